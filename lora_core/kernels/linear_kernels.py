"""The Triton kernels of adapted linear layers: four launches serve a group of up to four layers that share their input x.

    shrink_kernel     t = x' downs^T                                                    [m, R], R = all ranks side by side
    expand_kernel     y = y + scale t up^T, or gain (y + scale t up^T) + bias           in place
    back_up_kernel    dS = scale dz up, d_up = scale dz^T t, with a gain dz = gain dy and the sums over rows of dy z
    back_down_kernel  dx = dx + dS downs, masked as x' was, in place; d_down = dS^T x'

The backward launches have two kinds of programs, interleaved by rows so that both find their operand in the L2 cache. A sum that is cut into parts
is finished by the last program to arrive, which adds the parts in their order: no float atomics, no second launch, the same bits in every run (the
scheme of Inductor's cooperative reductions).

Addressing: element (m, k) of a matrix lies at m * sm + k * sk, and with SPATIAL, where rows are the pixels of [b, c, h, w], at
(m // AREA) * sb + (m % AREA) * sm + k * sk. Factors are contiguous fp32, cast to the activations' dtype here; sums are fp32; fp32 products are IEEE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_core.kernels.dropout import keep_elements, row_keys
from lora_core.kernels.narrow import INTERPRETED, round_to


@triton.jit
def _dot(a, b, total):
    # Triton's interpreter (3.6.0, 3.7.1, 3.9.0) multiplies the bits of bf16 as integers. There, products
    # are taken in fp32, which holds those of bf16 exactly.
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _pick(i, a, b, c, d, MEMBERS: tl.constexpr):
    """The i-th of the first MEMBERS; what lies beyond them may be None."""
    if MEMBERS == 1:
        return a
    elif MEMBERS == 2:
        return tl.where(i == 0, a, b)
    elif MEMBERS == 3:
        return tl.where(i == 0, a, tl.where(i == 1, b, c))
    else:
        return tl.where(i == 0, a, tl.where(i == 1, b, tl.where(i == 2, c, d)))


@triton.jit
def _place(m, AREA, sb, sm, SPATIAL: tl.constexpr):
    """Offsets of rows m, int64."""
    if SPATIAL:
        return (m // AREA).to(tl.int64) * sb + (m % AREA).to(tl.int64) * sm
    else:
        return m.to(tl.int64) * sm


@triton.jit
def _down_rows(c, d0, d1, d2, d3, e0, e1, e2, K, MEMBERS: tl.constexpr):
    """Pointers to the rows c of the members' [r, K] matrices laid one below the other; e0, e1, e2 are where the first three end."""
    rows = d0 + c * K
    if MEMBERS > 1:
        rows = tl.where(c < e0, rows, d1 + (c - e0) * K)
    if MEMBERS > 2:
        rows = tl.where(c < e1, rows, d2 + (c - e1) * K)
    if MEMBERS > 3:
        rows = tl.where(c < e2, rows, d3 + (c - e2) * K)
    return rows


@triton.jit
def _span(block, e0, e1, e2, R, PER, DROP: tl.constexpr, MEMBERS: tl.constexpr, BR: tl.constexpr):
    """(member, first rank, end) of a block of ranks. With dropout every member has its own x', so that no block may cross from one to the next."""
    if DROP:
        member = block // PER
        begin = tl.where(member == 0, 0, _pick(member - 1, e0, e1, e2, e2, MEMBERS))
        end = (
            R
            if MEMBERS == 1
            else tl.where(member == MEMBERS - 1, R, _pick(member, e0, e1, e2, e2, MEMBERS))
        )
        return member, begin + (block % PER) * BR, end
    else:
        return 0, block * BR, R


@triton.jit
def _last(counter, parts):
    """True for the last of the programs that call this with one counter, which it leaves at 0; it sees what the others have stored."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _add_parts(at, stride, parts, mask, A: tl.constexpr, B: tl.constexpr):
    """The sum of the parts in their order  [A, B]. They are read from the L2 cache, where other programs have put them."""
    total = tl.full((A, B), 0.0, tl.float32)
    for i in range(parts):
        total += tl.load(at + i * stride, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _deliver(
    total,
    here,
    mask,
    pile,
    stride,
    piece,
    PARTS,
    counter,
    SPLIT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Stores total [A, B] at `here`; with SPLIT, as one of PARTS, `stride` apart from `pile` on, that the last program sums. True for who stores."""
    if SPLIT:
        tl.store(pile + piece * stride, total, mask=mask)
        last = _last(counter, PARTS)
        if last:
            tl.store(
                here,
                round_to(_add_parts(pile, stride, PARTS, mask, A, B), here.dtype.element_ty),
                mask=mask,
            )
        return last
    else:
        tl.store(here, round_to(total, here.dtype.element_ty), mask=mask)
        return True


