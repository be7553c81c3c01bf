"""Tile sizes, splits of long sums and matrix strides for the launches of linear_kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.device_functions import Strides

# Multiprocessors of an H100 or H200: sums are split until there are about so many programs, twice
# as many for sums over rows.
PROGRAMS = 132


class Tile(NamedTuple):
    """Rows, features and ranks of a tile, and compile options."""

    rows: int
    features: int
    ranks: int
    warps: int
    stages: int


class Plane(NamedTuple):
    """Addressing of a matrix's rows in linear_kernels."""

    rows: int
    width: int
    area: int  # rows of one image, 1 where all rows have one stride
    image: int  # strides of an image, a row and a feature
    row: int
    feature: int


def choose_tile(kernel: str, rows: int, ranks: int, dtype: torch.dtype) -> Tile:
    """The tile for a class of shapes: an estimate, not measured on a GPU.

    Few rows make few tiles, so that these have fewer rows and more features. fp32 has no IEEE
    tensor cores: small tiles keep the operands of its FMAs in registers. With these warps, stages
    and back_up tiles ptxas spills nothing (Triton 3.9.0) or at most 16 bytes in 22 of 1,508
    configurations (3.7.1); with others more of them spill.
    """
    block = min(max(16, 1 << max(ranks - 1, 0).bit_length()), 64)
    warps, stages = (8, 2) if kernel == "back_up" else (4, 3)
    if dtype == torch.float32:
        return Tile(32, 32, min(block, 32), warps, stages)
    if kernel == "back_up":
        rows_of_tile = 64 if rows > 1024 and ranks in (16, 32) else 32
        return Tile(rows_of_tile, 64, block if ranks <= 64 else 32, warps, stages)
    if rows <= 1024:
        return Tile(32, 64, block, warps, stages)
    if kernel == "back_down" and ranks <= 128:
        stages = 2
    return Tile(64, 64, block, 4 if kernel == "expand" else 8, stages)


def find_plane(x: Tensor) -> Plane:
    """The addressing of x [m, k], or of the pixels of x [b, c, h, w]; needs `is_plane(x)`."""
    if x.ndim == 2:
        return Plane(x.shape[0], x.shape[1], 1, x.stride(0), x.stride(0), x.stride(1))
    b, c, h, w = x.shape
    row = x.stride(0) if h * w == 1 else x.stride(2) if w == 1 else x.stride(3)
    if b == 1 or x.stride(0) == h * w * row:
        return Plane(b * h * w, c, 1, row, row, x.stride(1))
    return Plane(b * h * w, c, h * w, x.stride(0), row, x.stride(1))


def is_plane(x: Tensor) -> bool:
    """Whether the pixels of x [b, c, h, w] have one stride inside an image.

    True for contiguous and channels_last images and slices of their channels.
    """
    h, w = x.shape[-2:]
    return x.ndim == 2 or h == 1 or w == 1 or x.stride(2) == w * x.stride(3)


def find_strides(plane: Plane, area: int) -> Strides:
    """The plane's strides, with one for images where another matrix of the launch has images."""
    image = plane.image if plane.area == area else area * plane.row
    return Strides(image, plane.row, plane.feature)


def ceil_divide(length: int, each: int) -> int:
    """length / each, rounded up.

    triton.cdiv takes 2.5 microseconds, and a layer needs 32 of these a step.
    """
    return -(-length // each)


def cut_sum(length: int, least: int, step: int, programs: int, wanted: int) -> tuple[int, int]:
    """(parts, length of each) of a sum over `length`.

    Parts are multiples of `step`, about `least` or longer, and as many as bring `programs` up to
    about `wanted`.
    """
    parts = max(1, min(ceil_divide(length, least), wanted // max(programs, 1)))
    each = ceil_divide(ceil_divide(length, step), parts) * step
    return ceil_divide(length, each), each


def sums_before(values: list[int]) -> tuple[int, ...]:
    """Exclusive prefix sums."""
    before = []
    total = 0
    for value in values:
        before.append(total)
        total += value
    return tuple(before)


def sums_through(values: list[int]) -> tuple[int, ...]:
    """Inclusive prefix sums."""
    return tuple(before + value for before, value in zip(sums_before(values), values))
