"""Tensors that autograd keeps, against graphs counted by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.memory.saved_tensors import saved_activations


def meta(*shape: int, grad: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


def test_saved_storages() -> None:
    weight, x = meta(8, grad=True), meta(4, 8)
    with saved_activations([weight], {"x": x}) as kept:
        y = x * weight  # keeps x, an input
        z = y.exp()  # keeps its output
        loss = (z[:, :4] * z[:, 4:]).sum()  # keeps two views of that same output
        (y.cos()).sum()  # keeps y in a graph that nothing holds
    assert loss.requires_grad and kept.bytes == 4 * 32
    loss.backward()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sin())
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def test_a_function_of_ours_is_seen_saving() -> None:
    x = meta(4, 8, grad=True)
    with saved_activations([x]) as kept:
        y = _Doubled.apply(x)
    assert y.requires_grad and kept.bytes == 4 * 32
