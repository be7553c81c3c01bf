"""Small example arguments of every op, for tests and benchmarks.

Each function takes (seed, dtype, device).
Sizes are odd or prime, so that a kernel that assumes whole tiles fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.reference import Member, wide_dtype

Arguments = tuple[Any, ...]


def linear_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of lora_linear."""
    return *_random(seed, dtype, device, (2, 5, 7), (11, 7), (11,), (3, 7), (11, 3)), 0.5


def grouped_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of lora_grouped."""
    first = (11, 7), (11,), (3, 7), (11, 3)
    second = (6, 7), (2, 7), (6, 2)
    x, w1, b1, d1, u1, w2, d2, u2 = _random(seed, dtype, device, (2, 5, 7), *first, *second)
    return x, (Member(w1, b1, d1, u1, 0.5), Member(w2, None, d2, u2, 2.0))


def conv_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of lora_conv."""
    shapes = (2, 6, 7, 9), (4, 3, 3, 2), (4,), (6, 3, 3, 2), (4, 3, 1, 1)
    return *_random(seed, dtype, device, *shapes), 0.5, (2, 1), (1, 0), (1, 2), 2


def norm_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of dora_norm."""
    return *_random(seed, dtype, device, (11, 7), (3, 7), (11, 3)), 0.5


def norms_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of dora_norms."""
    w, d, u = _random(seed + 1, dtype, device, (4, 3, 3, 2), (6, 3, 3, 2), (4, 6, 1, 1))
    return ((norm_example(seed, dtype, device), (w, d, u, 2.0)),)


def compose_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of dora_compose."""
    gain = _random(seed + 1, torch.float32, device, (11,))
    return *_random(seed, dtype, device, (2, 5, 11), (11,), (2, 5, 11)), *gain


def dropout_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of keyed_dropout."""
    step, rows = torch.tensor(3, device=device), torch.tensor([7, -(2**40)], device=device)
    return *_random(seed, dtype, device, (2, 5, 7)), 0.25, seed, 12345, step, rows


def mse_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Arguments of snr_weighted_mse."""
    shapes = (3, 4, 5, 7), (3, 4, 5, 7), (3, 1, 5, 7), (3,)
    out, target, mask, weight = _random(seed, dtype, device, *shapes)
    return out, target, (mask > 0).to(dtype), weight.abs().to(wide_dtype(dtype))


def _random(seed: int, dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
