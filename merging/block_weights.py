"""Block weights of a network, by the rules of A1111's extension sd-webui-lora-block-weight.

Lists for UNets have 12, 17, 20 or 26 numbers. The 26 blocks are BASE (the text encoders), IN00 to
IN11, MID (there also M00) and OUT00 to OUT11. Shorter lists name the blocks that hold layers: 17
and 12 those with attention, 26 and 20 all of a family. A block that a list does not name gets 0, a
layer of no block 1. kohya's svd_merge_lora.py has the same lists, but gives 1 to the blocks that a
list does not name; such weights are written as a list of 26.

Lists for Flux have 61 numbers: CLIP, T5, IN (the embedders), 19 double blocks D00 to D18, 38 single
blocks S00 to S37, and OUT (the last layer with its modulation).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from merging.adapter_sums import LayerFactor

BLOCKS = ("BASE", *(f"IN{i:02}" for i in range(12)), "MID", *(f"OUT{i:02}" for i in range(12)))
DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38  # of Flux
STREAM_BLOCKS = (
    "CLIP",
    "T5",
    "IN",
    *(f"D{i:02}" for i in range(DOUBLE_BLOCKS)),
    *(f"S{i:02}" for i in range(SINGLE_BLOCKS)),
    "OUT",
)
# length of a list -> the blocks it has numbers for
BLOCK_LISTS: dict[int, tuple[int, ...]] = {
    12: (0, 5, 6, 8, 9, 13, *range(14, 20)),
    17: (0, 2, 3, 5, 6, 8, 9, 13, *range(17, 26)),
    20: (0, *range(1, 10), 13, *range(14, 23)),
    26: tuple(range(26)),
    61: tuple(range(61)),
}
OTHER_NAMES = {"M00": "MID"}  # of blocks


def _ones(*places: int) -> tuple[float, ...]:
    """A list of 17 with ones at BASE and at the places."""
    return tuple(float(i == 0 or i in places) for i in range(17))


BLOCK_PRESETS: dict[str, tuple[float, ...]] = {  # the extension's names of lists
    "NONE": (0.0,) * 17,
    "ALL": (1.0,) * 17,
    "INS": _ones(1, 2, 3),
    "IND": _ones(4, 5, 6),
    "INALL": _ones(*range(1, 7)),
    "MIDD": _ones(*range(4, 12)),
    "OUTD": _ones(*range(8, 12)),
    "OUTS": _ones(*range(12, 17)),
    "OUTALL": _ones(*range(8, 17)),
    "ALL0.5": (0.5,) * 17,
    "FLUXALL": (1.0,) * 61,
}
BlockOf = Callable[[str, str], int | None]  # (component, published path) -> index of its block


class BlockTable(NamedTuple):
    """The blocks of one model."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]  # of the lists that are in use with it
    block_of: BlockOf

    def find_block(self, name: str) -> int | None:
        """The block of a name; None for another word."""
        name = OTHER_NAMES.get(name, name)
        return self.names.index(name) if name in self.names else None


def find_block_table(layout: Layout) -> BlockTable | None:
    """The blocks of a model; None for one without."""
    if layout.block_lists:
        return BlockTable(BLOCKS, layout.block_lists, layout.block_of)
    blocks: dict[str, int] = {}
    for component in layout.components.values():
        blocks |= _stream_blocks(component.names, component.fused)
    if not blocks:
        return None
    return BlockTable(STREAM_BLOCKS, (len(STREAM_BLOCKS),), partial(_stream_block, layout, blocks))


def parse_block_weights(
    text: str, lengths: Collection[int] = tuple(BLOCK_LISTS)
) -> tuple[float, ...]:
    """The weights of all blocks of "1,0,0,0.5,..." or "[1, 0, ...]", or of a preset's name.

    They are 26, or 61 of a list of 61; before a list "NAME:" may stand. Blocks for which a shorter
    list has no number get 0. Raises UserError for anything that is not a number, and for a length
    that is not in `lengths`, those of the model.
    """
    allowed = " or ".join(map(str, sorted(lengths)))
    values: Sequence[float] = BLOCK_PRESETS.get(text, ())
    if values and len(values) not in lengths:
        raise UserError(
            f"{text} is a list of {len(values)} block weights; this model takes a list of {allowed}"
        )
    values = values or _parse_numbers(text)
    if len(values) not in lengths or len(values) not in BLOCK_LISTS:
        raise UserError(f"got {len(values)} block weights; this model takes a list of {allowed}")
    weights = [0.0] * max(len(BLOCKS), len(values))
    for index, value in zip(BLOCK_LISTS[len(values)], values):
        weights[index] = value
    return tuple(weights)


def factor_by_block(weights: Sequence[float], block_of: BlockOf) -> LayerFactor:
    """The factor of each layer by its block; 1 for a layer that belongs to no block."""

    def factor(component: str, path: str) -> float:
        index = block_of(component, path)
        return 1.0 if index is None else weights[index]

    return factor


def _parse_numbers(text: str) -> list[float]:
    body = re.sub(r"^\s*[^\W\d]\w*\s*:", "", text).strip().removeprefix("[").removesuffix("]")
    try:
        return [float(json.loads(part)) for part in body.split(",")]
    except (ValueError, TypeError):
        raise UserError(
            f"block weights are numbers with commas between them, got {text!r}"
        ) from None


def _stream_blocks(
    names: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, int]:
    """Published path -> its block in STREAM_BLOCKS, by the original code's names.

    Empty for a network whose original has no double blocks.
    """
    originals = dict(names)
    for original, paths in fused.items():
        originals |= dict.fromkeys(paths, original)
    if not any(name.startswith("double_blocks.") for name in originals.values()):
        return {}
    blocks = {}
    for path, name in originals.items():
        kind, *rest = name.split(".")
        word = "OUT" if kind == "final_layer" else "IN"
        if kind in ("double_blocks", "single_blocks"):
            word = f"{kind[0].upper()}{int(rest[0]):02}"
        if word in STREAM_BLOCKS:
            blocks[path] = STREAM_BLOCKS.index(word)
    return blocks


def _stream_block(
    layout: Layout, blocks: Mapping[str, int], component: str, path: str
) -> int | None:
    if component in layout.encoders:
        return STREAM_BLOCKS.index("T5" if layout.encoders[component] == "t5" else "CLIP")
    return blocks.get(path)
