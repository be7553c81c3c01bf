"""The masked, weighted squared error against the reference: in Triton (interpreted where there is
no GPU) and fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.kernels import call, fused, reference, use_kernels
from tests.kernel_checks import (
    DEVICE,
    assert_equal,
    check_error,
    check_launches,
    check_row_of_ops,
    check_ways_to_run,
    draw,
)

pytest.importorskip("triton")
from lora_core.kernels import loss

pytestmark = pytest.mark.usefixtures("patched_once")


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
        check_error(got, eager, want)


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
            check_error(got, plain, want)
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


def ways() -> list[tuple[Callable[..., Tensor], tuple[Any, ...]]]:
    out, target, mask, weight = case(torch.float32, "soft", True)
    out.requires_grad_()
    return [
        (loss.snr_weighted_mse, (out, target, mask, weight)),
        (fused.snr_weighted_mse, (out, target, mask, weight)),
        (loss.snr_weighted_mse, (out, target, None, None)),
    ]


@pytest.mark.parametrize("i", range(3))
def test_compiled_whole_checkpointed_repeated_and_on_meta(i: int) -> None:
    check_ways_to_run(*ways()[i], assert_equal)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter runs")
def test_launches_are_those_declared() -> None:
    for op, args in (ways()[0], ways()[2]):
        check_launches(op, args, 2)


def test_rows_of_the_table_of_ops() -> None:
    check_row_of_ops("snr_weighted_mse")
