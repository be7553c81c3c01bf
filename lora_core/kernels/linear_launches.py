"""Launches of linear_kernels: arguments, workspaces, and the grid of each.

Matrices are [m, k] tensors of any strides, or [b, c, h, w] whose rows are the pixels. A launch
takes the tensors of all members of a group as lists; factors are contiguous fp32. `drop` is [] or
[step, rows]; then `words` has (hash of seed and layer, threshold) and `kept` 1 - p of each member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.device_functions import Strides
from lora_core.kernels.linear_kernels import (
    back_down_kernel,
    back_up_kernel,
    expand_kernel,
    shrink_kernel,
)
from lora_core.kernels.linear_tables import (
    BackDownWork,
    BackUpTable,
    BackUpWork,
    DownTable,
    Dropout,
    ExpandTable,
    pack_word,
)
from lora_core.kernels.linear_tiles import (
    PROGRAMS,
    Plane,
    Tile,
    ceil_divide,
    choose_tile,
    cut_sum,
    find_plane,
    find_strides,
    sums_before,
    sums_through,
)

COUNTERS = 1 << 16  # int32 arrival counters; a grid with more tiles need not split its sums


class Launch(NamedTuple):
    """One launch of a kernel, as `record_launches` records it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile


_recorded: list[Launch] | None = None
_counters: dict[tuple[torch.device, int | None], Tensor] = {}


def record_launches(run: Callable[[], Any]) -> list[Launch]:
    """The launches that `run` makes, recorded and not executed; its tensors are on meta."""
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


def _dropout(drop: list[Tensor], words: list[int], kept: list[float], rows: int) -> Dropout | None:
    """The dropout of a group's inputs as a kernel argument."""
    if not drop:
        return None
    step, keys = drop
    packed = [pack_word(word) for word in words]
    length = rows // len(keys)
    return Dropout(step, keys, length, tuple(packed[::2]), tuple(packed[1::2]), tuple(kept))


def arrival_counters(x: Tensor) -> Tensor:
    """Counters of program arrivals, zero before and after each kernel.

    One set a stream, and one for captured graphs, of which one replays at a time.
    """
    if not x.is_cuda:
        if (x.device, 0) not in _counters:
            _counters[x.device, 0] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
        return _counters[x.device, 0]
    capturing = torch.cuda.is_current_stream_capturing()
    key = (x.device, None if capturing else torch.cuda.current_stream(x.device).cuda_stream)
    if key not in _counters:
        if capturing:
            raise RuntimeError(
                "got the first call of a LoRA kernel inside a CUDA graph capture; "
                "run the step once before capturing it"
            )
        for each in {key, (x.device, None)} - _counters.keys():
            _counters[each] = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
    return _counters[key]


# ---------------------------------------------------------------- forward


def launch_shrink(
    x: Tensor, downs: list[Tensor], drop: list[Tensor], words: list[int], kept: list[float]
) -> Tensor:
    """t [m, R], the down-projections of a group's inputs after dropout."""
    plane = find_plane(x)
    ranks = [len(down) for down in downs]
    t = x.new_empty(plane.rows, sum(ranks))
    if not plane.rows:
        return t
    tile = choose_tile("shrink", plane.rows, max(ranks) if drop else sum(ranks), x.dtype)
    tiles, per_member, blocks = _blocks(plane, tile, ranks, bool(drop))
    parts, chunk = cut_sum(plane.width, 4 * tile.features, tile.features, tiles * blocks, PROGRAMS)
    part, counter = None, None
    if parts > 1:
        part = x.new_empty(parts * t.numel(), dtype=torch.float32)
        counter = arrival_counters(x)
    arguments = {
        "x": x,
        "t": t,
        "part": part,
        "counter": counter,
        "members": DownTable(tuple(downs), sums_through(ranks)),
        "drop": _dropout(drop, words, kept, plane.rows),
        "M": plane.rows,
        "K": plane.width,
        "R": sum(ranks),
        "area": plane.area,
        "x_at": find_strides(plane, plane.area),
        "PER": per_member,
        "CHUNK": chunk,
        "PARTS": parts,
    }
    _launch(shrink_kernel, (tiles, blocks, parts), tile, arguments)
    return t


def _blocks(plane: Plane, tile: Tile, ranks: list[int], drop: bool) -> tuple[int, int, int]:
    """(row tiles, rank blocks of a member, of all members); with dropout none spans two members."""
    per_member = ceil_divide(max(ranks), tile.ranks)
    blocks = per_member * len(ranks) if drop else ceil_divide(sum(ranks), tile.ranks)
    return ceil_divide(plane.rows, tile.rows), per_member, blocks


