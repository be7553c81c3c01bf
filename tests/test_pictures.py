"""Images from pixels: what no image can show is refused. Sheets that say where their images are."""

import json
import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw

from lora_core.errors import UserError
from lora_core.runs import pictures
from lora_core.runs.pictures import CELLS, MARGIN, ImageRow


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


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 5, 40), (3, 3, 3)])
def test_every_spectrum_is_seen_beside_its_whole_name(
    tmp_path: Path, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each color is on the axes and in the legend, whose names end before the edge."""
    names = [f"unet.down_blocks.{i}." + "transformer_blocks.0." * 4 for i in range(3)]
    series = {}
    for i, (name, count) in enumerate(zip(names, counts)):
        series[name] = (list(range(1, count + 1)), [(i + 1.0) / (k + 1) for k in range(count)])
    figures = []
    real = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (figures.append(figure), real(figure)))
    pictures.plot_spectra(series, tmp_path / "s.png", title="a long name " * 20)
    (figure,) = figures
    figure.set_dpi(120)  # that of the file
    figure.canvas.draw()
    (axis,) = figure.axes
    edge = axis.get_window_extent().x1
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= edge and box.x1 <= figure.bbox.x1
    assert [text.get_text() for text in legend.get_texts()] == names
    assert axis.title.get_window_extent().x0 >= 0
    image = Image.open(tmp_path / "s.png").convert("RGB")
    scale = image.width / figure.bbox.width
    left = image.crop((0, 0, int(edge * scale), image.height))
    found = dict((color, n) for n, color in left.getcolors(1 << 20) or [])
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # C0, C1, C2
        assert found.get(color, 0) > 20


def random_rows(dice: random.Random) -> list[ImageRow]:
    """Rows of up to 6 images with labels and captions of any length."""
    rows = []
    for _ in range(dice.randint(1, 5)):
        count = dice.randint(1, 6)
        size = (dice.choice([16, 64]), dice.choice([16, 64]))
        captions = [" ".join(["word"] * dice.randint(0, 40)) for _ in range(count)]
        label = " ".join(["label"] * dice.randint(0, 30))
        rows.append(ImageRow(label, [Image.new("RGB", size, RED)] * count, captions))
    return rows


RED = (250, 0, 0)


@pytest.mark.parametrize("seed", range(12))
def test_sheets_have_margins_and_no_text_on_an_image(seed: int) -> None:
    """Whatever the numbers and lengths: images keep their color, margins stay white, and no text is
    cut, as each is drawn inside the sheet.
    """
    dice = random.Random(seed)
    rows = random_rows(dice)
    title = " ".join(["title"] * dice.randint(0, 60))
    sheet = pictures.draw_grid(rows, title=title, columns=dice.choice([0, 6]))
    cells = sheet.info[CELLS]
    assert len(cells) == sum(len(row.images) for row in rows)
    blank = sheet.copy()
    for cell in cells:
        cut = sheet.crop(cell["box"])
        assert cut.getcolors() == [(cut.width * cut.height, RED)]
        blank.paste((255, 255, 255), cell["box"])
    ink = ImageChops.invert(blank.convert("L")).getbbox() or (MARGIN, MARGIN, MARGIN, MARGIN)
    assert ink[0] >= MARGIN - 1 and ink[1] >= MARGIN - 1
    assert ink[2] <= sheet.width - MARGIN + 1 and ink[3] <= sheet.height - MARGIN + 6


def test_long_titles_and_prompts_are_wrapped_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word that is given is drawn, in lines that fit."""
    drawn: list[str] = []
    real = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, words: str, *rest: Any) -> None:
        drawn.append(words)
        font = rest[1]
        assert place[0] + font.getlength(words) <= self.im.size[0] - MARGIN + 1
        real(self, place, words, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    prompt = " ".join(f"word{i}" for i in range(300))
    rows = [ImageRow(prompt, [Image.new("RGB", (64, 64))], [prompt])]
    pictures.draw_grid(rows, title=prompt)
    assert " ".join(drawn).split() == prompt.split() * 3


def test_short_labels_stand_on_the_left_and_long_ones_above() -> None:
    image = Image.new("RGB", (64, 64), RED)
    short = pictures.draw_grid([ImageRow("seed 0", [image]), ImageRow("seed 1", [image])])
    long = pictures.draw_grid([ImageRow("before: the base model", [image])])
    assert short.info[CELLS][0]["box"][0] > MARGIN + 20
    assert long.info[CELLS][0]["box"][0] == MARGIN
    beside = pictures.draw_grid([ImageRow("a", [image]), ImageRow("b", [image])], columns=2)
    tops = {cell["box"][1] for cell in beside.info[CELLS]}
    assert len(tops) == 1


@pytest.mark.parametrize("label", ["", "seed 0", "a photo of TOK on a red striped background"])
def test_headings_stand_above_their_columns_and_labels(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two texts of a sheet overlap."""
    boxes: list[tuple[float, float, float, float]] = []
    real = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, words: str, *rest: Any) -> None:
        boxes.append(self.textbbox(place, words, font=rest[1]))
        real(self, place, words, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    rows = [ImageRow(label, [Image.new("RGB", (64, 64), RED)] * 2, ["one", "two"])] * 2
    headings = ["before training", "10 steps"]
    sheet = pictures.draw_grid(rows, title="a title", columns=4, headings=headings * 2)
    images = [tuple(cell["box"]) for cell in sheet.info[CELLS]]
    for (a, b, c, d), (e, f, g, h) in combinations([*boxes, *images], 2):
        assert c <= e or g <= a or d <= f or h <= b
