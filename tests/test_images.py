"""Image files of every mode, bit depth, profile and orientation against littleCMS, the PNG
specification and public formulas.

Masks: their greys, what a crop leaves of them, and masked beside whole images.
"""

import ast
import colorsys
import io
import itertools
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps

import train
from lora_core.data import images
from lora_core.data.dataset import (
    ImageDataset,
    ImageSettings,
    collate,
    describe_moved_crops,
    iterate_batches,
    scan_folder,
)
from lora_core.data.images import IMAGE_SUFFIXES, format_problem, read_image, read_mask, to_srgb
from lora_core.diffusion import masked_losses
from lora_core.diffusion.losses import masked_mean
from lora_core.diffusion.start_images import fit_image
from lora_core.errors import UserError
from tests.conftest import rows
from training.samples import _center_crop

ROOT = Path(__file__).parent.parent
D50 = (0.9642, 1.0, 0.8249)
PRIMARIES = {  # columns of RGB to XYZ under D50
    "Display P3": (
        (0.51512, 0.24120, -0.00105),
        (0.29198, 0.69225, 0.04189),
        (0.15710, 0.06657, 0.78407),
    ),
    "Adobe RGB": (
        (0.60974, 0.31111, 0.01947),
        (0.20528, 0.62567, 0.06087),
        (0.14919, 0.06322, 0.74457),
    ),
    "ProPhoto": ((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249)),
}


# ---------------------------------------------------------------- profiles and PNG files, from
# their specifications


