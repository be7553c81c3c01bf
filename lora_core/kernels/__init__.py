"""OPS: every adapter operation and its twins, and `call`, the one place that chooses between them.

An op's `reference` is its definition; `fused` and `triton` are faster twins that must equal it. Edit one row to try a kernel:
    OPS["lora_linear"] = replace(OPS["lora_linear"], triton=my_kernel, supports=my_supports)
Mode: LORA_KERNELS=auto|reference|fused|triton in the environment, or `with using("reference"):`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.kernels import fused, reference

MODES = ("auto", "reference", "fused", "triton")


class Cost(NamedTuple):
    """What one call of a kernel issues and moves."""

    launches: int
    bytes: int  # read and written


@dataclass(frozen=True)
class Op:
    """One operation. The twins, `supports` and `cost` take the reference's arguments."""

    reference: Callable[..., Tensor]
    example: Callable[..., tuple[Any, ...]]  # (seed, dtype, device) -> arguments, for tests and benchmarks
    fused: Callable[..., Tensor] | None = None
    triton: Callable[..., Tensor] | None = None
    supports: Callable[..., str | None] | None = None  # why the triton kernel refuses these arguments, or None
    cost: Callable[..., Cost] | None = None  # of the triton kernel


def _random(seed: int, dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _linear_example(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    return *_random(seed, dtype, device, (2, 5, 7), (11, 7), (11,), (3, 7), (11, 3)), 0.5


def _conv_example(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    shapes = (2, 6, 7, 9), (4, 3, 3, 2), (4,), (6, 3, 3, 2), (4, 3, 1, 1)
    return *_random(seed, dtype, device, *shapes), 0.5, (2, 1), (1, 0), (1, 2), 2


def _norm_example(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    return *_random(seed, dtype, device, (11, 7), (3, 7), (11, 3)), 0.5


def _compose_example(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    return *_random(seed, dtype, device, (2, 5, 11), (11,), (2, 5, 11)), *_random(seed + 1, torch.float32, device, (11,))


def _dropout_example(seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    step, rows = torch.tensor(3, device=device), torch.tensor([7, -(2**40)], device=device)
    return *_random(seed, dtype, device, (2, 5, 7)), 0.25, seed, 12345, step, rows


OPS: dict[str, Op] = {
    "lora_linear": Op(reference.lora_linear, _linear_example, fused.lora_linear),
    "lora_conv": Op(reference.lora_conv, _conv_example, fused.lora_conv),
    "dora_norm": Op(reference.dora_norm, _norm_example),
    "dora_compose": Op(reference.dora_compose, _compose_example),
    "keyed_dropout": Op(reference.keyed_dropout, _dropout_example),
}

_forced: list[str] = []  # a plain list: a context variable would not reach autograd's threads, where checkpointing recomputes
_said: set[str] = set()


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Runs every op in one mode inside the block; blocks nest."""
    _check(mode, "using(...)")
    _forced.append(mode)
    try:
        yield
    finally:
        _forced.pop()


def mode() -> str:
    """The mode in force: the innermost `using`, else LORA_KERNELS, else auto."""
    if _forced:
        return _forced[-1]
    named = os.environ.get("LORA_KERNELS", "auto")
    _check(named, "LORA_KERNELS")
    return named


def call(name: str, *args: Any) -> Tensor:
    """The op's result, by the twin that the mode asks for.

    auto takes triton for CUDA arguments that it supports, else fused, else the reference; a refusal is said once. A forced mode never
    falls back: UserError when the op has no such twin or it refuses the arguments.
    """
    op, chosen = OPS[name], mode()
    if chosen == "auto":
        return _fastest(name, op, args)(*args)
    twin = getattr(op, chosen)
    if twin is None:
        raise UserError(f"op {name} has no {chosen} twin; use LORA_KERNELS=auto or LORA_KERNELS=reference")
    reason = op.supports(*args) if chosen == "triton" and op.supports else None
    if reason:
        raise UserError(f"the triton kernel of op {name} refuses: {reason}; use LORA_KERNELS=auto or LORA_KERNELS=reference")
    return twin(*args)


def _fastest(name: str, op: Op, args: tuple[Any, ...]) -> Callable[..., Tensor]:
    other = op.fused or op.reference
    if op.triton is None or not next(a for a in args if isinstance(a, Tensor)).is_cuda:
        return other
    reason = op.supports(*args) if op.supports else None
    if reason is None:
        return op.triton
    if f"{name}: {reason}" not in _said:
        _said.add(f"{name}: {reason}")
        warnings.warn(f"op {name} runs as {other.__name__}, its triton kernel refuses: {reason}", stacklevel=3)
    return other


def _check(mode: str, source: str) -> None:
    if mode not in MODES:
        raise UserError(f"{source} got the kernel mode {mode!r}; expected one of {', '.join(MODES)}")
