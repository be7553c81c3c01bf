"""Which arguments the Triton kernels of lora_linear, lora_grouped and lora_conv support.

Imports no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.kernels.device import FLOATS, device_refusal
from lora_core.kernels.reference import Drop, Member


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
    member = Member(weight, bias, down, up, scale, *rest)  # type: ignore[arg-type]
    return grouped_supports(x, (member,))


def grouped_supports(x: Tensor, members: tuple[Member, ...]) -> str | None:
    """Why lora_grouped has no Triton kernel for these arguments, or None."""
    for weight, bias, down, up, _, magnitude, norm, drop in members:
        factors = [down, up]
        if magnitude is not None and norm is not None:
            factors += [magnitude, norm]
        reason = _refusal(x, weight, bias, factors) or _drop_refusal(drop)
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
        return f"the convolution has {groups} groups; the kernels support one"
    if resolve_padding(padding, down.shape[2:], dilation) is None:
        kernel = f"{down.shape[2]} x {down.shape[3]}"
        return f'padding="same" of a {kernel} kernel is not the same on both sides'
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


def _refusal(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: list[Tensor]
) -> str | None:
    reason = device_refusal(x)
    if reason:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {_dtype_name(x.dtype)}; the kernels support float32, bfloat16 and float16"
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        target = _dtype_name(torch.get_autocast_dtype(kind))
        return f"autocast would cast x from {_dtype_name(x.dtype)} to {target}"
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype != x.dtype:
            frozen = _dtype_name(tensor.dtype)
            return f"x is {_dtype_name(x.dtype)} and the frozen layer {frozen}"
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return "the layer requires a gradient; the kernels support frozen layers"
    for factor in factors:
        if factor.dtype != torch.float32:
            found = _dtype_name(factor.dtype)
            return f"an adapter's factor is {found}; the kernels read float32"
    return None


def _drop_refusal(drop: Drop | None) -> str | None:
    if drop is None or 0 <= drop.p < 1:
        return None
    return f"dropout of p = {drop.p}; the kernels divide by 1 - p"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
