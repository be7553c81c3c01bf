"""Sums of whole models with adapters folded in, streamed tensor by tensor.

Each tensor is computed when it is read, in fp32 or better, and rounded once.

A model is component -> `Weights` with the keys of the diffusers layout. The loss of the updates by
rounding is measured as the tensors are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats.compvis import TEXT_MODEL_LEVEL
from lora_core.formats.layout import Layout
from lora_core.formats.model_folders import Model, parameter_key, weight_key
from lora_core.formats.weights import TensorInfo, Weights
from merging.adapter_sums import LayerKey, Term, layer_generator, weighted_layers
from merging.factor_sums import WeightedAdapters
from merging.parameter_sums import WeightedVectors, add_vectors, weighted_parameters
from merging.rounding import Rounding, add_updates, round_weight
from merging.svd import distill_update
from merging.truncation import ApproximationReport, Keep, total_report

ONE_TOLERANCE = 1e-6  # a coefficient this near to 1 is 1
# key of a weight -> the layer that it belongs to and the adapters to add
Places = Mapping[str, tuple[LayerKey, WeightedAdapters]]


@dataclass(frozen=True)
class FoldedNetwork:
    """One network of every model, and what is added to its weights, norms and biases."""

    parts: Sequence[tuple[float, Weights]]
    places: Places
    vectors: Mapping[str, WeightedVectors]  # key -> what is added to it


@dataclass
class FoldStatistics:
    """The rounding losses of a fold, layer by layer; filled while its tensors are read."""

    residual_rank: int = 0  # of the adapter of the rounding loss; 0: no such adapter
    roundings: dict[LayerKey, Rounding] = field(default_factory=dict)
    ranks: dict[LayerKey, int] = field(default_factory=dict)  # of the folded update
    residual: AdapterState = field(default_factory=AdapterState)
    residual_reports: dict[LayerKey, ApproximationReport] = field(default_factory=dict)

    def add_layer(
        self,
        key: LayerKey,
        exact: Tensor,
        result: Tensor,
        rounding: Rounding,
        weighted: WeightedAdapters,
    ) -> None:
        """Adds a layer's rounding loss; a layer that is read again is not counted twice."""
        if key in self.roundings:
            return
        self.roundings[key] = rounding
        self.ranks[key] = rank_of_sum(weighted)
        if self.residual_rank:
            groups = max(conv_groups(lr) for _, lr in weighted)
            keep = Keep(rank=math.ceil(self.residual_rank / groups) * groups)
            lost = exact - result.to(exact.dtype)
            sketch = layer_generator(0, key, "sketch")
            adapter, report = distill_update(lost, keep, groups=groups, generator=sketch)
            self.residual.components.setdefault(key[0], {})[key[1]] = adapter
            self.residual_reports[key] = report

    def layer_reports(self) -> dict[LayerKey, ApproximationReport]:
        """Layer -> the update's norm and the part of it that rounding lost."""
        found = {}
        for key, rounding in self.roundings.items():
            square = rounding.square - 2 * rounding.product + rounding.effective
            rank = self.ranks[key]
            norm = math.sqrt(rounding.square)
            found[key] = ApproximationReport(rank, rank, norm, math.sqrt(max(0.0, square)))
        return found

    @property
    def surviving_energy(self) -> float:
        """The share of the update's energy in the rounded weights, over all layers.

        It is 1 minus the squared relative error, at least 0: 0 when nothing of the update is left,
        or when rounding changed the weights as much as the update did.
        """
        return max(0.0, total_report(self.layer_reports().values()).energy)


def rank_of_sum(weighted: WeightedAdapters) -> int:
    """The rank of a sum, as far as it is known without computing it."""
    return sum(_largest_rank(lr) for _, lr in weighted)


def conv_groups(lr: LowRank | DenseUpdate) -> int:
    """The groups of the convolution that an update is for; 1 for other layers."""
    return 1 if isinstance(lr, DenseUpdate) else lr.rank // lr.up.shape[1]


def fold_adapters(
    models: Sequence[tuple[float, Model]],
    terms: Sequence[Term],
    layout: Layout,
    statistics: FoldStatistics,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Weights]:
    """The weighted sum of models with the weighted updates of adapters added to it.

    Its tensors are computed when they are read; each is rounded once, to `dtype` or to the first
    model's. A DoRA contributes its update of the sum of the models. Tensors that are not floating
    point are the first model's.

    Raises UserError for models that differ in keys or shapes, and for a layer or component that
    they do not have; reading raises it for numbers that overflow the dtype.
    """
    weight, first = models[0]
    parts = {name: [(weight, weights)] for name, weights in first.items()}
    for coefficient, model in models[1:]:
        if set(first) != set(model):
            raise UserError(
                f"one model has {', '.join(first)}, another {', '.join(model)}; only models of one "
                "kind can be added"
            )
        for name, weights in first.items():
            parts[name].append((coefficient, _align_keys(name, weights, model[name])))
    places: dict[str, dict[str, tuple[LayerKey, WeightedAdapters]]] = {name: {} for name in first}
    for key, weighted in weighted_layers(terms).items():
        component, path = key
        _require_component(component, first)
        name = weight_key(first[component], layout, component, path)
        places[component][name] = (key, weighted)
    vectors: dict[str, dict[str, WeightedVectors]] = {name: {} for name in first}
    for (component, path), changes in weighted_parameters(terms).items():
        _require_component(component, first)
        vectors[component][parameter_key(first[component], layout, component, path)] = changes
    folded = {}
    for name in first:
        whole = FoldedNetwork(parts[name], places[name], vectors[name])
        folded[name] = _fold_network(whole, statistics, dtype)
    return folded


