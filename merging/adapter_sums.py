"""Merges of whole adapter files, streamed layer by layer.

Only one layer is in fp32 at a time, apart from the results that the caller keeps, so a caller that
rounds and drops each layer keeps memory constant. Layers that only some of the files have are kept.
The caller merges tokens and headers, and runs its loop over the layers on one thread
(`factor_sums.one_thread`): casting a small tensor on two threads costs as much as merging it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import (
    AdapterState,
    LayerUpdate,
    LowRank,
    delta_weight,
    refuse_dora,
    split_updates,
)
from lora_core.errors import UserError
from merging.factor_sums import WeightedAdapters, concat_factors, frobenius_norm, lpl, slerp_weights
from merging.stored_layers import OWN_LAYERS, LayerKey, StoredLayers
from merging.truncation import ApproximationReport, Keep

if TYPE_CHECKING:
    from merging.survival import InputEnergies
    from merging.ties_dare import DenseMerge

LayerFactor = Callable[[str, str], float]  # (component, published path) -> factor of the weight
BaseWeight = Callable[[str, str], Tensor]  # (component, published path) -> weight of the base model


def every_layer(component: str, path: str) -> float:
    """The factor 1.0 for every layer."""
    return 1.0


class Term(NamedTuple):
    """One file of a sum."""

    state: AdapterState
    weight: float = 1.0
    factor: LayerFactor = (
        every_layer  # of the weight, by layer; 0 leaves the layer of this file out
    )


class MergedLayer(NamedTuple):
    """One layer of a merge."""

    component: str
    path: str
    adapter: LayerUpdate | None  # None where a budget gives the layer rank 0
    report: ApproximationReport
    inputs: InputEnergies | None = None  # of a sum: what is kept of each file that has the layer
    sources: Sequence[int] = ()  # the numbers of these files


@dataclass(frozen=True)
class DenseOptions:
    """Options of merging layers: of those whose sum is a dense update, and of large results."""

    base: BaseWeight | None = None  # needed for DoRA
    # seed of the randomized SVD; None: the exact SVD, which takes a second for 1280 x 1280
    sketch: int | None = None
    kept_at: str = ""  # the output in whose folder layers are kept until it is written; "": memory


def layers_by_key(state: AdapterState) -> dict[LayerKey, LowRank]:
    """Every layer of an adapter, in the order of the file."""
    layers = {}
    for component, adapters in state.components.items():
        for path, adapter in adapters.items():
            layers[component, path] = adapter
    return layers


def has_magnitude(state: AdapterState) -> bool:
    """Whether a layer of an adapter is a DoRA."""
    for adapters in state.components.values():
        for adapter in adapters.values():
            if adapter.magnitude is not None:
                return True
    return False


def weighted_layers(terms: Sequence[Term]) -> dict[LayerKey, WeightedAdapters]:
    """Every layer that at least one term holds with a weight other than 0, with its adapters.

    Layers come in the order of their first appearance.
    """
    found: dict[LayerKey, list[tuple[float, LowRank]]] = {}
    for state, weight, factor in terms:
        for key, adapter in layers_by_key(state).items():
            weighted = found.setdefault(key, [])
            own = weight if factor is every_layer else weight * factor(*key)
            if own != 0:
                weighted.append((own, adapter))
    return {key: weighted for key, weighted in found.items() if weighted}


def update_bytes(weighted: WeightedAdapters) -> int:
    """The bytes of the tensors of some updates."""
    total = 0
    for _, update in weighted:
        tensors = (
            (update.down, update.up) if isinstance(update, LowRank) else update.tensors.values()
        )
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def join_terms(terms: Sequence[Term], stored: StoredLayers) -> list[Term]:
    """The terms in stored layers, with the factors of their parts; DoRAs stay in our layers."""
    return [_join_term(term, stored) for term in terms]


def _join_term(term: Term, stored: StoredLayers) -> Term:
    if stored.layout is None:
        return term
    layers = layers_by_key(term.state)
    joined: dict[LayerKey, tuple[float, LowRank]] = {}
    for key, parts in stored.group_parts(layers).items():
        given = {}
        for part in parts:
            factor = term.factor(*part)
            if factor != 0:
                given[part] = (factor, layers[part])
        if any(lr.magnitude is not None for _, lr in given.values()):
            joined |= given
        elif given:
            joined[key] = stored.stack_weighted(key, given)
    state = AdapterState()
    for (component, path), (_, lr) in joined.items():
        state.components.setdefault(component, {})[path] = lr
    return Term(state, term.weight, lambda *key: joined[key][0])


def layer_sources(terms: Sequence[Term]) -> dict[LayerKey, list[int]]:
    """The numbers of the terms that `weighted_layers` takes each layer from, in its order."""
    found: dict[LayerKey, list[int]] = {}
    for number, term in enumerate(terms):
        for key in weighted_layers([term]):
            found.setdefault(key, []).append(number)
    return found


def mix_layers(
    terms: Sequence[Term],
    keep: Keep | Mapping[LayerKey, int] | None = None,
    dense: DenseOptions = DenseOptions(),
    *,
    rounded: bool = False,
) -> Iterator[MergedLayer]:
    """The weighted sum of files, exact (its rank is the sum of ranks) or truncated by `keep`.

    `rounded`: the result is to be rounded, so that an exact sum has energies of its inputs too.
    `keep` is one criterion for all layers, or a rank for each. A single DoRA of weight 1 passes
    unchanged. Any other sum with a DoRA is of full rank: with base weights its dense update is
    distilled.

    Raises UserError, with the layer's name, for a DoRA without a base weight or without a
    criterion, and for shapes that do not fit.
    """
    is_table = isinstance(keep, Mapping)
    has_energies = len(terms) > 1 and (keep is not None or rounded)
    sources = layer_sources(terms) if has_energies else {}
    for key, weighted in weighted_layers(terms).items():
        wanted: Any = _keep_rank(keep[key]) if is_table else keep  # type: ignore[index]
        try:
            adapter, report, inputs = _merge_layer(key, weighted, wanted, dense, rounded)
        except ValueError as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None
        yield MergedLayer(*key, adapter, report, inputs, sources.get(key, ()))


def mix_layers_dense(
    terms: Sequence[Term],
    merge: DenseMerge,
    keep: Keep,
    *,
    density: float,
    seed: int,
    dense: DenseOptions = DenseOptions(),
    stored: StoredLayers = OWN_LAYERS,
) -> Iterator[MergedLayer]:
    """A merge of `ties_dare.MERGES` by layer, on dense updates, then the nearest adapter.

    Our layers are merged one by one, then stacked to stored ones. Random numbers depend on
    (seed, layer) alone. Raises UserError, with the layer's name, for a DoRA without a base weight
    and for shapes that do not fit.
    """
    from merging.svd import distill_update

    layers = weighted_layers(terms)
    for key, parts in stored.group_parts(layers).items():
        merged = {}
        try:
            for part in parts:
                base = dense.base(*part) if dense.base else None
                updates = [weight * delta_weight(lr, base) for weight, lr in layers[part]]
                merged[part] = merge(updates, density, layer_generator(seed, part, "merge"))
            distilled = distill_update(
                stored.stack_dense(key, merged),
                keep,
                groups=_group_count(layers[parts[0]][0][1]),
                generator=sketch_generator(key, dense),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None
        yield MergedLayer(*key, *distilled)


def mix_layers_slerp(
    first: AdapterState,
    second: AdapterState,
    t: float,
    keep: Keep | None = None,
    stored: StoredLayers = OWN_LAYERS,
) -> Iterator[MergedLayer]:
    """`factor_sums.slerp` of every layer; a layer of a single file is scaled by its 1 - t or t.

    Raises UserError, with the layer's name, for a DoRA and for shapes that do not fit.
    """
    weights: dict[LayerKey, tuple[float, float]] = {}
    ours, others = layers_by_key(first), layers_by_key(second)
    for key, lr in (ours | others).items():
        weights[key] = (1 - t, t)
        try:
            refuse_dora(lr)
            if key in ours and key in others:
                weights[key] = slerp_weights(ours[key], others[key], t)
        except ValueError as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None
    terms = [
        Term(first, 1.0, lambda *key: weights[key][0]),
        Term(second, 1.0, lambda *key: weights[key][1]),
    ]
    return mix_layers(join_terms(terms, stored), keep)


def lpl_layers(
    first: AdapterState, second: AdapterState, alpha_1: float = 0.5, alpha_2: float = 0.5
) -> AdapterState:
    """`factor_sums.lpl` of every layer, with the first file's tokens, as in cloneofsimo's tool.

    Raises UserError when the files do not have the same layers with the same ranks; the message
    names mix, which takes any.
    """
    keys, others = layers_by_key(first), layers_by_key(second)
    if only := sorted(keys.keys() ^ others.keys()):
        raise UserError(
            f"lpl needs the same layers in both files, but {len(only)} are in one only, such as "
            f"{'.'.join(only[0])}; mix keeps them all"
        )
    merged = AdapterState(tokens=dict(first.tokens), token_names=first.token_names)
    for key, lr in keys.items():
        component, path = key
        try:
            total = lpl(lr, others[key], alpha_1, alpha_2)
        except UserError as error:
            raise UserError(f"{component}.{path}: {error}") from None
        merged.components.setdefault(component, {})[path] = total
    return merged


def collect_layers(
    merged: Iterable[MergedLayer],
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport]]:
    """(the merge without tokens or header, the reports of all layers, dropped ones included)."""
    updates: dict[str, dict[str, LayerUpdate]] = {}
    reports = {}
    for layer in merged:
        reports[layer.component, layer.path] = layer.report
        if layer.adapter is not None:
            updates.setdefault(layer.component, {})[layer.path] = layer.adapter
    factors, dense = split_updates(updates)
    return AdapterState(factors, dense=dense), reports


def sketch_generator(key: LayerKey, dense: DenseOptions) -> torch.Generator | None:
    """The generator of a layer's randomized SVD; None for the exact SVD."""
    return None if dense.sketch is None else layer_generator(dense.sketch, key, "sketch")


