"""Twins of the reference with fewer operations, in plain differentiable torch: what runs where there is no kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import reference

# Up to 128 x 128 the weight W + scale up down is cheaper to form than its two products with x are to launch: forward + backward at rank 8 takes
# 0.54-0.86 of the reference's time (64 to 4096 rows, one x86 thread); from 256 x 256 on it takes more than the split form (1.1-1.4 of it).
MERGED = 128 * 128


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    drop: reference.Drop | None = None,
) -> Tensor:
    """reference.lora_linear by one product with W + scale up down where that matrix is small, else with the update added in its own product."""
    if weight is None or magnitude is not None or drop is not None or not _one_dtype(x, weight, down):
        return reference.lora_linear(x, weight, bias, down, up, scale, magnitude, norm, drop)
    if weight.numel() <= MERGED:
        return F.linear(x, torch.addmm(weight, up, down, alpha=scale), bias)
    y, hidden = F.linear(x, weight, bias), F.linear(x, down)
    return torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=scale).view(y.shape)


def lora_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """reference.lora_conv by one convolution with W + scale up down where that weight is small."""
    if weight is None or groups != 1 or weight.numel() > MERGED or not _one_dtype(x, weight, down):
        return reference.lora_conv(x, weight, bias, down, up, scale, stride, padding, dilation, groups)
    merged = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale).view(weight.shape)
    return F.conv2d(x, merged, bias, stride, padding, dilation)


def _one_dtype(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether nothing is cast: in a half-precision weight the sum would lose a small update."""
    return x.dtype == weight.dtype == down.dtype == reference.wide(x.dtype) and not torch.is_autocast_enabled(x.device.type)
