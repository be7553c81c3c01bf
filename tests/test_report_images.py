"""Images of a run for a page: cut where the sheets say, bounded, only those that may be seen."""

import base64
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from lora_core.runs import pictures
from lora_core.runs.pictures import CELLS
from lora_core.runs.report_images import (
    LONGEST_PROMPT,
    MOST_SHEETS,
    SheetImage,
    encode_image,
    evenly_chosen,
    read_images,
)
from tests.report_runs import STRENGTHS, color_of, flat, write_run, write_sheet


def color_in(picture: SheetImage) -> tuple[int, ...]:
    """The color of a flat picture, as the page holds it."""
    code = picture.source.removeprefix("data:image/jpeg;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(code)))
    assert image.size == (picture.width, picture.height) and not image.getexif()
    return image.getpixel((picture.width // 2, picture.height // 2))


def test_each_image_is_cut_where_the_sheet_says(tmp_path: Path) -> None:
    prompts = ("a TOK", "b" * 1000)
    run = write_run(tmp_path / "a", prompts=prompts)
    images = read_images(run, shows_data=False)
    assert [sheet.step for sheet in images.samples] == [4, 8] and images.notes == ()
    for sheet in images.samples:
        for i, picture in enumerate(sheet.images):
            strength, prompt = STRENGTHS[i // 2], i % 2
            assert (picture.role, picture.strength) == ("sample", strength)
            wanted = color_of(sheet.step, strength, prompt)
            assert color_in(picture) == pytest.approx(wanted, abs=3)
            assert len(picture.caption) < LONGEST_PROMPT + 5
    assert [color_in(p) for p in images.with_role("base")] == [
        pytest.approx((255, 0, 0), abs=3)
    ] * 2


def test_training_images_are_shown_on_demand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {"samples": {"show_data": True}})
    assert read_images(run, shows_data=False).with_role("training") == []
    (shown,) = read_images(run, shows_data=True).with_role("training")
    assert color_in(shown) == pytest.approx((255, 0, 254), abs=3)


def test_private_sheets_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_sheet(run / "samples" / "step_000008.png", 8, ("a",), private=True)
    images = read_images(run, shows_data=False)
    assert [sheet.step for sheet in images.samples] == [4]
    assert "surroundings of validation images" in images.notes[0]
    assert [sheet.step for sheet in read_images(run, shows_data=True).samples] == [4, 8]


def test_sheets_of_older_versions_are_shown_where_the_card_shows_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for file in (run / "before_after.png", *(run / "samples").iterdir()):
        pictures.save_png(flat((9, 9, 9)), file)
    hidden = read_images(run, shows_data=False)
    assert hidden.samples == () and "of an older version" in hidden.notes[0]
    shown = read_images(run, shows_data=False, card="![a](samples/step_000008.png)")
    assert [sheet.step for sheet in shown.samples] == [4, 8]
    assert shown.samples[0].images[0].role == "sheet" and "as a whole" in shown.notes[0]


@pytest.mark.parametrize("box", [[0, 0, 9999, 5], [5, 5, 5, 9], "left", [0, 0, 2.5, 3], None])
def test_a_place_that_is_not_on_the_sheet_is_said(tmp_path: Path, box: object) -> None:
    run = write_run(tmp_path / "a")
    facts = {"step": 4, "private": False, "cells": [{"box": box}]}
    for text in (json.dumps(facts), "[", json.dumps({"step": 4, "private": False, "cells": 3})):
        pictures.save_png(flat((9, 9, 9)), run / "samples" / "step_000004.png", {CELLS: text})
        images = read_images(run, shows_data=False)
        assert [sheet.step for sheet in images.samples] == [8] and len(images.notes) == 2


def test_images_are_bounded_and_the_last_ones_stay(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for step in range(1, 8):
        write_sheet(run / "samples" / f"step_{step:06d}.png", step, ("a",))
    whole = read_images(run, shows_data=False)
    sizes = [len(p.source) for p in whole.before_after]
    sheets = [sum(len(p.source) for p in sheet.images) for sheet in whole.samples]
    for count in (1, 2, 4):
        bounded = read_images(run, shows_data=False, most_bytes=sum(sizes) + count * max(sheets))
        held: list[str] = []
        for sheet in bounded.samples:
            held += [p.source for p in sheet.images]
        assert sum(map(len, held)) <= count * max(sheets)
        assert (
            bounded.samples[-1].step == 8 and f"of {len(sheets)} sample sheets" in bounded.notes[0]
        )
    nothing = read_images(run, shows_data=False, most_bytes=10)
    assert nothing.samples == nothing.before_after == () and len(nothing.notes) == 2
    assert [s.step for s in read_images(run, shows_data=False, last_only=True).samples] == [8]


def test_chosen_items_are_even_with_both_ends() -> None:
    items = list(range(1000))
    kept = evenly_chosen(items, MOST_SHEETS)
    assert len(kept) == MOST_SHEETS and (kept[0], kept[-1]) == (0, 999)
    gaps = {b - a for a, b in pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1
    assert evenly_chosen(items, 1) == [999] and evenly_chosen([], 3) == evenly_chosen([1], 0) == []


def test_a_large_image_is_scaled_down() -> None:
    _, width, height = encode_image(Image.new("RGBA", (2000, 500)), 256)
    assert (width, height) == (256, 64)
