"""samples/over_steps.png: images of the same prompts and seeds, before training and over steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lora_core.data.images import READ_ERRORS, decode_image
from lora_core.runs import pictures
from lora_core.runs.pictures import CELLS, OVER_STEPS, ImageRow
from lora_core.runs.report_images import evenly_chosen
from lora_core.runs.sheet_layout import MOST_COLUMNS, MOST_EMPTY, empty_share

MOST_STEPS = 7  # columns beside the one before training
MOST_ROWS = 8
SAMPLE = "sample"  # the role of the images of a sheet of samples
BEFORE = "before training"


class SampledStep(NamedTuple):
    """Images after a number of steps, cut from a sheet."""

    step: int
    images: list[Image.Image]  # one for each caption


def save_over_steps(
    folder: Path,
    captions: Sequence[str],
    before: Sequence[Image.Image],
    words: Mapping[str, str],
    *,
    is_private: bool,
) -> Path | None:
    """Write samples/over_steps.png of a run: a row for each caption, a column for each of its
    sheets samples/step_NNNNNN.png, evenly chosen, after the images `before` training, which show
    ordinary `words` for those to learn ({"TOK": "creature"}). Returns its path, or None where no
    sheet has these captions, as after a change of the prompts.

    Only the chosen sheets are read: a long run has hundreds.
    """
    captions = list(captions)[:MOST_ROWS]
    paths = evenly_chosen(sorted((folder / "samples").glob("step_*.png")), MOST_STEPS)
    found = [read_sampled_step(path, captions) for path in paths]
    steps = [each for each in found if each is not None]
    if not steps:
        return None
    headings = [heading_before(words), *(f"{each.step:,} steps" for each in steps)]
    prompt, labels = split_captions(captions)
    rows = []
    for i, label in enumerate(labels):
        images = [before[i], *(each.images[i] for each in steps)]
        rows.append(ImageRow(label, images, headings, role=SAMPLE, notes=()))
    title = f"{folder.name}: over the steps"
    if prompt:
        title += f", {pictures.in_quotes(prompt)}"
    beside = rows_beside(len(rows), len(headings))
    columns = beside * len(headings)
    sheet = pictures.draw_grid(rows, title=title, columns=columns, headings=headings * beside)
    path = folder / "samples" / OVER_STEPS
    pictures.save_sheet(sheet, path, step=steps[-1].step, is_private=is_private)
    return path


def heading_before(words: Mapping[str, str]) -> str:
    """What stands over the images before training, with the words that were drawn for others."""
    heading = BEFORE
    for word, drawn in words.items():
        heading += f", {pictures.in_quotes(drawn)} for {word}" if drawn else f", without {word}"
    return heading


def rows_beside(count: int, images: int) -> int:
    """How many of `count` rows of so many images stand beside each other, for a sheet that is not
    tall: as many as leave little of it empty.
    """
    for beside in range(min(count, MOST_COLUMNS // images), 1, -1):
        if empty_share([images] * count, beside * images) <= MOST_EMPTY:
            return beside
    return 1


def split_captions(captions: Sequence[str]) -> tuple[str, list[str]]:
    """(the prompt that all captions "PROMPT, seed N" have, "" for others; what differs)."""
    if len(captions) == 1:
        return captions[0], [""]
    prompts = {caption.rpartition(", seed ")[0] for caption in captions}
    if len(prompts) > 1 or "" in prompts:
        return "", list(captions)
    (prompt,) = prompts
    return prompt, [caption.removeprefix(f"{prompt}, ") for caption in captions]


def read_sampled_step(path: Path, captions: Sequence[str]) -> SampledStep | None:
    """The images of a sheet of samples with these captions, at the strength nearest to 1; None for
    a sheet without one of them, and for one that cannot be read.
    """
    try:
        sheet = decode_image(path)
        facts = json.loads(sheet.info[CELLS])
        cells = [cell for cell in facts["cells"] if cell["role"] == SAMPLE]
        strengths = {float(cell["strength"]) for cell in cells}
        nearest = min(strengths, key=lambda strength: abs(strength - 1))
        boxes = {cell["caption"]: cell["box"] for cell in cells if cell["strength"] == nearest}
        return SampledStep(
            int(facts["step"]), [sheet.crop(boxes[each]).convert("RGB") for each in captions]
        )
    except (*READ_ERRORS, KeyError, TypeError, ValueError):
        return None
