"""Triton device functions that several kernels share.

Rounding and products (`round_to`, `dot`), addressing (`row_offsets`), the columns of a group's
table (`select_member`, `find_column_tile`), the hash of keyed dropout (`row_keys`, `keep_elements`)
and sums that are split over programs (`arrived_last`, `add_parts`, `store_sum`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_core.kernels.device import interpreted

INTERPRETED = tl.constexpr(interpreted())


class Strides(NamedTuple):
    """Strides of a matrix whose rows may be the pixels of images, as one kernel argument."""

    image: Any  # from the first row of an image to that of the next; without images, as `row`
    row: Any
    feature: Any


# ---------------------------------------------------------------- rounding and products


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x in another dtype, rounded to nearest, ties to even.

    Written out for Triton's interpreter, whose cast to bf16 truncates (3.6.0, 3.7.1, 3.9.0).
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, total):
    """total + a b, with fp32 sums; products of fp32 operands are IEEE, not tf32.

    Triton's interpreter (3.6.0, 3.7.1, 3.9.0) multiplies the bits of bf16 as integers. There,
    products are computed in fp32, which represents products of bf16 exactly.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


# ---------------------------------------------------------------- addressing


@triton.jit
def row_offsets(m, area, image, row):
    """int64 offsets of rows m: the `area` rows of an image have stride `row`, images have `image`.

    Where all rows have one stride, area is 1, which the launcher makes a constant: the division and
    the second term are optimized away.
    """
    return (m // area).to(tl.int64) * image + (m % area).to(tl.int64) * row


# ---------------------------------------------------------------- columns of a group's table


@triton.jit
def select_member(member, column):
    """The entry of a member in a column (pointers or numbers) of the group's table."""
    value = column[0]
    for i in tl.static_range(1, len(column)):
        value = tl.where(member == i, column[i], value)
    return value


@triton.jit
def find_column_tile(tile, widths, BN: tl.constexpr):
    """(member, first column) of a tile of BN columns, the members' tiles counted in order."""
    member = tile * 0
    start = tile * 0
    end = (widths[0] + BN - 1) // BN
    for i in tl.static_range(1, len(widths)):
        member = tl.where(tile < end, member, i)
        start = tl.where(tile < end, start, end)
        end += (widths[i] + BN - 1) // BN
    return member, (tile - start) * BN


# ---------------------------------------------------------------- keyed dropout


@triton.jit
def mix_bits(h):
    """The bijection of reference.keyed_dropout on uint32, which wraps by itself."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def absorb_word(state, word):
    return mix_bits((state ^ word) + 0x9E3779B9)


@triton.jit
def row_keys(state, step, row):
    """The two uint32 keys of an example: the hash `state` of seed and layer, int64 step and key."""
    key = absorb_word((row * 0).to(tl.uint32) + state.to(tl.uint32), step.to(tl.uint32))
    key = absorb_word(absorb_word(key, row.to(tl.uint32)), (row >> 32).to(tl.uint32))
    return key, absorb_word(key, 1)


@triton.jit
def keep_elements(element, key, second, threshold):
    """Whether dropout keeps elements, bool; element: row-major index inside the example."""
    return mix_bits(mix_bits(element.to(tl.uint32) ^ key) ^ second) >= threshold.to(tl.uint32)


# ---------------------------------------------------------------- sums split over programs


@triton.jit
def arrived_last(counter, parts):
    """True in the last of the `parts` programs that call this with one counter; resets it to 0.

    Stores that the other programs made before their call are visible to that program.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_parts(at, stride, parts, mask, A: tl.constexpr, B: tl.constexpr):
    """The sum [A, B] of the parts, in their order.

    They are read from the L2 cache, where the other programs' stores are.
    """
    total = tl.full((A, B), 0.0, tl.float32)
    for i in range(parts):
        total += tl.load(at + i * stride, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def store_sum(
    total, to, mask, pile, at, stride, piece, parts, counter, A: tl.constexpr, B: tl.constexpr
):
    """Store a sum [A, B] at the pointers `to`; returns True in the program that stores it.

    With `pile` (None where the sum is not split) total is one of `parts` parts: it is stored at
    pile + at + piece * stride, and the last program to arrive adds the parts and stores their sum.
    """
    if pile is not None:
        parts_at = pile + at
        tl.store(parts_at + piece * stride, total, mask=mask)
        last = arrived_last(counter, parts)
        if last:
            whole = add_parts(parts_at, stride, parts, mask, A, B)
            tl.store(to, round_to(whole, to.dtype.element_ty), mask=mask)
        return last
    else:
        tl.store(to, round_to(total, to.dtype.element_ty), mask=mask)
        return True