def icc(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """A profile of version 2.4 (ICC.1:2001-04)."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        **tags,
    }
    tags[b"wtpt"] = xyz(*D50)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s", 128 + len(table) + len(body), b"lcms", 0x02400000, kind, space, pcs
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return head.ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(name: str, gamma: float = 2.2) -> bytes:
    tags = {
        key: xyz(*column)
        for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), PRIMARIES[name], strict=True)
    }
    return icc(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", b"XYZ ", {b"kTRC": curve(gamma)})


def cmyk_profile() -> bytes:
    """A printer whose table has the Lab colours of its 16 full inks."""
    inks = [[i >> shift & 1 for shift in (3, 2, 1, 0)] for i in range(16)]
    lab = b""
    for c, m, y, k in inks:
        light, left = (1 - 0.45 * c) * (1 - 0.52 * m) * (1 - 0.1 * y) * (1 - 0.85 * k), 1 - 0.9 * k
        a, b = 128 + left * (-37 * c + 74 * m - 5 * y), 128 + left * (-50 * c - 5 * m + 90 * y)
        lab += bytes(max(0, min(255, round(v))) for v in (255 * light, a, b))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = (
        b"mft1"
        + bytes(4)
        + bytes((4, 3, 2, 0))
        + identity
        + bytes(range(256)) * 4
        + lab
        + bytes(range(256)) * 3
    )
    return icc(b"CMYK", b"Lab ", {b"A2B0": table}, kind=b"prtr")


def true_colours(image: Image.Image, profile: bytes) -> Image.Image:
    """What littleCMS makes of the image."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    found = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert found is not None
    return found


def png(size: tuple[int, int], depth: int, colour: int, rows: list[bytes], **extra: bytes) -> bytes:
    """A PNG file (ISO/IEC 15948): 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    out = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    )
    out += b"".join(chunk(name.encode(), content) for name, content in extra.items())
    return (
        out
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(
        mode, (width, height), random.Random(seed).randbytes(width * height * bands)
    )


def difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size and a.mode == b.mode == "RGB"
    return max(ImageChops.difference(a, b).tobytes())


def pixels(image: Image.Image) -> list:
    places = itertools.product(range(image.height), range(image.width))
    return [image.getpixel((x, y)) for y, x in places]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize(
    ("name", "gamma"), [("Display P3", 2.2), ("Adobe RGB", 2.2), ("ProPhoto", 1.8)]
)
def test_rgb_profiles_are_applied_in_every_format(tmp_path, name, gamma, suffix):
    profile = rgb_profile(name, gamma)
    image = noise(16, 12)
    image.save(
        tmp_path / f"x.{suffix}",
        icc_profile=profile,
        **({"lossless": True} if suffix == "webp" else {}),
    )
    stored = Image.open(tmp_path / f"x.{suffix}").convert("RGB")
    got = read_image(tmp_path / f"x.{suffix}").image
    assert difference(got, true_colours(stored, profile)) == 0
    assert difference(got, stored) > 20


TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF 2.3 -> Pillow's transpositions


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_orientations_of_every_format(tmp_path, suffix):
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 8, 16))
    image.paste("white", (0, 8, 8, 16))
    for orientation, turn in TURNS.items():
        image.save(tmp_path / f"x.{suffix}", exif=turned(orientation), quality=95)
        upright = image if turn is None else image.transpose(Image.Transpose(turn))
        got = read_image(tmp_path / f"x.{suffix}")
        assert got.original_size == upright.size[::-1]
        for at in (
            (2, 2),
            (upright.width - 3, 2),
            (2, upright.height - 3),
            (upright.width - 3, upright.height - 3),
        ):
            assert all(
                abs(a - b) < 40
                for a, b in zip(got.image.getpixel(at), upright.getpixel(at), strict=True)
            ), (orientation, at)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_profile_alpha_and_orientation_together(tmp_path, orientation):
    """White below what is transparent is white of sRGB, not of the profile; the alpha itself is no
    colour.
    """
    image, alpha, profile = noise(9, 6), noise(9, 6, "L", 1), rgb_profile("Display P3")
    both = image.copy()
    both.putalpha(alpha)
    both.save(tmp_path / "x.png", icc_profile=profile, exif=turned(orientation))
    upright = TURNS[orientation]

    def turn(part: Image.Image) -> Image.Image:
        return part if upright is None else part.transpose(Image.Transpose(upright))

    colours = turn(true_colours(image, profile))
    expected = Image.composite(colours, Image.new("RGB", colours.size, "white"), turn(alpha))
    assert difference(read_image(tmp_path / "x.png").image, expected) <= 1
    masked = read_image(tmp_path / "x.png", use_alpha=True)
    assert (
        difference(masked.image, colours) == 0
        and masked.mask is not None
        and masked.mask.tobytes() == turn(alpha).tobytes()
    )


def test_profiles_of_greys_palettes_and_inks(tmp_path):
    grey, p3 = noise(8, 8, "L"), rgb_profile("Display P3")
    grey.save(tmp_path / "grey.png", icc_profile=grey_profile(1.8))
    assert (
        difference(read_image(tmp_path / "grey.png").image, true_colours(grey, grey_profile(1.8)))
        <= 1
    )
    grey.save(tmp_path / "screen.png", icc_profile=p3)  # greys with the profile of the screen
    assert (
        difference(read_image(tmp_path / "screen.png").image, true_colours(grey.convert("RGB"), p3))
        == 0
    )
    palette = noise(8, 8).quantize(16)
    palette.save(tmp_path / "palette.png", icc_profile=p3)
    assert (
        difference(
            read_image(tmp_path / "palette.png").image, true_colours(palette.convert("RGB"), p3)
        )
        == 0
    )
    clear = noise(8, 8, "LA")
    clear.save(tmp_path / "clear.png", icc_profile=grey_profile(2.2))
    assert (
        difference(
            read_image(tmp_path / "clear.png", use_alpha=True).image,
            true_colours(clear.getchannel("L"), grey_profile(2.2)),
        )
        <= 1
    )
    inks, printer = noise(8, 8, "CMYK"), cmyk_profile()
    for name in ("inks.tiff", "inks.jpg"):
        inks.save(tmp_path / name, icc_profile=printer)
        stored = Image.open(tmp_path / name)
        assert (
            stored.mode == "CMYK"
            and difference(read_image(tmp_path / name).image, true_colours(stored, printer)) == 0
        )
        assert difference(read_image(tmp_path / name).image, stored.convert("RGB")) > 20


def linear_to_srgb(x: float) -> float:
    """IEC 61966-2-1."""
    return 255 * (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055)


def test_sixteen_bit_greys_go_through_their_profile_with_all_their_bits(tmp_path):
    levels = [0, 100, 300, 1000, 5000, 20000, 65535]
    row = struct.pack(f">{len(levels)}H", *levels)
    image = Image.open(io.BytesIO(png((len(levels), 1), 16, 0, [row])))
    image.save(tmp_path / "x.png", icc_profile=grey_profile(1.0))
    got = [value[0] for value in pixels(read_image(tmp_path / "x.png").image)]
    assert all(
        abs(value - linear_to_srgb(level / 65535)) <= 1
        for value, level in zip(got, levels, strict=True)
    ), got
    pairs = struct.pack(
        ">4H", 20000, 65535, 40000, 30000
    )  # 16-bit grey with alpha is RGBA in Pillow
    profile = b"x\0\0" + zlib.compress(grey_profile(1.0))
    (tmp_path / "y.png").write_bytes(png((2, 1), 16, 4, [pairs], iCCP=profile))
    got = [value[0] for value in pixels(read_image(tmp_path / "y.png", use_alpha=True).image)]
    assert all(
        abs(value - linear_to_srgb(level / 65535)) <= 1
        for value, level in zip(got, (20000, 40000), strict=True)
    ), got


def test_srgb_and_no_profile_leave_every_bit(tmp_path):
    image = noise(64, 64)
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("with", made), ("without", None)):
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert read_image(tmp_path / f"{name}.png").image.tobytes() == image.tobytes()
    inks = noise(8, 8, "CMYK")
    inks.save(tmp_path / "inks.tiff")
    assert read_image(tmp_path / "inks.tiff").image.tobytes() == inks.convert("RGB").tobytes()
    gamma = struct.pack(">I", 100000)  # gAMA 1.0, which viewers disagree about, is not applied
    (tmp_path / "gamma.png").write_bytes(png((1, 1), 8, 2, [bytes((10, 20, 30))], gAMA=gamma))
    assert pixels(read_image(tmp_path / "gamma.png").image) == [(10, 20, 30)]


@pytest.mark.parametrize(
    ("mode", "profile", "reason"),
    [
        ("RGB", b"no profile at all", "cannot open profile"),
        ("RGB", rgb_profile("Display P3")[:200], "cannot"),
        ("RGB", cmyk_profile(), "it is for CMYK and the image is RGB"),
        ("RGB", grey_profile(2.2), "it is for GRAY and the image is RGB"),
        ("CMYK", rgb_profile("Adobe RGB"), "it is for RGB and the image is CMYK"),
    ],
)
def test_a_profile_that_cannot_be_used_is_said_once_and_left_out(
    tmp_path, capsys, mode, profile, reason
):
    image = noise(8, 8, mode)
    image.save(tmp_path / "x.tiff", icc_profile=profile)
    for _ in range(2):
        assert read_image(tmp_path / "x.tiff").image.tobytes() == image.convert("RGB").tobytes()
    said = capsys.readouterr().err
    assert (
        said.count("warning: the color profile of") == 1
        and "x.tiff" in said
        and reason in said
        and "taken as sRGB" in said
    )


# ---------------------------------------------------------------- modes and bit depths


def lab_to_srgb(light: float, a: float, b: float) -> tuple[float, ...]:
    """CIE 15 and IEC 61966-2-1, with Bradford's matrix from D50 to sRGB's primaries."""
    fy = (light + 16) / 116
    white = zip((fy + a / 500, fy, fy - b / 200), D50, strict=True)
    x, y, z = (w * (f**3 if f > 6 / 29 else 3 * (6 / 29) ** 2 * (f - 4 / 29)) for f, w in white)
    matrix = (
        (3.1338561, -1.6168667, -0.4906146),
        (-0.9787684, 1.9161415, 0.0334540),
        (0.0719453, -0.2289914, 1.4052427),
    )
    return tuple(linear_to_srgb(min(1, max(0, r * x + g * y + c * z))) for r, g, c in matrix)


def ycc_to_rgb(y: int, cb: int, cr: int) -> tuple[float, ...]:
    """JFIF 1.02."""
    return (
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    )


MODES = {
    "1": (255, (255, 255, 255), None),
    "L": (77, (77, 77, 77), None),
    "LA": ((77, 30), (77, 77, 77), 30),
    "La": ((40, 128), (80, 80, 80), 128),
    "PA": ((0, 9), (0, 0, 0), 9),
    "RGB": ((9, 80, 200), (9, 80, 200), None),
    "RGBA": ((9, 80, 200, 3), (9, 80, 200), 3),
    "RGBX": ((9, 80, 200, 3), (9, 80, 200), None),
    "RGBa": ((64, 32, 128, 128), (128, 64, 255), 128),
    "CMYK": (
        (0, 100, 255, 50),
        tuple((255 - ink) * (255 - 50) / 255 for ink in (0, 100, 255)),
        None,
    ),
    "YCbCr": ((120, 100, 150), ycc_to_rgb(120, 100, 150), None),
    "HSV": (
        (40, 200, 180),
        tuple(255 * v for v in colorsys.hsv_to_rgb(40 / 255, 200 / 255, 180 / 255)),
        None,
    ),
    "LAB": ((128, 148, 108), lab_to_srgb(128 / 2.55, 20, -20), None),  # a and b with 128 added
    "I": (20000, (77.8,) * 3, None),
    "I;16": (20000, (77.8,) * 3, None),
    "I;16L": (20000, (77.8,) * 3, None),
    "I;16B": (20000, (77.8,) * 3, None),
    "F": (0.3, (76.5,) * 3, None),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_values_of_its_definition(mode):
    value, colour, alpha = MODES[mode]
    image = Image.new(mode, (2, 3), value)
    got, transparency = to_srgb(image, "x")
    assert got.mode == "RGB" and got.size == (2, 3)
    assert all(abs(a - b) <= 1.5 for a, b in zip(got.getpixel((1, 2)), colour, strict=True)), (
        got.getpixel((1, 2)),
        colour,
    )
    assert (transparency is None) == (alpha is None) and (
        alpha is None or transparency.getpixel((0, 0)) == alpha
    )


def greys(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


DEPTHS = {  # bits, colour type, row, chunks -> colours, alpha (None: there is none)
    "1 bit": (1, 0, bytes([0b01000000]), {}, greys(0, 255), None),
    "1 bit, black clear": (1, 0, bytes([0b01000000]), {"tRNS": b"\0\0"}, greys(0, 255), [0, 255]),
    "2 bits, one clear": (2, 0, bytes([0b01110000]), {"tRNS": b"\0\1"}, greys(85, 255), [0, 255]),
    "4 bits, one clear": (4, 0, bytes([0x3F]), {"tRNS": b"\0\3"}, greys(51, 255), [0, 255]),
    "8 bits, one clear": (8, 0, bytes([9, 200]), {"tRNS": b"\0\xc8"}, greys(9, 200), [255, 0]),
    "16 bits": (16, 0, struct.pack(">2H", 1000, 65535), {}, greys(3, 255), None),
    "16 bits, one clear": (16, 0, struct.pack(">2H", 20000, 20001),
    {"tRNS": struct.pack(">H", 20000)}, greys(77, 77), [0, 255]),
    "16 bits with alpha": (16, 4, struct.pack(">4H", 20000, 65535, 40000, 30000), {},
    greys(78, 156), [255, 117]),
    "colours, one clear": (8, 2, bytes([1, 2, 3, 9, 8, 7]), {"tRNS": b"\0\x09\0\x08\0\x07"},
    [(1, 2, 3), (9, 8, 7)], [255, 0]),
    "16-bit colours": (16, 2, struct.pack(">6H", 300, 33023, 65535, 20000, 30000, 0), {},
    [(1, 128, 255), (78, 117, 0)], None),
    "16-bit colours, one clear": (
        16, 2, struct.pack(">6H", 1000, 2000, 3000, 20000, 30000, 40000),
        {"tRNS": struct.pack(">3H", 20000, 30000, 40000)},
        [(3, 7, 11), (78, 117, 156)], [255, 0],
    ),
    "16-bit colours with alpha": (
        16, 6, struct.pack(">8H", *(9, 9, 9, 65535), *(20000, 65535, 40000, 30000)), {},
        [(0, 0, 0), (78, 255, 156)], [255, 117],
    ),
    "palette": (8, 3, bytes([1, 0]), {"PLTE": bytes([9, 8, 7, 200, 100, 50])},
    [(200, 100, 50), (9, 8, 7)], None),
    "palette, clear": (2, 3, bytes([0b01000000]), {"PLTE": bytes([9, 8, 7, 200, 100, 50]),
    "tRNS": bytes([0, 128])},
                       [(200, 100, 50), (9, 8, 7)], [128, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPTHS)
def test_bit_depths_and_transparency_of_png_files(tmp_path, name):
    depth, kind, row, chunks, colours, alpha = DEPTHS[name]
    (tmp_path / "x.png").write_bytes(png((2, 1), depth, kind, [row], **chunks))
    if alpha is None:
        assert pixels(read_image(tmp_path / "x.png").image) == colours
        return
    got = read_image(tmp_path / "x.png", use_alpha=True)
    assert pixels(got.image) == colours and got.mask is not None and pixels(got.mask) == alpha
    on_white = [
        tuple(c * a / 255 + 255 - a for c in colour)
        for colour, a in zip(colours, alpha, strict=True)
    ]
    for shown, expected in zip(pixels(read_image(tmp_path / "x.png").image), on_white, strict=True):
        assert all(abs(s - e) <= 1 for s, e in zip(shown, expected, strict=True))


def test_integers_and_floats_of_tiff_files(tmp_path):
    ramp = torch.tensor([[0.0, 0.25, 1.0]])
    for scale in (1, 255):
        Image.fromarray((ramp * scale).numpy()).save(tmp_path / "f.tiff")
        assert pixels(read_image(tmp_path / "f.tiff").image) == greys(
            0, 64 if scale == 1 else 63, 255
        )
    for bad in (-0.1, 4.0, 1000.0, float("nan")):
        Image.fromarray((ramp * bad).numpy()).save(tmp_path / "f.tiff")
        with pytest.raises(
            UserError, match=r"f\.tiff has floats from .* expected 0 to 1 or 0 to 255"
        ):
            read_image(tmp_path / "f.tiff")
    levels = torch.tensor([[0, 20000, 65535]], dtype=torch.int32)
    Image.fromarray(levels.numpy()).save(tmp_path / "i.tiff")
    assert pixels(read_image(tmp_path / "i.tiff").image) == greys(0, 77, 255)
    Image.fromarray((levels * 2).numpy()).save(tmp_path / "i.tiff")
    with pytest.raises(
        UserError, match=r"i\.tiff has integers from 0 to 131070, expected 0 to 65535"
    ):
        read_image(tmp_path / "i.tiff")


# ---------------------------------------------------------------- formats


def test_every_suffix_is_a_format_that_pillow_reads_and_what_it_writes_is_read(tmp_path):
    known = Image.registered_extensions()
    heic = [".heic", ".heif", ".hif"]
    assert [s for s in IMAGE_SUFFIXES if known.get(s) not in Image.OPEN and s not in heic] == []
    image, written = noise(16, 16), []
    for suffix in (
        s
        for s in IMAGE_SUFFIXES
        if s not in heic and known[s] in Image.SAVE and s not in (".pgm", ".pbm", ".pfm")
    ):
        file = tmp_path / f"x{suffix}"
        image.save(file)
        assert format_problem(file) is None and read_image(file).original_size == (16, 16)
        written.append(suffix)
    assert {".gif", ".tiff", ".avif", ".jfif", ".jp2", ".apng"} <= set(written)


def test_a_photoshop_file_shows_its_merged_picture(tmp_path):
    """By Adobe's specification: header, no palette, no resources, no layers, the planes."""
    image, profile = noise(6, 4), rgb_profile("Adobe RGB")
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 6, 8, 3)
    resource = (
        b"8BIM" + struct.pack(">HHI", 1039, 0, len(profile)) + profile + bytes(len(profile) % 2)
    )
    planes = b"".join(band.tobytes() for band in image.split())
    content = (
        head + struct.pack(">II", 0, len(resource)) + resource + struct.pack(">IH", 0, 0) + planes
    )
    (tmp_path / "x.psd").write_bytes(content)
    assert difference(read_image(tmp_path / "x.psd").image, true_colours(image, profile)) == 0


