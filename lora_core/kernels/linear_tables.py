"""Arguments of linear_kernels: tables of a group's members, dropout, and division of the work.

Each is a NamedTuple that is passed as one kernel argument. A table's column has one pointer or
number for each member of the group, or nothing where the group has none of that kind. M, n, r and K
are rows of x, the member's width and rank, and x's width.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class DownTable(NamedTuple):
    """The members of a group as shrink_kernel and back_down_kernel read them."""

    down: tuple[Any, ...]  # [r, K] fp32
    end: tuple[int, ...]  # one past the member's last column in t and dS
    d_down: tuple[Any, ...] = ()  # [r, K] fp32


class ExpandTable(NamedTuple):
    """The members of a group as expand_kernel reads them."""

    y: tuple[Any, ...]  # [M, n]
    up: tuple[Any, ...]  # [n, r] fp32
    width: tuple[int, ...]  # n
    rank: tuple[int, ...]  # r
    start: tuple[int, ...]  # first column in t
    image: tuple[int, ...]  # strides of y
    row: tuple[int, ...]
    scale: tuple[float, ...]
    magnitude: tuple[Any, ...] = ()  # [n] fp32, of a DoRA
    norm: tuple[Any, ...] = ()  # [n] fp32, of a DoRA
    bias: tuple[Any, ...] = ()  # [n], of a DoRA: added after the gain


class BackUpTable(NamedTuple):
    """The members of a group as back_up_kernel reads them."""

    dy: tuple[Any, ...]  # [M, n]
    up: tuple[Any, ...]  # [n, r] fp32
    d_up: tuple[Any, ...]  # [n, r] fp32
    width: tuple[int, ...]  # n
    rank: tuple[int, ...]  # r
    start: tuple[int, ...]  # first column in t, which may hold members without a gradient
    column: tuple[int, ...]  # first column in dS
    element: tuple[int, ...]  # elements of d_up and channels of the members before this one
    channel: tuple[int, ...]
    image: tuple[int, ...]  # strides of dy
    row: tuple[int, ...]
    scale: tuple[float, ...]
    y: tuple[Any, ...] = ()  # [M, n] contiguous, the output of a DoRA
    magnitude: tuple[Any, ...] = ()  # [n] fp32
    norm: tuple[Any, ...] = ()  # [n] fp32
    bias: tuple[Any, ...] = ()  # [n]
    gains: tuple[Any, ...] = ()  # [2, n] fp32: d_magnitude, d_norm
    dz: tuple[Any, ...] = ()  # [M, n] contiguous, where dx is needed


class Dropout(NamedTuple):
    """The dropout of the members' inputs."""

    step: Any  # [] int64
    rows: Any  # [b] int64, the keys of the examples
    length: int  # rows of x in an example
    state: tuple[int, ...]  # hash of seed and layer; see `pack_word`
    threshold: tuple[int, ...]  # smallest hash of a kept element; see `pack_word`
    kept: tuple[float, ...]  # 1 - p


class BackUpWork(NamedTuple):
    """Division of back_up_kernel's work. A part of the rows has `each` programs."""

    rows: int  # in a part
    tiles: int  # of rows, in a part
    blocks: int  # of ranks
    first: int  # programs of a part that sum over features (dS, dz); the others sum over rows
    each: int
    chunk: int  # features of a piece
    pieces: int  # into which the sums over features are split
    parts: int  # into which the sums over rows are split
    ranks: int  # columns of dS
    elements: int  # of all d_up
    stack: int  # elements of all d_up and channels of all members


class BackDownWork(NamedTuple):
    """Division of back_down_kernel's work. A part of the rows has `each` programs."""

    rows: int  # in a part
    tiles: int  # of rows, in a part
    blocks: int  # of ranks
    per_member: int  # blocks of ranks of a member, with dropout
    first: int  # programs of a part that add to dx; the others sum over rows (d_down)
    each: int
    parts: int  # into which the sums over rows are split


def pack_word(word: int) -> int:
    """A uint32 (or its int32) as an odd number above 2^32, which `unpack_word` undoes.

    Triton recompiles a kernel for an integer that is 1 or a multiple of 16, which cannot be
    switched off for an integer inside a table; hashes and thresholds would be such by chance.
    """
    return 2 * (word & 0xFFFFFFFF) + 2**33 + 1