def layer_generator(seed: int, key: LayerKey, purpose: str) -> torch.Generator:
    """A generator for one layer, the same in every merge with that seed."""
    # imported here: a sum of factors needs no random numbers and no noise schedules
    from lora_core.diffusion.noise import keyed_generator

    return keyed_generator(seed, ".".join(key), 0, purpose)


def _merge_layer(
    key: LayerKey,
    weighted: WeightedAdapters,
    keep: Keep | int | None,
    dense: DenseOptions,
    rounded: bool,
) -> tuple[LowRank | None, ApproximationReport, InputEnergies | None]:
    """The adapter of one layer, its report and what is kept of each input.

    `keep` is 0 where a budget gives the layer rank 0.
    """
    for weight, lr in weighted:
        if lr.magnitude is not None:
            if len(weighted) == 1 and weight == 1 and keep is None:
                return lr, _exact_report(lr._replace(magnitude=None)), None
            return _distill_layer(key, weighted, keep, dense)
    if keep is not None or rounded:
        return _approximate_layer(weighted, keep)
    lr = concat_factors(weighted)
    return lr, _exact_report(lr), None


def _approximate_layer(
    weighted: WeightedAdapters, keep: Keep | int | None
) -> tuple[LowRank | None, ApproximationReport, InputEnergies]:
    """`_merge_layer` of a layer that is truncated, or rounded later (`keep` is None)."""
    from merging import survival, svd  # an exact sum needs neither

    if isinstance(keep, Keep) and len(weighted) > 1:
        return svd.compress_sum(weighted, keep)
    lr = concat_factors(weighted)
    if isinstance(keep, Keep):
        kept, report = svd.compress_adapter(lr, keep)
        return kept, report, survival.energies_of_one(report, kept)
    norm, inputs = survival.energies_of_factors(weighted, lr)
    exact = ApproximationReport(lr.rank, lr.rank, norm, 0.0)
    if keep is None:
        return lr, exact, inputs
    return None, exact._replace(rank=0, lost=norm), inputs._replace(lost=inputs.whole)


