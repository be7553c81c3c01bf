"""Images of noise or of two greys, folders of them, and settings that change every pixel."""

import random
from pathlib import Path

from PIL import Image, ImageChops

from lora_core.data.dataset import ImageSettings

WILD = ImageSettings(8, crop="random", zoom=1.5, flip=True, jitter=True)


def noise_image(width, height, seed=0, mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(
        mode, (width, height), random.Random(seed).randbytes(width * height * bands)
    )


def save_image(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def save_gray_square(path: Path, colour: int = 0) -> Path:
    """An image with two values, so that it can be a mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (8, 8), 0)
    image.paste(200 + colour, (0, 0, 4, 8))
    image.save(path)
    return path


def save_kohya_folders(root: Path) -> Path:
    save_gray_square(root / "10_ohwx dog" / "IMG_1.png")
    save_gray_square(root / "10_ohwx dog" / "IMG_2.png", 1)
    (root / "10_ohwx dog" / "IMG_2.caption").write_text("ohwx dog on grass")
    save_gray_square(root / "3_TOK" / "IMG_1.jpg", 2)
    return root


def levels_between(image: Image.Image, other: Image.Image) -> int:
    """The largest difference between two images, of 255 levels."""
    return max(high for _, high in ImageChops.difference(image, other).getextrema())
