"""Triton kernels of dora_compose, DoRA's gain and sum: one launch forward, one backward.

compose_kernel           y0 + strength ((gain - 1) (y0 - bias) + gain lora)
compose_backward_kernel  d_y0, d_lora and, in parts that are added in a fixed order, d_gain
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.ahead import Build, describe_launch
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import FLOATS, device_refusal
from lora_core.kernels.device_functions import Strides, round_to, row_offsets

PER = 8  # tiles of rows of a program of the backward: 4096 x 320 gives 32 parts and 96 programs


# ---------------------------------------------------------------- kernels


@triton.jit
def element_offsets(m, n, area, at):
    """Offsets of rows m and channels n of a matrix with these strides."""
    return row_offsets(m, area, at.image, at.row)[:, None] + n[None, :] * at.feature


@triton.jit
def compose_kernel(
    y0, bias, lora, gain, out, strength, rows, channels, area, y0_at, lora_at,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = y0 + strength ((gain - 1) (y0 - bias) + gain lora). Grid: row tiles, channel tiles."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (n < channels)[None, :]
    at = element_offsets(m, n, area, y0_at)
    g = tl.load(gain + n, mask=n < channels, other=1.0).to(tl.float32)[None, :]
    base = tl.load(y0 + at, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(lora + element_offsets(m, n, area, lora_at), mask=inside, other=0.0)
    linear = base
    if bias is not None:
        linear = base - tl.load(bias + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
    total = base + strength * ((g - 1) * linear + g * change.to(tl.float32))
    tl.store(out + at, round_to(total, out.dtype.element_ty), mask=inside)


@triton.jit
def compose_backward_kernel(
    dy, y0, bias, lora, gain, d_y0, d_lora, parts, strength, rows, channels, area, PER,
    dy_at, y0_at, lora_at, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """d_y0, d_lora and d_gain. Program (i, j) computes PER row tiles of BN channels; its part of
    d_gain goes to parts[i].
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.program_id(0) * PER
    g = tl.load(gain + n, mask=n < channels, other=1.0).to(tl.float32)[None, :]
    total = tl.zeros((BN,), tl.float32)
    for start in range(begin, tl.minimum(begin + PER, rows), BM):
        m = start + tl.arange(0, BM)
        inside = (m < rows)[:, None] & (n < channels)[None, :]
        base_at = element_offsets(m, n, area, y0_at)
        change_at = element_offsets(m, n, area, lora_at)
        slope = tl.load(dy + element_offsets(m, n, area, dy_at), mask=inside, other=0.0)
        slope = slope.to(tl.float32)
        value = tl.load(y0 + base_at, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(lora + change_at, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value -= tl.load(bias + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(slope * value, 0)
        change = round_to(strength * g * slope, d_lora.dtype.element_ty)
        tl.store(d_lora + change_at, change, mask=inside)
        if d_y0 is not None:
            base = round_to(slope + strength * ((g - 1) * slope), d_y0.dtype.element_ty)
            tl.store(d_y0 + base_at, base, mask=inside)
    part = parts + tl.program_id(0).to(tl.int64) * channels
    tl.store(part + n, strength * total, mask=n < channels)


# ---------------------------------------------------------------- arguments


def compose_refusal(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float = 1.0
) -> str | None:
    """Why the composition's kernels do not run on these arguments, or None."""
    reason = device_refusal(y0)
    if reason is not None:
        return reason
    if y0.dtype not in FLOATS or lora.dtype not in FLOATS or gain.dtype not in FLOATS:
        found = f"the output is {y0.dtype} and the update {lora.dtype}"
        return f"{found}; there is a kernel for fp32, bf16 and fp16"
    one_bias = bias is None or bias.shape == gain.shape
    if y0.shape != lora.shape or not y0.numel() or not _fits(y0, gain) or not one_bias:
        shapes = f"{list(y0.shape)}, {list(lora.shape)} and {list(gain.shape)}"
        return f"the shapes {shapes} are not an output, its update and one gain a channel"
    vectors = [x for x in (gain, bias) if x is not None]
    dense = all(x.is_contiguous() for x in vectors)
    if not dense or _find_strides(y0, gain) is None or _find_strides(lora, gain) is None:
        return "an argument is neither contiguous nor channels_last"
    return "the bias requires a gradient" if bias is not None and bias.requires_grad else None


def _fits(y: Tensor, gain: Tensor) -> bool:
    """Whether the gain [out] or [out, 1, 1] belongs to a dimension of y."""
    if gain.numel() != gain.shape[0] or gain.ndim > y.ndim:
        return False
    return y.shape[y.ndim - gain.ndim] == len(gain)


def _find_strides(y: Tensor, gain: Tensor) -> Strides | None:
    """The strides of y's rows and channels; None for a layout that needs more than three."""
    channels = len(gain)
    if gain.ndim == 1:
        return Strides(channels, channels, 1) if y.is_contiguous() else None
    area = y[0, 0].numel()
    if y.is_contiguous():
        return Strides(channels * area, 1, area)
    channels_last = y.ndim == 4 and y.is_contiguous(memory_format=torch.channels_last)
    return Strides(channels * area, channels, 1) if channels_last else None


class _Tiling(NamedTuple):
    rows: int
    channels: int
    area: int  # rows of an image, 1 where rows have one stride
    bm: int
    bn: int


def _choose_tiling(y: Tensor, gain: Tensor) -> _Tiling:
    """Tiles that are long along the contiguous dimension."""
    strides = _find_strides(y, gain)
    assert strides is not None
    bm, bn = (16, 128) if strides.feature == 1 else (128, 16)
    area = 1 if gain.ndim == 1 else y[0, 0].numel()
    return _Tiling(y.numel() // len(gain), len(gain), area, bm, bn)


# ---------------------------------------------------------------- launches


def dora_compose(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float = 1.0
) -> Tensor:
    """reference.dora_compose in one launch; backward in one launch and a sum over its parts."""
    return _compose(y0, bias, lora, gain, float(strength))


@torch.library.custom_op("lora_core::dora_compose", mutates_args=())
def _compose(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float
) -> Tensor:
    out = torch.empty_like(y0)
    tiling = _choose_tiling(y0, gain)
    rows, channels, area, bm, bn = tiling
    grid = triton.cdiv(rows, bm), triton.cdiv(channels, bn)
    strides = _find_strides(y0, gain), _find_strides(lora, gain)
    tensors = y0, bias, lora, gain, out
    compose_kernel[grid](*tensors, strength, rows, channels, area, *strides, bm, bn, num_warps=4)
    return out


@torch.library.custom_op("lora_core::dora_compose_backward", mutates_args=())
def _compose_back(
    dy: Tensor,
    y0: Tensor,
    bias: Tensor | None,
    lora: Tensor,
    gain: Tensor,
    strength: float,
    base: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_y0, or an empty tensor without `base`, d_lora, the parts of d_gain [parts, out] fp32)"""
    d_y0, d_lora, parts = _compose_gradients(y0, lora, gain, base)
    rows, channels, area, bm, bn = _choose_tiling(y0, gain)
    grid = len(parts), triton.cdiv(channels, bn)
    tensors = dy, y0, bias, lora, gain, d_y0 if base else None, d_lora, parts
    strides = _find_strides(dy, gain), _find_strides(y0, gain), _find_strides(lora, gain)
    sizes = rows, channels, area, PER * bm
    compose_backward_kernel[grid](*tensors, strength, *sizes, *strides, bm, bn, num_warps=4)
    return d_y0, d_lora, parts


def _compose_gradients(
    y0: Tensor, lora: Tensor, gain: Tensor, base: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized d_y0 (empty without `base`), d_lora and parts of d_gain."""
    tiling = _choose_tiling(y0, gain)
    count = triton.cdiv(tiling.rows, PER * tiling.bm)
    parts = gain.new_empty(count, tiling.channels, dtype=torch.float32)
    return torch.empty_like(y0) if base else y0.new_empty(0), torch.empty_like(lora), parts


@_compose.register_fake
def _(y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float) -> Tensor:
    return torch.empty_like(y0)


@_compose_back.register_fake
def _(
    dy: Tensor,
    y0: Tensor,
    bias: Tensor | None,
    lora: Tensor,
    gain: Tensor,
    strength: float,
    base: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _compose_gradients(y0, lora, gain, base)


def _save_compose(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y0, bias, lora, gain, ctx.strength = inputs
    ctx.save_for_backward(y0, bias, lora, gain)


def _compose_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    y0, bias, lora, gain = ctx.saved_tensors
    if _find_strides(dy, gain) is None:
        dy = dy.contiguous()
    base = ctx.needs_input_grad[0]
    d_y0, d_lora, parts = _compose_back(dy, y0, bias, lora, gain, ctx.strength, base)
    d_gain = parts.sum(0).view(gain.shape).to(gain.dtype) if ctx.needs_input_grad[3] else None
    return d_y0 if base else None, None, d_lora, d_gain, None


_compose.register_autograd(_compose_backward, setup_context=_save_compose)


def _compose_cost(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float
) -> Cost:
    return Cost(1, 2 * y0.nbytes + lora.nbytes + gain.nbytes)


def _compose_back_cost(
    dy: Tensor, y0: Tensor, bias: Any, lora: Tensor, gain: Tensor, strength: float, base: bool
) -> Cost:
    tiling = _choose_tiling(y0, gain)
    parts = 4 * triton.cdiv(tiling.rows, PER * tiling.bm) * tiling.channels
    moved = dy.nbytes + y0.nbytes * (2 if base else 1) + 2 * lora.nbytes + gain.nbytes
    return Cost(1, moved + parts)


COSTS["lora_core::dora_compose"] = _compose_cost
COSTS["lora_core::dora_compose_backward"] = _compose_back_cost


# ---------------------------------------------------------------- ahead of time


def list_compose_builds(full: bool) -> list[Build]:
    """Both kernels for every dtype and for either order of channels and pixels."""
    dtypes = ("bf16", "fp32", "fp16") if full else ("bf16",)
    builds = []
    for kernel, dtype, last in product(
        (compose_kernel, compose_backward_kernel), dtypes, (True, False)
    ):
        builds.append(_compose_build(kernel, dtype, last))
    return builds


def _compose_build(kernel: Any, dtype: str, channels_last: bool) -> Build:
    """The kernel on two images [320, 32, 32]."""
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y0 = torch.empty(2, 320, 32, 32, dtype=kind, device="meta", memory_format=layout)
    gain = torch.empty(320, 1, 1, device="meta")
    rows, channels, area, bm, bn = _choose_tiling(y0, gain)
    strides = _find_strides(y0, gain)
    arguments: dict[str, Any] = {"gain": gain, "parts": gain, "strength": 1.0}
    arguments |= dict.fromkeys(("dy", "y0", "bias", "lora", "out", "d_y0", "d_lora"), y0)
    arguments |= {"rows": rows, "channels": channels, "area": area, "PER": PER * bm}
    arguments |= {"dy_at": strides, "y0_at": strides, "lora_at": strides, "BM": bm, "BN": bn}
    name = f"{kernel.__name__} {dtype} {'channels last' if channels_last else 'planes'}"
    return describe_launch(kernel, arguments, warps=4, stages=3, name=name)
