"""What the Triton twins of lora_linear, lora_grouped and lora_conv accept. Needs no Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.device import device_refusal
from lora_core.kernels.reference import Drop, Member

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_supports(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    *rest: object,
) -> str | None:
    """Why lora_linear has no Triton kernel for these arguments, or None."""
    return grouped_supports(x, (Member(weight, bias, down, up, scale, *rest),))  # type: ignore[arg-type]


def grouped_supports(x: Tensor, members: tuple[Member, ...]) -> str | None:
    """Why lora_grouped has no Triton kernel for these arguments, or None."""
    for weight, bias, down, up, _, magnitude, norm, drop in members:
        wide = [down, up] if magnitude is None or norm is None else [down, up, magnitude, norm]
        reason = _refusal(x, weight, bias, wide) or _drop_refusal(drop)
        if reason:
            return reason
    return None


def conv_supports(
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
) -> str | None:
    """Why lora_conv has no Triton kernel for these arguments, or None."""
    if groups != 1:
        return f"the convolution has {groups} groups; the kernels know one"
    if resolve_padding(padding, down.shape[2:], dilation) is None:
        return f'padding="same" of a {down.shape[2]} x {down.shape[3]} kernel is not the same on both sides'
    return _refusal(x, weight, bias, [down, up])


def resolve_padding(
    padding: tuple[int, ...] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...] | None:
    """The padding of each side as numbers, or None where its two sides differ."""
    if not isinstance(padding, str):
        return tuple(padding)
    if padding == "valid":
        return (0,) * len(kernel)
    both = [d * (k - 1) for k, d in zip(kernel, dilation)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


def conv_class(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    *geometry: Any,
) -> str:
    """The class of lora_conv's arguments: the kernel's size, input pixels, in, out and rank, rounded up to powers of two, and the stride."""
    pixels, sizes = len(x) * math.prod(x.shape[2:]), "x".join(map(str, down.shape[2:]))
    numbers = [
        1 << max(value - 1, 0).bit_length() for value in (pixels, x.shape[1], len(up), len(down))
    ]
    return f"{sizes} {numbers[0]},{numbers[1]},{numbers[2]} rank {numbers[3]} stride {'x'.join(map(str, geometry[0]))}"


def _refusal(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, wide: list[Tensor]
) -> str | None:
    reason = device_refusal(x)
    if reason:
        return reason
    if x.dtype not in DTYPES:
        return f"x is {_name(x)}; the kernels know float32, bfloat16 and float16"
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return f"autocast would cast x from {_name(x)} to {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}"
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype != x.dtype:
            return f"x is {_name(x)} and the frozen layer {_name(tensor)}"
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return "the layer wants a gradient itself; the kernels know frozen ones"
    return next(
        (
            f"an adapter's factor is {_name(factor)}; the kernels read float32"
            for factor in wide
            if factor.dtype != torch.float32
        ),
        None,
    )


def _drop_refusal(drop: Drop | None) -> str | None:
    return (
        None
        if drop is None or 0 <= drop.p < 1
        else f"dropout of p = {drop.p}; the kernels divide by 1 - p"
    )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
