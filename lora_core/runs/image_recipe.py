"""The recipe of an image in its PNG text: the options that repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from lora_core.data.images import READ_ERRORS, decode_image
from lora_core.errors import UserError
from lora_core.runs.pictures import save_png
from lora_core.text import parse_json
from lora_core.toml import from_table, to_table

CHUNK = "lora_core"  # the PNG text chunk with the recipe
UNRECORDED = ("source", "out", "batch", "device", "threads")  # options that do not change pixels
C = TypeVar("C")


def save_with_recipe(image: Image.Image, path: Path, config: Any) -> None:
    """Writes a PNG with its options in text chunks.

    They are there as JSON, for --from, and as the `parameters` text that other programs show.
    """
    c = config
    shown = (
        f"{c.prompt}\nSteps: {c.steps}, Sampler: {c.sampler}, CFG scale: {c.guidance:g}, "
        f"Seed: {c.seed}, Model: {c.model}"
    )
    if c.lora:
        shown += f", Lora: {', '.join(c.lora)}"
    table = {name: value for name, value in to_table(c).items() if name not in UNRECORDED}
    save_png(image, path, {CHUNK: json.dumps(table), "parameters": shown})


def read_recipe(path: str, cls: type[C]) -> C:
    """The options in an image's text chunk. Raises UserError when it has none."""
    try:
        text = decode_image(Path(path)).info.get(CHUNK)
    except READ_ERRORS as error:
        raise UserError(f"--from {path}: {error}") from None
    if not text:
        raise UserError(
            f"--from {path}: the image has no recipe; was it made by infer.py and not saved again?"
        )
    advice = "take an image that infer.py made"
    table = parse_json(str(text), f"--from {path}: its recipe", advice)
    if not isinstance(table, dict):
        raise UserError(
            f"--from {path}: its recipe is {table!r}, expected a table of options; {advice}"
        )
    try:
        return from_table(table, cls)
    except UserError as error:
        raise UserError(
            f"--from {path}: its recipe is of another program or version: {error}"
        ) from None