@triton.jit
def _begin(member, r0, r1, r2, MEMBERS: tl.constexpr):
    """The sum of the values of the members before this one."""
    begin = member * 0
    if MEMBERS > 1:
        begin = tl.where(member > 0, r0, 0)
    if MEMBERS > 2:
        begin += tl.where(member > 1, r1, 0)
    if MEMBERS > 3:
        begin += tl.where(member > 2, r2, 0)
    return begin


@triton.jit
def _column_tile(tile, n0, n1, n2, BN: tl.constexpr, MEMBERS: tl.constexpr):
    """(member, first column) of a tile of BN columns, the members' tiles counted one after the other."""
    member, start = tile * 0, tile * 0
    end = (n0 + BN - 1) // BN
    if MEMBERS > 1:
        member, start = tl.where(tile < end, member, 1), tl.where(tile < end, start, end)
    if MEMBERS > 2:
        end += (n1 + BN - 1) // BN
        member, start = tl.where(tile < end, member, 2), tl.where(tile < end, start, end)
    if MEMBERS > 3:
        end += (n2 + BN - 1) // BN
        member, start = tl.where(tile < end, member, 3), tl.where(tile < end, start, end)
    return member, (tile - start) * BN


@triton.jit
def _keys(state, step, rows, m, mask, LENGTH):
    """(key, second key) of the examples that rows m belong to; state is the hash of seed and layer, an example has LENGTH rows."""
    row = tl.load(rows + m // LENGTH, mask=mask, other=0)
    return row_keys(state, tl.load(step), row)


@triton.jit
def _keep(key, second, m, k, K, LENGTH, threshold):
    """reference.keyed_dropout's mask of rows m (down) and features k (across): an example's elements are counted row by row."""
    element = ((m % LENGTH) * K)[:, None] + k[None, :]
    return keep_elements(element, key[:, None], second[:, None], threshold)


@triton.jit(do_not_specialize=["w0", "w1", "w2", "w3", "h0", "h1", "h2", "h3"])
def shrink_kernel(
    x, d0, d1, d2, d3, t, part, counter, step, rows, w0, w1, w2, w3, h0, h1, h2, h3, q0, q1, q2, q3,
    M, K, R, e0, e1, e2, AREA, xb, xm, xk, LENGTH, PER, CHUNK, PARTS,
    MEMBERS: tl.constexpr, DROP: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """t[m, c] = sum over k of x'[m, k] downs[c, k]. Grid: row tiles, blocks of ranks, parts of CHUNK features.

    w: hash of seed and layer, h: threshold of the mask, both uint32 held in int32; q = 1 - p. part [PARTS, M, R] fp32.
    """
    tile, block, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member, first, end = _span(block, e0, e1, e2, R, PER, DROP, MEMBERS, BR)
    m, c = tile * BM + tl.arange(0, BM), first + tl.arange(0, BR)
    inside, wanted = m < M, c < end
    at = x + _place(m, AREA, xb, xm, SPATIAL)
    factor = _down_rows(c, d0, d1, d2, d3, e0, e1, e2, K, MEMBERS)
    if DROP:
        threshold, kept = (
            _pick(member, h0, h1, h2, h3, MEMBERS),
            _pick(member, q0, q1, q2, q3, MEMBERS),
        )
        key, second = _keys(_pick(member, w0, w1, w2, w3, MEMBERS), step, rows, m, inside, LENGTH)
    total = tl.full((BM, BR), 0.0, tl.float32)
    stop = tl.minimum(K, (piece + 1) * CHUNK)
    for k0 in range(piece * CHUNK, stop, BN):
        k = k0 + tl.arange(0, BN)
        a = tl.load(
            at[:, None] + k[None, :] * xk, mask=inside[:, None] & (k < stop)[None, :], other=0.0
        )
        if DROP:
            a = round_to(
                tl.where(
                    _keep(key, second, m, k, K, LENGTH, threshold), a.to(tl.float32) / kept, 0.0
                ),
                a.dtype,
            )
        f = round_to(
            tl.load(
                factor[None, :] + k[:, None], mask=wanted[None, :] & (k < stop)[:, None], other=0.0
            ),
            a.dtype,
        )
        total = _dot(a, f, total)
    here = m[:, None].to(tl.int64) * R + c[None, :]
    own = counter + tile * tl.num_programs(1) + block
    _deliver(
        total,
        t + here,
        inside[:, None] & wanted[None, :],
        part + here,
        M * R,
        piece,
        PARTS,
        own,
        SPLIT,
        BM,
        BR,
    )


@triton.jit
def expand_kernel(
    y0, y1, y2, y3, t, u0, u1, u2, u3, g0, g1, g2, g3, v0, v1, v2, v3, b0, b1, b2, b3,
    M, n0, n1, n2, n3, r0, r1, r2, r3, s0, s1, s2, s3, AREA, yb, ym, yk, tb, tm, tk,
    MEMBERS: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, SPATIAL: tl.constexpr, FRESH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y = y + s t u^T in place, with GAIN g / v (y + s t u^T) + b, with FRESH without reading y. Grid: column tiles of all members, row tiles."""
    member, column = _column_tile(tl.program_id(0), n0, n1, n2, BN, MEMBERS)
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), column + tl.arange(0, BN)
    n_end, r_end = _pick(member, n0, n1, n2, n3, MEMBERS), _pick(member, r0, r1, r2, r3, MEMBERS)
    begin = _begin(member, r0, r1, r2, MEMBERS)
    inside, wanted = m < M, n < n_end
    up = _pick(member, u0, u1, u2, u3, MEMBERS)
    at = t + _place(m, AREA, tb, tm, SPATIAL)
    total = tl.full((BM, BN), 0.0, tl.float32)
    for c0 in range(0, r_end, BR):
        c = c0 + tl.arange(0, BR)
        a = tl.load(
            at[:, None] + (begin + c)[None, :] * tk,
            mask=inside[:, None] & (c < r_end)[None, :],
            other=0.0,
        )
        f = round_to(
            tl.load(
                up + n[None, :] * r_end + c[:, None],
                mask=wanted[None, :] & (c < r_end)[:, None],
                other=0.0,
            ),
            a.dtype,
        )
        total = _dot(a, f, total)
    total *= _pick(member, s0, s1, s2, s3, MEMBERS)
    stride = ym if SPATIAL else n_end
    y = (
        _pick(member, y0, y1, y2, y3, MEMBERS)
        + _place(m, AREA, yb, stride, SPATIAL)[:, None]
        + n[None, :] * yk
    )
    mask = inside[:, None] & wanted[None, :]
    if not FRESH:
        total += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    if GAIN:
        gain = tl.load(_pick(member, g0, g1, g2, g3, MEMBERS) + n, mask=wanted, other=0.0)
        total *= (
            gain / tl.load(_pick(member, v0, v1, v2, v3, MEMBERS) + n, mask=wanted, other=1.0)
        )[None, :]
        if BIAS:
            total += tl.load(_pick(member, b0, b1, b2, b3, MEMBERS) + n, mask=wanted, other=0.0).to(
                tl.float32
            )[None, :]
    tl.store(y, round_to(total, y.dtype.element_ty), mask=mask)


@triton.jit
def _contract_up(
    dy, up, magnitude, norm, dz, here, inside, pile, stride, piece, parts, own, scale, ok, rank, c, start, stop,
    GAIN: tl.constexpr, DZ: tl.constexpr, CUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of dS = scale dz up, or of its part over the features from start to stop, and with DZ dz itself; dy, dz: pointers to rows."""
    total = tl.full((BM, BR), 0.0, tl.float32)
    wanted = c < rank
    for k0 in range(start, stop, BN):
        k = k0 + tl.arange(0, BN)
        real = k < stop
        a = tl.load(dy[:, None] + k[None, :] * ok, mask=inside[:, None] & real[None, :], other=0.0)
        if GAIN:
            gain = tl.load(magnitude + k, mask=real, other=0.0) / tl.load(
                norm + k, mask=real, other=1.0
            )
            a = round_to(a.to(tl.float32) * gain[None, :], a.dtype)
            if DZ:
                tl.store(dz[:, None] + k[None, :], a, mask=inside[:, None] & real[None, :])
        f = round_to(
            tl.load(
                up + k[:, None] * rank + c[None, :], mask=real[:, None] & wanted[None, :], other=0.0
            ),
            a.dtype,
        )
        total = _dot(a, f, total)
    _deliver(
        total * scale,
        here,
        inside[:, None] & wanted[None, :],
        pile,
        stride,
        piece,
        parts,
        own,
        CUT,
        BM,
        BR,
    )


@triton.jit
def _gather_up(
    dy, y, t, magnitude, norm, bias, d_up, gains, pile, pile_row, stack, group, PARTS, own, scale, guard, M, ROWS, n, c, width, rank, block,
    AREA, ob, om, ok, tb, tm, tk,
    GAIN: tl.constexpr, BIAS: tl.constexpr, SPATIAL: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of d_up = scale dz^T t, or of its part over the rows of a group, and of d_magnitude and d_norm, which the first block of ranks takes."""
    wanted, ranked, plain = n < width, c < rank, n < tl.where(block == 0, width, 0)
    total, dot = tl.full((BN, BR), 0.0, tl.float32), tl.full((BN,), 0.0, tl.float32)
    stop = tl.minimum(M, (group + 1) * ROWS)
    for m0 in range(group * ROWS, stop, BM):
        m = m0 + tl.arange(0, BM)
        inside = m < stop
        a = tl.load(
            dy + n[:, None] * ok + _place(m, AREA, ob, om, SPATIAL)[None, :],
            mask=wanted[:, None] & inside[None, :],
            other=0.0,
        )
        s = tl.load(
            t + _place(m, AREA, tb, tm, SPATIAL)[:, None] + c[None, :] * tk,
            mask=inside[:, None] & ranked[None, :],
            other=0.0,
        )
        total = _dot(a, s, total)
        if GAIN:
            mask = plain[:, None] & inside[None, :]
            z = tl.load(y + n[:, None] + m[None, :].to(tl.int64) * width, mask=mask, other=0.0).to(
                tl.float32
            )
            if BIAS:
                z = tl.where(
                    mask, z - tl.load(bias + n, mask=plain, other=0.0).to(tl.float32)[:, None], 0.0
                )
            dot += tl.sum(a.to(tl.float32) * z, 1)
    total *= scale
    if GAIN:
        length = tl.load(norm + n, mask=wanted, other=1.0)
        gain = tl.load(magnitude + n, mask=wanted, other=1.0) / length
        total *= gain[:, None]
        if SPLIT:
            tl.store(pile_row + group * stack + n, dot, mask=plain)
    here = n[:, None] * rank + c[None, :]
    mine = _deliver(
        total,
        d_up + here,
        wanted[:, None] & ranked[None, :],
        pile + here,
        stack,
        group,
        PARTS,
        own,
        SPLIT,
        BN,
        BR,
    )
    if GAIN:  # noqa: SIM102 (GAIN is known when this is compiled, mine is not)
        if mine:
            if SPLIT:
                dot = tl.full((BN,), 0.0, tl.float32)
                for i in range(PARTS):
                    dot += tl.load(
                        pile_row + i * stack + n, mask=plain, other=0.0, cache_modifier=".cg"
                    )
            known = tl.abs(gain) > guard
            d_gain = tl.where(known, dot / tl.where(known, gain, 1.0), 0.0)
            tl.store(gains + n, d_gain / length, mask=plain)
            tl.store(gains + width + n, -d_gain * gain / length, mask=plain)


@triton.jit
def back_up_kernel(
    o0, o1, o2, o3, y0, y1, y2, y3, g0, g1, g2, g3, v0, v1, v2, v3, b0, b1, b2, b3, u0, u1, u2, u3, z0, z1, z2, z3, p0, p1, p2, p3, w0, w1, w2, w3,
    t, ds, part, piled, counter,
    M, n0, n1, n2, n3, r0, r1, r2, r3, s0, s1, s2, s3, i0, i1, i2, i3, a0, a1, a2, a3, R, T, STACK, AREA, ob, ok, tb, tm, tk, db, dm, dk, guard,
    ROWS, TILES, BLOCKS, FIRST, EACH, CHUNK, PIECES, PARTS,
    MEMBERS: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, DZ: tl.constexpr, SPATIAL: tl.constexpr,
    CUT: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Grid: for every ROWS rows EACH programs, of which the FIRST sum over features (dS, dz) and the others over rows (d_up, d_magnitude, d_norm).

    o: dy, y: the layer's output, g: magnitude, v: norm, b: bias, u: up, z: dz, p: d_up, w: d_magnitude above d_norm [2, n]; n: width, r: rank,
    s: scale, i: first column in t, a: row stride of dy; R: width of dS, T: elements of all d_up. part [PIECES, M, R] and piled [PARTS, STACK = T +
    sum of n] take the parts of sums that are cut (CUT over features, SPLIT over rows). z is (y - b) / gain where |gain| > guard, else 0.
    """
    group, local = tl.program_id(0) // EACH, tl.program_id(0) % EACH
    if local < FIRST:
        member, block, turn = (
            local % MEMBERS,
            (local // MEMBERS) % BLOCKS,
            local // (MEMBERS * BLOCKS),
        )
        piece, tile = turn % PIECES, group * TILES + turn // PIECES
        width, rank = _pick(member, n0, n1, n2, n3, MEMBERS), _pick(member, r0, r1, r2, r3, MEMBERS)
        m, c = tile * BM + tl.arange(0, BM), block * BR + tl.arange(0, BR)
        column, row = _begin(member, r0, r1, r2, MEMBERS) + c, m.to(tl.int64)
        _contract_up(
            _pick(member, o0, o1, o2, o3, MEMBERS) + _place(m, AREA, ob, _pick(member, a0, a1, a2, a3, MEMBERS), SPATIAL),
            _pick(member, u0, u1, u2, u3, MEMBERS), _pick(member, g0, g1, g2, g3, MEMBERS), _pick(member, v0, v1, v2, v3, MEMBERS),
            _pick(member, z0, z1, z2, z3, MEMBERS) + row * width, ds + _place(m, AREA, db, dm, SPATIAL)[:, None] + column[None, :] * dk,
            m < M, part + row[:, None] * R + column[None, :], M * R, piece, PIECES,
            counter + (tile * BLOCKS + block) * MEMBERS + member, _pick(member, s0, s1, s2, s3, MEMBERS), ok, rank, c,
            piece * CHUNK, tl.minimum(width, (piece + 1) * CHUNK), GAIN, DZ, CUT, BM, BN, BR,
        )  # fmt: skip
    else:
        block, tile = (local - FIRST) % BLOCKS, (local - FIRST) // BLOCKS
        member, start = _column_tile(tile, n0, n1, n2, BN, MEMBERS)
        width, rank = _pick(member, n0, n1, n2, n3, MEMBERS), _pick(member, r0, r1, r2, r3, MEMBERS)
        _gather_up(
            _pick(member, o0, o1, o2, o3, MEMBERS), _pick(member, y0, y1, y2, y3, MEMBERS), t + _pick(member, i0, i1, i2, i3, MEMBERS) * tk,
            _pick(member, g0, g1, g2, g3, MEMBERS), _pick(member, v0, v1, v2, v3, MEMBERS), _pick(member, b0, b1, b2, b3, MEMBERS),
            _pick(member, p0, p1, p2, p3, MEMBERS), _pick(member, w0, w1, w2, w3, MEMBERS),
            piled + _begin(member, n0 * r0, n1 * r1, n2 * r2, MEMBERS), piled + T + _begin(member, n0, n1, n2, MEMBERS), STACK, group, PARTS,
            counter + PARTS * TILES * BLOCKS * MEMBERS + tile * BLOCKS + block, _pick(member, s0, s1, s2, s3, MEMBERS), guard, M, ROWS,
            start + tl.arange(0, BN), block * BR + tl.arange(0, BR), width, rank, block,
            AREA, ob, _pick(member, a0, a1, a2, a3, MEMBERS), ok, tb, tm, tk, GAIN, BIAS, SPATIAL, SPLIT, BM, BN, BR,
        )  # fmt: skip


@triton.jit
def _spread_down(
    dx, ds, d0, d1, d2, d3, step, rows, w0, w1, w2, w3, h0, h1, h2, h3, q0, q1, q2, q3, m, k, M, K, R, e0, e1, e2, gk, LENGTH, PER, BLOCKS,
    MEMBERS: tl.constexpr, DROP: tl.constexpr, FRESH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of dx + dS downs, masked as x' was, or with FRESH of dS downs alone; dx: pointers to rows."""
    inside, wanted = m < M, k < K
    total = tl.full((BM, BN), 0.0, tl.float32)
    for block in range(BLOCKS):
        member, first, end = _span(block, e0, e1, e2, R, PER, DROP, MEMBERS, BR)
        c = first + tl.arange(0, BR)
        a = tl.load(
            ds + m[:, None].to(tl.int64) * R + c[None, :],
            mask=inside[:, None] & (c < end)[None, :],
            other=0.0,
        )
        down = _down_rows(c, d0, d1, d2, d3, e0, e1, e2, K, MEMBERS)
        f = round_to(
            tl.load(
                down[:, None] + k[None, :], mask=(c < end)[:, None] & wanted[None, :], other=0.0
            ),
            a.dtype,
        )
        if DROP:
            key, second = _keys(
                _pick(member, w0, w1, w2, w3, MEMBERS), step, rows, m, inside, LENGTH
            )
            kept = _keep(key, second, m, k, K, LENGTH, _pick(member, h0, h1, h2, h3, MEMBERS))
            more = _dot(a, f, tl.full((BM, BN), 0.0, tl.float32)) / _pick(
                member, q0, q1, q2, q3, MEMBERS
            )
            total += tl.where(kept, more, 0.0)
        else:
            total = _dot(a, f, total)
    here, mask = dx[:, None] + k[None, :] * gk, inside[:, None] & wanted[None, :]
    if not FRESH:
        total += tl.load(here, mask=mask, other=0.0).to(tl.float32)
    tl.store(here, round_to(total, here.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["w0", "w1", "w2", "w3", "h0", "h1", "h2", "h3"])
def back_down_kernel(
    dx, ds, x, d0, d1, d2, d3, p0, p1, p2, p3, piled, counter, step, rows, w0, w1, w2, w3, h0, h1, h2, h3, q0, q1, q2, q3,
    M, K, R, e0, e1, e2, AREA, xb, xm, xk, gb, gm, gk, LENGTH, PER, ROWS, TILES, BLOCKS, FIRST, EACH, PARTS,
    MEMBERS: tl.constexpr, DROP: tl.constexpr, SPATIAL: tl.constexpr, DX: tl.constexpr, FRESH: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Grid: for every ROWS rows EACH programs, of which the FIRST add to a tile of dx (with FRESH they write it) and the others sum d_down over rows.

    d: down, p: d_down, w, h, q: dropout as in shrink_kernel; dS [M, R] lies dense; piled [PARTS, K, R] takes the parts of sums that are cut.
    """
    group, local = tl.program_id(0) // EACH, tl.program_id(0) % EACH
    if local < FIRST:
        if DX:
            row = (group * TILES + local // ((K + BN - 1) // BN)) * BM + tl.arange(0, BM)
            _spread_down(
                dx + _place(row, AREA, gb, gm, SPATIAL), ds, d0, d1, d2, d3, step, rows, w0, w1, w2, w3, h0, h1, h2, h3, q0, q1, q2, q3,
                row, (local % ((K + BN - 1) // BN)) * BN + tl.arange(0, BN), M, K, R, e0, e1, e2, gk, LENGTH, PER, BLOCKS,
                MEMBERS, DROP, FRESH, BM, BN, BR,
            )  # fmt: skip
    else:
        block, tile = (local - FIRST) % BLOCKS, (local - FIRST) // BLOCKS
        member, first, end = _span(block, e0, e1, e2, R, PER, DROP, MEMBERS, BR)
        k, c = tile * BN + tl.arange(0, BN), first + tl.arange(0, BR)
        wanted, ranked = k < K, c < end
        total = tl.full((BN, BR), 0.0, tl.float32)
        stop = tl.minimum(M, (group + 1) * ROWS)
        for m0 in range(group * ROWS, stop, BM):
            m = m0 + tl.arange(0, BM)
            inside = m < stop
            a = tl.load(
                x + k[:, None] * xk + _place(m, AREA, xb, xm, SPATIAL)[None, :],
                mask=wanted[:, None] & inside[None, :],
                other=0.0,
            )
            if DROP:
                key, second = _keys(
                    _pick(member, w0, w1, w2, w3, MEMBERS), step, rows, m, inside, LENGTH
                )
                kept = tl.trans(
                    _keep(key, second, m, k, K, LENGTH, _pick(member, h0, h1, h2, h3, MEMBERS))
                )
                a = round_to(
                    tl.where(kept, a.to(tl.float32) / _pick(member, q0, q1, q2, q3, MEMBERS), 0.0),
                    a.dtype,
                )
            s = tl.load(
                ds + m[:, None].to(tl.int64) * R + c[None, :],
                mask=inside[:, None] & ranked[None, :],
                other=0.0,
            )
            total = _dot(a, s, total)
        here = _down_rows(c, p0, p1, p2, p3, e0, e1, e2, K, MEMBERS)[None, :] + k[:, None]
        pile, own = piled + k[:, None] * R + c[None, :], counter + tile * BLOCKS + block
        _deliver(
            total,
            here,
            wanted[:, None] & ranked[None, :],
            pile,
            K * R,
            group,
            PARTS,
            own,
            SPLIT,
            BN,
            BR,
        )
