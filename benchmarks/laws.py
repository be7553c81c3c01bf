"""Error of an implementation relative to its op's reference in float64, and the limit for it.

The law: in every result, every gradient and every argument that the op writes, the error to the
reference in float64 is at most twice that of the reference itself in the arguments' dtypes, plus an
allowance for the order of a sum: a running sum of n terms of random sign has the relative error
u sqrt(n / 6), u half a unit in the last place (torch's own sums are pairwise, near u). The worst of
thousands of such sums may be off by twice that, since its partial sums are larger than most.
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
    """Results, gradients and written arguments of a call, by name."""

    values: dict[str, Tensor]  # "result", "gradient of down", "step after"
    spare: dict[str, float]  # the relative error of a running sum in the value's dtype


class Error(NamedTuple):
    """The error to float64."""

    norm: float  # of the difference, over the true norm
    worst: float  # largest difference, over the largest true value


def run_outcome(
    call: Callable[..., Any], reference: Callable[..., Any], args: tuple[Any, ...]
) -> Outcome:
    """Run a call on copies of the arguments; returns results, gradients and written arguments.

    The gradients are for fixed random gradients of the results.
    """
    mine, before = copy_arguments(args), copy_arguments(args)
    results = [leaf for leaf in tree_leaves(call(*mine)) if isinstance(leaf, Tensor)]
    values = {}
    for i, result in enumerate(results):
        values[f"result {i}" if len(results) > 1 else "result"] = result.detach()
    names = list(inspect.signature(reference).parameters)
    gradients = _gradients(results, trained_tensors(mine))
    for (path, leaf), old in zip(tree_flatten_with_path(mine)[0], tree_leaves(before)):
        if not isinstance(leaf, Tensor):
            continue
        number: Any = path[0]
        name = names[number.idx] + "".join(str(key) for key in path[1:])
        gradient = gradients.get(id(leaf))
        if gradient is not None:
            values[f"gradient of {name}"] = gradient
        if not torch.equal(leaf.detach(), old.detach()):
            values[f"{name} after"] = leaf.detach()
    largest = max(leaf.numel() for leaf in tree_leaves(mine) if isinstance(leaf, Tensor))
    spare = {}
    for name, value in values.items():
        spare[name] = _running_sum_error(value, largest / max(1, value.numel()))
    return Outcome(values, spare)


def _gradients(results: list[Tensor], trains: list[Tensor]) -> dict[int, Tensor | None]:
    """id of a trained tensor -> its gradient, if it has one."""
    smooth = [result for result in results if result.requires_grad]
    if not (smooth and trains):
        return {}
    slopes = [output_gradient(result) for result in smooth]
    found = torch.autograd.grad(smooth, trains, slopes, allow_unused=True)
    return {id(leaf): gradient for leaf, gradient in zip(trains, found)}


def _running_sum_error(value: Tensor, terms: float) -> float:
    """u sqrt(terms / 6), at least u; 0 for whole numbers."""
    if not value.dtype.is_floating_point:
        return 0.0
    return torch.finfo(value.dtype).eps / 2 * math.sqrt(max(1.0, terms / 6))


def output_gradient(result: Tensor) -> Tensor:
    """A random gradient of a result, the same for a shape in every dtype: its values are bf16's."""
    generator = torch.Generator(result.device).manual_seed(1)
    drawn = torch.randn(result.shape, generator=generator, device=result.device)
    return drawn.bfloat16().to(result.dtype)


def errors_to_truth(got: Outcome, truth: Outcome) -> dict[str, Error]:
    """The error of every value in `truth`.

    Raises ValueError where a value is missing, has another shape, or is not finite; the message is
    the predicate of a sentence.
    """
    found = {}
    for name, true in truth.values.items():
        value = got.values.get(name)
        if value is None:
            raise ValueError(f"gives no {name}")
        if value.shape != true.shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(true.shape)}"
            raise ValueError(f"gives {name} in the shape {shapes}")
        true, difference = true.double(), value.double() - true.double()
        if not bool(value.isfinite().all()) and bool(true.isfinite().all()):
            raise ValueError(f"gives {name} with values that are not finite")
        norm, largest, worst = float(true.norm()) or 1.0, 1.0, 0.0
        if true.numel():
            largest = float(true.abs().max()) or 1.0
            worst = float(difference.abs().max())
        found[name] = Error(float(difference.norm()) / norm, worst / largest)
    return found


def broken_law(got: Outcome, truth: Outcome, eager: dict[str, Error]) -> str | None:
    """How an outcome breaks the law, as the predicate of a sentence; None where it does not."""
    try:
        mine = errors_to_truth(got, truth)
    except ValueError as error:
        return str(error)
    for name, found in mine.items():
        spare = got.spare[name]
        # the reference's own may be small by luck where there are few elements
        worst = max(eager[name].worst, 2 * eager[name].norm)
        for kind, value, own, more in (
            ("", found.norm, eager[name].norm, spare),
            ("worst ", found.worst, worst, 2 * spare),
        ):
            if value > ALLOWED * own + more:
                return (
                    f"has the {kind}error {value:.1e} to float64 in {name}, "
                    f"where the reference itself has {own:.1e} (twice that is allowed)"
                )
    return None
