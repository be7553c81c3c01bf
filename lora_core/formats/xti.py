"""kohya's files of extended textual inversion (XTI, P+): a tensor [n, d] for each layer.

Their keys are the blocks with cross-attention, IN01 ... MID ... OUT11, in the order of the forward
pass: down, middle, up. The file's name is the word, with n tokens for each layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.container import check_finite
from lora_core.formats.embeddings import placeholder_header, rows_of_tensor
from lora_core.formats.known_formats import TOKEN_NAMES
from lora_core.formats.layout import Layout

# of Stable Diffusion 1 and 2, the only models of kohya's script
XTI_BLOCKS = (
    "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", "OUT03", "OUT04", "OUT05", "OUT06",
    "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
)  # fmt: skip
ANY_BLOCK = re.compile(r"(IN|OUT)\d\d|MID")


def is_xti(keys: Collection[Any]) -> bool:
    """Whether all keys are names of blocks."""
    return bool(keys) and all(isinstance(key, str) and ANY_BLOCK.fullmatch(key) for key in keys)


def read_xti(tensors: Mapping[str, Any], layout: Layout | None, source: str) -> AdapterState:
    """The word of the file's name, with its rows layer by layer.

    Raises UserError for other blocks, and for tensors that are no rows of one shape.
    """
    if odd := sorted(set(XTI_BLOCKS) ^ tensors.keys()):
        are = "is" if len(odd) == 1 else "are"
        raise UserError(
            f"{source} has token rows of {len(tensors)} blocks of a network; expected kohya's "
            f"{len(XTI_BLOCKS)} ({XTI_BLOCKS[0]} to {XTI_BLOCKS[-1]}), "
            f"{', '.join(odd)} {are} missing or not among them"
        )
    shapes = {key: tuple(getattr(rows, "shape", ())) for key, rows in tensors.items()}
    count, *width = shapes[XTI_BLOCKS[0]] or (0,)
    for key, rows in tensors.items():
        is_rows = isinstance(rows, Tensor) and rows.is_floating_point() and rows.ndim == 2
        if not is_rows or shapes[key] != (count, *width) or not count:
            raise UserError(
                f"{key} of {source} has shape {list(shapes[key])}, expected token rows [n, d] of "
                f"the same shape in all blocks, {list(shapes[XTI_BLOCKS[0]])} as in {XTI_BLOCKS[0]}"
            )
    check_finite(tensors, source)
    word = Path(source).stem.strip()
    stacked = torch.cat([tensors[block] for block in XTI_BLOCKS])  # [layers * n, d]
    names: list[str] = []
    for block in XTI_BLOCKS:
        names += _name_tokens(word, block, count)
    metadata = placeholder_header({word: names}, {word: len(XTI_BLOCKS)})
    metadata[TOKEN_NAMES] = json.dumps(names, ensure_ascii=False)
    rows = rows_of_tensor(word, stacked, layout, source).rows
    return AdapterState(tokens=rows, token_names=tuple(names), metadata=metadata)


def _name_tokens(word: str, block: str, count: int) -> list[str]:
    """The tokens of a block: <dog-IN01>, <dog-IN01-1> ..."""
    first = f"{'-'.join(word.strip('<>').split())}-{block}"
    return [f"<{first}>", *(f"<{first}-{i}>" for i in range(1, count))]