def with_embedding_rows(weights: Weights, key: str, rows: Mapping[int, Tensor]) -> Weights:
    """The network with some rows of its embedding table `key` replaced.

    The table grows if an index is beyond its end, with zeros where indices leave gaps.
    """
    shape, dtype = weights.infos[key]
    count = max(shape[0], *(index + 1 for index in rows))

    def read(wanted: str) -> Tensor:
        table = weights.read(wanted)
        if wanted != key:
            return table
        grown = torch.cat([table, table.new_zeros(count - shape[0], *shape[1:])])
        for index, row in rows.items():
            grown[index] = row.to(dtype)
        return grown

    infos = {**weights.infos, key: TensorInfo((count, *shape[1:]), dtype)}
    return Weights(weights.source, infos, read)


def _require_component(component: str, model: Model) -> None:
    if component not in model:
        raise UserError(
            f"the adapters change {component}, which the model does not have; it has "
            f"{', '.join(model)}"
        )


def _fold_network(
    whole: FoldedNetwork, statistics: FoldStatistics, dtype: torch.dtype | None
) -> Weights:
    """One network of the sum, from the same network of every model."""
    parts, places = whole.parts, whole.places
    coefficient, first = parts[0]
    infos = {}
    for key, info in first.infos.items():
        to = dtype if dtype and info.dtype.is_floating_point else info.dtype
        infos[key] = TensorInfo(info.shape, to)
    is_alone = len(parts) == 1 and abs(coefficient - 1) < ONE_TOLERANCE

    def read(key: str) -> Tensor:
        if not first.infos[key].dtype.is_floating_point:
            return first.read(key)
        base = first.read(key) if is_alone else _sum_weights(parts, key)
        to = infos[key].dtype
        if key in whole.vectors:
            result = _add_changes(base, whole.vectors[key], key).to(to)
        elif key not in places:
            result = base.to(to)
        else:
            layer, weighted = places[key]
            try:
                exact = add_updates(base, weighted)
            except ValueError as error:
                raise UserError(f"{'.'.join(layer)}: {error}") from None
            result, rounding = round_weight(base, exact, to)
            statistics.add_layer(layer, exact, result, rounding, weighted)
        if not torch.isfinite(result).all():
            raise UserError(
                f"{key} of {first.source} holds NaN or Inf as {to}; choose a wider --dtype, or fix "
                "the input"
            )
        return result

    return Weights(first.source, infos, read)


def _add_changes(base: Tensor, changes: WeightedVectors, key: str) -> Tensor:
    """A norm's weight or a bias with its changes, in fp32 or better."""
    for _, change in changes:
        if change.shape != base.shape:
            raise UserError(
                f"{key} is {list(base.shape)} and an adapter changes {list(change.shape)}; "
                "is it for another model?"
            )
    return add_vectors(base, changes)


def _sum_weights(parts: Sequence[tuple[float, Weights]], key: str) -> Tensor:
    """The weighted sum of a tensor over several models, fp32 or better.

    They are added as a stack, whose order of additions a running sum of five or more would change.
    """
    shape = parts[0][1].infos[key].shape
    wide = torch.float32
    for _, weights in parts:
        wide = torch.promote_types(wide, weights.infos[key].dtype)
    terms = torch.empty(len(parts), *shape, dtype=wide)
    for term, (coefficient, weights) in zip(terms, parts):
        tensor = weights.read(key)
        own = torch.promote_types(tensor.dtype, torch.float32)
        term.copy_(tensor.to(own, copy=True).mul_(coefficient))
    return terms.sum(0)


def _align_keys(name: str, first: Weights, other: Weights) -> Weights:
    """`other` under the keys of `first`, which may have a level that the other lacks.

    Position ids, which only older files have, are ignored. Raises UserError that names
    the first difference in keys or shapes.
    """
    names = _corresponding_keys(first, other)
    if only := list(_unmatched_keys(names, other)):
        raise UserError(
            f"{first.source} and {other.source} differ in {len(only)} tensors of {name}, such as "
            f"{only[0]}; are they of one kind?"
        )
    infos = {key: other.infos[there] for key, there in names.items() if there}
    for key, info in infos.items():
        if info.shape != first.infos[key].shape:
            raise UserError(
                f"{name}.{key} is {list(first.infos[key].shape)} in {first.source} and "
                f"{list(info.shape)} in {other.source}; are they of one kind?"
            )
    return Weights(other.source, infos, lambda key: other.read(names[key]))


def _corresponding_keys(first: Weights, other: Weights) -> dict[str, str]:
    """Key of `first` -> the same tensor's key in `other`, empty where it has none."""
    plain = {key.removeprefix(TEXT_MODEL_LEVEL): key for key in other.infos}
    names = {}
    for key in first.infos:
        is_same = key in other.infos
        names[key] = key if is_same else plain.get(key.removeprefix(TEXT_MODEL_LEVEL), "")
    return names


def _unmatched_keys(names: Mapping[str, str], other: Weights) -> Iterator[str]:
    only_first = [key for key, there in names.items() if not there]
    only_other = sorted(set(other.infos) - set(names.values()))
    for key in only_first + only_other:
        if not key.endswith("position_ids"):
            yield key


def _largest_rank(lr: LowRank | DenseUpdate) -> int:
    if isinstance(lr, DenseUpdate):
        return min(lr.shape[0], torch.Size(lr.shape[1:]).numel())
    return lr.rank
