"""Random adapters of layers of several shapes, in fp64."""

from __future__ import annotations

import torch

from lora_core.adapters.weight_updates import AdapterState, LowRank

SHAPES = [((13, 7), 1), ((7, 13), 1), ((12, 5, 3, 3), 1), ((12, 4, 3, 2), 3), ((6, 1, 3, 3), 6)]
NAMED_SHAPES = {"a": ((8, 6), 1), "b": ((5, 9), 1), "c": ((6, 4, 3, 3), 1), "d": ((6, 2, 3, 3), 3)}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def adapter(shape, rank, groups=1, scale=0.5, seed=0, dtype=torch.float64):
    """A layer of weight shape [out, in / groups, ...]."""
    ones = [1] * (len(shape) - 2)
    down = randn(rank, *shape[1:], seed=seed) * torch.logspace(
        0, -2, rank, dtype=torch.float64
    ).view(-1, 1, *ones)
    return LowRank(
        down.to(dtype), randn(shape[0], rank // groups, *ones, seed=seed + 1, dtype=dtype), scale
    )


def random_unet(paths, rank=3, seed=0, **kwargs):
    rows = {
        path: adapter(
            NAMED_SHAPES[path][0], rank, NAMED_SHAPES[path][1], seed=10 * ord(path) + seed, **kwargs
        )
        for path in paths
    }
    return AdapterState({"unet": rows})


def random_dora(path, seed=3):
    lr = adapter(NAMED_SHAPES[path][0], 3, NAMED_SHAPES[path][1], seed=seed)
    return lr._replace(magnitude=randn(NAMED_SHAPES[path][0][0], seed=seed).abs() + 0.5)
