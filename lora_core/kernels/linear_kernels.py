"""The Triton kernels of adapted linear layers: four launches for up to four layers with one input.

    shrink_kernel     t = x' downs^T                      [m, R], R: sum of the members' ranks
    expand_kernel     y = y + scale t up^T, or gain (y + scale t up^T) + bias       in place
    back_up_kernel    dS = scale dz up, d_up = scale dz^T t;
                      with a gain dz = gain dy and the sums over rows of dy z
    back_down_kernel  dx = dx + dS downs, masked as x' was, in place; d_down = dS^T x'

x' is x after the member's dropout. The members of a group are passed as one argument, a table
(linear_tables.py). Triton passes it by value with the launch: it needs no copy to the device, a
CUDA graph records it, and the compiler knows of every pointer whether it is aligned, which it would
not of an address read from memory. (The table of dora.norms_kernel is in memory: it has hundreds of
rows, of weights whose addresses are the same in every step. Those of activations change in every
call.)

The backward launches have two kinds of programs, interleaved by rows so that both find their
operand in the L2 cache. A sum that is split into parts is finished by the last program to arrive,
which adds the parts in their order: no float atomics, no second launch, the same bits in every run
(the scheme of Inductor's cooperative reductions).

Addressing: where rows are the pixels of [b, c, h, w], area = h w and element (m, k) has the offset
(m // area) * image + (m % area) * row + k * feature; else area = 1, and its offset is
m * row + k * feature. Factors are contiguous fp32, cast to the activations' dtype here; sums are
fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_core.kernels.device_functions import (
    dot,
    find_column_tile,
    keep_elements,
    round_to,
    row_keys,
    row_offsets,
    select_member,
    store_sum,
)

# ---------------------------------------------------------------- device functions


@triton.jit
def unpack_word(packed):
    return (packed >> 1).to(tl.uint32)


@triton.jit
def down_rows(c, factors, ends, K):
    """Pointers to rows c of the members' [r, K] matrices, stacked."""
    rows = factors[0] + c * K
    for i in tl.static_range(1, len(factors)):
        rows = tl.where(c < ends[i - 1], rows, factors[i] + (c - ends[i - 1]) * K)
    return rows


@triton.jit
def rank_span(block, ends, drop, R, PER, BR: tl.constexpr):
    """(member, first rank, end) of a block of ranks.

    With dropout every member has its own x', so that no block may span two members.
    """
    if drop is not None:
        member = block // PER
        begin = member * 0
        for i in tl.static_range(1, len(ends)):
            begin = tl.where(member >= i, ends[i - 1], begin)
        return member, begin + (block % PER) * BR, select_member(member, ends)
    else:
        return 0, block * BR, R