def _keep_rank(rank: int) -> Keep | int:
    return Keep(rank=rank) if rank else 0


def _exact_report(lr: LowRank) -> ApproximationReport:
    rank = lr.rank
    return ApproximationReport(rank, rank, frobenius_norm(lr), 0.0)


def _distill_layer(
    key: LayerKey, weighted: WeightedAdapters, keep: Keep | int | None, dense: DenseOptions
) -> tuple[LowRank, ApproximationReport, InputEnergies]:
    """`_merge_layer` of a layer whose sum is only known as a dense update."""
    if dense.base is None:
        raise UserError(
            "a sum with a DoRA in it depends on the base weight; give the base model, or fold the "
            "files into it"
        )
    if not isinstance(keep, Keep):
        raise UserError(
            "a sum with a DoRA in it is of full rank; give a rank or an error to keep, or fold the "
            "files into the base model"
        )
    from merging.survival import energies_of_dense
    from merging.svd import distill_update

    weight = dense.base(*key)
    parts = [strength * delta_weight(lr, weight) for strength, lr in weighted]
    groups, sketch = _group_count(weighted[0][1]), sketch_generator(key, dense)
    kept, report = distill_update(torch.stack(parts).sum(0), keep, groups=groups, generator=sketch)
    return kept, report, energies_of_dense(parts, kept)


def _group_count(lr: LowRank) -> int:
    return lr.rank // lr.up.shape[1]
