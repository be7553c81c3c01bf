"""Merges of whole files, streamed layer by layer, and the allotment of a rank budget to layers.

Nothing here holds more than one layer in fp32 besides what it hands out, so a caller that rounds and drops each Layer keeps memory flat.
Layers that only some of the files hold are kept. Tokens and headers are the caller's. Work in factor space runs on one thread (see `one_thread`,
which a caller puts around its own loop over the layers as well: casting a small tensor on two threads costs as much as merging the layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank, delta_weight
from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from merging.block_weights import LayerFactor
from merging.compare import frobenius_norm
from merging.factor_sums import WeightedAdapters, concat_factors, lpl, slerp
from merging.svd import (
    ApproximationReport,
    Keep,
    compress_adapter,
    distill_update,
    one_thread,
    singular_values,
    steps_within,
)
from merging.ties_dare import DenseMerge

LayerKey = tuple[str, str]  # component, published path
BaseWeight = Callable[
    [str, str], Tensor
]  # (component, published path) -> weight of the model before any adapter


def every_layer(component: str, path: str) -> float:
    """1.0 for every layer."""
    return 1.0


class Term(NamedTuple):
    """One file of a sum."""

    state: AdapterState
    weight: float = 1.0
    share: LayerFactor = (
        every_layer  # factor of the weight by layer; 0 leaves the layer of this file out
    )


class MergedLayer(NamedTuple):
    """One layer of a merge."""

    component: str
    path: str
    adapter: LowRank | None  # None where a budget leaves the layer nothing
    report: ApproximationReport


class RankSteps(NamedTuple):
    """What the ranks of one layer are worth and cost. A step is one rank, or one of each group of a grouped convolution."""

    squares: Tensor  # [k] energy of each step, descending
    ranks: int  # rows of `down` in a step
    parameters: int  # numbers of both factors in a step


@dataclass(frozen=True)
class DenseOptions:
    """How layers merge that only have a dense update."""

    base: BaseWeight | None = None  # needed for DoRA
    sketch: int | None = (
        None  # seed of the randomised SVD; None takes the exact one, which takes a second for a layer 1280 wide
    )


def weighted_layers(terms: Sequence[Term]) -> Iterator[tuple[LayerKey, WeightedAdapters]]:
    """Every layer that at least one term holds with a weight other than 0, in order of first appearance, with its weighted adapters."""
    keys = dict.fromkeys(
        (component, path)
        for term in terms
        for component, rows in term.state.components.items()
        for path in rows
    )
    for component, path in keys:
        found = [
            (
                term.weight * term.share(component, path),
                term.state.components.get(component, {}).get(path),
            )
            for term in terms
        ]
        kept = [
            (weight, adapter) for weight, adapter in found if adapter is not None and weight != 0
        ]
        if kept:
            yield (component, path), kept


def mix_layers(
    terms: Sequence[Term],
    keep: Keep | Mapping[LayerKey, int] | None = None,
    dense: DenseOptions = DenseOptions(),
) -> Iterator[MergedLayer]:
    """The weighted sum of files: exact of rank the sum of ranks, or the nearest adapter of what `keep` says, one for all or a rank for each layer.

    A single DoRA of weight 1 passes as it is. Any other sum with a DoRA in it is of full rank: with base weights its dense update is distilled.

    Raises UserError, with the layer's name, for a DoRA without a base weight or without something to keep, and for shapes that do not fit.
    """
    for key, weighted in weighted_layers(terms):
        wanted = keep[key] if isinstance(keep, Mapping) else keep
        try:
            yield MergedLayer(
                *key,
                *_merge_layer(
                    key,
                    weighted,
                    Keep(rank=wanted) if isinstance(wanted, int) and wanted else wanted,
                    dense,
                ),
            )
        except ValueError as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None


def mix_layers_dense(
    terms: Sequence[Term],
    merge: DenseMerge,
    keep: Keep,
    *,
    density: float,
    seed: int,
    dense: DenseOptions = DenseOptions(),
) -> Iterator[MergedLayer]:
    """A merge of MERGES by layer, on dense updates, then the nearest adapter. What is drawn depends on (seed, layer) alone.

    Raises UserError, with the layer's name, for a DoRA without a base weight and for shapes that do not fit.
    """
    for key, weighted in weighted_layers(terms):
        try:
            updates = [
                weight * delta_weight(lr, dense.base(*key) if dense.base else None)
                for weight, lr in weighted
            ]
            merged = merge(updates, density, keyed_generator(seed, ".".join(key), 0, "merge"))
            yield MergedLayer(
                *key,
                *distill_update(
                    merged,
                    keep,
                    groups=_group_count(weighted[0][1]),
                    generator=_sketch_generator(key, dense),
                ),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None


def mix_layers_slerp(
    first: AdapterState, second: AdapterState, t: float, keep: Keep | None = None
) -> Iterator[MergedLayer]:
    """`sums.slerp` of every layer; one that a single file holds is scaled by that file's 1 - t or t.

    Raises UserError, with the layer's name, for a DoRA and for shapes that do not fit.
    """
    for key, weighted in weighted_layers([Term(first, 1 - t), Term(second, t)]):
        try:
            lr = (
                slerp(weighted[0][1], weighted[1][1], t)
                if len(weighted) == 2
                else concat_factors(weighted)
            )
            yield MergedLayer(*key, *_merge_layer(key, [(1.0, lr)], keep, DenseOptions()))
        except ValueError as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None


def lpl_layers(
    first: AdapterState, second: AdapterState, alpha_1: float = 0.5, alpha_2: float = 0.5
) -> AdapterState:
    """`sums.lpl` of every layer; tokens are the first file's, unscaled, as in cloneofsimo's tool.

    Raises UserError when the files do not hold the same layers with the same ranks; the sentence names mix, which takes any.
    """
    keys = [
        {(component, path) for component, rows in state.components.items() for path in rows}
        for state in (first, second)
    ]
    if only := sorted(keys[0] ^ keys[1]):
        name, count = ".".join(only[0]), len(only)
        raise UserError(
            f"lpl needs the same layers in both files, but {count} are in one only, such as {name}; mix keeps them all"
        )
    merged = AdapterState(tokens=dict(first.tokens), token_names=first.token_names)
    for component, rows in first.components.items():
        merged.components[component] = {}
        for path, lr in rows.items():
            try:
                merged.components[component][path] = lpl(
                    lr, second.components[component][path], alpha_1, alpha_2
                )
            except UserError as error:
                raise UserError(f"{component}.{path}: {error}") from None
    return merged


def collect_layers(
    merged: Iterable[MergedLayer],
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport]]:
    """A merge as one record without tokens or header, and the reports of all layers, dropped ones included."""
    state, reports = AdapterState(), {}
    for layer in merged:
        reports[layer.component, layer.path] = layer.report
        if layer.adapter is not None:
            state.components.setdefault(layer.component, {})[layer.path] = layer.adapter
    return state, reports


def add_updates(weight: Tensor, weighted: WeightedAdapters) -> Tensor:
    """The base weight plus the weighted updates, in fp32 or better, for the caller to round once.

    Each DoRA counts as the update it makes to the base weight alone, W + t (W_dora - W), so the order does not matter. Raises ValueError when
    shapes do not fit.
    """
    folded = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for strength, lr in weighted:
        folded = folded + strength * delta_weight(lr, weight)
    return folded


class Rounding(NamedTuple):
    """How much of an update a rounded weight holds. Those of several layers add up entry by entry."""

    square: float  # squared norm of the wished update
    product: float  # its inner product with the effective one, rounded - base
    effective: float  # squared norm of the effective update

    @property
    def kept(self) -> float:
        """The effective update's share along the wished one, 1 when all survived; 1 for an update that is zero."""
        return self.product / self.square if self.square else 1.0

    @property
    def cosine(self) -> float:
        """Of the angle between both; 0 when nothing survived, 1 for an update that is zero."""
        return (
            (self.product / math.sqrt(self.square * self.effective) if self.effective else 0.0)
            if self.square
            else 1.0
        )


