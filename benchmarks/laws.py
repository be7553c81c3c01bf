"""How far a twin is from its op's definition in float64, and whether that is near enough.

The law: in every result, every gradient and every argument that the op writes, the error to the reference in float64 is at most twice that of the
reference itself in the arguments' dtypes, plus what the order of a sum is free to change: a running sum of n terms of random sign has the relative
error u sqrt(n / 6), u half a unit in the last place (torch's own sums are pairwise, near u). The worst of thousands of such sums may be off by twice
that, since its partial sums are larger than most.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from benchmarks.cases import copy_arguments, trained_tensors

ALLOWED = 2.0  # times the reference's own error


class Outcome(NamedTuple):
    """What a call did, by the names of the reference's arguments."""

    values: dict[str, Tensor]  # "result", "gradient of down", "step after"
    spare: dict[str, float]  # the relative error of a running sum in the value's dtype


class Error(NamedTuple):
    """Against float64."""

    norm: float  # of the difference, over the true norm
    worst: float  # largest difference, over the largest true value


def run_outcome(
    call: Callable[..., Any], reference: Callable[..., Any], args: tuple[Any, ...]
) -> Outcome:
    """Results of the call on copies of the arguments, their gradients for a fixed random slope, and the tensor arguments that it wrote."""
    mine, before = copy_arguments(args), copy_arguments(args)
    results = [leaf for leaf in tree_leaves(call(*mine)) if isinstance(leaf, Tensor)]
    values = {
        f"result {i}" if len(results) > 1 else "result": result.detach()
        for i, result in enumerate(results)
    }
    names = list(inspect.signature(reference).parameters)
    smooth = [result for result in results if result.requires_grad]
    trains = trained_tensors(mine)
    found: list[Tensor | None] = [None] * len(trains)
    if smooth and trains:
        found = list(
            torch.autograd.grad(
                smooth, trains, [output_gradient(result) for result in smooth], allow_unused=True
            )
        )
    gradients = {id(leaf): gradient for leaf, gradient in zip(trains, found)}
    for (path, leaf), old in zip(tree_flatten_with_path(mine)[0], tree_leaves(before)):
        if not isinstance(leaf, Tensor):
            continue
        name = names[path[0].idx] + "".join(str(key) for key in path[1:])  # type: ignore[attr-defined]
        if gradients.get(id(leaf)) is not None:
            values[f"gradient of {name}"] = gradients[id(leaf)]  # type: ignore[assignment]
        if not torch.equal(leaf.detach(), old.detach()):
            values[f"{name} after"] = leaf.detach()
    largest = max(leaf.numel() for leaf in tree_leaves(mine) if isinstance(leaf, Tensor))
    return Outcome(
        values,
        {
            name: _running_sum_error(value, largest / max(1, value.numel()))
            for name, value in values.items()
        },
    )


def _running_sum_error(value: Tensor, terms: float) -> float:
    """u sqrt(terms / 6), at least u; 0 for whole numbers."""
    return (
        torch.finfo(value.dtype).eps / 2 * math.sqrt(max(1.0, terms / 6))
        if value.dtype.is_floating_point
        else 0.0
    )


def output_gradient(result: Tensor) -> Tensor:
    """A random gradient of a result, the same for a shape whatever the dtype: its values are bf16's."""
    generator = torch.Generator(result.device).manual_seed(1)
    return (
        torch.randn(result.shape, generator=generator, device=result.device)
        .bfloat16()
        .to(result.dtype)
    )


def errors_to_truth(got: Outcome, truth: Outcome) -> dict[str, Error]:
    """Of everything that the truth names. ValueError, a sentence, where something is missing, has another shape, or is not finite."""
    found = {}
    for name, true in truth.values.items():
        value = got.values.get(name)
        if value is None:
            raise ValueError(f"gives no {name}")
        if value.shape != true.shape:
            raise ValueError(
                f"gives {name} in the shape {tuple(value.shape)}, expected {tuple(true.shape)}"
            )
        true, difference = true.double(), value.double() - true.double()
        if not bool(value.isfinite().all()) and bool(true.isfinite().all()):
            raise ValueError(f"gives {name} with values that are not finite")
        norm, largest = float(true.norm()) or 1.0, float(true.abs().max()) if true.numel() else 1.0
        found[name] = Error(
            float(difference.norm()) / norm,
            float(difference.abs().max()) / (largest or 1.0) if true.numel() else 0.0,
        )
    return found


def broken_law(got: Outcome, truth: Outcome, eager: dict[str, Error]) -> str | None:
    """How an outcome breaks the law, in words; None where it keeps it."""
    try:
        mine = errors_to_truth(got, truth)
    except ValueError as error:
        return str(error)
    for name, found in mine.items():
        spare = got.spare[name]
        worst = max(
            eager[name].worst, 2 * eager[name].norm
        )  # the reference's own may be small by luck where there are few elements
        for kind, value, own, more in (
            ("", found.norm, eager[name].norm, spare),
            ("worst ", found.worst, worst, 2 * spare),
        ):
            if value > ALLOWED * own + more:
                return f"has the {kind}error {value:.1e} to float64 in {name}, where the reference itself has {own:.1e} (twice that is allowed)"
    return None