def launch_expand(
    ys: list[Tensor],
    t: Tensor,
    ups: list[Tensor],
    scales: list[float],
    magnitudes: list[Tensor],
    norms: list[Tensor],
    biases: list[Tensor],
    fresh: bool,
) -> None:
    """Add the up-projections to ys in place; with norms apply DoRA's gain and bias too.

    fresh: ys are written, not added to.
    """
    planes = [find_plane(y) for y in ys]
    hidden = find_plane(t)
    if not hidden.rows:
        return
    widths, ranks = [len(up) for up in ups], [up.shape[1] for up in ups]
    tile = choose_tile("expand", hidden.rows, max(ranks), t.dtype)
    columns = sum(ceil_divide(width, tile.features) for width in widths)
    area = max(hidden.area, planes[0].area)
    strides = [find_strides(plane, area) for plane in planes]
    members = ExpandTable(
        y=tuple(ys),
        up=tuple(ups),
        width=tuple(widths),
        rank=tuple(ranks),
        start=sums_before(ranks),
        image=tuple(at.image for at in strides),
        row=tuple(at.row for at in strides),
        scale=tuple(scales),
        magnitude=tuple(magnitudes),
        norm=tuple(norms),
        bias=tuple(biases),
    )
    arguments = {
        "members": members,
        "t": t,
        "M": hidden.rows,
        "area": area,
        "feature": _shared_feature(planes),
        "t_at": find_strides(hidden, area),
        "FRESH": fresh,
    }
    _launch(expand_kernel, (columns, ceil_divide(hidden.rows, tile.rows)), tile, arguments)


def _shared_feature(planes: list[Plane]) -> int:
    """The common stride of features: a matrix with one feature may have any stride."""
    return max(planes, key=lambda plane: plane.width).feature


# ---------------------------------------------------------------- backward


def launch_back_up(
    dys: list[Tensor],
    t: Tensor,
    starts: list[int],
    ups: list[Tensor],
    scales: list[float],
    ys: list[Tensor],
    magnitudes: list[Tensor],
    norms: list[Tensor],
    biases: list[Tensor],
    guard: float,
    need_dz: bool,
) -> list[Tensor]:
    """[dS, d_up ..., dz ..., (d_magnitude, d_norm) ...], the tensors of `back_up_outputs`.

    starts: the members' first columns in t. guard: |gain| up to which z is not recovered from y.
    """
    gain = ys, magnitudes, norms, biases
    outputs = back_up_outputs(dys, t, starts, ups, scales, *gain, guard, need_dz)
    ds, d_ups, dzs, gains = _split_outputs(outputs, len(ups), len(norms), need_dz)
    hidden, inner = find_plane(t), find_plane(ds)
    planes = [find_plane(dy) for dy in dys]
    if not hidden.rows:
        return [out.zero_() for out in outputs]
    widths, ranks = [len(up) for up in ups], [up.shape[1] for up in ups]
    tile = choose_tile("back_up", hidden.rows, max(ranks), t.dtype)
    work = _back_up_work(hidden.rows, widths, ranks, tile)
    area = max(plane.area for plane in (*planes, hidden, inner))
    strides = [find_strides(plane, area) for plane in planes]
    members = BackUpTable(
        dy=tuple(dys),
        up=tuple(ups),
        d_up=tuple(d_ups),
        **_back_up_numbers(widths, ranks, starts, strides),
        scale=tuple(scales),
        y=tuple(ys),
        magnitude=tuple(magnitudes),
        norm=tuple(norms),
        bias=tuple(biases),
        gains=tuple(gains),
        dz=tuple(dzs),
    )
    part, piled = _partial_sums(t, hidden.rows, work)
    arguments = {
        "members": members,
        "t": t,
        "ds": ds,
        "part": part,
        "piled": piled,
        "counter": None if part is None and piled is None else arrival_counters(t),
        "M": hidden.rows,
        "area": area,
        "feature": _shared_feature(planes),
        "t_at": find_strides(hidden, area),
        "ds_at": find_strides(inner, area),
        "guard": guard,
        "work": work,
    }
    _launch(back_up_kernel, (work.parts * work.each,), tile, arguments)
    return outputs


def _partial_sums(t: Tensor, rows: int, work: BackUpWork) -> tuple[Tensor | None, Tensor | None]:
    """Workspaces for the parts of the sums over features and over rows; None where unsplit."""
    part, piled = None, None
    if work.pieces > 1:
        part = t.new_empty(work.pieces * rows * work.ranks, dtype=torch.float32)
    if work.parts > 1:
        piled = t.new_empty(work.parts * work.stack, dtype=torch.float32)
    return part, piled


def _back_up_numbers(
    widths: list[int], ranks: list[int], starts: list[int], strides: list[Strides]
) -> dict[str, tuple[int, ...]]:
    """The columns of a BackUpTable that hold integers."""
    return {
        "width": tuple(widths),
        "rank": tuple(ranks),
        "start": tuple(starts),
        "column": sums_before(ranks),
        "element": sums_before([width * rank for width, rank in zip(widths, ranks)]),
        "channel": sums_before(widths),
        "image": tuple(at.image for at in strides),
        "row": tuple(at.row for at in strides),
    }


