"""Allot a budget of ranks or parameters to the layers with the largest singular values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError
from merging.adapter_sums import LayerKey, Term, weighted_layers
from merging.factor_sums import concat_factors, one_thread
from merging.svd import singular_values
from merging.truncation import steps_within


class RankSteps(NamedTuple):
    """The gain and the cost of each rank of one layer.

    A step is one rank, or one of each group of a grouped convolution.
    """

    squares: Tensor  # [k] energy of each step, descending
    ranks: int  # rows of `down` in a step
    parameters: int  # entries of both factors in a step


def rank_steps(terms: Sequence[Term]) -> dict[LayerKey, RankSteps]:
    """The steps of each layer of a weighted sum, for `allot_ranks`. Raises UserError for a DoRA."""
    found = {}
    for key, weighted in weighted_layers(terms).items():
        with one_thread():
            lr = concat_factors(weighted)
            sigma = singular_values(lr)
        groups = len(sigma)
        parameters = groups * (lr.down[0].numel() + lr.up.shape[0] // groups)
        found[key] = RankSteps(sigma.square().sum(0), groups, parameters)
    return found


def allot_ranks(
    steps: Mapping[LayerKey, RankSteps],
    *,
    total: int | None = None,
    max_error: float | None = None,
    unit: Literal["ranks", "parameters"] = "ranks",
    at_least: int = 0,
) -> dict[LayerKey, int]:
    """The rank of each layer for a total budget or a total error.

    Steps are taken in the order of squared singular value per unit of cost, over all layers. A
    total in ranks gives the smallest possible sum of squared errors; a total in parameters the
    smallest but for the gain of the last step that no longer fits. An error, relative to the norm
    of all layers together, is met with the fewest units. Layers may get rank 0; `at_least` steps of
    each layer are taken first.

    Raises UserError when not one of total and max_error is given, or when the total is too small
    for `at_least`.
    """
    if (total is None) == (max_error is None):
        raise UserError("give either the total budget or the error to reach")
    order = sorted(_steps_in_order(steps, unit, at_least), key=lambda step: step[:2])
    if max_error is not None:
        floor = sum(not step[0] for step in order)
        costs = [getattr(steps[key], unit) for _, _, key in order]
        squares = torch.tensor(
            [-gain * cost for (_, gain, _), cost in zip(order, costs)], dtype=torch.float64
        )
        needed = steps_within(squares, max_error**2 * float(squares.sum()))
        order = order[: max(floor, needed)]
    taken = dict.fromkeys(steps, 0)
    left = total
    for is_optional, _, key in order:
        cost = getattr(steps[key], unit)
        if left is not None:
            if cost > left and is_optional:
                continue
            if cost > left:
                raise UserError(
                    f"a budget of {total} {unit} is too small for {at_least} of each of the "
                    f"{len(steps)} layers; raise it"
                )
            left -= cost
        taken[key] += steps[key].ranks
    return taken


def _steps_in_order(
    steps: Mapping[LayerKey, RankSteps], unit: str, at_least: int
) -> Iterator[tuple[bool, float, LayerKey]]:
    """(whether the step is optional, minus its gain per unit of cost, its layer) of every step."""
    for key, layer in steps.items():
        cost = getattr(layer, unit)
        for j, square in enumerate(layer.squares.tolist()):
            yield j >= at_least, -square / cost, key
