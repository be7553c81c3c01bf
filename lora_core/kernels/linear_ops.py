"""The launches of linear_kernels as torch ops of one launch each: arguments, tiles, workspaces, and what each costs.

    lora_core::shrink      t [m, R]
    lora_core::expand_     the outputs of a group, in place
    lora_core::back_up     [dS, d_up ..., dz ..., (d_magnitude, d_norm) ...]
    lora_core::back_down_  d_down ... and dx, in place

Matrices are [m, k] tensors of any strides, or [b, c, h, w] whose rows are the pixels. An op takes the tensors of all members of a group as lists,
factors contiguous fp32, `drop` as [] or [step, rows] with, for every member, (hash of seed and layer, threshold) in `words` and 1 - p in `kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.linear_kernels import (
    back_down_kernel,
    back_up_kernel,
    expand_kernel,
    shrink_kernel,
)

MEMBERS = 4  # the most that one launch serves: the kernels have so many arguments of each kind
PROGRAMS = 132  # multiprocessors of an H100 or H200: sums are cut until about so many programs, twice so many over rows, are in flight
COUNTERS = 1 << 16  # int32 arrival counters; a grid with more tiles has no need to cut its sums


class Tile(NamedTuple):
    """Rows, features and ranks of a tile, and how it is compiled."""

    rows: int
    features: int
    ranks: int
    warps: int
    stages: int


class Plane(NamedTuple):
    """How linear_kernels finds the rows of a matrix."""

    rows: int
    width: int
    area: int  # rows of one image, 1 where rows lie at one stride
    image: int  # strides of an image, a row and a feature
    row: int
    feature: int


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile


_recorded: list[Launch] | None = None
_counters: dict[tuple[torch.device, int | None], Tensor] = {}


def choose_tile(kernel: str, rows: int, ranks: int, dtype: torch.dtype) -> Tile:
    """The tile for a class of shapes. Estimates: no GPU was there to measure them (performance.md, 1.4).

    Few rows make few tiles, so these are low and deep. fp32 has no IEEE tensor cores: small tiles keep the operands of its FMAs in registers.
    """
    wide = min(max(16, 1 << max(ranks - 1, 0).bit_length()), 64)
    # Warps, stages and back_up's tiles are those with which ptxas parks nothing in local memory (Triton
    # 3.9.0) or at most 16 bytes in 22 of 1,508 configurations (3.7.1); with others more of them spill.
    warps, stages = (8, 2) if kernel == "back_up" else (4, 3)
    if dtype == torch.float32:
        return Tile(32, 32, min(wide, 32), warps, stages)
    if kernel == "back_up":
        return Tile(
            64 if rows > 1024 and ranks in (16, 32) else 32,
            64,
            wide if ranks <= 64 else 32,
            warps,
            stages,
        )
    if rows <= 1024:
        return Tile(32, 64, wide, warps, stages)
    return Tile(
        64,
        64,
        wide,
        4 if kernel == "expand" else 8,
        2 if kernel == "back_down" and ranks <= 128 else stages,
    )


def find_plane(x: Tensor) -> Plane:
    """x [m, k], or x [b, c, h, w] as the matrix of its pixels; needs `is_plane(x)`."""
    if x.ndim == 2:
        return Plane(x.shape[0], x.shape[1], 1, 0, x.stride(0), x.stride(1))
    b, c, h, w = x.shape
    row = x.stride(0) if h * w == 1 else x.stride(2) if w == 1 else x.stride(3)
    if b == 1 or x.stride(0) == h * w * row:
        return Plane(b * h * w, c, 1, 0, row, x.stride(1))
    return Plane(b * h * w, c, h * w, x.stride(0), row, x.stride(1))


def is_plane(x: Tensor) -> bool:
    """Whether the pixels of x [b, c, h, w] lie at one stride inside an image: contiguous, channels_last and slices of their channels do."""
    h, w = x.shape[-2:]
    return x.ndim == 2 or h == 1 or w == 1 or x.stride(2) == w * x.stride(3)


def record_launches(run: Callable[[], Any]) -> list[Launch]:
    """The launches that `run` would make, with its tensors on the meta device; nothing is launched."""
    global _recorded
    _recorded = []
    try:
        run()
        return _recorded
    finally:
        _recorded = None


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: dict[str, Any]) -> None:
    arguments |= {"BM": tile.rows, "BN": tile.features, "BR": tile.ranks}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, tile))
    else:
        kernel[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages)


def _four(prefix: str, values: Sequence[Any], empty: Any = None) -> dict[str, Any]:
    """prefix0 ... prefix3"""
    return {f"{prefix}{i}": values[i] if i < len(values) else empty for i in range(MEMBERS)}


def _ends(ranks: Sequence[int]) -> dict[str, int]:
    """Where the ranks of the first three members end; the last one ends at R."""
    ends = [sum(ranks[: i + 1]) for i in range(3)]
    return {f"e{i}": end for i, end in enumerate(ends)}


def _drop(drop: list[Tensor], words: list[int], kept: list[float], rows: int) -> dict[str, Any]:
    step, keys = drop or (None, None)
    given = {
        "step": step,
        "rows": keys,
        "LENGTH": 1 if keys is None else rows // len(keys),
        "DROP": bool(drop),
    }
    return given | _four("w", words[::2], 0) | _four("h", words[1::2], 0) | _four("q", kept, 1.0)


def _count(length: int, each: int) -> int:
    """length / each, rounded up; triton.cdiv takes 2.5 microseconds, and a layer asks 32 times a step."""
    return -(-length // each)


def _parts(length: int, least: int, step: int, programs: int, wanted: int) -> tuple[int, int]:
    """(parts, length of each) of a sum over `length`: multiples of `step`, about `least` or more, that bring `programs` up to about `wanted`."""
    parts = max(1, min(_count(length, least), wanted // max(programs, 1)))
    each = _count(_count(length, step), parts) * step
    return _count(length, each), each


def counters(x: Tensor) -> Tensor:
    """Zeros that kernels count arrivals in and leave at zero: one set a stream, and one for captured graphs, of which one replays at a time."""
    if not x.is_cuda:
        if (x.device, 0) not in _counters:
            _counters[x.device, 0] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
        return _counters[x.device, 0]
    capturing = torch.cuda.is_current_stream_capturing()
    key = (x.device, None if capturing else torch.cuda.current_stream(x.device).cuda_stream)
    if key not in _counters:
        if capturing:
            raise RuntimeError(
                "got the first call of a LoRA kernel inside a CUDA graph capture; run the step once before capturing it"
            )
        for each in {key, (x.device, None)} - _counters.keys():
            _counters[each] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
    return _counters[key]


def _shrink(
    x: Tensor, downs: list[Tensor], drop: list[Tensor], words: list[int], kept: list[float]
) -> Tensor:
    at, ranks = find_plane(x), [len(down) for down in downs]
    t = x.new_empty(at.rows, sum(ranks))
    if not at.rows:
        return t
    tile = choose_tile("shrink", at.rows, max(ranks) if drop else sum(ranks), x.dtype)
    per = _count(max(ranks), tile.ranks)
    blocks = per * len(downs) if drop else _count(sum(ranks), tile.ranks)
    tiles = _count(at.rows, tile.rows)
    parts, chunk = _parts(at.width, 4 * tile.features, tile.features, tiles * blocks, PROGRAMS)
    split = parts > 1
    _launch(shrink_kernel, (tiles, blocks, parts), tile, {
        "x": x, "t": t, "part": x.new_empty(parts * t.numel(), dtype=torch.float32) if split else t, "counter": counters(x) if split else t,
        "M": at.rows, "K": at.width, "R": sum(ranks), "AREA": at.area, "xb": at.image, "xm": at.row, "xk": at.feature,
        "PER": per, "CHUNK": chunk, "PARTS": parts, "MEMBERS": len(downs), "SPATIAL": at.area > 1, "SPLIT": split,
        **_four("d", downs), **_ends(ranks), **_drop(drop, words, kept, at.rows),
    })  # fmt: skip
    return t


def _expand_(
    ys: list[Tensor], t: Tensor, ups: list[Tensor], scales: list[float],
    magnitudes: list[Tensor], norms: list[Tensor], biases: list[Tensor], fresh: bool,
) -> None:  # fmt: skip
    at, hidden, ranks = find_plane(ys[0]), find_plane(t), [up.shape[1] for up in ups]
    if not at.rows:
        return
    tile = choose_tile("expand", at.rows, max(ranks), t.dtype)
    widths = [len(up) for up in ups]
    columns = sum(_count(width, tile.features) for width in widths)
    area, (image, _), (t_image, _) = _shared_area(at, hidden)
    _launch(expand_kernel, (columns, _count(at.rows, tile.rows)), tile, {
        "t": t, "M": at.rows, "AREA": area, "yb": image, "ym": at.row, "yk": at.feature, "tb": t_image, "tm": hidden.row, "tk": hidden.feature,
        "MEMBERS": len(ups), "GAIN": bool(norms), "BIAS": bool(biases), "SPATIAL": area > 1, "FRESH": fresh,
        **_four("y", ys), **_four("u", ups), **_four("g", magnitudes), **_four("v", norms), **_four("b", biases),
        **_four("n", widths, 0), **_four("r", ranks, 0), **_four("s", scales, 0.0),
    })  # fmt: skip


def _shared_area(*planes: Plane) -> tuple[Any, ...]:
    """(area, (image stride, row stride) of each): what lies at one stride is read image by image like the others."""
    area = max(p.area for p in planes)
    return area, *((p.image if p.area > 1 else area * p.row, p.row) for p in planes)


def _back_up(
    dys: list[Tensor], t: Tensor, starts: list[int], ups: list[Tensor], scales: list[float],
    ys: list[Tensor], magnitudes: list[Tensor], norms: list[Tensor], biases: list[Tensor], guard: float, need_dz: bool,
) -> list[Tensor]:  # fmt: skip
    found = _back_up_outputs(
        dys, t, starts, ups, scales, ys, magnitudes, norms, biases, guard, need_dz
    )
    ds, d_ups, dzs, gains = _cut(
        found, [1, len(ups), len(ups) if norms and need_dz else 0, len(norms)]
    )
    at, hidden = (
        find_plane(max(dys, key=lambda dy: dy.shape[1])),
        find_plane(t),
    )  # the one feature of a narrow dy may lie at any stride
    if not at.rows:
        return [out.zero_() for out in found]
    ranks, widths = [up.shape[1] for up in ups], [len(up) for up in ups]
    tile = choose_tile("back_up", at.rows, max(ranks), t.dtype)
    blocks, tiles = _count(max(ranks), tile.ranks), _count(at.rows, tile.rows)
    columns = sum(_count(width, tile.features) for width in widths)
    parts, rows = _parts(at.rows, 2 * tile.rows, tile.rows, columns * blocks, 2 * PROGRAMS)
    pieces, chunk = _parts(
        max(widths), 4 * tile.features, tile.features, tiles * blocks * len(ups), PROGRAMS
    )
    if (parts * (rows // tile.rows) * len(ups) + columns) * blocks > COUNTERS:
        parts, rows, pieces, chunk = (
            1,
            tiles * tile.rows,
            1,
            _count(max(widths), tile.features) * tile.features,
        )
    first = rows // tile.rows * blocks * pieces * len(ups)
    total, workspace = sum(up.numel() for up in ups), t.new_empty
    area, (image, _), (t_image, _), (s_image, _) = _shared_area(at, hidden, find_plane(ds[0]))
    _launch(back_up_kernel, (parts * (first + columns * blocks),), tile, {
        "t": t, "ds": ds[0], "part": workspace(pieces * at.rows * sum(ranks), dtype=torch.float32) if pieces > 1 else t,
        "piled": workspace(parts * (total + sum(widths)), dtype=torch.float32) if parts > 1 else t,
        "counter": counters(t) if max(parts, pieces) > 1 else t,
        "M": at.rows, "R": sum(ranks), "T": total, "STACK": total + sum(widths), "AREA": area, "ob": image, "ok": at.feature,
        "tb": t_image, "tm": hidden.row, "tk": hidden.feature,
        "db": s_image, "dm": find_plane(ds[0]).row, "dk": find_plane(ds[0]).feature, "guard": guard,
        "ROWS": rows, "TILES": rows // tile.rows, "BLOCKS": blocks, "FIRST": first, "EACH": first + columns * blocks,
        "CHUNK": chunk, "PIECES": pieces, "PARTS": parts,
        "MEMBERS": len(ups), "GAIN": bool(norms), "BIAS": bool(biases), "DZ": bool(dzs), "SPATIAL": area > 1, "CUT": pieces > 1, "SPLIT": parts > 1,
        **_four("o", dys), **_four("y", ys or dys), **_four("g", magnitudes or ups), **_four("v", norms or ups), **_four("b", biases or dys),
        **_four("u", ups), **_four("z", dzs or dys), **_four("p", d_ups), **_four("w", gains or d_ups),  # what a flag rules out gets any pointer
        **_four("n", widths, 0), **_four("r", ranks, 0), **_four("s", scales, 0.0), **_four("i", starts, 0),
        **_four("a", [find_plane(dy).row for dy in dys], 0),
    })  # fmt: skip
    return found


def _back_up_outputs(
    dys: list[Tensor], t: Tensor, starts: list[int], ups: list[Tensor], scales: list[float],
    ys: list[Tensor], magnitudes: list[Tensor], norms: list[Tensor], biases: list[Tensor], guard: float, need_dz: bool,
) -> list[Tensor]:  # fmt: skip
    ds = torch.empty_like(t) if t.ndim == 4 else t.new_empty(len(t), sum(up.shape[1] for up in ups))
    dzs = (
        [torch.empty_like(dy, memory_format=torch.contiguous_format) for dy in dys]
        if norms and need_dz
        else []
    )
    return [
        ds,
        *(torch.empty_like(up) for up in ups),
        *dzs,
        *(norm.new_empty(2, len(norm)) for norm in norms),
    ]


def _cut(found: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [found[end - size : end] for end, size in zip(ends, sizes)]


def _back_down_(
    dx: Tensor | None, d_downs: list[Tensor], ds: Tensor, x: Tensor,
    downs: list[Tensor], drop: list[Tensor], words: list[int], kept: list[float], fresh: bool,
) -> None:  # fmt: skip
    at, ranks = find_plane(x), [len(down) for down in downs]
    if not at.rows:
        for out in d_downs:
            out.zero_()
        return
    tile = choose_tile("back_down", at.rows, max(ranks) if drop else sum(ranks), x.dtype)
    per = _count(max(ranks), tile.ranks)
    blocks = per * len(downs) if drop else _count(sum(ranks), tile.ranks)
    columns, tiles = _count(at.width, tile.features), _count(at.rows, tile.rows)
    parts, rows = _parts(at.rows, 2 * tile.rows, tile.rows, columns * blocks, 2 * PROGRAMS)
    if columns * blocks > COUNTERS:
        parts, rows = 1, tiles * tile.rows
    first = 0 if dx is None else rows // tile.rows * columns
    to = at if dx is None else find_plane(dx)
    area, (image, _), (to_image, _) = _shared_area(at, to)
    _launch(back_down_kernel, (parts * (first + columns * blocks),), tile, {
        "dx": dx, "ds": ds, "x": x, "piled": ds.new_empty(parts * sum(ranks) * at.width, dtype=torch.float32) if parts > 1 else ds,
        "counter": counters(x) if parts > 1 else ds,
        "M": at.rows, "K": at.width, "R": sum(ranks), "AREA": area, "xb": image, "xm": at.row, "xk": at.feature,
        "gb": to_image, "gm": to.row, "gk": to.feature,
        "PER": per, "ROWS": rows, "TILES": rows // tile.rows, "BLOCKS": blocks, "FIRST": first, "EACH": first + columns * blocks, "PARTS": parts,
        "MEMBERS": len(downs), "SPATIAL": area > 1, "DX": dx is not None, "FRESH": fresh, "SPLIT": parts > 1,
        **_four("d", downs), **_four("p", d_downs), **_ends(ranks), **_drop(drop, words, kept, at.rows),
    })  # fmt: skip


def _op(
    name: str, run: Callable[..., Any], meta: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Any:
    op = torch.library.custom_op(f"lora_core::{name}", run, mutates_args=mutates)
    op.register_fake(meta)
    return op


def _shrink_meta(
    x: Tensor, downs: list[Tensor], drop: list[Tensor], words: list[int], kept: list[float]
) -> Tensor:
    return x.new_empty(x.numel() // x.shape[1], sum(len(down) for down in downs))


shrink = _op("shrink", _shrink, _shrink_meta)
expand_ = _op("expand_", _expand_, lambda *_: None, ("ys",))
back_up = _op("back_up", _back_up, _back_up_outputs)
back_down_ = _op("back_down_", _back_down_, lambda *_: None, ("dx", "d_downs"))
LAUNCHERS: dict[Any, Callable[..., Any]] = {
    shrink: _shrink,
    expand_: _expand_,
    back_up: _back_up,
    back_down_: _back_down_,
}


def run_op(op: Any, x: Tensor, *args: Any) -> Any:
    """op(*args) inside an autograd.Function, on tensors like x; past torch's dispatcher where nothing traces, fakes or counts the op.

    With it the host is busy with a LoRA layer for 286 microseconds a step, without it for 154 (one Zen 4 thread, Triton's own launch not in either).
    """
    heard = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
    )
    return op(*args) if heard else LAUNCHERS[op](*args)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _shrink_cost(
    x: Tensor, downs: list[Tensor], drop: list[Tensor], words: list[int], kept: list[float]
) -> Cost:
    return Cost(1, _bytes(x, _shrink_meta(x, downs, drop, words, kept), *downs, *drop), True)


def _expand_cost(
    ys: list[Tensor], t: Tensor, ups: list[Tensor], scales: list[float],
    magnitudes: list[Tensor], norms: list[Tensor], biases: list[Tensor], fresh: bool,
) -> Cost:  # fmt: skip
    return Cost(
        1, _bytes(*ys) * (1 if fresh else 2) + _bytes(t, *ups, *magnitudes, *norms, *biases), True
    )


def _back_up_cost(
    dys: list[Tensor],
    t: Tensor,
    starts: list[int],
    ups: list[Tensor],
    scales: list[float],
    ys: list[Tensor],
    *rest: Any,
) -> Cost:
    written = _back_up_outputs(dys, t, starts, ups, scales, ys, *rest)
    return Cost(
        1,
        2 * _bytes(*dys)
        + _bytes(t, *ups, *ys, *(v for given in rest[:3] for v in given), *written),
        True,
    )


def _back_down_cost(
    dx: Tensor | None,
    d_downs: list[Tensor],
    ds: Tensor,
    x: Tensor,
    downs: list[Tensor],
    drop: list[Tensor],
    *rest: Any,
) -> Cost:
    return Cost(
        1, _bytes(dx) * (1 if rest[-1] else 2) + _bytes(ds, x, *d_downs, *downs, *drop), True
    )


# Every operand once, but dy twice: its two uses read it in programs of their own, the second time mostly from the L2 cache.
COSTS |= {"lora_core::shrink": _shrink_cost, "lora_core::expand_": _expand_cost}
COSTS |= {"lora_core::back_up": _back_up_cost, "lora_core::back_down_": _back_down_cost}
