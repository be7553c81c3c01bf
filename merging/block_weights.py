"""Block weights of a network: lists of 12, 17, 20 or 26 numbers, as in kohya's and A1111's tools.

The 26 blocks are BASE (the text encoders), IN00 to IN11, MID and OUT00 to OUT11. Shorter lists name
the blocks that hold layers: 17 and 12 those with attention, 26 and 20 all of a family. The block of
a layer is looked up in the family's layout, by a function (component, path) -> index or None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence

from lora_core.errors import UserError
from merging.adapter_sums import LayerFactor

BLOCKS = ("BASE", *(f"IN{i:02}" for i in range(12)), "MID", *(f"OUT{i:02}" for i in range(12)))
# length of a list -> the blocks it has numbers for (sd-scripts, networks/svd_merge_lora.py)
BLOCK_LISTS: dict[int, tuple[int, ...]] = {
    12: (0, 5, 6, 8, 9, 13, *range(14, 20)),
    17: (0, 2, 3, 5, 6, 8, 9, 13, *range(17, 26)),
    20: (0, *range(1, 10), 13, *range(14, 23)),
    26: tuple(range(26)),
}
BlockOf = Callable[[str, str], int | None]  # (component, published path) -> index into BLOCKS


def parse_block_weights(
    text: str, lengths: Collection[int] = tuple(BLOCK_LISTS)
) -> tuple[float, ...]:
    """The 26 weights of "1,0,0,0.5,..." or "[1, 0, ...]", with or without a leading "NAME:".

    Blocks for which a shorter list has no number get 1. Raises UserError for anything that is not a
    number, and for a length that is not in `lengths`, those of the family.
    """
    body = re.sub(r"^\s*[^\W\d]\w*\s*:", "", text).strip().removeprefix("[").removesuffix("]")
    try:
        values = [float(json.loads(part)) for part in body.split(",")]
    except (ValueError, TypeError):
        raise UserError(
            f"block weights are numbers with commas between them, got {text!r}"
        ) from None
    if len(values) not in lengths or len(values) not in BLOCK_LISTS:
        allowed = " or ".join(map(str, sorted(lengths)))
        raise UserError(f"got {len(values)} block weights; this model takes a list of {allowed}")
    weights = [1.0] * len(BLOCKS)
    for index, value in zip(BLOCK_LISTS[len(values)], values):
        weights[index] = value
    return tuple(weights)


def factor_by_block(weights: Sequence[float], block_of: BlockOf) -> LayerFactor:
    """The factor of each layer by its block; 1 for a layer that belongs to no block."""

    def factor(component: str, path: str) -> float:
        index = block_of(component, path)
        return 1.0 if index is None else weights[index]

    return factor
