"""Conversion of an opened image of any Pillow mode to sRGB with 8 bits, and its alpha.

ICC profiles are applied by littleCMS, through Pillow.
"""

import io
import itertools
import sys
from functools import cache, lru_cache

import torch
from PIL import Image, ImageChops, ImageCms
from torch import Tensor

from lora_core.errors import UserError

# mode -> the color space that an ICC profile for it names
SPACES = {"L": "GRAY", "I;16": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
GREYS = ("1", "L", "LA")
# For one channel: the tables of littleCMS 2.19 put a linear grey profile up to 10 of 255 wrong.
EXACT = ImageCms.Flags.NOOPTIMIZE


def to_srgb(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """(RGB, alpha in mode L or None) of an image; `name` is the file, for messages.

    An ICC profile is applied with the perceptual intent, Pillow's own default. Where it moves no
    color by more than 1 of 255 it is sRGB, and the numbers stay as they are, as they do without a
    profile: gAMA, cHRM and nclx entries and EXIF's color space are not applied. A profile that is
    damaged, or for another kind of image, is left out with a warning. By mode:

    1, L, P, RGB, RGBX, YCbCr, HSV   as Pillow converts them
    LA, La, PA, RGBA, RGBa           the same and alpha; premultiplied colors are divided by it
    CMYK without a profile           (255 - C) (255 - K) / 255, Pillow's formula
    LAB                              CIE L*a*b* under D50
    I;16, I                          white is 65535, rounded down; Pillow reads 16-bit colors as
                                     their upper 8 bits
    F                                white is 1, or 255 where values go up to 32 and more

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
    """(image without alpha, alpha or None).

    Alpha is from a channel, a palette or a PNG's one transparent value.
    """
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image, None
    if image.mode.startswith("I"):
        solid = _values(image.convert("I"), torch.int32) != image.info["transparency"]
        levels = solid.to(torch.uint8).mul(255)
        return image, Image.frombytes("L", image.size, levels.numpy().tobytes())
    rgba = image.convert("RGBA")
    return rgba.convert("L" if image.mode in GREYS else "RGB"), rgba.getchannel("A")


def _apply_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """The image in sRGB; its numbers unchanged and a warning if the profile cannot be used."""
    try:
        space = _color_space(profile)
        if space == "RGB" and SPACES[image.mode] == "GRAY":
            # editors save greys with the profile of the screen
            image = _eight_bit(image).convert("RGB")
        if space == "GRAY" and image.mode == "RGB" and _is_grey(image):
            image = image.getchannel("R")  # Pillow opens 16-bit greys with alpha as RGBA
        if space != SPACES[image.mode]:
            raise ValueError(f"it is for {space} and the image is {SPACES[image.mode]}")
        transform = _to_srgb(profile, image.mode)
        changed = image if transform is None else transform.apply(image)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        _warn(f"the color profile of {name} cannot be used ({error}); its colors are taken as sRGB")
        changed = image
    return _eight_bit(changed).convert("RGB")


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def _color_space(profile: bytes) -> str:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None for a profile that is sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    flags = EXACT if SPACES[mode] == "GRAY" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(source, target, mode, "RGB", flags=flags)
    if mode == "L":
        probe = Image.frombytes("L", (256, 1), bytes(range(256)))
    elif mode == "RGB":
        grid = bytes(itertools.chain(*itertools.product(range(0, 256, 15), repeat=3)))
        probe = Image.frombytes("RGB", (18**3, 1), grid)
    else:
        return transform
    moved = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    return None if max(moved.tobytes()) <= 1 else transform


@cache
def _warn(sentence: str) -> None:
    """Prints a warning once: large data sets are read again in each epoch."""
    print(f"warning: {sentence}", file=sys.stderr)


def _sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    """Integers as I;16, which is what littleCMS reads."""
    values = _values(image.convert("I"), torch.int32)
    low, high = values.aminmax()
    if low < 0 or high > 65535:
        found = f"{name} has integers from {int(low)} to {int(high)}, expected 0 to 65535"
        raise UserError(f"{found}; save it with 8 or 16 bits a channel")
    levels = values.to(torch.uint16).numpy().astype("<u2")
    return Image.frombytes("I;16", image.size, levels.tobytes())


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits, which Pillow's convert would clip at 255."""
    if image.mode != "I;16":
        return image
    return image.convert("I").point(lambda value: value / 257).convert("L")


def _eight_bit_floats(image: Image.Image, name: str) -> Image.Image:
    values = _values(image, torch.float32)
    low, high = (float(v) for v in values.aminmax())
    if not (low >= 0 and (high <= 1 or 32 <= high <= 255)):  # false for NaN too
        found = f"{name} has floats from {low:g} to {high:g}, expected 0 to 1 or 0 to 255"
        raise UserError(f"{found}; save it with 8 or 16 bits a channel")
    scaled = image.point(lambda value: value * 255 + 0.5) if high <= 1 else image
    return scaled.convert("L")


def _values(image: Image.Image, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
