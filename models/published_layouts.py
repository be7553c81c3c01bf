"""Layouts of the published models, read from a table that comes with the package.

The table holds what `models.read_layout` finds in the networks themselves; making it takes seconds
and both model libraries, reading it milliseconds. `python -m models.published_tables` writes it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lora_core.formats.layout import Component, Layout, Numbering

TABLE = Path(__file__).with_name("published_layouts.json.gz")

Json = dict[str, Any]


@cache
def published_layout(kind: str) -> Layout:
    """The layout of one of PUBLISHED_MODELS, always the same object."""
    table = _read_table()
    return decode_layout(table["layouts"][kind], table["components"])


def encode_layouts(layouts: Mapping[str, Layout]) -> Json:
    """The table of some layouts: {"layouts": {kind: ...}, "components": [...]}.

    Networks that several models share are stored once.
    """
    components: list[Json] = []
    rows = {}
    for kind, layout in layouts.items():
        row = dataclasses.asdict(layout)
        for name, component in row["components"].items():
            component["swapped"] = sorted(component["swapped"])
            if component not in components:
                components.append(component)
            row["components"][name] = components.index(component)
        rows[kind] = row
    return {"layouts": rows, "components": components}


def decode_layout(row: Json, components: list[Json]) -> Layout:
    """The layout of one entry of the table."""
    parts = {name: _decode_component(components[i]) for name, i in row["components"].items()}
    presets = {name: _with_tuples(own) for name, own in row["presets"].items()}
    own = {name: tuple(row[name]) for name in ("block_lists", "cross_attention")}
    return Layout(**{**row, **own, "components": parts, "presets": presets})


def _decode_component(row: Json) -> Component:
    numbering = row["numbering"]
    if numbering is not None:
        numbering = Numbering(
            classes=_with_tuples(numbering["classes"]),
            targets=tuple(map(tuple, numbering["targets"])),
            orders=tuple(map(tuple, numbering["orders"])),
        )
    decoded = {
        "prefixes": tuple(row["prefixes"]),
        "shapes": _with_tuples(row["shapes"]),
        "parameters": _with_tuples(row["parameters"]),
        "fused": _with_tuples(row["fused"]),
        "swapped": frozenset(row["swapped"]),
        "numbering": numbering,
    }
    return Component(**{**row, **decoded})


def _with_tuples(lists: Mapping[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return dict(zip(lists, map(tuple, lists.values())))


@cache
def _read_table() -> Json:
    return json.loads(gzip.decompress(TABLE.read_bytes()))
