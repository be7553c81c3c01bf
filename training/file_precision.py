"""The precision of a run's LoRA files, and what does not fit into it."""

from __future__ import annotations

import sys

import torch

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.formats.container import is_finite
from models import DTYPES


def fitting_dtype(state: AdapterState, precision: str) -> torch.dtype | None:
    """The dtype of the files for --files.precision; None for fp32, the precision of training.

    Also None, with a warning that names the layer, where a number of the state would overflow: a
    file in fp32 is of more use than none.
    """
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return None
    updates: dict[str, LowRank | DenseUpdate] = {}
    for component, factors in state.components.items():
        updates |= {f"{component}.{path}": update for path, update in factors.items()}
    for component, dense in state.dense.items():
        updates |= {f"{component}.{path}": update for path, update in dense.items()}
    for name, update in updates.items():
        if not _fits(update, dtype):
            print(
                f"warning: {name} has numbers that overflow {precision}, so the files are in "
                "fp32; choose --files.precision bf16, or merge.py resize",
                file=sys.stderr,
            )
            return None
    return dtype


def _fits(update: LowRank | DenseUpdate, dtype: torch.dtype) -> bool:
    if isinstance(update, LowRank):
        return is_finite(update.down.to(dtype)) and is_finite(update.up.to(dtype))
    return all(is_finite(tensor) for tensor in update.cast(dtype).tensors.values())
