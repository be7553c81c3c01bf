"""Which twin of an op is the fastest, per device, dtype and class of shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def choose(name: str, op: Any, args: tuple[Any, ...]) -> str:
    """ "triton" for CUDA arguments of an op that has such a twin, else "fused"."""
    return "triton" if op.triton is not None and next(a for a in args if isinstance(a, Tensor)).is_cuda else "fused"
