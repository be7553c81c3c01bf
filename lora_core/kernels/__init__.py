"""OPS: every adapter operation and its twins, and `call`, the one place that chooses between them.

An op's `reference` is its definition; `fused` (torch, for any device) and `triton` are faster twins that must equal it. Edit one row to try a kernel:
    OPS["lora_linear"] = replace(OPS["lora_linear"], triton=my_kernel, supports=my_supports)
Mode: LORA_KERNELS=auto|reference|fused|triton in the environment, or `with using("reference"):`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.kernels import fused, linear_shapes, loops, reference, steps, winners
from lora_core.kernels.device import HAS_TRITON
from lora_core.kernels.reference import Member

MODES = ("auto", "reference", "fused", "triton")


class Cost(NamedTuple):
    """What one call of a kernel issues and moves."""

    launches: int
    bytes: int  # read and written
    product: bool = False  # a matrix product, not an elementwise pass


@dataclass(frozen=True)
class Op:
    """One operation. The twins, `supports` and `shape_class` take the reference's arguments."""

    reference: Callable[..., Any]
    example: Callable[
        ..., tuple[Any, ...]
    ]  # (seed, dtype, device) -> arguments, for tests and benchmarks
    fused: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    supports: Callable[..., str | None] | None = (
        None  # why the triton twin refuses these arguments, or None
    )
    shape_class: Callable[..., str] | None = None  # what the table of winners tells apart


COSTS: dict[
    str, Callable[..., Cost]
] = {}  # torch op, "lora_core::shrink" -> its cost from its own arguments; filled beside each kernel


def lazy_function(module: str, name: str) -> Callable[..., Any]:
    """lora_core.kernels.<module>.<name>, imported at the first call or by `load`: Triton need not be there before."""

    def run(*args: Any) -> Any:
        found = _loaded.get((module, name))
        return (_load(module, name) if found is None else found)(*args)

    run.__name__ = name
    _loaded[module, name] = None
    return run


def import_backends() -> None:
    """Imports every twin that can be: torch.compile cannot trace an import."""
    for module, name in _loaded:
        if HAS_TRITON or module in PLAIN:
            _load(module, name)


def _load(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"lora_core.kernels.{module}"), name
    )
    _loaded[module, name] = found
    return found


_loaded: dict[tuple[str, str], Callable[..., Any] | None] = {}
PLAIN = ("norms", "squares")  # modules that need no Triton