def test_threads_share_a_profile(tmp_path):
    noise(200, 200).save(tmp_path / "x.png", icc_profile=rgb_profile("Display P3"))
    with ThreadPoolExecutor(4) as pool:
        assert (
            len({read.image.tobytes() for read in pool.map(read_image, [tmp_path / "x.png"] * 16)})
            == 1
        )


def test_transparent_gif_and_webp_are_on_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.paste(1, (0, 0, 4, 8))
    image.save(tmp_path / "x.gif", transparency=0)
    Image.open(tmp_path / "x.gif").convert("RGBA").save(tmp_path / "x.webp", lossless=True)
    for name in ("x.gif", "x.webp"):
        got = read_image(tmp_path / name).image
        assert got.getpixel((1, 1)) == (200, 100, 50) and got.getpixel((6, 1)) == (255, 255, 255)


def test_the_first_frame_of_an_animation_and_of_a_phones_double_picture(tmp_path):
    first, second = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    for name, how in (
        ("x.gif", {}),
        ("x.webp", {"lossless": True}),
        ("x.png", {}),
        ("x.tiff", {}),
        ("x.jpg", {"format": "MPO", "quality": 95}),
    ):
        first.save(tmp_path / name, save_all=True, append_images=[second], **how)
        assert difference(read_image(tmp_path / name).image, first) <= 2


