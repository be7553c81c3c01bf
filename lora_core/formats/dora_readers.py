"""How A1111 and ComfyUI apply a DoRA by rows under kohya's names, and how far off that is.

Trained is W' = m / n V with V = W + delta W and n the norms of V's rows. A1111 1.10 divides by the
norms of V's columns instead (`apply_weight_decompose` of its Lora extension), ComfyUI 0.3.77 by the
norms of W's rows (`weight_decompose`). Both apply a DoRA by columns as LyCORIS does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import (
    AdapterState,
    DenseUpdate,
    LowRank,
    delta_weight,
    scaled_product,
)

# Errors of the update, in percent, of the DoRAs that were measured.
MEASURED = {"A1111": (187, 543), "ComfyUI": (10, 12)}
HOW_TO_CONVERT = (
    "merge.py convert --as lora --model BASE makes a plain LoRA, which every tool applies alike"
)


def has_row_dora(state: AdapterState) -> bool:
    """Whether any layer is a DoRA by rows."""
    for modules in state.components.values():
        for lr in modules.values():
            if is_row_dora(lr):
                return True
    return False


def is_row_dora(lr: LowRank | DenseUpdate) -> bool:
    return lr.magnitude is not None and lr.magnitude.ndim == 1


def apply_as_a1111(lr: LowRank | DenseUpdate, weight: Tensor) -> Tensor:
    """The update that A1111 makes of a DoRA by rows, in fp64: m over the column norms of V."""
    tuned = weight.double() + scaled_product(lr).double()
    others = [axis for axis in range(tuned.ndim) if axis != 1]
    norm = torch.linalg.vector_norm(tuned, dim=others, keepdim=True)
    return tuned * (_column_of(lr, tuned) / norm) - weight.double()


def apply_as_comfyui(lr: LowRank | DenseUpdate, weight: Tensor) -> Tensor:
    """The update that ComfyUI makes of a DoRA by rows, in fp64: m over the row norms of W."""
    base = weight.double()
    tuned = base + scaled_product(lr).double()
    others = list(range(1, base.ndim))
    norm = torch.linalg.vector_norm(base, dim=others, keepdim=True)
    norm = norm + torch.finfo(weight.dtype).eps  # for rows of zeros
    return tuned * (_column_of(lr, tuned) / norm) - base


READERS: dict[str, Callable[[LowRank | DenseUpdate, Tensor], Tensor]] = {
    "A1111": apply_as_a1111,
    "ComfyUI": apply_as_comfyui,
}


def reader_errors(layers: Iterable[tuple[LowRank, Tensor]]) -> dict[str, float]:
    """Reader -> relative Frobenius error of its updates of DoRAs by rows, over all layers.

    The layers come with their base weights.
    """
    total = 0.0
    lost = dict.fromkeys(READERS, 0.0)
    for lr, weight in layers:
        wanted = delta_weight(lr, weight.double())
        total += float(wanted.square().sum())
        for name, apply_dora in READERS.items():
            lost[name] += float((apply_dora(lr, weight) - wanted).square().sum())
    return {name: (square / total) ** 0.5 if total else 0.0 for name, square in lost.items()}


def describe_reader_errors(errors: Mapping[str, float] | None = None) -> str:
    """What is wrong with a DoRA by rows under kohya's names: its own errors, or measured ones."""
    if errors:
        shown = [f"{100 * error:.3g} % in {name}" for name, error in errors.items()]
        size = f"of this one the update is wrong by {' and '.join(shown)}"
    else:
        shown = [f"{low} to {high} % in {name}" for name, (low, high) in MEASURED.items()]
        size = f"of those that were measured the update was wrong by {' and '.join(shown)}"
    return (
        "A1111 and ComfyUI apply a DoRA under kohya's names by other norms than it was trained "
        f"with; {size}"
    )


def _column_of(lr: LowRank | DenseUpdate, like: Tensor) -> Tensor:
    assert lr.magnitude is not None
    return lr.magnitude.double().reshape(-1, *[1] * (like.ndim - 1))
