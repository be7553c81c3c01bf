"""An opened image of any Pillow mode -> sRGB with 8 bits, and its alpha. Colour profiles are littleCMS's, through Pillow."""

import io
import itertools
import sys
from functools import cache, lru_cache

import torch
from PIL import Image, ImageChops, ImageCms
from torch import Tensor

from lora_core.errors import UserError

SPACES = {"L": "GRAY", "I;16": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # mode -> the colour space that an ICC profile for it names
GREYS = ("1", "L", "LA")
EXACT = ImageCms.Flags.NOOPTIMIZE  # of one channel: littleCMS 2.19's tables put a linear grey profile up to 10 of 255 wrong


def to_srgb(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """(RGB, alpha in mode L or None) of an image; `name` is the file, for messages.

    An ICC profile is applied with the perceptual intent, Pillow's own default. One that moves no colour by more than 1 of 255 is sRGB, and then the
    numbers stay as they are, as they do without a profile: gAMA, cHRM and nclx entries and EXIF's colour space are not applied. A profile that is
    damaged or for another kind of image is left out with a warning. What is in no profile's hands:

    1, L, P, PA, RGB, RGBA, RGBX, YCbCr, HSV   as Pillow converts them
    LA, La, RGBa, a PNG's transparent colour   alpha, divided out of the colours where they were multiplied by it
    CMYK without a profile                     (255 - C) (255 - K) / 255, Pillow's formula
    LAB                                        CIE L*a*b* under D50
    I;16, I                                    white is 65535, rounded down. 16-bit colours Pillow itself cuts to their upper 8 bits
    F                                          white is 1, or 255 where values go up to 32 and more

    Raises UserError for integers and floats outside these ranges.
    """
    profile = image.info.get("icc_profile")
    image, alpha = _split_alpha(image)
    if image.mode == "F":
        image = _eight_bit_floats(image, name)
    elif image.mode.startswith("I"):
        image = _sixteen_bit(image, name)
    elif image.mode not in (*SPACES, "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile and image.mode in SPACES:
        return _apply_profile(image, profile, name), alpha
    return _eight_bit(image).convert("RGB"), alpha


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The image without alpha, and its alpha: a channel, a palette's, or 0 where a pixel has the one transparent value of a PNG."""
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image, None
    if image.mode.startswith("I"):
        solid = _values(image.convert("I"), torch.int32) != image.info["transparency"]
        return image, Image.frombytes("L", image.size, solid.to(torch.uint8).mul(255).numpy().tobytes())
    rgba = image.convert("RGBA")
    return rgba.convert("L" if image.mode in GREYS else "RGB"), rgba.getchannel("A")


def _apply_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """The image in sRGB; unchanged numbers and one warning where the profile cannot be used."""
    try:
        space = _color_space(profile)
        if space == "RGB" and SPACES[image.mode] == "GRAY":
            image = _eight_bit(image).convert("RGB")  # editors save greys with the profile of the screen
        if space == "GRAY" and image.mode == "RGB" and _is_grey(image):
            image = image.getchannel("R")  # Pillow opens 16-bit greys with alpha as RGBA
        if space != SPACES[image.mode]:
            raise ValueError(f"it is for {space} and the image is {SPACES[image.mode]}")
        transform = _to_srgb(profile, image.mode)
        changed = image if transform is None else transform.apply(image)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        _warn(f"the colour profile of {name} cannot be used ({error}); its colours are taken as sRGB")
        changed = image
    return _eight_bit(changed).convert("RGB")


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return not ImageChops.difference(red, green).getbbox() and not ImageChops.difference(red, blue).getbbox()


def _color_space(profile: bytes) -> str:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way to sRGB; None for a profile that is sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    flags = EXACT if SPACES[mode] == "GRAY" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    if mode not in ("L", "RGB"):
        return transform
    levels = [bytes(c) for c in itertools.product(range(0, 256, 15), repeat=3)] if mode == "RGB" else [bytes(range(256))]
    probe = Image.frombytes(mode, (len(b"".join(levels)) // len(mode), 1), b"".join(levels))
    moved = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    return None if max(moved.tobytes()) <= 1 else transform


@cache
def _warn(sentence: str) -> None:
    """Prints a warning, once: an image is read again in each epoch that does not find it in memory."""
    print(f"warning: {sentence}", file=sys.stderr)


def _sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    """Integers as I;16, which is what littleCMS reads."""
    values = _values(image.convert("I"), torch.int32)
    low, high = values.aminmax()
    if low < 0 or high > 65535:
        raise UserError(f"{name} has integers from {int(low)} to {int(high)}, expected 0 to 65535; save it with 8 or 16 bits a channel")
    return Image.frombytes("I;16", image.size, values.to(torch.uint16).numpy().astype("<u2").tobytes())


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits, which Pillow's convert would clip at 255."""
    if image.mode != "I;16":
        return image
    return image.convert("I").point(lambda value: value / 257).convert("L")


def _eight_bit_floats(image: Image.Image, name: str) -> Image.Image:
    values = _values(image, torch.float32)
    low, high = (float(v) for v in values.aminmax())
    if not (low >= 0 and (high <= 1 or 32 <= high <= 255)):  # false for NaN too
        raise UserError(f"{name} has floats from {low:g} to {high:g}, expected 0 to 1 or 0 to 255; save it with 8 or 16 bits a channel")
    return image.point(lambda value: value * 255 + 0.5).convert("L") if high <= 1 else image.convert("L")


def _values(image: Image.Image, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
