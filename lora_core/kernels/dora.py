"""Triton kernels of DoRA's row norms, one launch for a layer or for all layers of a model.

    norm_kernel   ||W_j + s B_j A|| of one layer; W is read once, B A is only in registers (the
                  tiled form of norms.py, where its accuracy is compared)
    norms_kernel  the same for all layers that share a weight dtype and a kind of layout, through a
                  table of addresses

The table of norms_kernel is made and copied to the device at the first call with a set of layers,
and kept: a CUDA graph captured after one eager step uses it without a copy. Its content follows
from its key (addresses, shapes, scales), so that it cannot go stale.
"""

from __future__ import annotations

import struct
from itertools import accumulate, product
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
FIELDS = 12  # int64 entries of a layer in the table
ROWS, COLUMNS = 16, 128  # the tile of W; with ranks up to 16 it takes 94 registers


# ---------------------------------------------------------------- kernels


@triton.jit
def _row_norms(
    w, down, up, first, rows, columns, rank, scale, inner, inner_stride, outer_stride,
    PLAIN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """(indices of the rows first ... first + BN - 1, their norms).

    Column c of W has offset c. In down it has offset c too if PLAIN; otherwise one of them is
    channels_last and the other not, and it is (c % inner) * inner_stride +
    (c // inner) * outer_stride. ONCE: the ranks fit in one block of BR.
    """
    n, r = first + tl.arange(0, BN), tl.arange(0, BR)
    real = (n < rows)[:, None]
    w_rows = w + n.to(tl.int64)[:, None] * columns
    up_rows = up + n.to(tl.int64)[:, None] * rank
    u = tl.load(up_rows + r[None, :], mask=real & (r < rank)[None, :], other=0.0)
    total = tl.zeros((BN,), tl.float32)
    for k in range(0, columns, BK):
        c = k + tl.arange(0, BK)
        inside = (c < columns)[None, :]
        at = c if PLAIN else (c % inner) * inner_stride + (c // inner) * outer_stride
        v = tl.load(w_rows + c[None, :], mask=real & inside, other=0.0).to(tl.float32)
        if ONCE:
            factor = down + r[:, None] * columns + at[None, :]
            d = tl.load(factor, mask=(r < rank)[:, None] & inside, other=0.0)
            v += scale * tl.dot(u, d, input_precision="tf32x3")
        else:
            update = tl.zeros((BN, BK), tl.float32)
            for begin in range(0, rank, BR):
                s = begin + r
                b = tl.load(up_rows + s[None, :], mask=real & (s < rank)[None, :], other=0.0)
                factor = down + s[:, None] * columns + at[None, :]
                d = tl.load(factor, mask=(s < rank)[:, None] & inside, other=0.0)
                update = tl.dot(b, d, update, input_precision="tf32x3")
            v += scale * update
        total += tl.sum(v * v, 1)
    return n, tl.sqrt_rn(total)


@triton.jit
def norm_kernel(
    w, down, up, out, rows, columns, rank, scale, inner, inner_stride, outer_stride,
    PLAIN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """out[j] = ||W_j + scale up_j down||. Grid: tiles of BN rows."""
    n, norm = _row_norms(
        w, down, up, tl.program_id(0) * BN, rows, columns, rank, scale,
        inner, inner_stride, outer_stride, PLAIN, BN, BK, BR, ONCE,
    )  # fmt: skip
    tl.store(out + n, norm, mask=n < rows)


@triton.jit
def norms_kernel(
    table, tiles, out, W: tl.constexpr, ALIGNED: tl.constexpr, PLAIN: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ONCE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Norms of several layers. Program i computes rows tiles[i, 1] ... of the layer in row
    tiles[i, 0] of the table.

    W: the weights' dtype. ALIGNED: the addresses of weights and down-factors and the numbers of
    columns are multiples of 16.
    """
    tile = tiles + tl.program_id(0) * 2
    first = tl.load(tile + 1)
    entry = table + tl.load(tile) * FIELDS
    w = tl.load(entry).to(tl.pointer_type(W))
    down = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    up = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    rows = tl.load(entry + 3).to(tl.int32)
    columns = tl.load(entry + 4).to(tl.int32)
    rank = tl.load(entry + 5).to(tl.int32)
    start = tl.load(entry + 6)
    scale = tl.load(entry + 7).to(tl.int32).to(tl.float32, bitcast=True)
    inner = tl.load(entry + 8).to(tl.int32)
    inner_stride = tl.load(entry + 9).to(tl.int32)
    outer_stride = tl.load(entry + 10).to(tl.int32)
    if ALIGNED:  # a compiler hint, which is lost when a value is passed to another function
        w, down = tl.multiple_of(w, 16), tl.multiple_of(down, 16)
        columns = tl.multiple_of(columns, 16)
    n, norm = _row_norms(
        w, down, up, first, rows, columns, rank, scale,
        inner, inner_stride, outer_stride, PLAIN, BN, BK, BR, ONCE,
    )  # fmt: skip
    tl.store(out + start + n, norm, mask=n < rows)


# ---------------------------------------------------------------- arguments


def norm_refusal(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> str | None:
    """Why the tiled norm does not run on these arguments, or None."""
    reason = device_refusal(weight)
    if reason is not None:
        return reason
    if weight.dtype not in TYPES or down.dtype != torch.float32 or up.dtype != torch.float32:
        found = f"the weight is {weight.dtype} and its factors {down.dtype}"
        return f"{found}; there is a kernel for fp32, bf16 and fp16 with factors in fp32"
    if count_groups(down, up) != 1:
        return "the convolution has groups"
    if weight.requires_grad:
        return "the weight requires a gradient"
    if _column_strides(weight) is None or _column_strides(down) is None or not up.is_contiguous():
        return "the weight or a factor is neither contiguous nor channels_last"
    return "there are no rows" if not weight.numel() else None


def norms_refusal(layers: tuple[NormLayer, ...]) -> str | None:
    """Why one of the layers is refused, or None."""
    if not layers:
        return "there are no layers"
    for layer in layers:
        reason = norm_refusal(*layer)
        if reason is not None:
            return reason
    return None


def _column_strides(x: Tensor) -> tuple[int, int, int] | None:
    """(channels, their stride, stride of the kernel window's positions) of the columns of x.

    None unless the rows of x are dense, contiguous blocks.
    """
    channels, places = x.shape[1], x[0, 0].numel()
    if x.is_contiguous():
        return channels, places, 1
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return channels, 1, channels
    return None


class _ColumnMap(NamedTuple):
    """Offset in a row of down of the column with offset c in a row of W, as in `_row_norms`."""

    plain: bool  # it is c
    inner: int
    inner_stride: int
    outer_stride: int


def _map_columns(weight: Tensor, down: Tensor) -> _ColumnMap:
    w, d = _column_strides(weight), _column_strides(down)
    assert w is not None and d is not None
    channels, places = w[0], weight[0, 0].numel()
    plain = w == d or channels == 1 or places == 1
    if w[1] == 1:  # channels fastest
        return _ColumnMap(plain, channels, d[1], d[2])
    return _ColumnMap(plain, places, d[2], d[1])


class _Tile(NamedTuple):
    """Columns and ranks of a tile, and compile options."""

    columns: int
    ranks: int
    once: bool  # all ranks fit in one block
    stages: int


def _choose_tile(rank: int) -> _Tile:
    """The tile for a rank: fewer columns where a second block of ranks takes registers.

    128 columns would then spill 200 bytes on sm_90, and 3 stages 8 bytes on sm_80.
    """
    once = rank <= 32
    ranks = min(32, max(16, triton.next_power_of_2(rank)))
    return _Tile(COLUMNS if once else COLUMNS // 2, ranks, once, 3 if once else 2)


# ---------------------------------------------------------------- launches


def dora_norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """reference.dora_norm in one launch, differentiable in down and up."""
    return _norm(weight, down, up, float(scale))


def dora_norms(layers: tuple[NormLayer, ...]) -> tuple[Tensor, ...]:
    """dora_norm of every layer, differentiable in the factors.

    One launch for each dtype of weights and kind of layout.
    """
    norms: list[Tensor | None] = [None] * len(layers)
    for kind, members in _group_by_kind(layers).items():
        weights, downs, ups, scales = zip(*(layers[i] for i in members), strict=True)
        factors = list(weights), list(downs), list(ups), [float(s) for s in scales]
        flat = _norms(*factors, kind.aligned, kind.plain, kind.once)
        for i, norm in zip(members, flat.split([len(w) for w in weights]), strict=True):
            norms[i] = norm
    return tuple(norm for norm in norms if norm is not None)


class _Kind(NamedTuple):
    """Properties that the layers of one launch share."""

    dtype: torch.dtype
    aligned: bool
    plain: bool
    once: bool


def _group_by_kind(layers: tuple[NormLayer, ...]) -> dict[_Kind, list[int]]:
    """Kind -> indices of its layers."""
    kinds: dict[_Kind, list[int]] = {}
    for i, (weight, down, up, _) in enumerate(layers):
        aligned, plain = weight[0].numel() % 16 == 0, _map_columns(weight, down).plain
        kind = _Kind(weight.dtype, aligned, plain, _choose_tile(up.shape[1]).once)
        kinds.setdefault(kind, []).append(i)
    return kinds


@torch.library.custom_op("lora_core::dora_norm", mutates_args=())
def _norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    (rows, rank), columns = up.shape[:2], weight[0].numel()
    out = weight.new_empty(rows, dtype=torch.float32)
    plain, *mapped = _map_columns(weight, down)
    bk, br, once, stages = _choose_tile(rank)
    norm_kernel[(triton.cdiv(rows, ROWS),)](
        weight, down, up, out, rows, columns, rank, scale, *mapped,
        plain, ROWS, bk, br, once, num_warps=4, num_stages=stages,
    )  # fmt: skip
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
    table, tiles = _find_table(list(zip(weights, downs, ups, scales, strict=True)))
    out = weights[0].new_empty(sum(map(len, weights)), dtype=torch.float32)
    aligned = aligned and all(x.data_ptr() % 16 == 0 for x in (*weights, *downs))
    bk, br, _, stages = _choose_tile(max(up.shape[1] for up in ups))
    norms_kernel[(len(tiles),)](
        table, tiles, out, TYPES[weights[0].dtype], aligned, plain,
        ROWS, bk, br, once, FIELDS, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


_tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def _find_table(layers: list[NormLayer]) -> tuple[Tensor, Tensor]:
    """(addresses [layers, FIELDS] int64, tiles [programs, 2] int32) on the layers' device.

    Raises UserError where the first call with these layers is inside a CUDA graph capture.
    """
    device = layers[0][0].device
    starts = accumulate((len(layer[0]) for layer in layers), initial=0)
    entries = [_table_entry(layer, start) for layer, start in zip(layers, starts)]
    key = (device, *entries)
    if key not in _tables:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UserError(
                "the first call of dora_norms with these layers is inside a CUDA graph capture; "
                "run one step before the capture"
            )
        tiles = []
        for i, layer in enumerate(layers):
            tiles += [(i, first) for first in range(0, len(layer[0]), ROWS)]
        table = torch.tensor(entries, dtype=torch.int64).to(device)
        _tables[key] = table, torch.tensor(tiles, dtype=torch.int32).to(device)
    return _tables[key]


def _table_entry(layer: NormLayer, start: int) -> tuple[int, ...]:
    """The layer's FIELDS entries; start: index of its first norm in the output."""
    weight, down, up, scale = layer
    addresses = weight.data_ptr(), down.data_ptr(), up.data_ptr()
    scale_bits = struct.unpack("<i", struct.pack("<f", scale))[0]
    sizes = len(weight), weight[0].numel(), up.shape[1]
    return *addresses, *sizes, start, scale_bits, *_map_columns(weight, down)[1:], 0


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


def _save_norms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, downs, ups, ctx.scales, *_ = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *downs, *ups, output)


def _norms_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    *tensors, flat = ctx.saved_tensors
    weights, downs, ups = (tensors[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
    rows = [len(w) for w in weights]
    layers = zip(weights, downs, ups, ctx.scales, flat.split(rows), g.split(rows), strict=True)
    gradients = [norm_gradients(*layer) for layer in layers]
    d_downs, d_ups = [d for d, _ in gradients], [u for _, u in gradients]
    return [None] * ctx.count, d_downs, d_ups, None, None, None, None


_norm.register_autograd(norm_backward, setup_context=save_norm)
_norms.register_autograd(_norms_backward, setup_context=_save_norms)


def _norm_cost(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Cost:
    return Cost(1, weight.nbytes + down.nbytes + up.nbytes + 4 * len(weight), True)


def _norms_cost(
    weights: list[Tensor], downs: list[Tensor], ups: list[Tensor], scales: list[float], *kind: bool
) -> Cost:
    read = sum(x.nbytes for x in (*weights, *downs, *ups))
    return Cost(1, read + 4 * sum(map(len, weights)), True)


COSTS["lora_core::dora_norm"] = _norm_cost
COSTS["lora_core::dora_norms"] = _norms_cost


# ---------------------------------------------------------------- ahead of time


def list_norm_builds(full: bool) -> list[Build]:
    """Builds of both kernels: a few, or with `full` every weight dtype, layout and rank block."""
    if not full:
        found = []
        for rank in (16, 128):
            found += [_norm_build("bf16", rank, True), _norms_build("bf16", rank, True, True)]
        return found
    found = []
    for dtype, rank, plain in product(("bf16", "fp32", "fp16"), (16, 32, 128), (True, False)):
        found.append(_norm_build(dtype, rank, plain))
        found += [_norms_build(dtype, rank, plain, aligned) for aligned in (True, False)]
    return found


def _norm_build(dtype: str, rank: int, plain: bool) -> Build:
    tile = _choose_tile(rank)
    constants = _tile_constants(tile, plain)
    types = {"w": f"*{dtype}", "scale": "fp32"} | dict.fromkeys(("down", "up", "out"), "*fp32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in norm_kernel.arg_names}
    name = f"norm {dtype} rank {rank} {'plain' if plain else 'channels_last'}"
    multiples = ("rows", "columns", "rank")
    return Build(norm_kernel, signature, constants, 4, tile.stages, True, name, multiples)


def _norms_build(dtype: str, rank: int, plain: bool, aligned: bool) -> Build:
    tile = _choose_tile(rank)
    weight = {"bf16": tl.bfloat16, "fp32": tl.float32, "fp16": tl.float16}[dtype]
    constants = {"W": weight, "ALIGNED": aligned} | _tile_constants(tile, plain)
    constants |= {"FIELDS": FIELDS}
    signature = {"table": "*i64", "tiles": "*i32", "out": "*fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    layout = "plain" if plain else "channels_last"
    name = f"norms {dtype} rank {rank} {layout}{'' if aligned else ' odd'}"
    return Build(norms_kernel, signature, constants, 4, tile.stages, True, name)


def _tile_constants(tile: _Tile, plain: bool) -> dict[str, Any]:
    return {"PLAIN": plain, "BN": ROWS, "BK": tile.columns, "BR": tile.ranks, "ONCE": tile.once}
