"""Images from pixels: what no image can show is refused. Sheets that say where their images are."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core.errors import UserError
from lora_core.runs import pictures
from lora_core.runs.pictures import CELLS, ImageRow


def test_pixels_of_nan_are_refused() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[1, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="NaN"):
        pictures.to_images(pixels)


def test_a_sheet_says_where_each_of_its_images_is(tmp_path: Path) -> None:
    """Images of other shapes and captions of other lengths; each place has the image's color."""
    colors = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    images = [Image.new("RGB", (8, 4 + 4 * i), color) for i, color in enumerate(colors)]
    rows = [
        ImageRow("strength 0.5", images[:2], ["a <b> " * 20, "b"], "sample", 0.5),
        ImageRow("", images[2:], role="base"),
    ]
    sheet = pictures.draw_grid(rows, title="after 7 steps", cell=50)
    pictures.save_sheet(sheet, tmp_path / "sheet.png", step=7, is_private=True)
    with Image.open(tmp_path / "sheet.png") as saved:
        facts = json.loads(saved.text[CELLS])
        assert (facts["step"], facts["private"]) == (7, True)
        for cell, color, image in zip(facts["cells"], colors, images, strict=True):
            cut = saved.crop(cell["box"])
            assert cut.getcolors() == [(cut.width * cut.height, color)]
            assert cut.size == (50, 50 * image.height // 8)
    told = [(c["role"], c["strength"], c["label"], c["caption"]) for c in facts["cells"]]
    assert told[0] == ("sample", 0.5, "strength 0.5", "a <b> " * 20)
    assert told[2] == ("base", None, "", "")
