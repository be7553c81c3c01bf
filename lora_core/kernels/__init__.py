"""Adapter operations: OPS, the table of each with its implementations, and `call`, which runs one.

An op's `reference` is its definition in plain torch. `fused` (torch, for any device) and `triton`
are faster implementations of the same function. Edit one entry to try a kernel:

    OPS["lora_linear"] = replace(OPS["lora_linear"], triton=my_kernel, supports=my_supports)

choice.py says which implementation runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lora_core.kernels import fused, loops, norms, reference, steps, winners
from lora_core.kernels.choice import (
    OPS,
    Op,
    call,
    current_mode,
    dispatch,
    resolve,
    set_mode,
    use_kernels,
)
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import HAS_TRITON
from lora_core.kernels.reference import Member

__all__ = [
    "COSTS",
    "OPS",
    "Cost",
    "Member",
    "Op",
    "call",
    "current_mode",
    "dispatch",
    "resolve",
    "set_mode",
    "use_kernels",
]


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

OPS.update(
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
