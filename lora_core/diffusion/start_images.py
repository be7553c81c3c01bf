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

    An image is scaled to cover the size and cut at its center. So is a mask, which has the shape of
    the image or is drawn for the size itself. Raises UserError for a file that is missing, a mask
    of another shape, and one with nothing to paint.
    """
    opened = _open_file(image) if image else None
    pixels = None if opened is None else image_to_pixels(fit_image(opened, height, width))[None]
    if not mask:
        return StartImages(pixels, None)
    drawn = _open_file(mask, is_mask=True)
    if opened is not None and drawn.size != (width, height):
        _check_shape(mask, drawn, opened, height, width)
    painted = image_to_tensor(fit_image(drawn, height, width))[None] > 127
    if not painted.any():
        raise UserError(
            f"--mask {mask} has no white pixel inside the image, {width} x {height} pixels; "
            "paint the area to be drawn white"
        )
    return StartImages(pixels, painted.float())


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image scaled to cover (height, width) and center-cropped to it."""
    image = image.resize(_covering_size(image, height, width), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _covering_size(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    scale = max(width / image.width, height / image.height)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def _open_file(path: str, *, is_mask: bool = False) -> Image.Image:
    """The image, or a mask's greys. Raises UserError for a file that is missing."""
    if not Path(path).is_file():
        raise UserError(f"there is no image {path}")
    return read_mask(Path(path)) if is_mask else read_image(Path(path)).image


def _check_shape(path: str, mask: Image.Image, image: Image.Image, height: int, width: int) -> None:
    """Raises UserError where the mask would be cut otherwise than the image, by over a pixel."""
    sizes = [_covering_size(each, height, width) for each in (mask, image)]
    if any(abs(own - other) > 1 for own, other in zip(*sizes)):
        raise UserError(
            f"--mask {path} is {mask.width} x {mask.height} pixels and its image {image.width} x "
            f"{image.height}: they would be cut to {width} x {height} at other places; give the "
            f"mask the size of the image, or {width} x {height} pixels"
        )
