"""The squared error and keyed dropout against the references.

Triton's kernels, in the interpreter where there is no GPU, and the fused error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_core.kernels import COSTS, OPS, call, fused, reference, use_kernels

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from lora_core.kernels import dropout, loss  # noqa: E402

pytestmark = pytest.mark.usefixtures("patched_once")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def error(got: Tensor, exact: Tensor) -> float:
    return float(
        (got.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-300)
    )


def close(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of the reference in the same dtype, or one rounding."""
    assert got.shape == exact.shape and got.dtype == eager.dtype
    assert error(got, exact) <= 2 * error(eager, exact) + torch.finfo(got.dtype).eps


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


# ---------------------------------------------------------------- squared error


def case(
    dtype: torch.dtype,
    mask: str,
    weighted: bool,
    shape: tuple[int, ...] = (3, 4, 5, 7),
    target: torch.dtype | None = None,
) -> tuple[Any, ...]:
    out, aim, area, weight = draw(0, shape, shape, (shape[0], 1, *shape[2:]), (shape[0],))
    area = area.sigmoid() if mask == "soft" else (area > 0).float()
    area[-1] *= 0 if mask == "empty" else 1
    return (
        out.to(dtype),
        aim.to(target or dtype),
        None if mask == "none" else area,
        weight.abs() if weighted else None,
    )