def test_what_cannot_be_read_has_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "pillow_heif", None)
    head = struct.pack(">I", 24) + b"ftypheic" + bytes(12)
    for name in ("a.heic", "b.HEIF", "c.jpg"):  # photos of phones are often renamed
        (tmp_path / name).write_bytes(head)
        assert (
            format_problem(tmp_path / name)
            == "HEIC needs the package pillow-heif: pip install pillow-heif"
        )
        with pytest.raises(
            UserError,
            match=rf"cannot read the image .*{name}: HEIC needs .* pip install pillow-heif$",
        ):
            read_image(tmp_path / name)
    assert "raw file; export it as" in str(
        format_problem(Path("x.NEF"))
    ) and ".mp4 is not a supported image format" in str(format_problem(Path("x.mp4")))
    monkeypatch.setattr(images.features, "check", lambda name: False)
    assert (
        "lacks avif" in str(format_problem(Path("x.avif")))
        and format_problem(Path("x.png")) is None
    )


def test_heic_with_the_profile_of_a_phone(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is an extra")
    pillow_heif.register_heif_opener()
    image, profile = Image.new("RGB", (64, 48), (200, 60, 50)), rgb_profile("Display P3")
    image.save(tmp_path / "x.heic", icc_profile=profile, quality=-1, chroma=444)
    assert difference(read_image(tmp_path / "x.heic").image, true_colours(image, profile)) <= 3
    assert format_problem(tmp_path / "x.heic") is None


def test_image_files_are_opened_in_one_place():
    found = []
    product = [
        *ROOT.glob("*.py"),
        *(ROOT / "lora_core").rglob("*.py"),
        *(ROOT / "merging").glob("*.py"),
        *(ROOT / "models").glob("*.py"),
    ]
    for path in [*product, *(ROOT / "toy").rglob("*.py")]:
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "open"
        ]
        found += [
            path.name
            for node in calls
            if isinstance(node.value, ast.Name) and node.value.id == "Image"
        ]
    assert found == ["images.py"]


