"""DoRA's row norms in Triton: the tiled form, one launch for a layer or for every layer of a model.

    norm_kernel   ||W_j + s B_j A|| of one layer; W is read once, B A lives in registers only (its accuracy beside the other forms': norms.py)
    norms_kernel  the same for all layers that share a weight dtype and a kind of layout, through a table of addresses

The table of norms_kernel is made and copied to the device when a set of layers is met for the first time and kept for good, so that a CUDA graph
captured after one plain step finds it, copies nothing, and replays. Its content follows from its key (addresses, shapes, scales) and cannot go stale.
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.errors import UserError
from lora_core.kernels.ahead import Build
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import device_refusal
from lora_core.kernels.norms import (
    NormLayer,
    count_groups,
    norm_backward,
    norm_gradients,
    save_norm,
)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELDS = 12  # int64 numbers of a layer in the table
ROWS, COLUMNS = 16, 128  # the tile of W; with ranks up to 16 94 registers (performance notes 1.4)


# ---------------------------------------------------------------- kernels


@triton.jit
def _row_norms(w, down, up, first, rows, columns, rank, scale, inner, inner_stride, outer_stride,
               PLAIN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ONCE: tl.constexpr):  # fmt: skip
    """The norms of rows first ... first + BN. Column c of W lies in memory at c, of down at c too or, not PLAIN, where W is channels_last and down
    is not or the reverse, at (c % inner) * inner_stride + (c // inner) * outer_stride. ONCE: the ranks fit in one block of BR."""
    n, r = first + tl.arange(0, BN), tl.arange(0, BR)
    row = n.to(tl.int64)[:, None]
    u = tl.load(
        up + row * rank + r[None, :], mask=(n < rows)[:, None] & (r < rank)[None, :], other=0.0
    )
    total = tl.zeros((BN,), tl.float32)
    for k in range(0, columns, BK):
        c = k + tl.arange(0, BK)
        at = c if PLAIN else (c % inner) * inner_stride + (c // inner) * outer_stride
        wide = tl.load(
            w + row * columns + c[None, :],
            mask=(n < rows)[:, None] & (c < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        if ONCE:
            d = tl.load(
                down + r[:, None] * columns + at[None, :],
                mask=(r < rank)[:, None] & (c < columns)[None, :],
                other=0.0,
            )
            wide += scale * tl.dot(u, d, input_precision="tf32x3")
        else:
            product = tl.zeros((BN, BK), tl.float32)
            for begin in range(0, rank, BR):
                s = begin + r
                part = tl.load(
                    up + row * rank + s[None, :],
                    mask=(n < rows)[:, None] & (s < rank)[None, :],
                    other=0.0,
                )
                d = tl.load(
                    down + s[:, None] * columns + at[None, :],
                    mask=(s < rank)[:, None] & (c < columns)[None, :],
                    other=0.0,
                )
                product = tl.dot(part, d, product, input_precision="tf32x3")
            wide += scale * product
        total += tl.sum(wide * wide, 1)
    return n, tl.sqrt_rn(total)


@triton.jit
def norm_kernel(w, down, up, out, rows, columns, rank, scale, inner, inner_stride, outer_stride,
                PLAIN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ONCE: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * BN
    n, norm = _row_norms(
        w,
        down,
        up,
        first,
        rows,
        columns,
        rank,
        scale,
        inner,
        inner_stride,
        outer_stride,
        PLAIN,
        BN,
        BK,
        BR,
        ONCE,
    )
    tl.store(out + n, norm, mask=n < rows)


@triton.jit
def norms_kernel(table, tiles, out, W: tl.constexpr, ALIGNED: tl.constexpr, PLAIN: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ONCE: tl.constexpr, FIELDS: tl.constexpr):  # fmt: skip
    """Program i does rows tiles[i, 1] ... of the layer at row tiles[i, 0] of the table."""
    tile = tiles + tl.program_id(0) * 2
    entry, first = table + tl.load(tile) * FIELDS, tl.load(tile + 1)
    w = tl.load(entry).to(tl.pointer_type(W))
    down = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    up = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    rows, columns, rank = (
        tl.load(entry + 3).to(tl.int32),
        tl.load(entry + 4).to(tl.int32),
        tl.load(entry + 5).to(tl.int32),
    )
    start, scale = tl.load(entry + 6), tl.load(entry + 7).to(tl.int32).to(tl.float32, bitcast=True)
    inner, inner_stride, outer_stride = (
        tl.load(entry + 8).to(tl.int32),
        tl.load(entry + 9).to(tl.int32),
        tl.load(entry + 10).to(tl.int32),
    )
    if ALIGNED:
        w, down, columns = (
            tl.multiple_of(w, 16),
            tl.multiple_of(down, 16),
            tl.multiple_of(columns, 16),
        )
    n, norm = _row_norms(
        w,
        down,
        up,
        first,
        rows,
        columns,
        rank,
        scale,
        inner,
        inner_stride,
        outer_stride,
        PLAIN,
        BN,
        BK,
        BR,
        ONCE,
    )
    tl.store(out + start + n, norm, mask=n < rows)


# ---------------------------------------------------------------- norms


def norm_refusal(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> str | None:
    """Why the tiled norm does not run on these arguments, or None."""
    said = device_refusal(weight)
    if said is not None:
        return said
    if weight.dtype not in TYPES or down.dtype != torch.float32 or up.dtype != torch.float32:
        return f"the weight is {weight.dtype} and its factors {down.dtype}; there is a kernel for fp32, bf16 and fp16 beside fp32"
    if count_groups(down, up) != 1:
        return "the convolution has groups"
    if weight.requires_grad:
        return "the weight wants a gradient"
    if _columns(weight) is None or _columns(down) is None or not up.is_contiguous():
        return "the weight or a factor is neither contiguous nor channels_last"
    return "there are no rows" if not weight.numel() else None


def norms_refusal(layers: tuple[NormLayer, ...]) -> str | None:
    """Why one of the layers is refused, or None."""
    if not layers:
        return "there are no layers"
    return next(
        (said for said in (norm_refusal(*layer) for layer in layers) if said is not None), None
    )


def _columns(x: Tensor) -> tuple[int, int, int] | None:
    """(channels, their stride, the stride of the window's places) where the rows of x are dense blocks one behind the other; else None."""
    channels, places = x.shape[1], x[0, 0].numel()
    if x.is_contiguous():
        return channels, places, 1
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return channels, 1, channels
    return None


class _Addressing(NamedTuple):
    plain: bool
    inner: int
    inner_stride: int
    outer_stride: int


def _addressing(weight: Tensor, down: Tensor) -> _Addressing:
    """Where in a row of down the column is that lies at c in a row of W."""
    w, d = _columns(weight), _columns(down)
    assert w is not None and d is not None
    channels, places = w[0], weight[0, 0].numel()
    plain = w == d or channels == 1 or places == 1
    if w[1] == 1:  # channels fastest
        return _Addressing(plain, channels, d[1], d[2])
    return _Addressing(plain, places, d[2], d[1])


def _rank_block(rank: int) -> tuple[int, bool]:
    """(BR, ONCE)"""
    return min(32, max(16, triton.next_power_of_2(rank))), rank <= 32


def _width(once: bool) -> int:
    """BK: a second block of ranks takes registers that 128 columns have not left (200 bytes spilled on sm_90)."""
    return COLUMNS if once else COLUMNS // 2


def _stages(once: bool) -> int:
    """For the same reason: with 3 of them 8 bytes are spilled on sm_80."""
    return 3 if once else 2


def dora_norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """reference.dora_norm in one launch, differentiable in down and up."""
    return _norm(weight, down, up, float(scale))


def dora_norms(layers: tuple[NormLayer, ...]) -> tuple[Tensor, ...]:
    """dora_norm of every layer in one launch for each dtype of weights and kind of layout, differentiable in the factors."""
    norms: list[Tensor | None] = [None] * len(layers)
    for plan, members in _kinds(layers).items():
        weights, downs, ups, scales = zip(*(layers[i] for i in members), strict=True)
        flat = _norms(
            list(weights),
            list(downs),
            list(ups),
            [float(s) for s in scales],
            plan.aligned,
            plan.plain,
            plan.once,
        )
        for i, norm in zip(members, flat.split([len(w) for w in weights]), strict=True):
            norms[i] = norm
    return tuple(norm for norm in norms if norm is not None)


class _Kind(NamedTuple):
    """What one launch has in common."""

    dtype: torch.dtype
    aligned: bool
    plain: bool
    once: bool


def _kinds(layers: tuple[NormLayer, ...]) -> dict[_Kind, list[int]]:
    kinds: dict[_Kind, list[int]] = {}
    for i, (weight, down, up, _) in enumerate(layers):
        aligned = weight[0].numel() % 16 == 0
        kinds.setdefault(
            _Kind(weight.dtype, aligned, _addressing(weight, down).plain, up.shape[1] <= 32), []
        ).append(i)
    return kinds


@torch.library.custom_op("lora_core::dora_norm", mutates_args=())
def _norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    (rows, rank), columns = up.shape[:2], weight[0].numel()
    out, at, (block, once) = (
        weight.new_empty(rows, dtype=torch.float32),
        _addressing(weight, down),
        _rank_block(rank),
    )
    grid = (triton.cdiv(rows, ROWS),)
    norm_kernel[grid](
        weight,
        down,
        up,
        out,
        rows,
        columns,
        rank,
        scale,
        *at[1:],
        at.plain,
        ROWS,
        _width(once),
        block,
        once,
        num_warps=4,
        num_stages=_stages(once),
    )
    return out


@torch.library.custom_op("lora_core::dora_norms", mutates_args=())
def _norms(
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    aligned: bool,
    plain: bool,
    once: bool,
) -> Tensor:
    table, tiles = _table(list(zip(weights, downs, ups, scales, strict=True)))
    out = weights[0].new_empty(sum(map(len, weights)), dtype=torch.float32)
    aligned = aligned and all(x.data_ptr() % 16 == 0 for x in (*weights, *downs))
    block = max(_rank_block(up.shape[1])[0] for up in ups)
    kind = TYPES[weights[0].dtype], aligned, plain
    norms_kernel[(len(tiles),)](
        table,
        tiles,
        out,
        *kind,
        ROWS,
        _width(once),
        block,
        once,
        FIELDS,
        num_warps=4,
        num_stages=_stages(once),
    )
    return out


_tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def _table(layers: list[NormLayer]) -> tuple[Tensor, Tensor]:
    """(addresses [layers, FIELDS] int64, tiles [programs, 2] int32) on the layers' device. Raises UserError in a CUDA graph that meets them first."""
    device = layers[0][0].device
    entries = []
    for (weight, down, up, scale), start in zip(
        layers, accumulate((len(layer[0]) for layer in layers), initial=0)
    ):
        bits = struct.unpack("<i", struct.pack("<f", scale))[0]
        sizes = len(weight), weight[0].numel(), up.shape[1], start, bits
        entries.append(
            (
                weight.data_ptr(),
                down.data_ptr(),
                up.data_ptr(),
                *sizes,
                *_addressing(weight, down)[1:],
                0,
            )
        )
    key = (device, *entries)
    if key not in _tables:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UserError(
                "dora_norms met its layers for the first time inside a CUDA graph; run one step before the capture"
            )
        tiles = [
            (i, first) for i, entry in enumerate(entries) for first in range(0, entry[3], ROWS)
        ]
        _tables[key] = (
            torch.tensor(entries, dtype=torch.int64).to(device),
            torch.tensor(tiles, dtype=torch.int32).to(device),
        )
    return _tables[key]


@_norm.register_fake
def _(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return weight.new_empty(len(weight), dtype=torch.float32)


@_norms.register_fake
def _(
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    aligned: bool,
    plain: bool,
    once: bool,
) -> Tensor:
    return weights[0].new_empty(sum(map(len, weights)), dtype=torch.float32)


def _keep_norms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, downs, ups, ctx.scales, *_ = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *downs, *ups, output)


def _norms_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    *tensors, flat = ctx.saved_tensors
    weights, downs, ups = (tensors[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
    rows = [len(w) for w in weights]
    layers = zip(weights, downs, ups, ctx.scales, flat.split(rows), g.split(rows), strict=True)
    gradients = [norm_gradients(*layer) for layer in layers]
    return (
        [None] * ctx.count,
        [d for d, _ in gradients],
        [u for _, u in gradients],
        None,
        None,
        None,
        None,
    )


_norm.register_autograd(norm_backward, setup_context=save_norm)
_norms.register_autograd(_norms_backward, setup_context=_keep_norms)


def _norm_cost(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Cost:
    return Cost(1, weight.nbytes + down.nbytes + up.nbytes + 4 * len(weight), True)


def _norms_cost(
    weights: list[Tensor], downs: list[Tensor], ups: list[Tensor], scales: list[float], *kind: bool
) -> Cost:
    return Cost(
        1, sum(x.nbytes for x in (*weights, *downs, *ups)) + 4 * sum(map(len, weights)), True
    )


COSTS["lora_core::dora_norm"] = _norm_cost
COSTS["lora_core::dora_norms"] = _norms_cost


# ---------------------------------------------------------------- ahead of time


def list_builds(full: bool) -> list[Build]:
    """The configurations: every dtype of weights, layout and block of ranks; a few of each kernel without `full`."""
    found = []
    for dtype in ("bf16", "fp32", "fp16") if full else ("bf16",):
        for rank in (16, 32, 128) if full else (16, 128):
            for plain in (True, False) if full else (True,):
                found += [_norm_build(dtype, rank, plain), _norms_build(dtype, rank, plain, True)]
                found += [_norms_build(dtype, rank, plain, False)] if full else []
    return found


def _blocks(rank: int, plain: bool) -> dict[str, Any]:
    block, once = _rank_block(rank)
    return {"PLAIN": plain, "BN": ROWS, "BK": _width(once), "BR": block, "ONCE": once}


def _norm_build(dtype: str, rank: int, plain: bool) -> Build:
    constants = _blocks(rank, plain)
    signature = {
        "w": f"*{dtype}",
        "down": "*fp32",
        "up": "*fp32",
        "out": "*fp32",
        "rows": "i32",
        "columns": "i32",
        "rank": "i32",
        "scale": "fp32",
    }
    signature |= {"inner": "i32", "inner_stride": "i32", "outer_stride": "i32"} | dict.fromkeys(
        constants, "constexpr"
    )
    name = f"norm {dtype} rank {rank} {'plain' if plain else 'channels_last'}"
    return Build(
        norm_kernel,
        signature,
        constants,
        4,
        _stages(rank <= 32),
        True,
        name,
        ("rows", "columns", "rank"),
    )


def _norms_build(dtype: str, rank: int, plain: bool, aligned: bool) -> Build:
    weight = {"bf16": tl.bfloat16, "fp32": tl.float32, "fp16": tl.float16}[dtype]
    constants = {"W": weight, "ALIGNED": aligned} | _blocks(rank, plain) | {"FIELDS": FIELDS}
    signature = {"table": "*i64", "tiles": "*i32", "out": "*fp32"} | dict.fromkeys(
        constants, "constexpr"
    )
    name = f"norms {dtype} rank {rank} {'plain' if plain else 'channels_last'}{'' if aligned else ' odd'}"
    return Build(norms_kernel, signature, constants, 4, _stages(rank <= 32), True, name)
