"""Operators as on CUDA, without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_core.memory.cuda_operators import WORKSPACES, as_cuda, has_meta_autocast
from lora_core.memory.saved_tensors import saved_activations


def test_rms_norm_is_torchs() -> None:
    torch.manual_seed(0)
    x, dy, weight = (
        torch.randn(3, 5, 8, dtype=torch.float64).float().requires_grad_(),
        torch.randn(3, 5, 8),
        torch.randn(8),
    )
    expected = F.rms_norm(x, (8,), weight, 1e-6)
    (gradient,) = torch.autograd.grad(expected, x, dy)
    with as_cuda():
        y = F.rms_norm(x, (8,), weight, 1e-6)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], gradient)


def test_autocast_on_meta_casts_as_on_the_cpu() -> None:
    """The CPU has autocast, and for these operators CUDA's lists are the CPU's."""
    found = []
    for device in ("cpu", "meta"):
        linear = nn.Linear(4, 6, device=device)
        x = torch.ones(2, 4, device=device)
        with as_cuda(), torch.autocast(device, torch.bfloat16):
            y = linear(x)
            with torch.autocast(device, torch.bfloat16, enabled=False):
                exact = linear(x)
        found.append((y.dtype, exact.dtype))
    assert found[0] == found[1] == (torch.bfloat16, torch.float32)
    assert not has_meta_autocast()
    with as_cuda(), torch.autocast("meta", torch.bfloat16):
        assert has_meta_autocast() and torch.is_autocast_enabled("meta")
        x = torch.ones(2, 4, device="meta", dtype=torch.bfloat16)
        assert F.layer_norm(x, (4,)).dtype == torch.float32  # as CUDA, and not the CPU, does


def test_what_is_recomputed_in_the_backward_is_as_on_cuda_too() -> None:
    q = torch.empty(1, 2, 16, 8, device="meta", requires_grad=True)
    attend = F.scaled_dot_product_attention
    with as_cuda(), saved_activations([q]) as plain:
        attend(q, q, q)
    with as_cuda():
        y = torch.utils.checkpoint.checkpoint(lambda x: attend(x, x, x), q, use_reentrant=False)
        y.sum().backward()
    assert q.grad is not None and plain.bytes < 2 * 4 * q.numel()


@pytest.mark.parametrize("last", [False, True])
def test_workspaces(last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(1, 8, 16, 16, device="meta").to(memory_format=layout)
    weight = torch.empty(4, 8, 3, 3, device="meta")
    size = WORKSPACES["convolution"](x, weight)
    assert size == (0 if last else 4 * 16 * 16 * (8 + 4))
    assert WORKSPACES["convolution"](x, torch.empty(4, 8, 1, 1, device="meta")) == 0