def test_what_shows_a_training_image_reads_it_as_training_does(tmp_path):
    side = Image.new("RGB", (40, 40), "blue")
    side.paste("red", (0, 0, 40, 20))
    side.save(tmp_path / "phone.png", exif=turned(6), icc_profile=rgb_profile("Display P3"))
    Image.new("I;16", (40, 40), 20000).save(tmp_path / "deep.png")
    Image.new("RGBA", (40, 40), (9, 9, 9, 100)).save(tmp_path / "clear.png")
    for name in ("phone.png", "deep.png", "clear.png"):
        shown = _center_crop(tmp_path / name, use_alpha=False)
        assert shown.tobytes() == read_image(tmp_path / name).image.tobytes()
        assert (
            fit_image(read_image(tmp_path / name).image, 40, 40).tobytes()
            == read_image(tmp_path / name).image.tobytes()
        )
    clear = noise(8, 8)
    clear.putalpha(noise(8, 8, "L", 1))
    clear.save(tmp_path / "alpha.png")
    assert (
        _center_crop(tmp_path / "alpha.png", use_alpha=True).tobytes()
        == clear.convert("RGB").tobytes()
    )
    paint = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    paint.paste((255, 255, 255, 255), (10, 10, 30, 30))
    paint.save(tmp_path / "hole.png")
    hole = fit_image(read_mask(tmp_path / "hole.png"), 40, 40)
    assert hole.mode == "L" and hole.getbbox() == (10, 10, 30, 30)


