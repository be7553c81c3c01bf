"""The image and the mask that sampling starts from: image to image and inpainting."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from lora_core.data.images import image_to_pixels, image_to_tensor, read_image, read_mask
from lora_core.errors import UserError


class StartImages(NamedTuple):
    """The initial image and the inpainting mask of `generate_images`."""

    pixels: Tensor | None  # [1, 3, h, w] in [-1, 1]
    mask: Tensor | None  # [1, 1, h, w], 1 where the image is to be painted


def read_start_images(image: str, mask: str, height: int, width: int) -> StartImages:
    """The files as tensors of a size in pixels; None for those that are "".

    Raises UserError for a file that is missing, and for a mask with nothing to paint.
    """
    pixels = image_to_pixels(fit_image(image, height, width))[None] if image else None
    if not mask:
        return StartImages(pixels, None)
    painted = image_to_tensor(fit_image(mask, height, width, is_mask=True))[None] > 127
    if not painted.any():
        raise UserError(
            f"--mask {mask} has no white pixel inside the image, {width} x {height} pixels; "
            "paint the area to be drawn white"
        )
    return StartImages(pixels, painted.float())


def fit_image(path: str, height: int, width: int, *, is_mask: bool = False) -> Image.Image:
    """The image, or the mask's greys, scaled to cover (height, width) and center-cropped to it."""
    if not Path(path).is_file():
        raise UserError(f"there is no image {path}")
    image = read_mask(Path(path)) if is_mask else read_image(Path(path)).image
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
