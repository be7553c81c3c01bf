"""What linear_ops launches of linear_kernels, recorded from its own launchers on the meta device, to be compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_core.kernels import linear_ops as ops
from lora_core.kernels.ahead import Build

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
RANKS = (4, 16, 64, 128, 256)


def list_builds(full: bool) -> list[Build]:
    """dtypes x ranks x LoRA and DoRA x dropout x few and many rows, groups of one to four, 1x1 convolutions of contiguous images; or a few."""
    if not full:
        cases = [
            _linear(1024, 640, 640, 16, 3),
            _linear(4096, 640, 640, 64, 1, gain=True),
            _linear(77, 2048, 1280, 4, 2, gain=True, drop=True),
        ]
        cases += [
            _linear(4096, 320, 320, 128, 1),
            _linear(1024, 640, 640, 16, 1, dtype=torch.float32, gain=True),
            _pointwise(4096, 320, 16),
        ]
    else:
        cases = [_linear(m, 640, 640, rank, members, dtype, gain, drop) for m, members in ((77, 1), (4096, 3)) for rank in RANKS
                 for dtype in (torch.bfloat16, torch.float16, torch.float32) for gain in (False, True) for drop in (False, True)]  # fmt: skip
        cases += [_linear(1024, 1280, 1280, 16, members) for members in (2, 4)]
        cases += [
            _pointwise(m, 640, rank, dtype)
            for m in (256, 4096)
            for rank in RANKS
            for dtype in (torch.bfloat16, torch.float32)
        ]
    found = {
        str((build.kernel.__name__, build.signature, build.constants, build.multiples)): build
        for case in cases
        for build in case
    }
    return list(found.values())


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
    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, ys = empty(m, k, of=dtype), [empty(m, n, of=dtype) for _ in range(members)]
    downs, ups, vectors = (
        [empty(rank, k) for _ in ys],
        [empty(n, rank) for _ in ys],
        [empty(n) for _ in ys] if gain else [],
    )
    biases = [empty(n, of=dtype) for _ in ys] if gain else []
    given: Any = (
        ([empty(1, of=torch.int64), empty(1, of=torch.int64)], [7, 9] * members, [0.5] * members)
        if drop
        else ([], [], [])
    )
    scales, starts, t = (
        [0.5] * members,
        [rank * i for i in range(members)],
        empty(m, rank * members, of=dtype),
    )
    runs: list[Callable[[], Any]] = [
        partial(ops._shrink, x, downs, *given),
        partial(ops._expand_, ys, t, ups, scales, vectors, vectors, biases, False),
        partial(
            ops._back_up,
            ys,
            t,
            starts,
            ups,
            scales,
            ys if gain else [],
            vectors,
            vectors,
            biases,
            0.0,
            gain,
        ),
        partial(ops._back_down_, x, downs, t, x, downs, given[0], given[1], given[2], False),
    ]
    kind = (
        f"{NAMES[dtype]} m{m} r{rank} x{members}{' dora' if gain else ''}{' drop' if drop else ''}"
    )
    return [_build(launch, kind, dtype) for run in runs for launch in ops.record_launches(run)]


def _pointwise(m: int, c: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> list[Build]:
    """The 1x1 convolution of two images [c, m / 16, 16] in the contiguous layout, where a row's features are far apart."""
    x = torch.empty(2, c, m // 16, 16, dtype=dtype, device="meta")
    down, up, t = (
        torch.empty(rank, c, device="meta"),
        torch.empty(c, rank, device="meta"),
        torch.empty(2 * m, rank, dtype=dtype, device="meta"),
    )
    runs: list[Callable[[], Any]] = [
        partial(ops._shrink, x, [down], [], [], []),
        partial(ops._expand_, [x], t, [up], [0.5], [], [], [], False),
        partial(ops._back_up, [x], t, [0], [up], [0.5], [], [], [], [], 0.0, False),
        partial(ops._back_down_, x, [down], t, x, [down], [], [], [], False),
    ]
    return [
        _build(launch, f"{NAMES[dtype]} m{2 * m} r{rank} pixels", dtype)
        for run in runs
        for launch in ops.record_launches(run)
    ]


def _build(launch: ops.Launch, kind: str, dtype: torch.dtype) -> Build:
    """The signature that Triton's launcher would derive from these arguments: 1 and None are constants, multiples of 16 are known as such."""
    signature, constants, multiples = {}, {}, []
    for name, parameter in zip(launch.kernel.arg_names, launch.kernel.params):
        value = launch.arguments[name]
        free = parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not free)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not free:
                multiples.append(name)
    name = f"{launch.kernel.__name__.removesuffix('_kernel')} {kind}"
    return Build(
        launch.kernel,
        signature,
        constants,
        launch.tile.warps,
        launch.tile.stages,
        dtype != torch.float32,
        name,
        tuple(multiples),
    )
