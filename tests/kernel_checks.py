"""Inputs, and laws that every Triton kernel is held to, for the tests of the single kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_core.kernels import COSTS, OPS, call, use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NormArguments = tuple[Tensor, Tensor, Tensor, float]  # weight, down, up, scale


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def norm_arguments(
    rows: int,
    columns: tuple[int, ...],
    rank: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> NormArguments:
    ones = [1] * (len(columns) - 1)
    weight, down, up = draw(seed, (rows, *columns), (rank, *columns), (rows, rank, *ones))
    return weight.to(dtype), down, up, 0.5


def error(got: Tensor, exact: Tensor) -> float:
    """The largest error, as a part of the largest value."""
    return float(
        (got.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-300)
    )


def check_error(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of the reference in the same dtype, or one rounding."""
    assert got.shape == exact.shape and got.dtype == eager.dtype
    assert error(got, exact) <= 2 * error(eager, exact) + torch.finfo(got.dtype).eps, (
        error(got, exact),
        error(eager, exact),
    )


@contextmanager
def launches() -> Iterator[list[str]]:
    """The kernels that are launched inside, by name; interpreter only."""
    from triton.runtime.interpreter import GridExecutor

    seen: list[str] = []
    run = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", counted):
        yield seen


class Declared(TorchDispatchMode):
    """The launches that our custom ops declare."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lora_core":
            cost = COSTS[func._schema.name](*args)
            assert cost.bytes > 0
            self.total += cost.launches
        return func(*args, **(kwargs or {}))


def check_launches(op: Callable[..., Tensor], args: tuple[Any, ...], count: int) -> None:
    """Forward and backward launch as many kernels as they declare: `count`."""
    with launches() as seen, Declared() as declared:
        op(*args).sum().backward()
    assert len(seen) == declared.total == count


def check_ways_to_run(
    op: Callable[..., Tensor],
    args: tuple[Any, ...],
    equal: Callable[[Tensor, Tensor], None] = torch.testing.assert_close,
) -> None:
    """Repeated to the bit; compiled whole and checkpointed `equal`; and its shapes on meta."""
    wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]

    def outcome(run: Callable[..., Tensor]) -> list[Tensor]:
        y = run(*args)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    plain = outcome(op)
    assert all(torch.equal(a, b) for a, b in zip(outcome(op), plain, strict=True))
    for run in (
        torch.compile(op, backend="aot_eager", fullgraph=True),
        lambda *a: checkpoint(op, *a, use_reentrant=False),
    ):
        for got, want in zip(outcome(run), plain, strict=True):
            equal(got, want)
    empty = [
        x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in args
    ]
    y = op(*empty)
    leaves = [x for x in empty if isinstance(x, Tensor) and x.requires_grad]
    for got, want in zip([y, *torch.autograd.grad(y.sum(), leaves)], plain, strict=True):
        assert got.is_meta and got.shape == want.shape and got.dtype == want.dtype


def assert_equal(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got, want)


def check_row_of_ops(name: str, **tolerance: float) -> None:
    """The op's implementations in the table give what its reference gives for its example."""
    args = OPS[name].example(0, torch.float32, DEVICE)
    exact = OPS[name].reference(*args)
    for mode in ("fused", "triton"):
        with use_kernels(mode):
            torch.testing.assert_close(call(name, *args), exact, **tolerance)