# ---------------------------------------------------------------- masks


def test_the_greys_of_masks(tmp_path):
    grey = noise(9, 7, "L")
    grey.save(tmp_path / "plain.png")
    grey.save(tmp_path / "tagged.png", icc_profile=grey_profile(1.0))  # weights are no colours
    Image.frombytes(
        "I;16", grey.size, b"".join(struct.pack("<H", 257 * v) for v in grey.tobytes())
    ).save(tmp_path / "deep.png")
    grey.convert("P").save(tmp_path / "palette.png")
    grey.convert("RGB").save(tmp_path / "colours.webp", lossless=True)
    white = Image.new("RGB", grey.size, "white")
    white.putalpha(grey)
    white.save(tmp_path / "painted.png")  # white on nothing
    ImageOps.mirror(grey).save(tmp_path / "mirrored.png", exif=turned(2))
    for name in (
        "plain.png",
        "tagged.png",
        "deep.png",
        "palette.png",
        "colours.webp",
        "painted.png",
        "mirrored.png",
    ):
        assert read_mask(tmp_path / name).tobytes() == grey.tobytes(), name


def save_masked(
    folder: Path,
    name: str,
    size: tuple[int, int],
    box: tuple[int, int, int, int] | None,
    seed: int = 0,
) -> None:
    """An image, with a mask that is white in the box."""
    folder.mkdir(exist_ok=True)
    noise(*size, seed=seed).save(folder / f"{name}.png")
    if box is not None:
        mask = Image.new("L", size, 0)
        mask.paste(255, box)
        mask.save(folder / f"{name}.mask.png")


