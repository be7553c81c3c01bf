"""Ahead-of-time builds of linear_kernels, from launches that are recorded on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.ahead import TYPES, Build, describe_launch
from lora_core.kernels.linear_launches import (
    launch_back_down,
    launch_back_up,
    launch_expand,
    launch_shrink,
    record_launches,
)

RANKS = (4, 16, 64, 128, 256)
HALVES_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


def list_linear_builds(full: bool) -> list[Build]:
    """Builds of a few configurations, or with `full` of all that are dispatched.

    dtypes x ranks x LoRA and DoRA x dropout x few and many rows, groups of one to four, and 1x1
    convolutions of contiguous images.
    """
    cases = _all_cases() if full else _few_cases()
    found = {}
    for case in cases:
        for build in case:
            shape = build.kernel.__name__, build.signature, build.constants, build.multiples
            found[str(shape)] = build
    return list(found.values())


def _few_cases() -> list[list[Build]]:
    return [
        _linear(1024, 640, 640, 16, 3),
        _linear(4096, 640, 640, 64, 1, gain=True),
        _linear(77, 2048, 1280, 4, 2, gain=True, drop=True),
        _linear(4096, 320, 320, 128, 1),
        _linear(1024, 640, 640, 16, 1, dtype=torch.float32, gain=True),
        _pointwise(4096, 320, 16),
    ]


def _all_cases() -> list[list[Build]]:
    cases = []
    sizes = (77, 1), (4096, 3)
    for size, rank, dtype, gain, drop in product(
        sizes, RANKS, HALVES_AND_SINGLE, (False, True), (False, True)
    ):
        rows, members = size
        cases.append(_linear(rows, 640, 640, rank, members, dtype, gain, drop))
    for members in (2, 4):
        cases.append(_linear(1024, 1280, 1280, 16, members))
    for rows, rank, dtype in product((256, 4096), RANKS, (torch.bfloat16, torch.float32)):
        cases.append(_pointwise(rows, 640, rank, dtype))
    return cases


def _linear(
    m: int,
    k: int,
    n: int,
    rank: int,
    members: int,
    dtype: torch.dtype = torch.bfloat16,
    gain: bool = False,
    drop: bool = False,
) -> list[Build]:
    """The four launches of a group of linear layers [n, k] on m rows."""
    x = _empty(m, k, dtype=dtype)
    t = _empty(m, rank * members, dtype=dtype)
    ys = [_empty(m, n, dtype=dtype) for _ in range(members)]
    downs = [_empty(rank, k) for _ in range(members)]
    ups = [_empty(n, rank) for _ in range(members)]
    vectors = [_empty(n) for _ in range(members)] if gain else []
    biases = [_empty(n, dtype=dtype) for _ in range(members)] if gain else []
    scales = [0.5] * members
    starts = [rank * i for i in range(members)]
    outputs = ys if gain else []
    dropout: tuple[list[Any], list[int], list[float]] = ([], [], [])
    if drop:
        keys = [_empty(1, dtype=torch.int64), _empty(1, dtype=torch.int64)]
        dropout = keys, [7, 9] * members, [0.5] * members
    norms = vectors, vectors, biases
    launches: list[Callable[[], Any]] = [
        partial(launch_shrink, x, downs, *dropout),
        partial(launch_expand, ys, t, ups, scales, *norms, False),
        partial(launch_back_up, ys, t, starts, ups, scales, outputs, *norms, 0.0, gain),
        partial(launch_back_down, x, downs, t, x, downs, *dropout, False),
    ]
    kind = f"{TYPES[dtype]} m{m} r{rank} x{members}"
    kind += " dora" if gain else ""
    kind += " drop" if drop else ""
    return _recorded_builds(launches, kind, dtype)


def _pointwise(m: int, c: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> list[Build]:
    """The four launches of a 1x1 convolution of two contiguous images [c, m / 16, 16].

    The features of a row, here a pixel, have a large stride.
    """
    x = _empty(2, c, m // 16, 16, dtype=dtype)
    t = _empty(2 * m, rank, dtype=dtype)
    downs, ups = [_empty(rank, c)], [_empty(c, rank)]
    launches: list[Callable[[], Any]] = [
        partial(launch_shrink, x, downs, [], [], []),
        partial(launch_expand, [x], t, ups, [0.5], [], [], [], False),
        partial(launch_back_up, [x], t, [0], ups, [0.5], [], [], [], [], 0.0, False),
        partial(launch_back_down, x, downs, t, x, downs, [], [], [], False),
    ]
    return _recorded_builds(launches, f"{TYPES[dtype]} m{2 * m} r{rank} pixels", dtype)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _recorded_builds(
    launches: list[Callable[[], Any]], kind: str, dtype: torch.dtype
) -> list[Build]:
    builds = []
    for run in launches:
        for launch in record_launches(run):
            build = describe_launch(
                launch.kernel,
                launch.arguments,
                warps=launch.tile.warps,
                stages=launch.tile.stages,
                tensor_cores=dtype != torch.float32,
                name=f"{launch.kernel.__name__.removesuffix('_kernel')} {kind}",
            )
            builds.append(build)
    return builds
