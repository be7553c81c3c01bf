"""Read, check, scale and crop image and mask files, and convert them to tensors.

Everything is done by Pillow, whose results are integers and the same on every machine. Images
become sRGB with 8 bits; ICC profiles are applied by littleCMS, through Pillow. No other module
opens image files.
"""

import io
import itertools
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image, ImageChops, ImageCms, ImageEnhance, ImageOps, features
from torch import Tensor

from lora_core.data.shards.stored_files import FileSource, path_of
from lora_core.errors import UserError

try:
    import pillow_heif
except ImportError:  # the extra "heic"
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif",
    ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf",
    ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".qoi", ".psd", ".pcx", ".sgi",
)  # fmt: skip
HEIC = (".heic", ".heif", ".hif")
# ISO/IEC 23008-12: these follow "ftyp" in the file's first 12 bytes.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
JPEG_2000 = (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
# Pillow's names of the formats above. It knows others too, of which one (EPS) is a program that
# another program would run, whatever the file is called.
PILLOW_FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM",
    "TGA", "QOI", "PSD", "PCX", "SGI",
)  # fmt: skip
# Width times height: a PNG of 0.2 MB can announce 169 million, which take 2 GB in three copies of 4
# bytes. A medium-format camera's 11,648 x 8,736 are the most that photographs have.
MOST_PIXELS = 102_000_000
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it begins below this limit
CODECS = {".avif": "avif", ".webp": "webp"} | dict.fromkeys(JPEG_2000, "jpg_2000")  # Pillow's names
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw")
GREY_STEPS = {"L;2": 85, "L;4": 17}  # of Pillow's names for the rows of a PNG file
# Incremented when a file gives other pixels: a cache must not return an older version's pixels.
READER_VERSION = 2
MASK_SUFFIX = ".mask.png"
READ_ERRORS = (  # exceptions of Pillow's readers for damaged files
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, LookupError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class MaskedImage(NamedTuple):
    """An image and its mask."""

    image: Image.Image  # RGB
    mask: Image.Image | None  # L, same size
    original_size: tuple[int, int]  # h, w of the file, upright


def mask_path(image: Path) -> Path:
    """The path of an image's mask file: 001.mask.png next to 001.jpg."""
    return image.with_name(image.stem + MASK_SUFFIX)


def format_problem(path: Path) -> str | None:
    """Why the file cannot be read as an image on this machine, or None.

    Looks at its name and first bytes only.
    """
    suffix = path.suffix.lower()
    if pillow_heif is None and (suffix in HEIC or _is_heic(path)):
        return "HEIC needs the package pillow-heif: pip install pillow-heif"
    if suffix in CODECS and not features.check(CODECS[suffix]):
        return f"this Pillow lacks {CODECS[suffix]}; install a newer one: pip install -U pillow"
    if suffix in RAW_SUFFIXES:
        return "it is a camera's raw file; export it as JPEG, PNG or TIFF"
    if suffix not in IMAGE_SUFFIXES:
        return f"{suffix or 'a name without a suffix'} is not a supported image format"
    return None


def decode_image(source: Path | BinaryIO) -> Image.Image:
    """The file's first frame in its own mode, decoded whole and turned upright (EXIF).

    Raises one of READ_ERRORS. Pillow scales a PNG's 2- and 4-bit greys and cuts its 16-bit colors
    to 8 bits, but not its one transparent grey or color, which is brought to the same depth here.
    """
    with Image.open(source, formats=_known_formats()) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}; scale it down"
            )
        rows = str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""
        image.load()
        key = image.info.get("transparency")
        if rows in GREY_STEPS and isinstance(key, int):
            image.info["transparency"] = key * GREY_STEPS[rows]
        if rows == "RGB;16B" and isinstance(key, tuple):
            image.info["transparency"] = tuple(level >> 8 for level in key)
        ImageOps.exif_transpose(image, in_place=True)
    return image


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of PILLOW_FORMATS that this Pillow can open."""
    Image.init()
    return tuple(name for name in PILLOW_FORMATS if name in Image.OPEN)


def read_image(
    path: FileSource, mask: FileSource | None = None, *, use_alpha: bool = False
) -> MaskedImage:
    """The image upright and in sRGB (`to_srgb`), with its mask from a file, its alpha, or None.

    Transparency that is not the mask is composited on white. Raises UserError naming the file for
    one that cannot be read, a mask of another size, and a mask with one value everywhere (it would
    have no effect, or leave nothing to learn).
    """
    opened = _open(path)
    image, alpha = to_srgb(opened, str(path))
    size = (image.height, image.width)
    if use_alpha:
        if alpha is None:
            raise UserError(
                f"{path} has no alpha channel to use as its mask; "
                "add one, or choose other --data.masks"
            )
        return MaskedImage(image, _check_mask(alpha, f"the alpha channel of {path}"), size)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if mask is None:
        return MaskedImage(image, None, size)
    grey = read_mask(mask)
    if grey.size != image.size:
        sizes = f"{grey.width}x{grey.height}, its image {image.width}x{image.height}"
        raise UserError(f"the mask {mask} is {sizes}; make them the same size")
    return MaskedImage(image, _check_mask(grey, f"the mask {mask}"), size)


def read_mask(path: FileSource) -> Image.Image:
    """A mask file's luminance in mode L, upright.

    Transparent parts are black. An ICC profile is not applied, because weights are not colors.
    """
    opened = _open(path)
    opened.info.pop("icc_profile", None)
    image, alpha = to_srgb(opened, str(path))
    grey = image.convert("L")
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def has_alpha_mask(path: FileSource) -> bool:
    """Whether the image has transparency that is not the same everywhere."""
    _, alpha = to_srgb(_open(path), str(path))
    return alpha is not None and len(set(alpha.getextrema())) == 2


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) of an image scaled until it covers `target`.

    One side is exact, the other rounded down, as torchvision's Resize does for squares.
    """
    (h, w), (height, width) = size, target
    if width * h >= height * w:
        return max(height, width * h // w), width
    return height, max(width, height * w // h)


def resize_image(
    masked: MaskedImage, target: tuple[int, int], interpolation: str = "bilinear"
) -> MaskedImage:
    """The image scaled to cover `target` (h, w), antialiased.

    `interpolation` is one of INTERPOLATIONS; bilinear is the public scripts' default. Masks are
    always bilinear: the other two overshoot at edges, and would give weight to pixels that the mask
    leaves out.
    """
    image, mask, original_size = masked
    height, width = covering_size((image.height, image.width), target)
    if image.size == (width, height):
        return masked
    if mask is not None:
        mask = mask.resize((width, height), Image.Resampling.BILINEAR)
    image = image.resize((width, height), INTERPOLATIONS[interpolation])
    return MaskedImage(image, mask, original_size)


def mirror_image(masked: MaskedImage) -> MaskedImage:
    """The image and its mask mirrored left to right."""
    mask = None if masked.mask is None else ImageOps.mirror(masked.mask)
    return masked._replace(image=ImageOps.mirror(masked.image), mask=mask)


def crop_image(masked: MaskedImage, corner: tuple[int, int], size: tuple[int, int]) -> MaskedImage:
    """The `size` (h, w) pixels at `corner` (top, left) of the image and its mask."""
    (top, left), (height, width) = corner, size
    box = (left, top, left + width, top + height)
    mask = None if masked.mask is None else masked.mask.crop(box)
    return masked._replace(image=masked.image.crop(box), mask=mask)


def harden_mask(masked: MaskedImage) -> MaskedImage:
    """The image with a mask of black and white: white where it was at least half (128 of 255)."""
    if masked.mask is None:
        return masked
    return masked._replace(mask=masked.mask.point(lambda grey: 255 * (grey >= 128)))


def jitter_colors(masked: MaskedImage, brightness: float, contrast: float) -> MaskedImage:
    """The image with brightness, then contrast, multiplied (1 keeps them; cloneofsimo: 0.9 to 1.1).

    The mask is not changed.
    """
    image = ImageEnhance.Brightness(masked.image).enhance(brightness)
    return masked._replace(image=ImageEnhance.Contrast(image).enhance(contrast))


def image_to_tensor(image: Image.Image) -> Tensor:
    """The image's bytes as fp32 [c, h, w] in [0, 255]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1).contiguous().float()


def image_to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as fp32 [3, h, w] in [-1, 1], rounded once."""
    return image_to_tensor(image).mul(2).sub(255).div(255)


class RecentImages:
    """A thread-safe LRU cache of decoded images, limited in bytes.

    So a small data set is read from disk once.
    """

    def __init__(self, limit_bytes: int = 2**29) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._images: OrderedDict[Hashable, MaskedImage] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], MaskedImage]) -> MaskedImage:
        """The image of that key, made if it is not in memory."""
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
        made = make()
        with self._lock:
            if key not in self._images:
                self._images[key] = made
                self.bytes += _bytes(made)
            while self.bytes > self.limit_bytes and self._images:
                self.bytes -= _bytes(self._images.popitem(last=False)[1])
        return made


