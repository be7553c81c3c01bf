"""DoRA's gain and sum in Triton: one launch forward, one backward.

compose_kernel           y0 + strength ((gain - 1) (y0 - bias) + gain lora)
compose_backward_kernel  d_y0, d_lora and, in parts that are added in a fixed order, d_gain
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.ahead import Build
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import device_refusal
from lora_core.kernels.narrow import round_to

TYPES = (torch.float32, torch.bfloat16, torch.float16)
PER = 8  # tiles of rows of a program of the backward: 4096 x 320 gives 32 parts and 96 programs


@triton.jit
def _place(m, AREA, sb, sm):
    """Offsets of rows m, where AREA rows lie sm apart and the next AREA sb further; int64."""
    return (m // AREA).to(tl.int64) * sb + (m % AREA).to(tl.int64) * sm


@triton.jit
def compose_kernel(
    y0,
    bias,
    lora,
    gain,
    out,
    strength,
    ROWS,
    CHANNELS,
    AREA,
    ysb,
    ysm,
    ysc,
    lsb,
    lsm,
    lsc,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < ROWS)[:, None] & (n < CHANNELS)[None, :]
    at = _place(m, AREA, ysb, ysm)[:, None] + n[None, :] * ysc
    g = tl.load(gain + n, mask=n < CHANNELS, other=1.0).to(tl.float32)[None, :]
    base = tl.load(y0 + at, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(
        lora + _place(m, AREA, lsb, lsm)[:, None] + n[None, :] * lsc, mask=inside, other=0.0
    ).to(tl.float32)
    product = base
    if bias is not None:
        product = base - tl.load(bias + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + at,
        round_to(base + strength * ((g - 1) * product + g * change), out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def compose_backward_kernel(dy, y0, bias, lora, gain, d_y0, d_lora, parts, strength, ROWS, CHANNELS, AREA, PER,
                            dsb, dsm, dsc, ysb, ysm, ysc, lsb, lsm, lsc, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Program (i, j) does PER rows of BN channels and leaves its part of d_gain in parts[i]."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.program_id(0) * PER
    g = tl.load(gain + n, mask=n < CHANNELS, other=1.0).to(tl.float32)[None, :]
    total = tl.zeros((BN,), tl.float32)
    for start in range(begin, tl.minimum(begin + PER, ROWS), BM):
        m = start + tl.arange(0, BM)
        inside = (m < ROWS)[:, None] & (n < CHANNELS)[None, :]
        at = _place(m, AREA, ysb, ysm)[:, None] + n[None, :] * ysc
        lora_at = _place(m, AREA, lsb, lsm)[:, None] + n[None, :] * lsc
        slope = tl.load(
            dy + _place(m, AREA, dsb, dsm)[:, None] + n[None, :] * dsc, mask=inside, other=0.0
        ).to(tl.float32)
        value = tl.load(y0 + at, mask=inside, other=0.0).to(tl.float32) + tl.load(
            lora + lora_at, mask=inside, other=0.0
        ).to(tl.float32)
        if bias is not None:
            value -= tl.load(bias + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(slope * value, 0)
        tl.store(
            d_lora + lora_at, round_to(strength * g * slope, d_lora.dtype.element_ty), mask=inside
        )
        if d_y0 is not None:
            tl.store(
                d_y0 + at,
                round_to(slope + strength * ((g - 1) * slope), d_y0.dtype.element_ty),
                mask=inside,
            )
    tl.store(
        parts + tl.program_id(0).to(tl.int64) * CHANNELS + n, strength * total, mask=n < CHANNELS
    )


def compose_refusal(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float = 1.0
) -> str | None:
    """Why the composition's kernels do not run on these arguments, or None."""
    said = device_refusal(y0)
    if said is not None:
        return said
    if y0.dtype not in TYPES or lora.dtype not in TYPES or gain.dtype not in TYPES:
        return f"the output is {y0.dtype} and the update {lora.dtype}; there is a kernel for fp32, bf16 and fp16"
    if (
        y0.shape != lora.shape
        or not y0.numel()
        or _channel(y0, gain) is None
        or not (bias is None or bias.shape == gain.shape)
    ):
        return f"the shapes {list(y0.shape)}, {list(lora.shape)} and {list(gain.shape)} are not an output, its update and one gain a channel"
    if (
        not all(_strides(x, gain) for x in (y0, lora))
        or not gain.is_contiguous()
        or not (bias is None or bias.is_contiguous())
    ):
        return "an argument is neither contiguous nor channels_last"
    return "the bias wants a gradient" if bias is not None and bias.requires_grad else None


def _channel(y: Tensor, gain: Tensor) -> int | None:
    """The dimension of y that the gain [out] or [out, 1, 1] belongs to."""
    if gain.numel() != gain.shape[0] or gain.ndim > y.ndim:
        return None
    return y.ndim - gain.ndim if y.shape[y.ndim - gain.ndim] == len(gain) else None


def _strides(y: Tensor, gain: Tensor) -> tuple[int, int, int] | None:
    """(between areas, between rows, between channels) of y  as kernels address it; None where that takes more than three numbers."""
    if gain.ndim == 1:
        return (0, len(gain), 1) if y.is_contiguous() else None
    area = y[0, 0].numel()
    if y.is_contiguous():
        return len(gain) * area, 1, area
    channels_last = y.ndim == 4 and y.is_contiguous(memory_format=torch.channels_last)
    return (len(gain) * area, len(gain), 1) if channels_last else None