@triton.jit
def example_keys(drop, member, m, mask):
    """(key, second key) of the examples that rows m belong to, for the member's dropout."""
    row = tl.load(drop.rows + m // drop.length, mask=mask, other=0)
    return row_keys(unpack_word(select_member(member, drop.state)), tl.load(drop.step), row)


@triton.jit
def kept_mask(drop, member, key, second, m, k, K):
    """reference.keyed_dropout's mask [rows m, features k].

    An example's elements are numbered in row-major order.
    """
    element = ((m % drop.length) * K)[:, None] + k[None, :]
    threshold = unpack_word(select_member(member, drop.threshold))
    return keep_elements(element, key[:, None], second[:, None], threshold)


# ---------------------------------------------------------------- forward


@triton.jit
def shrink_kernel(
    x, t, part, counter, members, drop, M, K, R, area, x_at, PER, CHUNK, PARTS,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """t[m, c] = sum over k of x'[m, k] downs[c, k].

    Grid: row tiles, blocks of ranks (PER of a member, with dropout), parts of CHUNK features.
    part [PARTS, M, R] fp32, or None where the sums are not split.
    """
    tile, block, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member, first, end = rank_span(block, members.end, drop, R, PER, BR)
    m = tile * BM + tl.arange(0, BM)
    c = first + tl.arange(0, BR)
    inside, wanted = m < M, c < end
    rows = x + row_offsets(m, area, x_at.image, x_at.row)
    factor = down_rows(c, members.down, members.end, K)
    if drop is not None:
        key, second = example_keys(drop, member, m, inside)
        kept = select_member(member, drop.kept)
    total = tl.full((BM, BR), 0.0, tl.float32)
    stop = tl.minimum(K, (piece + 1) * CHUNK)
    for k0 in range(piece * CHUNK, stop, BN):
        k = k0 + tl.arange(0, BN)
        real = k < stop
        mask = inside[:, None] & real[None, :]
        a = tl.load(rows[:, None] + k[None, :] * x_at.feature, mask=mask, other=0.0)
        if drop is not None:
            chosen = kept_mask(drop, member, key, second, m, k, K)
            a = round_to(tl.where(chosen, a.to(tl.float32) / kept, 0.0), a.dtype)
        mask = wanted[None, :] & real[:, None]
        f = round_to(tl.load(factor[None, :] + k[:, None], mask=mask, other=0.0), a.dtype)
        total = dot(a, f, total)
    here = m[:, None].to(tl.int64) * R + c[None, :]
    own = counter
    if part is not None:
        own += tile * tl.num_programs(1) + block
    mask = inside[:, None] & wanted[None, :]
    store_sum(total, t + here, mask, part, here, M * R, piece, PARTS, own, BM, BR)


@triton.jit
def expand_kernel(
    members, t, M, area, feature, t_at,
    FRESH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y = y + scale t up^T in place; with norms magnitude / norm (y + scale t up^T) + bias.

    Grid: column tiles of all members, row tiles. feature: y's stride. FRESH: y is not read.
    """
    member, column = find_column_tile(tl.program_id(0), members.width, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = column + tl.arange(0, BN)
    inside, wanted = m < M, n < select_member(member, members.width)
    rank, start = select_member(member, members.rank), select_member(member, members.start)
    up = select_member(member, members.up)
    hidden = t + row_offsets(m, area, t_at.image, t_at.row)
    total = tl.full((BM, BN), 0.0, tl.float32)
    for c0 in range(0, rank, BR):
        c = c0 + tl.arange(0, BR)
        mask = inside[:, None] & (c < rank)[None, :]
        a = tl.load(hidden[:, None] + (start + c)[None, :] * t_at.feature, mask=mask, other=0.0)
        mask = wanted[None, :] & (c < rank)[:, None]
        factor = tl.load(up + n[None, :] * rank + c[:, None], mask=mask, other=0.0)
        total = dot(a, round_to(factor, a.dtype), total)
    total *= select_member(member, members.scale)
    image, row = select_member(member, members.image), select_member(member, members.row)
    y = select_member(member, members.y) + row_offsets(m, area, image, row)[:, None]
    y += n[None, :] * feature
    mask = inside[:, None] & wanted[None, :]
    if not FRESH:
        total += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    if len(members.norm) > 0:
        gain = tl.load(select_member(member, members.magnitude) + n, mask=wanted, other=0.0)
        total *= (gain / tl.load(select_member(member, members.norm) + n, mask=wanted, other=1.0))[
            None, :
        ]
        if len(members.bias) > 0:
            bias = tl.load(select_member(member, members.bias) + n, mask=wanted, other=0.0)
            total += bias.to(tl.float32)[None, :]
    tl.store(y, round_to(total, y.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- backward


@triton.jit
def contract_features(
    members, ds, part, counter, member, tile, block, piece, M, area, feature, ds_at, work,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of dS = scale dz up, or its part over one piece of the features; writes dz too."""
    width, rank = select_member(member, members.width), select_member(member, members.rank)
    m = tile * BM + tl.arange(0, BM)
    c = block * BR + tl.arange(0, BR)
    inside, wanted = m < M, c < rank
    image, row = select_member(member, members.image), select_member(member, members.row)
    dy = select_member(member, members.dy) + row_offsets(m, area, image, row)
    up = select_member(member, members.up)
    total = tl.full((BM, BR), 0.0, tl.float32)
    stop = tl.minimum(width, (piece + 1) * work.chunk)
    for k0 in range(piece * work.chunk, stop, BN):
        k = k0 + tl.arange(0, BN)
        real = k < stop
        mask = inside[:, None] & real[None, :]
        a = tl.load(dy[:, None] + k[None, :] * feature, mask=mask, other=0.0)
        if len(members.norm) > 0:
            gain = tl.load(select_member(member, members.magnitude) + k, mask=real, other=0.0)
            gain /= tl.load(select_member(member, members.norm) + k, mask=real, other=1.0)
            a = round_to(a.to(tl.float32) * gain[None, :], a.dtype)
            if len(members.dz) > 0:
                dz = select_member(member, members.dz) + m.to(tl.int64)[:, None] * width
                tl.store(dz + k[None, :], a, mask=mask)
        mask = real[:, None] & wanted[None, :]
        factor = tl.load(up + k[:, None] * rank + c[None, :], mask=mask, other=0.0)
        total = dot(a, round_to(factor, a.dtype), total)
    total *= select_member(member, members.scale)
    column = select_member(member, members.column) + c
    to = (
        ds + row_offsets(m, area, ds_at.image, ds_at.row)[:, None] + column[None, :] * ds_at.feature
    )
    at = m.to(tl.int64)[:, None] * work.ranks + column[None, :]
    own = counter
    if part is not None:
        own += (tile * work.blocks + block) * len(members.up) + member
    mask = inside[:, None] & wanted[None, :]
    store_sum(total, to, mask, part, at, M * work.ranks, piece, work.pieces, own, BM, BR)


@triton.jit
def load_product(members, member, n, m, plain, inside, width):
    """gain z = y - bias  [channels n, rows m]; 0 outside the matrix."""
    mask = plain[:, None] & inside[None, :]
    y = select_member(member, members.y) + n[:, None]
    z = tl.load(y + m[None, :].to(tl.int64) * width, mask=mask, other=0.0).to(tl.float32)
    if len(members.bias) > 0:
        bias = tl.load(select_member(member, members.bias) + n, mask=plain, other=0.0)
        z = tl.where(mask, z - bias.to(tl.float32)[:, None], 0.0)
    return z


@triton.jit
def contract_rows(
    members, t, piled, counter, member, group, block, n, M, area, feature, t_at, guard, work,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of d_up = scale dz^T t, or its part over the rows of a group.

    The first block of ranks also computes the sums over rows of dy z, for d_magnitude and d_norm.
    """
    width, rank = select_member(member, members.width), select_member(member, members.rank)
    c = block * BR + tl.arange(0, BR)
    wanted, ranked = n < width, c < rank
    plain = n < tl.where(block == 0, width, 0)
    image, row = select_member(member, members.image), select_member(member, members.row)
    dy = select_member(member, members.dy) + n[:, None] * feature
    hidden = t + (select_member(member, members.start) + c)[None, :] * t_at.feature
    total, moment = tl.full((BN, BR), 0.0, tl.float32), tl.full((BN,), 0.0, tl.float32)
    stop = tl.minimum(M, (group + 1) * work.rows)
    for m0 in range(group * work.rows, stop, BM):
        m = m0 + tl.arange(0, BM)
        inside = m < stop
        mask = wanted[:, None] & inside[None, :]
        a = tl.load(dy + row_offsets(m, area, image, row)[None, :], mask=mask, other=0.0)
        mask = inside[:, None] & ranked[None, :]
        places = row_offsets(m, area, t_at.image, t_at.row)[:, None]
        total = dot(a, tl.load(hidden + places, mask=mask, other=0.0), total)
        if len(members.norm) > 0:
            z = load_product(members, member, n, m, plain, inside, width)
            moment += tl.sum(a.to(tl.float32) * z, 1)
    total *= select_member(member, members.scale)
    if len(members.norm) > 0:
        norm = tl.load(select_member(member, members.norm) + n, mask=wanted, other=1.0)
        gain = tl.load(select_member(member, members.magnitude) + n, mask=wanted, other=1.0) / norm
        total *= gain[:, None]
        if piled is not None:
            at = piled + work.elements + select_member(member, members.channel)
            tl.store(at + group * work.stack + n, moment, mask=plain)
    here = n[:, None] * rank + c[None, :]
    to, at = (
        select_member(member, members.d_up) + here,
        select_member(member, members.element) + here,
    )
    mask = wanted[:, None] & ranked[None, :]
    mine = store_sum(total, to, mask, piled, at, work.stack, group, work.parts, counter, BN, BR)
    # Only the outer condition is known at compile time: without norms `gain` does not exist.
    if len(members.norm) > 0:  # noqa: SIM102
        if mine:
            store_gain_gradients(
                members, piled, member, moment, gain, norm, n, plain, guard, work, BN
            )


@triton.jit
def store_gain_gradients(
    members, piled, member, moment, gain, norm, n, plain, guard, work, BN: tl.constexpr
):
    """d_magnitude and d_norm of channels n, from the sum over rows of dy z or its parts.

    moment = sum dy (y - bias) = gain sum dy z; the gradients are 0 where |gain| <= guard.
    """
    if piled is not None:
        at = piled + work.elements + select_member(member, members.channel)
        moment = tl.full((BN,), 0.0, tl.float32)
        for i in range(work.parts):
            moment += tl.load(at + i * work.stack + n, mask=plain, other=0.0, cache_modifier=".cg")
    known = tl.abs(gain) > guard
    d_gain = tl.where(known, moment / tl.where(known, gain, 1.0), 0.0)
    gains = select_member(member, members.gains)
    tl.store(gains + n, d_gain / norm, mask=plain)
    below = gains + select_member(member, members.width)
    tl.store(below + n, -d_gain * gain / norm, mask=plain)


@triton.jit
def back_up_kernel(
    members, t, ds, part, piled, counter, M, area, feature, t_at, ds_at, guard, work,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dS, dz, d_up, d_magnitude and d_norm. Grid: work.parts times work.each programs.

    feature: dy's stride. part [pieces, M, ranks] and piled [parts, stack] hold the parts of the
    sums over features and over rows, None where these are not split. z = (y - bias) / gain where
    |gain| > guard, else 0.
    """
    group, local = tl.program_id(0) // work.each, tl.program_id(0) % work.each
    if local < work.first:
        member, turn = local % len(members.up), local // len(members.up)
        block, turn = turn % work.blocks, turn // work.blocks
        piece, tile = turn % work.pieces, group * work.tiles + turn // work.pieces
        contract_features(
            members, ds, part, counter, member, tile, block, piece, M, area, feature, ds_at, work,
            BM, BN, BR,
        )  # fmt: skip
    else:
        block, tile = (local - work.first) % work.blocks, (local - work.first) // work.blocks
        member, start = find_column_tile(tile, members.width, BN)
        own = counter
        if piled is not None:
            own += work.parts * work.tiles * work.blocks * len(members.up)
            own += tile * work.blocks + block
        contract_rows(
            members, t, piled, own, member, group, block, start + tl.arange(0, BN),
            M, area, feature, t_at, guard, work, BM, BN, BR,
        )  # fmt: skip


@triton.jit
def spread_down(
    dx, ds, members, drop, m, k, M, K, R, feature, work,
    FRESH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of dx + dS downs, masked as x' was, or with FRESH of dS downs alone.

    dx: pointers to its rows.
    """
    inside, wanted = m < M, k < K
    total = tl.full((BM, BN), 0.0, tl.float32)
    for block in range(work.blocks):
        member, first, end = rank_span(block, members.end, drop, R, work.per_member, BR)
        c = first + tl.arange(0, BR)
        at = ds + m[:, None].to(tl.int64) * R + c[None, :]
        a = tl.load(at, mask=inside[:, None] & (c < end)[None, :], other=0.0)
        down = down_rows(c, members.down, members.end, K)
        mask = (c < end)[:, None] & wanted[None, :]
        f = round_to(tl.load(down[:, None] + k[None, :], mask=mask, other=0.0), a.dtype)
        if drop is not None:
            key, second = example_keys(drop, member, m, inside)
            chosen = kept_mask(drop, member, key, second, m, k, K)
            more = dot(a, f, tl.full((BM, BN), 0.0, tl.float32)) / select_member(member, drop.kept)
            total += tl.where(chosen, more, 0.0)
        else:
            total = dot(a, f, total)
    here = dx[:, None] + k[None, :] * feature
    mask = inside[:, None] & wanted[None, :]
    if not FRESH:
        total += tl.load(here, mask=mask, other=0.0).to(tl.float32)
    tl.store(here, round_to(total, here.dtype.element_ty), mask=mask)


@triton.jit
def gather_down(
    x, ds, piled, counter, members, drop, group, block, tile, M, K, R, area, x_at, work,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of d_down = dS^T x', or its part over the rows of a group."""
    member, first, end = rank_span(block, members.end, drop, R, work.per_member, BR)
    k, c = tile * BN + tl.arange(0, BN), first + tl.arange(0, BR)
    wanted, ranked = k < K, c < end
    total = tl.full((BN, BR), 0.0, tl.float32)
    stop = tl.minimum(M, (group + 1) * work.rows)
    for m0 in range(group * work.rows, stop, BM):
        m = m0 + tl.arange(0, BM)
        inside = m < stop
        at = x + k[:, None] * x_at.feature
        at += row_offsets(m, area, x_at.image, x_at.row)[None, :]
        a = tl.load(at, mask=wanted[:, None] & inside[None, :], other=0.0)
        if drop is not None:
            key, second = example_keys(drop, member, m, inside)
            chosen = tl.trans(kept_mask(drop, member, key, second, m, k, K))
            grown = a.to(tl.float32) / select_member(member, drop.kept)
            a = round_to(tl.where(chosen, grown, 0.0), a.dtype)
        at = ds + m[:, None].to(tl.int64) * R + c[None, :]
        s = tl.load(at, mask=inside[:, None] & ranked[None, :], other=0.0)
        total = dot(a, s, total)
    to = down_rows(c, members.d_down, members.end, K)[None, :] + k[:, None]
    at = k[:, None] * R + c[None, :]
    mask = wanted[:, None] & ranked[None, :]
    store_sum(total, to, mask, piled, at, K * R, group, work.parts, counter, BN, BR)


@triton.jit
def back_down_kernel(
    x, dx, ds, piled, counter, members, drop, M, K, R, area, x_at, dx_at, work,
    FRESH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx (None where it is not needed) and d_down. Grid: work.parts times work.each programs.

    FRESH: dx is written, not added to. dS [M, R] is contiguous; piled [parts, K, R] holds the parts
    of d_down, None where these sums are not split.
    """
    group, local = tl.program_id(0) // work.each, tl.program_id(0) % work.each
    if local < work.first:
        if dx is not None:
            columns = (K + BN - 1) // BN
            m = (group * work.tiles + local // columns) * BM + tl.arange(0, BM)
            k = (local % columns) * BN + tl.arange(0, BN)
            rows = dx + row_offsets(m, area, dx_at.image, dx_at.row)
            spread_down(
                rows, ds, members, drop, m, k, M, K, R, dx_at.feature, work, FRESH, BM, BN, BR
            )
    else:
        block, tile = (local - work.first) % work.blocks, (local - work.first) // work.blocks
        own = counter
        if piled is not None:
            own += tile * work.blocks + block
        gather_down(
            x, ds, piled, own, members, drop, group, block, tile, M, K, R, area, x_at, work,
            BM, BN, BR,
        )  # fmt: skip