def _back_up_work(rows: int, widths: list[int], ranks: list[int], tile: Tile) -> BackUpWork:
    """The division of the sums over `widths` features and over `rows` among programs."""
    members, widest = len(ranks), max(widths)
    blocks, tiles = ceil_divide(max(ranks), tile.ranks), ceil_divide(rows, tile.rows)
    columns = sum(ceil_divide(width, tile.features) for width in widths)
    parts, each = cut_sum(rows, 2 * tile.rows, tile.rows, columns * blocks, 2 * PROGRAMS)
    programs = tiles * blocks * members
    pieces, chunk = cut_sum(widest, 4 * tile.features, tile.features, programs, PROGRAMS)
    if (parts * (each // tile.rows) * members + columns) * blocks > COUNTERS:
        parts, each = 1, tiles * tile.rows
        pieces, chunk = 1, ceil_divide(widest, tile.features) * tile.features
    first = each // tile.rows * blocks * pieces * members
    elements = sum(width * rank for width, rank in zip(widths, ranks))
    return BackUpWork(
        rows=each,
        tiles=each // tile.rows,
        blocks=blocks,
        first=first,
        each=first + columns * blocks,
        chunk=chunk,
        pieces=pieces,
        parts=parts,
        ranks=sum(ranks),
        elements=elements,
        stack=elements + sum(widths),
    )


def back_up_outputs(
    dys: list[Tensor],
    t: Tensor,
    starts: list[int],
    ups: list[Tensor],
    scales: list[float],
    ys: list[Tensor],
    magnitudes: list[Tensor],
    norms: list[Tensor],
    biases: list[Tensor],
    guard: float,
    need_dz: bool,
) -> list[Tensor]:
    """Uninitialized dS, d_up ..., dz ... and, for each member, [d_magnitude, d_norm] [2, out]."""
    ranks = sum(up.shape[1] for up in ups)
    ds = torch.empty_like(t) if t.ndim == 4 else t.new_empty(len(t), ranks)
    d_ups = [torch.empty_like(up) for up in ups]
    dzs = []
    if norms and need_dz:
        dzs = [torch.empty_like(dy, memory_format=torch.contiguous_format) for dy in dys]
    return [ds, *d_ups, *dzs, *(norm.new_empty(2, len(norm)) for norm in norms)]


def _split_outputs(
    outputs: list[Tensor], members: int, norms: int, need_dz: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(dS, [d_up ...], [dz ...], [gain gradients ...]) from the list of `back_up_outputs`."""
    ds, d_ups, rest = outputs[0], outputs[1 : 1 + members], outputs[1 + members :]
    dzs = members if norms and need_dz else 0
    return ds, d_ups, rest[:dzs], rest[dzs:]


def launch_back_down(
    dx: Tensor | None,
    d_downs: list[Tensor],
    ds: Tensor,
    x: Tensor,
    downs: list[Tensor],
    drop: list[Tensor],
    words: list[int],
    kept: list[float],
    fresh: bool,
) -> None:
    """Write d_downs and add to dx (`fresh`: write it); dx is None where it is not needed."""
    plane = find_plane(x)
    ranks = [len(down) for down in downs]
    if not plane.rows:
        for out in d_downs:
            out.zero_()
        return
    tile = choose_tile("back_down", plane.rows, max(ranks) if drop else sum(ranks), x.dtype)
    work = _back_down_work(plane, tile, ranks, bool(drop), dx is not None)
    piled = None
    if work.parts > 1:
        piled = ds.new_empty(work.parts * sum(ranks) * plane.width, dtype=torch.float32)
    target = plane if dx is None else find_plane(dx)
    area = max(plane.area, target.area)
    arguments = {
        "x": x,
        "dx": dx,
        "ds": ds,
        "piled": piled,
        "counter": None if piled is None else arrival_counters(x),
        "members": DownTable(tuple(downs), sums_through(ranks), tuple(d_downs)),
        "drop": _dropout(drop, words, kept, plane.rows),
        "M": plane.rows,
        "K": plane.width,
        "R": sum(ranks),
        "area": area,
        "x_at": find_strides(plane, area),
        "dx_at": find_strides(target, area),
        "work": work,
        "FRESH": fresh,
    }
    _launch(back_down_kernel, (work.parts * work.each,), tile, arguments)


def _back_down_work(
    plane: Plane, tile: Tile, ranks: list[int], drop: bool, wants_dx: bool
) -> BackDownWork:
    """The division of dx and the sums over rows among programs."""
    tiles, per_member, blocks = _blocks(plane, tile, ranks, drop)
    columns = ceil_divide(plane.width, tile.features)
    parts, rows = cut_sum(plane.rows, 2 * tile.rows, tile.rows, columns * blocks, 2 * PROGRAMS)
    if columns * blocks > COUNTERS:
        parts, rows = 1, tiles * tile.rows
    first = rows // tile.rows * columns if wants_dx else 0
    return BackDownWork(
        rows=rows,
        tiles=rows // tile.rows,
        blocks=blocks,
        per_member=per_member,
        first=first,
        each=first + columns * blocks,
        parts=parts,
    )