@pytest.mark.parametrize("box", [(0, 0, 40, 64), (180, 50, 192, 64), (0, 0, 1, 1)])
def test_a_mask_outside_the_centre_crop_moves_the_crop_and_is_counted(tmp_path, box):
    save_masked(tmp_path, "a", (192, 64), box)
    save_masked(tmp_path, "b", (192, 64), (60, 0, 100, 64), 1)
    records = scan_folder(tmp_path, caption="x", masks="file")
    folder = ImageDataset(records, ImageSettings(64))
    moved, kept = folder.example(0, 0), folder.example(1, 0)
    assert (
        kept.crop == (0, 64)
        and moved.crop[0] == 0
        and moved.mask is not None
        and moved.mask.sum() > 0
    )
    left = moved.crop[1]
    whole = read_image(records[0].path, records[0].mask_path)
    assert torch.equal(
        moved.pixels, images.image_to_pixels(whole.image.crop((left, 0, left + 64, 64)))
    )
    assert torch.equal(
        moved.mask, images.image_to_tensor(whole.mask.crop((left, 0, left + 64, 64))).div(255)
    )
    for seed, visit in ((0, 5), (3, 0)):  # cached latents have neither in their key
        again = ImageDataset(records, ImageSettings(64), seed=seed).example(0, visit)
        assert again.crop == moved.crop
    said = (
        "the center crop shows nothing of the mask of 1 of 2 images, first a.png; "
        "they are cropped around their masks instead"
    )
    assert describe_moved_crops(folder).startswith(
        said
    ) and "--data.buckets" in describe_moved_crops(folder)
    assert describe_moved_crops(ImageDataset(records, ImageSettings(64, crop="random"))) == ""


WILD = ImageSettings(16, crop="random")


@pytest.mark.parametrize(
    "settings",
    [
        WILD, ImageSettings(16, crop="random", zoom=2.0, flip=True), ImageSettings(16, zoom=3.0),
        ImageSettings(16, flip=True),
        ImageSettings(16, crop="random", variants=3), ImageSettings(16, crop="random", zoom=1.5,
        buckets=True, bucket_step=4),
    ],
)  # fmt: skip
def test_no_visit_has_an_empty_mask_and_visits_that_had_some_keep_their_crop(tmp_path, settings):
    save_masked(tmp_path, "a", (90, 30), (80, 3, 84, 6))
    masked = ImageDataset(scan_folder(tmp_path, caption="x", masks="file"), settings)
    crops = set()
    for visit in range(60):
        example = masked.example(0, visit)
        assert (
            example.mask is not None
            and example.mask.sum() > 0
            and example.pixels.shape[1:] == example.mask.shape[1:]
        )
        again = ImageDataset(masked.records, settings).example(0, visit)
        assert again.crop == example.crop and torch.equal(again.pixels, example.pixels)
        crops.add(example.crop)
    assert len(crops) > 5 or settings.crop == "center" or settings.variants


def test_random_crops_with_some_of_the_mask_are_those_that_no_mask_would_give(tmp_path):
    save_masked(tmp_path, "a", (90, 30), (40, 0, 50, 30))
    record = scan_folder(tmp_path, caption="x", masks="file")[0]
    whole = images.resize_image(read_image(record.path, record.mask_path), (16, 16)).mask
    assert whole is not None
    shown, plain = (
        ImageDataset([record], WILD),
        ImageDataset([replace(record, mask_path=None)], WILD),
    )  # the same key
    kept = 0
    for visit in range(60):
        top, left = plain.example(0, visit).crop
        has_some = whole.crop((left, top, left + 16, top + 16)).getbbox() is not None
        kept += has_some
        assert (shown.example(0, visit).crop == (top, left)) is has_some
    assert 10 < kept < 55


def test_masks_that_vanish_or_say_nothing_after_the_crop_are_refused(tmp_path):
    save_masked(tmp_path / "dot", "a", (600, 600), (5, 5, 6, 6))
    for crop in ("center", "random"):
        with pytest.raises(
            UserError,
            match=r"nothing is left of the mask of .*a\.png when it is scaled to 16 x 16 pixels; "
            r".* --data\.resolution",
        ):
            ImageDataset(
                scan_folder(tmp_path / "dot", caption="x", masks="file"),
                ImageSettings(16, crop=crop),
            )
    save_masked(tmp_path / "full", "a", (90, 30), (20, 0, 70, 30))
    records = scan_folder(tmp_path / "full", caption="x", masks="file")
    with pytest.raises(
        UserError,
        match=r"every mask is one grey inside the crop, without effect, first that of a\.png; "
        r"leave --data\.masks out",
    ):
        ImageDataset(records, ImageSettings(30))
    for settings in (
        ImageSettings(30, zoom=1.2),
        ImageSettings(30, crop="random"),
        ImageSettings(30, buckets=True, bucket_step=5),
    ):
        assert ImageDataset(records, settings).has_masks
    save_masked(tmp_path / "full", "b", (90, 30), (40, 0, 50, 30), 1)
    assert ImageDataset(
        scan_folder(tmp_path / "full", caption="x", masks="file"), ImageSettings(30)
    ).has_masks  # one of them does say something


