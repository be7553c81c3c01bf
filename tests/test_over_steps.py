"""samples/over_steps.png: the images of a run's own sheets, a column for each step."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_core.runs import pictures
from lora_core.runs.over_steps import (
    read_sampled_step,
    rows_beside,
    save_over_steps,
    split_captions,
)
from lora_core.runs.pictures import CELLS, OVER_STEPS, ImageRow
from lora_core.runs.report_images import read_images
from tests.report_runs import flat

CAPTIONS = ["a TOK, seed 0", "a TOK, seed 1"]


def color(step: int, row: int) -> tuple[int, int, int]:
    return (10 * step, 100 * row, 50)


def write_steps(folder: Path, steps: list[int], captions: list[str] = CAPTIONS) -> None:
    for step in steps:
        rows = []
        for strength in (0.5, 1.0):
            images = [flat(color(step if strength == 1 else 25, i)) for i in range(len(captions))]
            rows.append(ImageRow(f"strength {strength}", images, captions, "sample", strength))
        path = folder / "samples" / f"step_{step:06d}.png"
        pictures.save_sheet(pictures.draw_grid(rows), path, step=step, is_private=False)


def test_each_cell_is_the_image_of_its_step_and_seed(tmp_path: Path) -> None:
    write_steps(tmp_path, [2, 4, 10])
    before = [flat((1, 2, 3)), flat((4, 5, 6))]
    path = save_over_steps(tmp_path, CAPTIONS, before, {}, is_private=False)
    assert path == tmp_path / "samples" / OVER_STEPS
    with Image.open(path) as sheet:
        facts = json.loads(sheet.text[CELLS])
        colors = [sheet.crop(cell["box"]).getcolors()[0][1] for cell in facts["cells"]]
    steps = [2, 4, 10]
    assert facts["step"] == 10
    assert colors[:4] == [(1, 2, 3), *(color(step, 0) for step in steps)]
    assert colors[4:] == [(4, 5, 6), *(color(step, 1) for step in steps)]
    captions = [cell["caption"] for cell in facts["cells"]]
    assert captions[:4] == ["before training", "2 steps", "4 steps", "10 steps"]
    assert [cell["label"] for cell in facts["cells"][::4]] == ["seed 0", "seed 1"]


@pytest.mark.parametrize(
    ("words", "heading"),
    [
        ({"TOK": "creature"}, "before training, “creature” for TOK"),
        ({"<a>": "red cat", "<b>": ""}, "before training, “red cat” for <a>, without <b>"),
    ],
)
def test_the_first_column_names_the_words_that_the_base_model_drew(
    tmp_path: Path, words: dict[str, str], heading: str
) -> None:
    write_steps(tmp_path, [2])
    path = save_over_steps(tmp_path, CAPTIONS, [flat((0, 0, 0))] * 2, words, is_private=False)
    assert path is not None
    with Image.open(path) as sheet:
        assert json.loads(sheet.text[CELLS])["cells"][0]["caption"] == heading


def test_sheets_of_other_prompts_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    before = [flat((1, 2, 3)), flat((4, 5, 6))]
    assert save_over_steps(tmp_path, CAPTIONS, before, {}, is_private=True) is None
    write_steps(tmp_path, [2], ["a dog", "a cat"])
    (tmp_path / "samples" / "step_000003.png").write_bytes(b"no image")
    flat((0, 0, 0)).save(tmp_path / "samples" / "step_000004.png")
    assert save_over_steps(tmp_path, CAPTIONS, before, {}, is_private=True) is None
    write_steps(tmp_path, [5])
    path = save_over_steps(tmp_path, CAPTIONS, before, {}, is_private=True)
    assert path is not None
    with Image.open(path) as sheet:
        facts = json.loads(sheet.text[CELLS])
    assert facts["private"] is True and len(facts["cells"]) == 4


def test_a_long_run_has_few_columns_and_the_page_shows_the_sheet(tmp_path: Path) -> None:
    write_steps(tmp_path, list(range(1, 21)))
    save_over_steps(tmp_path, CAPTIONS, [flat((1, 2, 3))] * 2, {}, is_private=False)
    with Image.open(tmp_path / "samples" / OVER_STEPS) as sheet:
        cells = json.loads(sheet.text[CELLS])["cells"]
    steps = [cell["caption"].split()[0] for cell in cells[1:8]]
    assert len(cells) == 16 and steps[0] == "1" and steps[-1] == "20"
    shown = read_images(tmp_path, shows_data=False)
    assert shown.over_steps is not None and shown.over_steps.role == "sheet"
    assert [each.step for each in shown.samples] == list(range(1, 21))
    hidden = read_images(tmp_path, shows_data=False, last_only=True)
    assert hidden.over_steps is None  # beside other runs there is no room


@pytest.mark.parametrize(
    "captions, parts",
    [
        (["a"], ("a", [""])),
        (CAPTIONS, ("a TOK", ["seed 0", "seed 1"])),
        (["a", "b"], ("", ["a", "b"])),
        (["a, seed 0", "b, seed 1"], ("", ["a, seed 0", "b, seed 1"])),
    ],
)
def test_one_prompt_is_said_once(captions: list[str], parts: tuple[str, list[str]]) -> None:
    assert split_captions(captions) == parts


def test_the_strength_nearest_to_1_is_shown(tmp_path: Path) -> None:
    write_steps(tmp_path, [3])
    found = read_sampled_step(tmp_path / "samples" / "step_000003.png", CAPTIONS)
    assert found is not None and found.step == 3
    assert found.images[1].getpixel((5, 5)) == color(3, 1)


def test_rows_of_few_steps_stand_beside_each_other() -> None:
    assert rows_beside(4, 2) == 2 and rows_beside(5, 2) == 3 and rows_beside(6, 2) == 3
    assert rows_beside(1, 2) == 1 and rows_beside(4, 5) == 1 and rows_beside(4, 3) == 2
    assert rows_beside(3, 3) == 2