def learned(op: Callable[..., Tensor], args: tuple[Any, ...], both: bool = True) -> list[Tensor]:
    out, target = (
        args[0].detach().clone().requires_grad_(),
        args[1].detach().clone().requires_grad_(both),
    )
    rows = op(out, target, *args[2:])
    (slope,) = draw(3, (len(rows),))
    (rows * slope.to(rows.dtype)).sum().backward()
    return [x for x in (rows.detach(), out.grad, target.grad) if x is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "hard", "soft", "empty"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fast", [loss.snr_weighted_mse, fused.snr_weighted_mse])
def test_the_error_and_its_gradients_are_the_references(
    fast: Callable[..., Tensor], weighted: bool, mask: str, dtype: torch.dtype
) -> None:
    args = case(dtype, mask, weighted)
    exact = learned(
        reference.snr_weighted_mse, tuple(None if x is None else x.double() for x in args)
    )
    for got, eager, want in zip(
        learned(fast, args), learned(reference.snr_weighted_mse, args), exact, strict=True
    ):
        close(got, eager, want)


@pytest.mark.parametrize("fast", [loss.snr_weighted_mse, fused.snr_weighted_mse])
def test_error_of_odd_shapes_layouts_and_mixed_dtypes(fast: Callable[..., Tensor]) -> None:
    for shape in (
        (1, 1, 1, 1),
        (2, 3, 67, 41),
        (2, 16, 5),
    ):  # one element, more than two turns of the loop, tokens
        args = case(
            torch.bfloat16, "none" if len(shape) == 3 else "hard", True, shape, torch.float32
        )
        exact = learned(
            reference.snr_weighted_mse, tuple(None if x is None else x.double() for x in args)
        )
        eager = learned(reference.snr_weighted_mse, args)
        for got, plain, want in zip(learned(fast, args), eager, exact, strict=True):
            close(got, plain, want)
    out, target, mask, weight = case(torch.float32, "soft", True)
    permuted = out.to(memory_format=torch.channels_last), target, mask, weight
    torch.testing.assert_close(fast(*permuted), fast(out, target, mask, weight))
    assert len(learned(fast, (out, target, mask, weight), both=False)) == 2
    mask[0] = 0
    assert fast(out, target, mask, weight)[0] == 0


def test_what_the_error_does_not_take_is_said_and_wrong_masks_are_refused_by_all() -> None:
    out, target, mask, weight = case(torch.float32, "hard", True)
    for args, word in [
        ((out.double(), target, mask, weight), "float64"),
        ((out, target, mask[:, :, 1:], weight), "mask"),
        ((out, target, mask, weight.clone().requires_grad_()), "gradient"),
        ((out[:0], target[:0], None, None), "shapes"),
    ]:
        assert word in str(loss.mse_refusal(*args))
    assert loss.mse_refusal(out, target, mask, weight) is None
    for mode in ("reference", "fused"):
        with use_kernels(mode), pytest.raises(ValueError, match=r"the mask is \[3, 1, 4, 7\]"):
            call("snr_weighted_mse", out, target, mask[:, :, 1:], weight)
    grown = weight.clone().requires_grad_()
    with use_kernels("fused"):
        call("snr_weighted_mse", out, target, mask, grown).sum().backward()
    assert grown.grad is not None


# ---------------------------------------------------------------- dropout


def dropped(op: Callable[..., Tensor], x: Tensor, *key: Any) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = op(x, *key)
    (slope,) = draw(5, tuple(x.shape))
    (y * slope.to(x.dtype)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_is_the_references_to_the_bit(dtype: torch.dtype) -> None:
    rows = torch.tensor([7, -(2**40), 2**62 + 5], device=DEVICE)
    for shape, p, seed, layer, step in [
        ((3, 5, 131), 0.25, 0, 0, 0),
        ((3, 700), 0.9, 2**40 + 3, 0xFFFFFFFF, 2**33),
        ((3, 1, 1), 0.5, -5, 12345, 3),
        ((3, 1), 0.0, 1, 1, 1),
    ]:
        (x,) = draw(1, shape)
        key = p, seed, layer, torch.tensor(step, device=DEVICE), rows
        for got, want in zip(
            dropped(dropout.keyed_dropout, x.to(dtype), *key),
            dropped(reference.keyed_dropout, x.to(dtype), *key),
            strict=True,
        ):
            assert torch.equal(got == 0, want == 0)
            if DEVICE == "cpu":
                assert torch.equal(got, want)
            else:  # torch multiplies by the reciprocal there
                torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_dropout_of_a_strided_input_and_of_what_is_refused() -> None:
    (x,) = draw(2, (4, 6, 5))
    key = 0.5, 1, 2, torch.tensor(3, device=DEVICE), torch.arange(4, device=DEVICE)
    strided = x.transpose(1, 2)
    assert torch.equal(
        dropout.keyed_dropout(strided, *key) == 0, reference.keyed_dropout(strided, *key) == 0
    )
    assert "float64" in str(dropout.dropout_refusal(x.double(), *key)) and "no elements" in str(
        dropout.dropout_refusal(x[:, :0], *key)
    )
    assert dropout.dropout_refusal(x, *key) is None


@triton.jit
def inlined_kernel(out, step, rows, size, state, threshold, BLOCK: tl.constexpr):
    """What a kernel that drops its own tile does, as the head of dropout.py tells."""
    i, element = tl.arange(0, 4), tl.arange(0, BLOCK)
    key, second = dropout.row_keys(state, tl.load(step), tl.load(rows + i))
    kept = dropout.keep_elements(element[None, :], key[:, None], second[:, None], threshold)
    tl.store(
        out + i[:, None] * size + element[None, :],
        kept.to(tl.float32),
        mask=element[None, :] < size,
    )


def test_the_device_functions_serve_another_kernel() -> None:
    step, rows, x = (
        torch.tensor(9, device=DEVICE),
        torch.arange(4, device=DEVICE) - 2,
        torch.ones(4, 13, device=DEVICE),
    )
    out = torch.empty_like(x)
    inlined_kernel[(1,)](
        out, step, rows, 13, dropout.hash_stream(3, 2**31 + 5), dropout.keep_threshold(0.7), 16
    )
    assert torch.equal(
        out, (reference.keyed_dropout(x, 0.7, 3, 2**31 + 5, step, rows) != 0).float()
    )


# ---------------------------------------------------------------- how they run


def cases() -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    out, target, mask, weight = case(torch.float32, "soft", True)
    key = 0.5, 1, 2, torch.tensor(3, device=DEVICE), torch.arange(3, device=DEVICE)
    out.requires_grad_()
    return [
        (loss.snr_weighted_mse, (out, target, mask, weight)),
        (fused.snr_weighted_mse, (out, target, mask, weight)),
        (loss.snr_weighted_mse, (out, target, None, None)),
        (dropout.keyed_dropout, (out, *key)),
    ]


@pytest.mark.parametrize("i", range(4))
def test_compiled_whole_checkpointed_repeated_and_on_meta(i: int) -> None:
    op, args = cases()[i]
    plain = op(*args)
    (expected,) = torch.autograd.grad(plain.square().sum(), args[0])
    for run in (
        op,
        torch.compile(op, backend="aot_eager", fullgraph=True),
        lambda *a: checkpoint(op, *a, use_reentrant=False),
    ):
        y = run(*args)
        (got,) = torch.autograd.grad(y.square().sum(), args[0])
        assert torch.equal(y, plain) and torch.equal(got, expected)
    empty = [
        x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in args
    ]
    y = op(*empty)
    assert y.is_meta and y.shape == plain.shape and y.dtype == plain.dtype
    assert torch.autograd.grad(y.sum(), empty[0])[0].shape == expected.shape


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter runs")
def test_launches_are_those_declared() -> None:
    for op, args in (cases()[i] for i in (0, 2, 3)):
        with launches() as seen, Declared() as declared:
            op(*args).sum().backward()
        assert len(seen) == declared.total == 2


def test_rows_of_the_table_of_ops() -> None:
    for name in ("snr_weighted_mse", "keyed_dropout"):
        args = OPS[name].example(0, torch.float32, DEVICE)
        for mode in ("fused", "triton"):
            with use_kernels(mode):
                torch.testing.assert_close(call(name, *args), OPS[name].reference(*args))
