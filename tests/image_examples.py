"""Images of noise, and settings that change every pixel of them."""

import random

from PIL import Image

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
