"""Layers of a merge whose update is only known as a whole: distilled, or kept in their own form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, delta_weight, split_updates
from lora_core.errors import UserError
from lora_core.formats import joined_layers
from lora_core.formats.container import is_finite
from lora_core.formats.lycoris import fold_scale_without_rank
from merging.adapter_sums import DenseOptions, MergedLayer, Term, layer_sources, sketch_generator
from merging.stored_layers import LayerKey, StoredLayers
from merging.survival import energies_of_dense
from merging.svd import distill_update
from merging.truncation import ApproximationReport, Keep

Layers = Mapping[LayerKey, Sequence[tuple[float, Any]]]  # key -> (weight, LowRank or DenseUpdate)


def sum_dense_layers(
    layers: Layers,
    terms: Sequence[Term],
    criterion: Keep | None,
    dense: DenseOptions,
    stored: StoredLayers,
    dtype: torch.dtype | None,
    *,
    is_sum: bool = True,
) -> Iterator[MergedLayer]:
    """Layers whose sum is only known as a dense update: distilled, or as one file has them.

    A layer of a single file, without a criterion, is scaled and keeps its tensors where the output
    holds them. Raises UserError for others, and for any without `is_sum`.
    """
    sources = layer_sources(terms)
    if is_sum and criterion is not None:
        return _distill_layers(layers, sources, criterion, dense, stored)
    kept: dict[LayerKey, DenseUpdate] = {}
    if is_sum and stored.holds_lycoris:
        kept = single_updates(layers, stored)
    if left := {key: weighted for key, weighted in layers.items() if key not in kept}:
        _refuse_layers(left)
    return _kept_layers(kept, sources, dtype)


def single_updates(layers: Layers, stored: StoredLayers) -> dict[LayerKey, DenseUpdate]:
    """The scaled updates of layers that one file has and the output can store.

    One with a DoRA's magnitude needs weight 1.
    """
    kept: dict[LayerKey, DenseUpdate] = {}
    for key, parts in stored.group_parts(layers).items():
        own: dict[LayerKey, DenseUpdate] = {}
        for part in parts:
            (weight, update), *others = layers[part]
            is_copy = weight == 1 or update.magnitude is None
            if isinstance(update, DenseUpdate) and not others and is_copy:
                own[part] = update.scaled(weight)
        if len(own) == len(parts) and _is_storable(own, key[0], stored):
            kept |= own
    return kept


def _kept_layers(
    kept: Mapping[LayerKey, DenseUpdate],
    sources: Mapping[LayerKey, Sequence[int]],
    dtype: torch.dtype | None,
) -> Iterator[MergedLayer]:
    """The updates as they are stored in this dtype; None: in their own."""
    for key, update in kept.items():
        yield MergedLayer(*key, *settle_update(key, update, dtype), None, sources[key])


def keep_dense_layers(
    state: AdapterState, stored: StoredLayers, dtype: torch.dtype | None
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport]]:
    """The state of an open file with LyCORIS' updates apart, in this dtype, and their reports.

    Raises UserError for a part of a stored layer.
    """
    factors, dense = split_updates(state.components)
    reports = {}
    for component, updates in dense.items():
        own = {(component, path): update for path, update in updates.items()}
        kept = single_updates({key: [(1.0, update)] for key, update in own.items()}, stored)
        if left := [key for key in own if key not in kept]:
            raise UserError(
                f"{'.'.join(left[0])} is a part of an update of LyCORIS that belongs to a larger "
                "layer of its file; --as lora --model BASE makes a plain LoRA of it"
            )
        for key, update in kept.items():
            updates[key[1]], reports[key] = settle_update(key, update, dtype)
    return replace(state, components=factors, dense=dense), reports


def settle_update(
    key: LayerKey, update: DenseUpdate, dtype: torch.dtype | None
) -> tuple[DenseUpdate, ApproximationReport]:
    """An update with the tensors that a file stores, and what their rounding loses.

    Its rank in the report is that of the weight, which a LoKr can have. Raises UserError for
    tensors that overflow the dtype.
    """
    own = next(iter(update.tensors.values())).dtype
    wide = update.cast(torch.promote_types(own, torch.float32))
    settled = fold_scale_without_rank(wide).cast(dtype or own)
    if not all(map(is_finite, settled.tensors.values())):
        raise UserError(
            f"{'.'.join(key)}: its tensors overflow {dtype or own}; choose --dtype bf16 or fp32"
        )
    before = update.build().double()
    is_same = settled.scale == update.scale and dtype in (None, own)
    lost = 0.0 if is_same else float((settled.build().double() - before).norm())
    rank = min(update.shape[0], math.prod(update.shape[1:]))
    return settled, ApproximationReport(rank, rank, float(before.norm()), lost)


def _distill_layers(
    whole: Layers,
    sources: Mapping[LayerKey, Sequence[int]],
    keep: Keep,
    dense: DenseOptions,
    stored: StoredLayers,
) -> Iterator[MergedLayer]:
    """The nearest adapters of layers with an update that is not a product of two factors."""
    for key, parts in stored.group_parts(whole).items():
        by_file: dict[int, dict[LayerKey, Tensor]] = {}
        try:
            for part in parts:
                weight = dense.base(*part) if dense.base else None
                for number, (strength, lr) in zip(sources[part], whole[part]):
                    update = strength * delta_weight(lr, weight)
                    by_file.setdefault(number, {})[part] = update
            updates = [stored.stack_dense(key, own) for own in by_file.values()]
            total = torch.stack(updates).sum(0)
            distilled = distill_update(total, keep, generator=sketch_generator(key, dense))
        except ValueError as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None
        yield MergedLayer(*key, *distilled, energies_of_dense(updates, distilled[0]), [*by_file])


def _refuse_layers(whole: Layers) -> NoReturn:
    key, weighted = next(iter(whole.items()))
    is_dense = any(isinstance(update, DenseUpdate) for _, update in weighted)
    kind = "an update of LyCORIS" if is_dense else "a DoRA"
    raise UserError(
        f"{'.'.join(key)} is {kind}, not a product of two factors; "
        "choose how much to keep with --rank, --max-error or --energy (and no --method), or fold "
        "it into a model"
    )


def _is_storable(
    updates: Mapping[LayerKey, DenseUpdate], component: str, stored: StoredLayers
) -> bool:
    """Whether these parts of a stored layer have a form of LyCORIS in files."""
    modules = {path: update for (_, path), update in updates.items()}
    if stored.layout is None or component not in stored.layout.components:
        return all(update.is_whole for update in modules.values())
    try:
        joined = joined_layers.join_dense(modules, stored.layout.component(component))
    except UserError:
        return False
    return all(update.is_whole for update in joined.values())
