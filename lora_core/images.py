"""Image and mask files: read, checked, scaled and cut, turned into tensors. Pillow only, whose results are integers and the same everywhere."""

import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from lora_core.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MASK_SUFFIX = ".mask.png"
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what Pillow raises for damaged files
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


class Picture(NamedTuple):
    image: Image.Image  # RGB
    mask: Image.Image | None  # L, same size
    original_size: tuple[int, int]  # h, w of the file, upright


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.endswith(MASK_SUFFIX) and not path.name.startswith(".")


def mask_path(image: Path) -> Path:
    """Where the mask of 001.jpg would be: 001.mask.png beside it."""
    return image.with_name(image.stem + MASK_SUFFIX)


def read_picture(path: Path, mask: Path | None = None, *, use_alpha: bool = False) -> Picture:
    """The image upright and in RGB, with its mask from a file, from its alpha channel, or None.

    Transparency that is not the mask is composited on white. Raises UserError naming the file for one that cannot be read, a mask of another size,
    and a mask with one value everywhere (it would have no effect, or leave nothing to learn).
    """
    opened = _open(path)
    size = (opened.height, opened.width)
    alpha = opened.convert("RGBA").getchannel("A") if opened.has_transparency_data else None
    if use_alpha:
        if alpha is None:
            raise UserError(f"{path} has no alpha channel to use as its mask; add one, or a {mask_path(path).name}, or choose other masks")
        return Picture(opened.convert("RGB"), _checked(alpha, f"the alpha channel of {path}"), size)
    if alpha is not None:
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
    if mask is None:
        return Picture(_eight_bit(opened).convert("RGB"), None, size)
    grey = _eight_bit(_open(mask)).convert("L")
    if grey.size != opened.size:
        raise UserError(f"the mask {mask} is {grey.width}x{grey.height}, its image {opened.width}x{opened.height}; make them the same size")
    return Picture(_eight_bit(opened).convert("RGB"), _checked(grey, f"the mask {mask}"), size)


def cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) of an image scaled until it covers `target`: one side exact, the other rounded down, as torchvision's Resize does for squares."""
    (h, w), (height, width) = size, target
    return (max(height, width * h // w), width) if width * h >= height * w else (height, max(width, height * w // h))


def resize(picture: Picture, target: tuple[int, int], interpolation: str = "bilinear") -> Picture:
    """The picture scaled to cover `target` (h, w), antialiased. `interpolation`: one of INTERPOLATIONS; bilinear is the public scripts' default.

    Masks are always bilinear: the other two overshoot at edges, and would give weight to what the mask leaves out.
    """
    height, width = cover((picture.image.height, picture.image.width), target)
    if picture.image.size == (width, height):
        return picture
    mask = None if picture.mask is None else picture.mask.resize((width, height), Image.Resampling.BILINEAR)
    return picture._replace(image=picture.image.resize((width, height), INTERPOLATIONS[interpolation]), mask=mask)


def flip(picture: Picture) -> Picture:
    """The picture and its mask mirrored left to right."""
    return _both(picture, ImageOps.mirror)


def cut(picture: Picture, corner: tuple[int, int], size: tuple[int, int]) -> Picture:
    """The `size` (h, w) pixels at `corner` (top, left) of the picture and its mask."""
    (top, left), (height, width) = corner, size
    return _both(picture, lambda image: image.crop((left, top, left + width, top + height)))


def tint(picture: Picture, brightness: float, contrast: float) -> Picture:
    """The picture with brightness, then contrast, multiplied (1 keeps them; cloneofsimo: 0.9 to 1.1). The mask is not touched."""
    image = ImageEnhance.Brightness(picture.image).enhance(brightness)
    return picture._replace(image=ImageEnhance.Contrast(image).enhance(contrast))


def to_tensor(image: Image.Image) -> Tensor:
    """The image's bytes as fp32 [c, h, w] in [0, 255]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1).contiguous().float()


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as fp32 [3, h, w] in [-1, 1], rounded once."""
    return to_tensor(image).mul(2).sub(255).div(255)


class RecentPictures:
    """Decoded pictures by key, the latest used ones up to a number of bytes, so that a small data set is read from disk once. Safe with threads."""

    def __init__(self, limit_bytes: int = 2**29) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._pictures: OrderedDict[Hashable, Picture] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Picture]) -> Picture:
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        made = make()
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = made
                self.bytes += _bytes(made)
            while self.bytes > self.limit_bytes and self._pictures:
                self.bytes -= _bytes(self._pictures.popitem(last=False)[1])
        return made


def _both(picture: Picture, change: Callable[[Image.Image], Image.Image]) -> Picture:
    return picture._replace(image=change(picture.image), mask=None if picture.mask is None else change(picture.mask))


def _bytes(picture: Picture) -> int:
    return picture.image.width * picture.image.height * (4 if picture.mask is None else 5)  # Pillow keeps RGB in 4 bytes


def _open(path: Path) -> Image.Image:
    """The file decoded whole and turned upright (EXIF); UserError naming it otherwise."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise UserError(f"cannot read the image {path} ({error}); replace or remove it") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits, which Pillow's convert would clip at 255."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value / 257).convert("L")


def _checked(mask: Image.Image, name: str) -> Image.Image:
    low, high = mask.getextrema()
    if low == high:
        value = "only zeros" if low == 0 else "only ones" if low == 255 else f"one grey, {low},"
        raise UserError(f"{name} is {value} and picks out nothing; paint the object white and the rest black, or do without the mask")
    return mask
