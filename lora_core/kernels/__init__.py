"""Adapter operations: OPS, the table of each with its implementations, and `call`, which runs one.

An op's `reference` is its definition in plain torch. `fused` (torch, for any device) and `triton`
are faster implementations of the same function. Edit one entry to try a kernel:

    OPS["lora_linear"] = replace(OPS["lora_linear"], triton=my_kernel, supports=my_supports)

The mode (auto, reference, fused or triton) is read once from LORA_KERNELS; `set_mode` and
`with use_kernels("reference"):` change it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lora_core.kernels import fused, loops, norms, reference, steps, winners
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import HAS_TRITON
from lora_core.kernels.modes import current_mode, dispatch, set_mode, use_kernels
from lora_core.kernels.reference import Member

__all__ = [
    "COSTS",
    "OPS",
    "Cost",
    "Member",
    "call",
    "current_mode",
    "dispatch",
    "resolve",
    "set_mode",
    "use_kernels",
]


@dataclass(frozen=True)
class Op:
    """One operation: its implementations, and functions that help to choose between them.

    Implementations, `supports` and `shape_class` take the reference's arguments.
    """

    reference: Callable[..., Any]
    example: Callable[..., tuple[Any, ...]]  # (seed, dtype, device) -> arguments
    fused: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    supports: Callable[..., str | None] | None = None  # why `triton` cannot run on them, or None
    shape_class: Callable[..., str] | None = None  # key in the table of winners


class OpTable(dict[str, Op]):
    """Name -> op. Setting or removing an entry invalidates every function that was resolved."""

    def __setitem__(self, name: str, op: Op) -> None:
        super().__setitem__(name, op)
        dispatch.generation += 1

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        dispatch.generation += 1


def lazy_function(module: str, name: str) -> Callable[..., Any]:
    """The function lora_core.kernels.<module>.<name>, imported when it is first called.

    For functions that need Triton, or that only tests and benchmarks call.
    """

    def run(*args: Any) -> Any:
        return (_imported.get((module, name)) or _import_function(module, name))(*args)

    run.__name__ = name
    _imported[module, name] = None
    return run


def import_backends() -> None:
    """Import every Triton implementation, if Triton is installed.

    To be called before torch.compile, which cannot trace an import.
    """
    if HAS_TRITON:
        for module, name in _imported:
            _import_function(module, name)


def _import_function(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(
        importlib.import_module(f"lora_core.kernels.{module}"), name
    )
    _imported[module, name] = function
    return function


_imported: dict[tuple[str, str], Callable[..., Any] | None] = {}
_warned: set[str] = set()

OPS = OpTable(
    lora_linear=Op(
        reference.lora_linear,
        lazy_function("op_examples", "linear_example"),
        fused.lora_linear,
        lazy_function("linear", "lora_linear"),
        lazy_function("linear_shapes", "linear_supports"),
        winners.linear_class,
    ),
    lora_grouped=Op(
        reference.lora_grouped,
        lazy_function("op_examples", "grouped_example"),
        fused.lora_grouped,
        lazy_function("linear", "lora_grouped"),
        lazy_function("linear_shapes", "grouped_supports"),
        winners.grouped_class,
    ),
    lora_conv=Op(
        reference.lora_conv,
        lazy_function("op_examples", "conv_example"),
        fused.lora_conv,
        lazy_function("linear", "lora_conv"),
        lazy_function("linear_shapes", "conv_supports"),
        winners.conv_class,
    ),
    dora_norm=Op(
        reference.dora_norm,
        lazy_function("op_examples", "norm_example"),
        norms.dora_norm,
        lazy_function("dora", "dora_norm"),
        lazy_function("dora", "norm_refusal"),
    ),
    dora_norms=Op(
        reference.dora_norms,
        lazy_function("op_examples", "norms_example"),
        norms.dora_norms,
        lazy_function("dora", "dora_norms"),
        lazy_function("dora", "norms_refusal"),
    ),
    dora_compose=Op(
        reference.dora_compose,
        lazy_function("op_examples", "compose_example"),
        fused.dora_compose,
        lazy_function("compose", "dora_compose"),
        lazy_function("compose", "compose_refusal"),
    ),
    keyed_dropout=Op(
        reference.keyed_dropout,
        lazy_function("op_examples", "dropout_example"),
        None,
        lazy_function("dropout", "keyed_dropout"),
        lazy_function("dropout", "dropout_refusal"),
    ),
    snr_weighted_mse=Op(
        reference.snr_weighted_mse,
        lazy_function("op_examples", "mse_example"),
        fused.snr_weighted_mse,
        lazy_function("loss", "snr_weighted_mse"),
        lazy_function("loss", "mse_refusal"),
    ),
    prodigy_step=Op(
        steps.prodigy_step,
        steps.prodigy_example,
        loops.fused_prodigy_step,
        lazy_function("optimizers", "triton_prodigy_step"),
        lazy_function("optimizers", "prodigy_refusal"),
    ),
    adamw_step=Op(
        steps.adamw_step,
        steps.adamw_example,
        loops.fused_adamw_step,
        lazy_function("optimizers", "triton_adamw_step"),
        lazy_function("optimizers", "adamw_refusal"),
    ),
)


def call(name: str, *args: Any) -> Any:
    """The op's result, by the implementation that `resolve` chooses."""
    return resolve(name, *args)(*args)


def resolve(name: str, *args: Any) -> Callable[..., Any]:
    """The implementation of an op for arguments of these shapes, dtype and device.

    Mode auto takes the fastest by measurement (winners.choose_winner). Another mode takes its own
    implementation, or the next simpler one if the op has none (triton: fused; fused: reference).
    A Triton implementation is wrapped: for arguments that it does not support, the fused one runs
    and one warning gives the reason. The function may be cached for such arguments as long as
    `dispatch.generation` is unchanged.
    """
    op, chosen = OPS[name], dispatch.mode or current_mode()
    if chosen == "auto":
        chosen = winners.choose_winner(name, op, args)
    if chosen == "triton":
        return partial(_run_triton, name, op)
    return op.fused if chosen == "fused" and op.fused is not None else op.reference


def _run_triton(name: str, op: Op, *args: Any) -> Any:
    """The result of the op's Triton kernels; of the fused implementation if they do not apply."""
    if op.triton is None:
        reason: str | None = "there is none"
    elif not HAS_TRITON:
        reason = "triton is not installed (it exists for Linux)"
    else:
        reason = op.supports(*args) if op.supports else None
    if reason is None and op.triton is not None:
        return op.triton(*args)
    if f"{name}: {reason}" not in _warned:
        _warned.add(f"{name}: {reason}")
        warnings.warn(f"op {name} runs without its triton kernel: {reason}", stacklevel=3)
    return (op.fused or op.reference)(*args)
