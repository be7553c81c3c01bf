"""Axes of a grid of images: each is a sampling setting and its values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from PIL import Image

from lora_core.errors import UserError
from lora_core.runs.pictures import ImageRow

MOST_VALUES = 64  # of one axis
SETTINGS = r"seed|guidance|steps|(lora\d+\.)?(strength|unet|text)"
WHOLE = ("seed", "steps")  # settings that are whole numbers


class Axis(NamedTuple):
    """One axis of a grid of images."""

    setting: str  # "seed", "guidance", "steps", "strength", "lora0.unet" ...
    values: list[float]


def parse_axis(text: str) -> Axis:
    """SETTING=START:STOP:STEP (stop included, for seed excluded) or SETTING=A,B,C.

    Raises UserError for anything else.
    """
    name, _, tail = text.partition("=")
    if not re.fullmatch(SETTINGS, name):
        raise UserError(
            f"--grid {text}: unknown setting {name!r}; "
            "choose seed, strength, unet, text, lora0.strength ..., guidance or steps"
        )
    try:
        values, total = _parse_values(tail, includes_stop=name != "seed")
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(
            f"--grid {text}: expected SETTING=START:STOP:STEP or SETTING=A,B,C, "
            "e.g. strength=0:1.2:0.3"
        ) from None
    if not 0 < total <= MOST_VALUES:
        raise UserError(f"--grid {text} gives {total} values; expected 1 to {MOST_VALUES}")
    for value in values:
        if not math.isfinite(value) or (name in WHOLE and not value.is_integer()):
            kind = "whole number" if name in WHOLE else "number"
            raise UserError(f"--grid {text}: {value:g} is no {kind}, which {name} has to be")
    return Axis(name, values)


def _parse_values(text: str, *, includes_stop: bool) -> tuple[list[float], int]:
    """(the values, at most MOST_VALUES of them, how many there are) of A:B:STEP or A,B,C."""
    if ":" not in text:
        values = [float(value) for value in text.split(",")]
        return values, len(values)
    start, stop, *rest = (float(value) for value in text.split(":"))
    (step,) = rest or (1.0,)
    total = int((stop - start) / step + 1e-9)
    if includes_stop or (stop - start) % step != 0:
        total += 1
    return [round(start + i * step, 9) for i in range(min(total, MOST_VALUES))], total


def grid_cells(axes: Sequence[Axis]) -> list[dict[str, float]]:
    """{setting: value} of each cell of a sheet, row by row: the last axis runs over the columns,
    the first of two over the rows.
    """
    names = [axis.setting for axis in axes]
    return [dict(zip(names, cell)) for cell in product(*(axis.values for axis in axes))]


def grid_rows(
    axes: Sequence[Axis], images: Sequence[Image.Image], label: str = ""
) -> list[ImageRow]:
    """The rows of a sheet, of the images of `grid_cells`; every row begins with `label`."""
    *vertical, across = axes
    captions = [f"{across.setting} {value:g}" for value in across.values]
    rows = []
    for number, down in enumerate(grid_cells(vertical)):
        words = [label, *(f"{setting} {value:g}" for setting, value in down.items())]
        first = number * len(captions)
        own = list(images[first : first + len(captions)])
        rows.append(ImageRow(", ".join(filter(None, words)), own, captions))
    return rows
