"""A candidate for an adapter operation: lora_linear with the small weight merged first.

    python -m benchmarks.kernels --op lora_linear --candidate examples/my_kernel.py:lora_linear

A candidate takes the arguments of the op's reference in lora_core/kernels/reference.py. The command
compares its outputs and gradients with the reference in float64 and times both. A first kernel
needs the first six arguments only (--case lora). In a training run:

    LORA_CANDIDATE=examples/my_kernel.py:lora_linear python train.py configs/toy_pti.toml
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import reference


def lora_linear(
    x: Tensor,  # [..., i]
    weight: Tensor | None,  # [o, i]
    bias: Tensor | None,  # [o]
    down: Tensor,  # [r, i]
    up: Tensor,  # [o, r]
    scale: float,
    *rest: object,  # magnitude, norm and drop: DoRA and dropout
) -> Tensor:
    """x (W + scale up down)^T + bias: one large product. The reference covers the other cases."""
    if weight is None or any(value is not None for value in rest):
        return reference.lora_linear(x, weight, bias, down, up, scale, *rest)
    merged = torch.addmm(weight.to(up.dtype), up, down, alpha=scale)
    return F.linear(x, merged.to(x.dtype), bias)