def test_masked_and_whole_images_give_the_same_rows_alone_and_together(tmp_path):
    save_masked(tmp_path, "a", (32, 24), (4, 4, 14, 20))
    save_masked(tmp_path, "b", (32, 24), None, 1)
    save_masked(tmp_path / "class", "c", (24, 24), None, 2)
    clear = noise(24, 24, seed=3)
    clear.putalpha(noise(24, 24, "L", 4))
    clear.save(tmp_path / "d.png")
    noise(24, 24, "RGBA").convert("RGB").convert("RGBA").save(
        tmp_path / "e.png"
    )  # opaque, so it has no mask
    kinds = {
        how: [
            (r.mask_path is not None, r.use_alpha)
            for r in scan_folder(tmp_path, caption="x", masks=how)
        ]
        for how in ("auto", "any")
    }
    assert kinds["auto"] == [(True, False), (False, False), (False, False), (False, False)]
    assert kinds["any"] == [(True, False), (False, False), (False, True), (False, False)]
    prior = ImageDataset(
        scan_folder(tmp_path / "class", caption="y", masks="none", is_prior=True), ImageSettings(16)
    )
    for settings in (ImageSettings(16), ImageSettings(16, buckets=True, bucket_step=8)):
        folder = ImageDataset(scan_folder(tmp_path, caption="x", masks="any"), settings)
        examples = [folder.example(i, 0, (16, 16)) for i in range(4)] + [prior.example(0, 0)]
        together = collate(examples)
        error = torch.rand(5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        small = torch.nn.functional.interpolate(together.mask, (2, 2), mode="area")
        rows = masked_mean(error, small)
        for i, example in enumerate(examples[:4]):
            alone = collate([example])
            assert alone.mask is not None and torch.equal(alone.mask[0], together.mask[i])
            assert torch.equal(
                masked_mean(
                    error[i : i + 1],
                    torch.nn.functional.interpolate(alone.mask, (2, 2), mode="area"),
                )[0],
                rows[i],
            )
        assert together.mask[1].min() == together.mask[4].min() == 1 and together.mask[0].min() == 0
        torch.testing.assert_close(rows[[1, 4]], error[[1, 4]].mean((1, 2, 3)))
        assert all(
            batch.mask is not None
            for batch in iterate_batches(folder, prior, batch=1, seed=0, stop=6)
        )


def test_a_temperature_never_leaves_nothing_of_a_mask():
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, 0, 1, 1], mask[1, 0, 2, 2], mask[1, 0, 0, 0], mask[2] = 1 / 255 / 64, 0.25, 0.5, 1
    error = torch.rand(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 2.0, 30.0, 0.5):
        raised = masked_losses.sharpen_mask(mask, temperature)
        assert torch.equal(
            raised[1:], mask[1:] ** temperature
        )  # what was something stays as it was
        weights = (mask.double() / mask.double().amax((1, 2, 3), keepdim=True)) ** temperature
        exact = (weights * error).sum((1, 2, 3)) / (4 * weights.sum((1, 2, 3)))
        torch.testing.assert_close(masked_mean(error, raised).double(), exact, rtol=1e-5, atol=0)


def test_a_run_mixes_masked_and_whole_images_and_says_which_crops_moved(
    config, plain, tmp_path, capsys
):
    save_masked(tmp_path / "some", "a", (48, 16), (0, 0, 6, 16))
    save_masked(tmp_path / "some", "b", (20, 16), None, 1)
    chosen = replace(
        config.data, images=str(tmp_path / "some"), captions="one", caption="a TOK", masks="auto"
    )
    train.train(replace(config, batch_size=1, data=chosen))
    assert (
        "the mask of 1 of 2 images, first a.png; they are cropped around their masks instead"
        in capsys.readouterr().err
    )
    assert [row["grad_norm"] > 0 for row in rows(Path(config.out)) if "loss" in row] == [True, True]
    (tmp_path / "some" / "a.mask.png").unlink()
    for masks in ("auto", "any"):
        with pytest.raises(UserError, match=f"--data.masks {masks} finds no mask for any image"):
            train.train(replace(config, out=config.out + masks, data=replace(chosen, masks=masks)))
