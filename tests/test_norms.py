"""DoRA's row norms by blocks of rows: their error, also where the terms nearly cancel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_core.kernels import reference
from tests.kernel_checks import (
    DEVICE,
    NormArguments,
    check_ways_to_run,
    draw,
    error,
    norm_arguments,
)

pytest.importorskip("triton")
from lora_core.kernels import dora, norms

pytestmark = pytest.mark.usefixtures("patched_once")


def cancelling(
    residual: float, rows: int = 64, columns: int = 1280, rank: int = 16
) -> tuple[NormArguments, Tensor]:
    """W = -s B A + a rest of `residual` ||W||, and the exact norms."""
    rest, down, up = draw(11, (rows, columns), (rank, columns), (rows, rank))
    base = -0.5 * up @ down
    weight = (
        base + residual * rest * base.norm(dim=1, keepdim=True) / rest.norm(dim=1, keepdim=True)
        if residual < 1
        else rest * base.norm() / rest.norm()
    )
    return (weight, down, up, 0.5), reference.dora_norm(
        weight.double(), down.double(), up.double(), 0.5
    )


def factored(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    products = 2 * scale * (weight @ down.t()) + scale**2 * up @ (down @ down.t())
    return (weight.square().sum(1) + (products * up).sum(1)).clamp(min=0).sqrt()


@pytest.mark.parametrize("residual", [1.0, 0.1, 0.01, 0.001])
def test_rows_that_nearly_cancel_are_as_good_as_the_dense_form(residual: float) -> None:
    args, exact = cancelling(residual, 16, 320)
    eager = ((reference.dora_norm(*args) - exact) / exact).abs().max()
    for fast in (dora.dora_norm, norms.dora_norm):
        assert ((fast(*args) - exact) / exact).abs().max() <= 2 * eager + 1e-7
    if residual < 0.1:
        assert (
            (factored(*args) - exact) / exact
        ).abs().max() > 20 * eager  # why that form is not taken


def test_the_norm_of_a_bf16_weight_is_good_to_1e6_under_autocast_too() -> None:
    weight, down, up, _ = norm_arguments(40, (1280,), 16, torch.bfloat16)
    exact = reference.dora_norm(weight.double(), down.double(), 0.01 * up.double(), 1.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert error(norms.dora_norm(weight, down, 0.01 * up, 1.0), exact) < 1e-6


def test_blocks_of_rows_do_not_change_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    args = norm_arguments(23, (50,), 3, torch.bfloat16)
    whole = norms.dora_norm(*args)
    for size in (1, 100, 400):
        monkeypatch.setattr(norms, "BLOCK", size)
        torch.testing.assert_close(norms.dora_norm(*args), whole, rtol=3e-7, atol=0)


def test_compiled_whole_checkpointed_and_on_meta() -> None:
    weight, down, up, scale = norm_arguments(9, (32,), 3)
    check_ways_to_run(norms.dora_norm, (weight, down.requires_grad_(), up.requires_grad_(), scale))
