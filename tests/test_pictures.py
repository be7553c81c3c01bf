"""Images from pixels: what no image can show is refused."""

import math

import pytest
import torch

from lora_core.errors import UserError
from lora_core.runs import pictures


def test_pixels_of_nan_are_refused() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[1, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="NaN"):
        pictures.to_images(pixels)
