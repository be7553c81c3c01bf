"""Torch ops of one launch of linear_kernels each, and their costs.

    lora_core::shrink      t [m, R]
    lora_core::expand_     the outputs of a group, in place
    lora_core::back_up     [dS, d_up ..., dz ..., (d_magnitude, d_norm) ...]
    lora_core::back_down_  d_down ... and dx, in place

Arguments are those of linear_launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.linear_launches import (
    back_up_outputs,
    launch_back_down,
    launch_back_up,
    launch_expand,
    launch_shrink,
)

# Most members of one launch. A table takes any number, but registers are checked, and builds made
# ahead of time, for up to four.
MEMBERS = 4


def _define_op(
    name: str, run: Callable[..., Any], meta: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Any:
    op = torch.library.custom_op(f"lora_core::{name}", run, mutates_args=mutates)
    op.register_fake(meta)
    return op


def _shrink_meta(
    x: Tensor, downs: list[Tensor], drop: list[Tensor], words: list[int], kept: list[float]
) -> Tensor:
    return x.new_empty(x.numel() // x.shape[1], sum(len(down) for down in downs))


shrink = _define_op("shrink", launch_shrink, _shrink_meta)
expand_ = _define_op("expand_", launch_expand, lambda *_: None, ("ys",))
back_up = _define_op("back_up", launch_back_up, back_up_outputs)
back_down_ = _define_op("back_down_", launch_back_down, lambda *_: None, ("dx", "d_downs"))
LAUNCHERS: dict[Any, Callable[..., Any]] = {
    shrink: launch_shrink,
    expand_: launch_expand,
    back_up: launch_back_up,
    back_down_: launch_back_down,
}


def run_op(op: Any, x: Tensor, *args: Any) -> Any:
    """op(*args) inside an autograd.Function, on tensors like x.

    Bypasses torch's dispatcher where nothing traces, fakes or counts the op: with it the host needs
    286 microseconds for a LoRA layer's step, without it 154 (one Zen 4 thread, without Triton's own
    launch).
    """
    observed = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
    )
    return op(*args) if observed else LAUNCHERS[op](*args)


# ---------------------------------------------------------------- costs


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _shrink_cost(
    x: Tensor, downs: list[Tensor], drop: list[Tensor], words: list[int], kept: list[float]
) -> Cost:
    return Cost(1, _bytes(x, _shrink_meta(x, downs, drop, words, kept), *downs, *drop), True)


def _expand_cost(
    ys: list[Tensor],
    t: Tensor,
    ups: list[Tensor],
    scales: list[float],
    magnitudes: list[Tensor],
    norms: list[Tensor],
    biases: list[Tensor],
    fresh: bool,
) -> Cost:
    read = _bytes(t, *ups, *magnitudes, *norms, *biases)
    return Cost(1, _bytes(*ys) * (1 if fresh else 2) + read, True)


def _back_up_cost(
    dys: list[Tensor],
    t: Tensor,
    starts: list[int],
    ups: list[Tensor],
    scales: list[float],
    ys: list[Tensor],
    magnitudes: list[Tensor],
    norms: list[Tensor],
    biases: list[Tensor],
    guard: float,
    need_dz: bool,
) -> Cost:
    gain = ys, magnitudes, norms, biases
    written = back_up_outputs(dys, t, starts, ups, scales, *gain, guard, need_dz)
    read = _bytes(t, *ups, *ys, *magnitudes, *norms, *biases)
    return Cost(1, 2 * _bytes(*dys) + read + _bytes(*written), True)


def _back_down_cost(
    dx: Tensor | None,
    d_downs: list[Tensor],
    ds: Tensor,
    x: Tensor,
    downs: list[Tensor],
    drop: list[Tensor],
    words: list[int],
    kept: list[float],
    fresh: bool,
) -> Cost:
    return Cost(1, _bytes(dx) * (1 if fresh else 2) + _bytes(ds, x, *d_downs, *downs, *drop), True)


# Every operand once, but dy twice: two kinds of programs read it, the second mostly from the L2
# cache.
COSTS |= {"lora_core::shrink": _shrink_cost, "lora_core::expand_": _expand_cost}
COSTS |= {"lora_core::back_up": _back_up_cost, "lora_core::back_down_": _back_down_cost}