def round_weight(weight: Tensor, folded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Rounding]:
    """`folded` in the output dtype, and how much of folded - weight is left in it; folded - result is what rounding lost."""
    result = folded.to(dtype)
    wished, effective = folded.double() - weight.double(), result.double() - weight.double()
    return result, Rounding(
        *(
            float((a * b).sum())
            for a, b in ((wished, wished), (wished, effective), (effective, effective))
        )
    )


def rank_steps(terms: Sequence[Term]) -> dict[LayerKey, RankSteps]:
    """What the ranks of each layer of a weighted sum are worth and cost, for `allot`. Raises UserError for a DoRA."""
    found = {}
    for key, weighted in weighted_layers(terms):
        with one_thread():
            lr = concat_factors(weighted)
            sigma = singular_values(lr)
        found[key] = RankSteps(
            sigma.square().sum(0),
            len(sigma),
            len(sigma) * (lr.down[0].numel() + lr.up.shape[0] // len(sigma)),
        )
    return found


def allot_ranks(
    steps: Mapping[LayerKey, RankSteps],
    *,
    total: int | None = None,
    max_error: float | None = None,
    unit: Literal["ranks", "parameters"] = "ranks",
    at_least: int = 0,
) -> dict[LayerKey, int]:
    """The rank of each layer: the largest squared singular values of all layers first, per unit of cost, until a total or an error is reached.

    A total in ranks gives the smallest sum of squared errors there is; a total in parameters the smallest but for what the last step that no longer
    fits would have saved. An error, relative to the norm of all layers together, is met with the fewest units. Layers may come out at rank 0;
    `at_least` steps of each go first.

    Raises UserError when not one of total and max_error is given, or when the total is too small for `at_least`.
    """
    if (total is None) == (max_error is None):
        raise UserError("give either the total budget or the error to reach")
    order = sorted(
        (
            (j >= at_least, -square / getattr(row, unit), key)
            for key, row in steps.items()
            for j, square in enumerate(row.squares.tolist())
        ),
        key=lambda entry: entry[:2],
    )
    floor = sum(not entry[0] for entry in order)
    if max_error is not None:
        squares = torch.tensor(
            [-value * getattr(steps[key], unit) for _, value, key in order], dtype=torch.float64
        )
        order = order[: max(floor, steps_within(squares, max_error**2 * float(squares.sum())))]
    taken, left = dict.fromkeys(steps, 0), total
    for optional, _, key in order:
        cost = getattr(steps[key], unit)
        if left is not None and cost > left:
            if not optional:
                raise UserError(
                    f"a budget of {total} {unit} is too small for {at_least} of each of the {len(steps)} layers; raise it"
                )
            continue
        left = None if left is None else left - cost
        taken[key] += steps[key].ranks
    return taken


def _merge_layer(
    key: LayerKey, weighted: WeightedAdapters, keep: Keep | int | None, dense: DenseOptions
) -> tuple[LowRank | None, ApproximationReport]:
    """The adapter of one layer and its report; `keep` is 0 where a budget leaves the layer nothing."""
    if any(lr.magnitude is not None for _, lr in weighted):
        if len(weighted) == 1 and weighted[0][0] == 1 and keep is None:
            lr = weighted[0][1]
            return lr, ApproximationReport(
                lr.rank, lr.rank, frobenius_norm(lr._replace(magnitude=None)), 0.0
            )
        return _distill_layer(key, weighted, keep, dense)
    with one_thread():
        lr = concat_factors(weighted)
        if isinstance(keep, Keep):
            return compress_adapter(lr, keep)
        size = frobenius_norm(lr)
        return (
            (lr, ApproximationReport(lr.rank, lr.rank, size, 0.0))
            if keep is None
            else (None, ApproximationReport(0, lr.rank, size, size))
        )


def _distill_layer(
    key: LayerKey, weighted: WeightedAdapters, keep: Keep | int | None, dense: DenseOptions
) -> tuple[LowRank, ApproximationReport]:
    if dense.base is None:
        raise UserError(
            "a sum with a DoRA in it depends on the base weight; give the base model, or fold the files into it"
        )
    if not isinstance(keep, Keep):
        raise UserError(
            "a sum with a DoRA in it is of full rank; give a rank or an error to keep, or fold the files into the base model"
        )
    weight = dense.base(*key)
    update = torch.stack([strength * delta_weight(lr, weight) for strength, lr in weighted]).sum(0)
    return distill_update(
        update, keep, groups=_group_count(weighted[0][1]), generator=_sketch_generator(key, dense)
    )


def _sketch_generator(key: LayerKey, dense: DenseOptions) -> torch.Generator | None:
    return (
        None if dense.sketch is None else keyed_generator(dense.sketch, ".".join(key), 0, "sketch")
    )


def _group_count(lr: LowRank) -> int:
    return lr.rank // lr.up.shape[1]
