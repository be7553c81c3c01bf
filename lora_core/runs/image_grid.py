"""Axes of a grid of images: each is a sampling setting and its values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lora_core.errors import UserError
from lora_core.formats.known_formats import NATIVE, folder_file_stem
from lora_core.runs.pictures import ImageRow

MOST_VALUES = 64  # of one axis
SETTINGS = r"seed|guidance|adapter_guidance|steps|checkpoint|(lora\d+\.)?(strength|unet|text)"
OF_ONE_LORA = re.compile(r"lora(\d+)\.(strength|unet|text)")
WHOLE = ("seed", "steps")  # settings that are whole numbers


class Axis(NamedTuple):
    """One axis of a grid of images."""

    setting: str  # "seed", "guidance", "strength", "lora0.unet" ..., "checkpoint"
    values: list[float]  # of a checkpoint its place in `names`
    run: str = ""  # of checkpoints: the run folder, as given
    names: tuple[str, ...] = ()  # of checkpoints: "step 100" ...
    loras: tuple[str, ...] = ()  # of checkpoints: each as a value of --lora
    label: str = ""  # the setting in words, where they are other ones

    @property
    def captions(self) -> list[str]:
        """The values in words, for a sheet."""
        label = self.label or self.setting
        return list(self.names) or [f"{label} {value:g}" for value in self.values]


def parse_axis(text: str) -> Axis:
    """SETTING=START:STOP:STEP (stop included, for seed excluded), SETTING=A,B,C, or checkpoint=RUN,
    whose checkpoints `find_checkpoints` names; here it has one value.

    Raises UserError for anything else.
    """
    name, _, tail = text.partition("=")
    if not re.fullmatch(SETTINGS, name):
        raise UserError(
            f"--grid {text}: unknown setting {name!r}; "
            "choose seed, strength, unet, text, lora0.strength ..., guidance, adapter_guidance, "
            "steps or checkpoint"
        )
    if name == "checkpoint":
        if not tail.strip():
            raise UserError(f"--grid {text}: expected checkpoint=RUN, a run's folder")
        return Axis(name, [0.0], run=tail)
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


def label_axes(axes: Sequence[Axis], loras: Sequence[str]) -> list[Axis]:
    """The axes with the names of LoRA files or runs in their captions: lora0.strength is "zib",
    lora1.unet "ink unet".

    A LoRA without a name of its own stays lora0, lora1 ...
    """
    names = list(map(_lora_name, loras))
    labelled = []
    for axis in axes:
        found = OF_ONE_LORA.fullmatch(axis.setting)
        name = names[int(found[1])] if found and int(found[1]) < len(names) else ""
        if found and names.count(name) == 1:
            part = "" if found[2] == "strength" else f" {found[2]}"
            axis = axis._replace(label=name + part)
        labelled.append(axis)
    return labelled


def _lora_name(path: str) -> str:
    """The name of a LoRA file or of its run, as sheets call it."""
    place = Path(path).resolve()
    is_run = place.is_dir() or place.name == NATIVE
    return folder_file_stem(place if place.is_dir() else place.parent) if is_run else place.stem


def check_axes(axes: Sequence[Axis], *, prompts: int, count: int, loras: int) -> None:
    """Raises UserError for axes that do not fit together, or to the numbers of prompts, of images
    of each, and of LoRAs.
    """
    if len(axes) > 2 or (len(axes) == 2 and prompts > 1) or (axes and count > 1):
        raise UserError(
            "a grid has one or two axes and one prompt, or one axis and several prompts; use "
            "--grid seed=0:4 for several images"
        )
    if len(axes) == 2 and axes[0].setting == axes[1].setting:
        raise UserError(f"--grid has {axes[0].setting} twice; name all its values in one axis")
    for axis in axes:
        number = re.match(r"lora(\d+)", axis.setting)
        is_strength = re.search(r"strength|unet|text", axis.setting)
        if is_strength and (int(number[1]) if number else 0) >= loras:
            raise UserError(
                f"--grid {axis.setting} needs {'such a' if number else 'a'} --lora; "
                f"{loras} given, counted from lora0"
            )


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
    captions = across.captions
    downs = vertical[0].captions if vertical else [""]
    rows = []
    for number, down in enumerate(downs):
        first = number * len(captions)
        own = list(images[first : first + len(captions)])
        rows.append(ImageRow(", ".join(filter(None, [label, down])), own, captions))
    return rows