class _Tiles(NamedTuple):
    rows: int
    channels: int
    area: int  # rows that lie evenly apart
    bm: int
    bn: int


def _tiles(y: Tensor, gain: Tensor) -> _Tiles:
    """Tiles that are long where memory is contiguous."""
    strides, channels = _strides(y, gain), len(gain)
    assert strides is not None
    rows = y.numel() // channels
    return _Tiles(
        rows,
        channels,
        rows if gain.ndim == 1 else y[0, 0].numel(),
        *((16, 128) if strides[2] == 1 else (128, 16)),
    )


def dora_compose(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float = 1.0
) -> Tensor:
    """reference.dora_compose in one launch, and one more and the sum of its parts in the backward."""
    return _compose(y0, bias, lora, gain, float(strength))


@torch.library.custom_op("lora_core::dora_compose", mutates_args=())
def _compose(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float
) -> Tensor:
    out, tiles = torch.empty_like(y0), _tiles(y0, gain)
    grid = triton.cdiv(tiles.rows, tiles.bm), triton.cdiv(tiles.channels, tiles.bn)
    places = *_strides(y0, gain), *_strides(lora, gain)  # type: ignore[misc]
    compose_kernel[grid](
        y0, bias, lora, gain, out, strength, *tiles[:3], *places, *tiles[3:], num_warps=4
    )
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
    tiles = _tiles(y0, gain)
    grid = len(parts), triton.cdiv(tiles.channels, tiles.bn)
    places = *_strides(dy, gain), *_strides(y0, gain), *_strides(lora, gain)  # type: ignore[misc]
    outputs = d_y0 if base else None, d_lora, parts
    compose_backward_kernel[grid](
        dy,
        y0,
        bias,
        lora,
        gain,
        *outputs,
        strength,
        *tiles[:3],
        PER * tiles.bm,
        *places,
        *tiles[3:],
        num_warps=4,
    )
    return d_y0, d_lora, parts


def _compose_gradients(
    y0: Tensor, lora: Tensor, gain: Tensor, base: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _tiles(y0, gain)
    parts = gain.new_empty(
        triton.cdiv(tiles.rows, PER * tiles.bm), tiles.channels, dtype=torch.float32
    )
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


def _keep_compose(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y0, bias, lora, gain, ctx.strength = inputs
    ctx.save_for_backward(y0, bias, lora, gain)


def _compose_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    y0, bias, lora, gain = ctx.saved_tensors
    if _strides(dy, gain) is None:
        dy = dy.contiguous()
    base = ctx.needs_input_grad[0]
    d_y0, d_lora, parts = _compose_back(dy, y0, bias, lora, gain, ctx.strength, base)
    d_gain = parts.sum(0).view(gain.shape).to(gain.dtype) if ctx.needs_input_grad[3] else None
    return d_y0 if base else None, None, d_lora, d_gain, None


_compose.register_autograd(_compose_backward, setup_context=_keep_compose)


def _compose_cost(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float
) -> Cost:
    return Cost(1, 2 * y0.nbytes + lora.nbytes + gain.nbytes)


def _compose_back_cost(
    dy: Tensor, y0: Tensor, bias: Any, lora: Tensor, gain: Tensor, strength: float, base: bool
) -> Cost:
    tiles = _tiles(y0, gain)
    parts = 4 * triton.cdiv(tiles.rows, PER * tiles.bm) * tiles.channels
    return Cost(
        1, dy.nbytes + y0.nbytes * (2 if base else 1) + 2 * lora.nbytes + gain.nbytes + parts
    )


COSTS["lora_core::dora_compose"] = _compose_cost
COSTS["lora_core::dora_compose_backward"] = _compose_back_cost


def list_builds(full: bool) -> list[Build]:
    """Both kernels for every dtype and for either order of channels and pixels."""
    kernels, dtypes = (
        (compose_kernel, compose_backward_kernel),
        ("bf16", "fp32", "fp16") if full else ("bf16",),
    )
    return [
        _compose_build(kernel, dtype, last)
        for kernel in kernels
        for dtype in dtypes
        for last in (True, False)
    ]


def _compose_build(kernel: Any, dtype: str, channels_last: bool) -> Build:
    constants: dict[str, Any] = {"BM": 16, "BN": 128} if channels_last else {"BM": 128, "BN": 16}
    wide = {"gain", "parts"}
    constants |= {
        name: 1 for name in kernel.arg_names if name.endswith("sc" if channels_last else "sm")
    }  # the launcher makes a constant of a 1
    signature = {}
    for name in kernel.arg_names:
        pointer = name in ("dy", "y0", "bias", "lora", "gain", "out", "d_y0", "d_lora", "parts")
        kind = (
            f"*{'fp32' if name in wide else dtype}"
            if pointer
            else "fp32"
            if name == "strength"
            else "i32"
        )
        signature[name] = "constexpr" if name in constants else kind
    multiples = tuple(name for name, kind in signature.items() if kind == "i32")
    return Build(
        kernel,
        signature,
        constants,
        4,
        3,
        False,
        f"{kernel.__name__} {dtype} {'channels last' if channels_last else 'planes'}",
        multiples,
    )
