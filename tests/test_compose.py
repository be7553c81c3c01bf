"""DoRA's gain and sum in Triton (interpreted where there is no GPU) against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.kernels import reference
from tests.kernel_checks import (
    DEVICE,
    check_error,
    check_launches,
    check_row_of_ops,
    check_ways_to_run,
    draw,
)

pytest.importorskip("triton")
from lora_core.kernels import compose

pytestmark = pytest.mark.usefixtures("patched_once")


def layouts(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y0, bias, lora and gain: rows, planes, channels_last, or planes with channels_last."""
    if kind == "rows":
        y0, bias, lora, gain = draw(1, (2, 5, 131), (131,), (2, 5, 131), (131,))
        return y0.to(dtype), bias.to(dtype), lora.to(dtype), gain
    y0, bias, lora, gain = draw(2, (2, 19, 3, 45), (19, 1, 1), (2, 19, 3, 45), (19, 1, 1))
    y0, lora = (x.to(dtype, memory_format=torch.contiguous_format) for x in (y0, lora))
    y0 = y0 if kind == "planes" else y0.to(memory_format=torch.channels_last)
    return (
        y0,
        bias.to(dtype),
        lora.to(memory_format=torch.channels_last) if kind == "last" else lora,
        gain,
    )


def composed(
    op: Callable[..., Tensor],
    args: tuple[Any, ...],
    slope: Tensor,
    bias: bool,
    strength: float,
    base: bool = True,
) -> list[Tensor]:
    y0, b, lora, gain = args
    y0, lora, gain = (
        y0.detach().clone().requires_grad_(base),
        lora.detach().clone().requires_grad_(),
        gain.detach().clone().requires_grad_(),
    )
    y = op(y0, b if bias else None, lora, gain, strength)
    (y * slope.to(y.dtype)).sum().backward()
    return [x for x in (y.detach(), y0.grad, lora.grad, gain.grad) if x is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rows", "planes", "last", "both"])
def test_composition_and_its_gradients_are_the_references(kind: str, dtype: torch.dtype) -> None:
    args = layouts(kind, dtype)
    slope = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    wide = tuple(x.double() for x in args)
    for bias, strength in ((True, 1.0), (False, 0.3)):
        assert (
            compose.compose_refusal(args[0], args[1] if bias else None, *args[2:], strength) is None
        )
        exact = composed(reference.dora_compose, wide, slope, bias, strength)
        eager = composed(reference.dora_compose, args, slope, bias, strength)
        for got, plain, want in zip(
            composed(compose.dora_compose, args, slope, bias, strength), eager, exact, strict=True
        ):
            check_error(got, plain, want)
    assert len(composed(compose.dora_compose, args, slope, True, 1.0, base=False)) == 3


def test_gain_1_and_no_update_leave_the_output_to_the_bit() -> None:
    y0, bias, lora, gain = layouts("rows", torch.bfloat16)
    assert torch.equal(
        compose.dora_compose(y0, bias, torch.zeros_like(lora), torch.ones_like(gain)), y0
    )


def test_what_the_composition_does_not_take_is_said() -> None:
    y0, bias, lora, gain = layouts("rows", torch.float32)
    for args, word in [
        ((y0.double(), None, lora, gain), "float64"),
        ((y0, bias.clone().requires_grad_(), lora, gain), "gradient"),
        ((y0, bias, lora[:, :1], gain), "shapes"),
        ((y0, bias, lora, gain[:5]), "shapes"),
        ((y0.transpose(0, 1), bias, lora.transpose(0, 1), gain), "contiguous"),
    ]:
        assert word in str(compose.compose_refusal(*args))


def trained_arguments() -> tuple[Any, ...]:
    y0, bias, lora, gain = layouts("rows", torch.float32)
    return y0.requires_grad_(), bias, lora.requires_grad_(), gain.requires_grad_(), 0.5


def test_compiled_whole_checkpointed_and_on_meta() -> None:
    check_ways_to_run(compose.dora_compose, trained_arguments())


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter runs")
def test_launches_are_those_declared() -> None:
    check_launches(compose.dora_compose, trained_arguments(), 2)


def test_rows_of_the_table_of_ops() -> None:
    check_row_of_ops("dora_compose", rtol=1e-6, atol=1e-6)