def _random(seed: int, dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _linear_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    return *_random(seed, dtype, device, (2, 5, 7), (11, 7), (11,), (3, 7), (11, 3)), 0.5


def _grouped_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    x, w1, b1, d1, u1, w2, d2, u2 = _random(
        seed, dtype, device, (2, 5, 7), (11, 7), (11,), (3, 7), (11, 3), (6, 7), (2, 7), (6, 2)
    )
    return x, (Member(w1, b1, d1, u1, 0.5), Member(w2, None, d2, u2, 2.0))


def _conv_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    shapes = (2, 6, 7, 9), (4, 3, 3, 2), (4,), (6, 3, 3, 2), (4, 3, 1, 1)
    return *_random(seed, dtype, device, *shapes), 0.5, (2, 1), (1, 0), (1, 2), 2


def _norm_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    return *_random(seed, dtype, device, (11, 7), (3, 7), (11, 3)), 0.5


def _norms_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    w, d, u = _random(seed + 1, dtype, device, (4, 3, 3, 2), (6, 3, 3, 2), (4, 6, 1, 1))
    return ((_norm_example(seed, dtype, device), (w, d, u, 2.0)),)


def _compose_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    return *_random(seed, dtype, device, (2, 5, 11), (11,), (2, 5, 11)), *_random(
        seed + 1, torch.float32, device, (11,)
    )


def _dropout_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    step, rows = torch.tensor(3, device=device), torch.tensor([7, -(2**40)], device=device)
    return *_random(seed, dtype, device, (2, 5, 7)), 0.25, seed, 12345, step, rows


def _mse_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    out, target, mask, weight = _random(
        seed, dtype, device, (3, 4, 5, 7), (3, 4, 5, 7), (3, 1, 5, 7), (3,)
    )
    return out, target, (mask > 0).to(dtype), weight.abs().to(reference.wide_dtype(dtype))


OPS: dict[str, Op] = {
    "lora_linear": Op(
        reference.lora_linear,
        _linear_example,
        fused.lora_linear,
        lazy_function("linear", "lora_linear"),
        linear_shapes.linear_supports,
        winners.linear_class,
    ),
    "lora_grouped": Op(
        reference.lora_grouped,
        _grouped_example,
        fused.lora_grouped,
        lazy_function("linear", "lora_grouped"),
        linear_shapes.grouped_supports,
        winners.grouped_class,
    ),
    "lora_conv": Op(
        reference.lora_conv,
        _conv_example,
        fused.lora_conv,
        lazy_function("linear", "lora_conv"),
        linear_shapes.conv_supports,
        linear_shapes.conv_class,
    ),
    "dora_norm": Op(
        reference.dora_norm,
        _norm_example,
        lazy_function("norms", "dora_norm"),
        lazy_function("dora", "dora_norm"),
        lazy_function("dora", "norm_refusal"),
    ),
    "dora_norms": Op(
        reference.dora_norms,
        _norms_example,
        lazy_function("norms", "dora_norms"),
        lazy_function("dora", "dora_norms"),
        lazy_function("dora", "norms_refusal"),
    ),
    "dora_compose": Op(
        reference.dora_compose,
        _compose_example,
        fused.dora_compose,
        lazy_function("compose", "dora_compose"),
        lazy_function("compose", "compose_refusal"),
    ),
    "keyed_dropout": Op(
        reference.keyed_dropout,
        _dropout_example,
        None,
        lazy_function("dropout", "keyed_dropout"),
        lazy_function("dropout", "dropout_refusal"),
    ),
    "snr_weighted_mse": Op(
        reference.snr_weighted_mse,
        _mse_example,
        lazy_function("squares", "snr_weighted_mse"),
        lazy_function("loss", "snr_weighted_mse"),
        lazy_function("loss", "mse_refusal"),
    ),
    "prodigy_step": Op(
        steps.prodigy_step,
        steps.prodigy_example,
        loops.fused_prodigy_step,
        lazy_function("optimizers", "triton_prodigy_step"),
        lazy_function("optimizers", "prodigy_refusal"),
    ),
    "adamw_step": Op(
        steps.adamw_step,
        steps.adamw_example,
        loops.fused_adamw_step,
        lazy_function("optimizers", "triton_adamw_step"),
        lazy_function("optimizers", "adamw_refusal"),
    ),
}

_forced: list[
    str
] = []  # a plain list: a context variable would not reach autograd's threads, where checkpointing recomputes
_said: set[str] = set()


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Runs every op in one mode inside the block; blocks nest."""
    _check(mode, "using(...)")
    _forced.append(mode)
    try:
        yield
    finally:
        _forced.pop()


def current_mode() -> str:
    """The mode in force: the innermost `using`, else LORA_KERNELS, else auto."""
    if _forced:
        return _forced[-1]
    named = os.environ.get("LORA_KERNELS", "auto")
    _check(named, "LORA_KERNELS")
    return named


def call(name: str, *args: Any) -> Any:
    """The op's result, by the twin that the mode asks for.

    auto takes the winner of the table for these arguments (winners.choose_winner); where its triton twin refuses them the fused one, said once. A forced
    mode takes its twin, and the next plainer one where the op has none (fused: reference; triton: fused) or, for triton, where it refuses: said once.
    """
    op, chosen = OPS[name], current_mode()
    if chosen == "reference":
        return op.reference(*args)
    plain = op.fused or op.reference
    if chosen == "fused":
        return plain(*args)
    if chosen == "auto":
        chosen = winners.choose_winner(name, op, args)
        if chosen != "triton":
            return (op.reference if chosen == "reference" else plain)(*args)
    if op.triton is None or not HAS_TRITON:
        reason: str | None = (
            "there is none"
            if op.triton is None
            else "triton is not installed (it exists for Linux)"
        )
    else:
        reason = op.supports(*args) if op.supports else None
    if reason is None:
        assert op.triton is not None
        return op.triton(*args)
    if f"{name}: {reason}" not in _said:
        _said.add(f"{name}: {reason}")
        warnings.warn(f"op {name} runs without its triton kernel: {reason}", stacklevel=2)
    return plain(*args)


def _check(mode: str, source: str) -> None:
    if mode not in MODES:
        raise UserError(
            f"{source} got the kernel mode {mode!r}; expected one of {', '.join(MODES)}"
        )
