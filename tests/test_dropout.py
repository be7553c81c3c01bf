"""Keyed dropout in Triton (interpreted where there is no GPU): the reference's to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.kernels import reference
from tests.kernel_checks import (
    DEVICE,
    assert_equal,
    check_launches,
    check_row_of_ops,
    check_ways_to_run,
    draw,
)

pytest.importorskip("triton")
from lora_core.kernels import dropout

pytestmark = pytest.mark.usefixtures("patched_once")


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


def trained_arguments() -> tuple[Any, ...]:
    (x,) = draw(0, (3, 4, 5, 7))
    key = 0.5, 1, 2, torch.tensor(3, device=DEVICE), torch.arange(3, device=DEVICE)
    return x.requires_grad_(), *key


def test_compiled_whole_checkpointed_repeated_and_on_meta() -> None:
    check_ways_to_run(dropout.keyed_dropout, trained_arguments(), assert_equal)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter runs")
def test_launches_are_those_declared() -> None:
    check_launches(dropout.keyed_dropout, trained_arguments(), 2)


def test_rows_of_the_table_of_ops() -> None:
    check_row_of_ops("keyed_dropout")
