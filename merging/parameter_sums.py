"""Sums of what adapters add to norms and biases: plain vectors, weighted like the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from merging.adapter_sums import LayerKey, Term

WeightedVectors = list[tuple[float, Tensor]]


def parameters_by_key(state: AdapterState) -> dict[LayerKey, Tensor]:
    """(component, path of a parameter) -> what an adapter adds to it."""
    found = {}
    for component, changes in state.parameters.items():
        for path, change in changes.items():
            found[component, path] = change
    return found


def weighted_parameters(terms: Sequence[Term]) -> dict[LayerKey, WeightedVectors]:
    """Every parameter that a term changes with a weight other than 0, with its vectors.

    The factor of a parameter is that of its layer or norm.
    """
    found: dict[LayerKey, WeightedVectors] = {}
    for state, weight, factor in terms:
        for (component, path), change in parameters_by_key(state).items():
            own = weight * factor(component, path.rpartition(".")[0])
            if own != 0:
                found.setdefault((component, path), []).append((own, change))
    return found


def sum_parameters(terms: Sequence[Term]) -> dict[str, dict[str, Tensor]]:
    """Component -> path -> weighted sum, in fp32 or better; one vector of weight 1 is unchanged.

    Raises UserError for vectors of different lengths.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    for key, weighted in weighted_parameters(terms).items():
        if len({len(change) for _, change in weighted}) > 1:
            lengths = " and ".join(str(len(change)) for _, change in weighted)
            raise UserError(
                f"the changes of {'.'.join(key)} have {lengths} numbers; "
                "these files are for different models"
            )
        is_copy = len(weighted) == 1 and weighted[0][0] == 1
        total = weighted[0][1] if is_copy else add_vectors(None, weighted)
        sums.setdefault(key[0], {})[key[1]] = total
    return sums


def add_vectors(base: Tensor | None, weighted: WeightedVectors) -> Tensor:
    """base (or 0) plus the weighted vectors, in fp32 or better."""
    total = torch.zeros(weighted[0][1].shape) if base is None else base
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    for weight, change in weighted:
        wide = torch.promote_types(change.dtype, total.dtype)
        total = total.to(wide) + weight * change.to(wide)
    return total