def _bytes(masked: MaskedImage) -> int:
    per_pixel = 4 if masked.mask is None else 5  # Pillow keeps RGB in 4 bytes
    return masked.image.width * masked.image.height * per_pixel


def _is_heic(path: Path) -> bool:
    """Whether the file is HEIC under any name; phones' photos are often renamed to .jpg."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS


def _open(path: FileSource) -> Image.Image:
    """`decode_image`; raises UserError naming the file for one that cannot be read."""
    try:
        return decode_image(path if isinstance(path, Path) else io.BytesIO(path.read_bytes()))
    except READ_ERRORS as error:
        has_ending = isinstance(path, Path) or path.suffix  # a cell of a table has none
        if has_ending and (reason := format_problem(path_of(path))):
            raise UserError(f"cannot read the image {path}: {reason}") from error
        raise UserError(f"cannot read the image {path} ({error}); replace or remove it") from error


def _check_mask(mask: Image.Image, name: str) -> Image.Image:
    """The mask; raises UserError for one with one value everywhere."""
    low, high = mask.getextrema()
    if low == high:
        value = f"one grey, {low},"
        if low == 0:
            value = "only zeros"
        elif low == 255:
            value = "only ones"
        raise UserError(
            f"{name} is {value} and picks out nothing; paint the object white and the rest black, "
            "or do without the mask"
        )
    return mask


# ---------------------------------------------------------------- colors

# mode -> the color space that an ICC profile for it names
SPACES = {"L": "GRAY", "I;16": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
GREYS = ("1", "L", "LA")
# For one channel: the tables of littleCMS 2.19 put a linear grey profile up to 10 of 255 wrong.
EXACT = ImageCms.Flags.NOOPTIMIZE


def to_srgb(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """(RGB, alpha in mode L or None) of an image; `name` is the file, for messages.

    An ICC profile is applied with the perceptual intent, Pillow's own default. Where it moves no
    color by more than 1 of 255 it is sRGB, and the numbers stay as they are, as they do without a
    profile: gAMA, cHRM and nclx entries and EXIF's color space are ignored. A profile that is
    damaged, or for another kind of image, is ignored with a warning. By mode:

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
