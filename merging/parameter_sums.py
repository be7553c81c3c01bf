"""Sums of what adapters add to norms and biases: plain vectors, weighted like the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.layout import Layout, nearest_name
from lora_core.formats.weights import Weights
from merging.adapter_sums import LayerKey, Term
from merging.compare import GramSums

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


def parameter_key(weights: Weights, layout: Layout, component: str, path: str) -> str:
    """The key of a norm's weight or of a bias in a network's weights.

    It is with or without a level that one library version drops. Raises UserError for a parameter
    that does not exist.
    """
    for name in (path, path.removeprefix(layout.component(component).module_prefix)):
        if name in weights.infos:
            return name
    near = nearest_name(path, weights.infos)
    raise UserError(f"{weights.source} has no {component} parameter {path}; nearest: {near}")


def vector_sums(delta: Tensor, vectors: Sequence[Tensor | None]) -> GramSums:
    """`compare.gram_sums` of one parameter: of its difference and what each file adds to it."""
    rows = torch.zeros(len(vectors), delta.numel(), dtype=torch.float64)
    for i, vector in enumerate(vectors):
        if vector is not None:
            rows[i] = vector.double()
    flat = delta.double().flatten()
    return GramSums(rows @ rows.mT, rows @ flat, float(flat.square().sum()))


def compare_parameters(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The cells of diff's table for the vectors that two files add to one network."""
    shared = first.keys() & second.keys()
    norm_a = math.sqrt(sum(float(change.double().square().sum()) for change in first.values()))
    norm_b = math.sqrt(sum(float(change.double().square().sum()) for change in second.values()))
    inner = sum(float(first[path].double() @ second[path].double()) for path in shared)
    distance = math.sqrt(max(0.0, norm_a**2 + norm_b**2 - 2 * inner))
    counts = len(shared), len(first) - len(shared), len(second) - len(shared)
    cosine = f"{inner / (norm_a * norm_b):.4f}" if norm_a * norm_b else "-"
    relative = f"{distance / norm_a:.4g}" if norm_a else "-"
    return (*map(str, counts), f"{norm_a:.4g}", f"{norm_b:.4g}", cosine, relative)
