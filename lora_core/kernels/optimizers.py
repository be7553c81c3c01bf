"""Prodigy's step in two Triton launches per group and AdamW's in one, for any number of parameters.

The kernels are in optimizer_kernels.py. Bytes moved per parameter and step, in fp32: 36 + 16 for
Prodigy, 28 for AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.ahead import Build
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import device_refusal
from lora_core.kernels.flat import FlatParameters
from lora_core.kernels.optimizer_kernels import (
    adamw_kernel,
    prodigy_reduce_kernel,
    prodigy_update_kernel,
)
from lora_core.kernels.steps import AdamWSettings, MovingGroup

BLOCK, WARPS = 1024, 4  # elements of a program; a LoRA factor of rank 16 has 5,120 and more
# Without a limit, ptxas chooses one for prodigy_reduce_kernel by a heuristic, which on some
# releases and chips spills 8 to 24 bytes. With this limit it takes 55 to 110.
REDUCE_WARPS, REDUCE_REGISTERS = 8, 128
ADDED = 1024  # partial sums that the last program reads at once

# ---------------------------------------------------------------- launches


@torch.library.custom_op(
    "lora_core::prodigy_reduce",
    mutates_args=("exp_avg", "exp_avg_sq", "s", "scalars", "scratch", "partials", "counter"),
)
def _launch_reduce(
    table: Tensor,
    blocks: Tensor,
    geometry: Tensor,
    param: Tensor,
    p0: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    s: Tensor,
    scalars: Tensor,
    scratch: Tensor,
    partials: Tensor,
    counter: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    lr: Tensor | None,
    flags: list[bool],
    slice_p: int,
) -> None:
    momentum, coupled, bias, safeguard, aligned = flags
    prodigy_reduce_kernel[(len(blocks),)](
        table,
        blocks,
        geometry,
        param,
        p0,
        exp_avg,
        exp_avg_sq,
        s,
        scalars,
        scratch,
        partials,
        counter,
        found_inf,
        grad_scale,
        lr,
        momentum,
        coupled,
        bias,
        safeguard,
        slice_p,
        aligned,
        BLOCK,
        ADDED,
        num_warps=REDUCE_WARPS,
        maxnreg=REDUCE_REGISTERS,
    )


@torch.library.custom_op("lora_core::prodigy_update", mutates_args=("param",))
def _launch_update(
    table: Tensor,
    blocks: Tensor,
    geometry: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    scratch: Tensor,
    grad_scale: Tensor | None,
    flags: list[bool],
) -> None:
    arguments = table, blocks, geometry, param, exp_avg, exp_avg_sq, scalars, scratch, grad_scale
    prodigy_update_kernel[(len(blocks),)](*arguments, *flags, BLOCK, num_warps=WARPS)


@torch.library.custom_op(
    "lora_core::adamw", mutates_args=("param", "exp_avg", "exp_avg_sq", "step", "counter")
)
def _launch_adamw(
    table: Tensor,
    blocks: Tensor,
    geometry: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    counter: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    lr: Tensor | None,
    aligned: bool,
) -> None:
    tensors = table, blocks, geometry, param, exp_avg, exp_avg_sq, step, counter
    optional = found_inf, grad_scale, lr
    adamw_kernel[(len(blocks),)](
        *tensors, *optional, len(geometry), aligned, BLOCK, ADDED, num_warps=WARPS
    )


for _op in (_launch_reduce, _launch_update, _launch_adamw):
    _op.register_fake(lambda *args: None)


def _reduce_cost(
    table: Tensor,
    blocks: Tensor,
    geometry: Tensor,
    param: Tensor,
    p0: Tensor,
    m: Tensor,
    v: Tensor,
    s: Tensor,
    *rest: Any,
) -> Cost:
    """Reads p, g and p0, reads and writes m, v and s."""
    return Cost(1, 2 * param.nbytes + p0.nbytes + 2 * (m.nbytes + v.nbytes + s.nbytes))


def _update_cost(
    table: Tensor, blocks: Tensor, geometry: Tensor, param: Tensor, m: Tensor, v: Tensor, *rest: Any
) -> Cost:
    """Reads m (without it the gradient) and v, reads and writes p."""
    return Cost(1, 2 * param.nbytes + (m.nbytes or param.nbytes) + v.nbytes)


def _adamw_cost(
    table: Tensor, blocks: Tensor, geometry: Tensor, param: Tensor, m: Tensor, v: Tensor, *rest: Any
) -> Cost:
    """Reads g, reads and writes p, m and v."""
    return Cost(1, 3 * param.nbytes + 2 * (m.nbytes + v.nbytes))


COSTS["lora_core::prodigy_reduce"] = _reduce_cost
COSTS["lora_core::prodigy_update"] = _update_cost
COSTS["lora_core::adamw"] = _adamw_cost


def triton_prodigy_step(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    groups: Sequence[MovingGroup],
) -> tuple[Tensor, ...]:
    """steps.prodigy_step in two launches for each group."""
    slots = len(groups)
    scratch = _workspace(groups[0].flat, f"scratch {slots}", 4 * slots + 1, torch.float64)
    empty = _workspace(groups[0].flat, "empty", 0, torch.float32)
    updates = []
    for slot, group in enumerate(groups):
        flat, settings, state = group.flat, group.settings, group.flat.state
        lr, table, aligned = _prodigy_table(group, len(scalars), slot, slots)
        momentum = settings.beta1 > 0
        coupled = bool(settings.weight_decay) and not settings.decouple
        decayed = bool(settings.weight_decay) and settings.decouple
        where = table, _block_table(flat), flat.geometry
        moments = (state["exp_avg"] if momentum else empty), state["exp_avg_sq"]
        _launch_reduce(
            *where,
            flat.param,
            state["p0"],
            *moments,
            state["s"],
            scalars,
            scratch,
            _workspace(flat, "partials", 2 * len(where[1]), torch.float64),
            _workspace(flat, "counter", 1, torch.int32),
            found_inf,
            grad_scale,
            lr,
            [momentum, coupled, settings.bias_correction, settings.safeguard, aligned],
            settings.slice_p,
        )
        flags = [momentum, coupled, decayed, aligned]
        updates.append((*where, flat.param, *moments, scalars, scratch, grad_scale, flags))
    for update in updates:
        _launch_update(*update)
    return tuple(group.flat.param for group in groups)


def triton_adamw_step(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    settings: AdamWSettings,
) -> tuple[Tensor, ...]:
    """steps.adamw_step in one launch."""
    lr, number = _split_lr(settings.lr)
    aligned = _are_aligned(grads)
    table = flat.send_table([number, *settings[1:]], grads)
    state = flat.state
    counter = _workspace(flat, "counter", 1, torch.int32)
    moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
    where = table, _block_table(flat), flat.geometry
    _launch_adamw(*where, param, *moments, counter, found_inf, grad_scale, lr, aligned)
    return (param,)


def _prodigy_table(
    group: MovingGroup, groups: int, slot: int, slots: int
) -> tuple[Tensor | None, Tensor, bool]:
    """(lr if it is a tensor, else None; the table of a launch; whether gradients are aligned)."""
    lr, number = _split_lr(group.settings.lr)
    settings = [number, *group.settings[1:9]]  # lr, beta1 ... growth_rate
    table = group.flat.send_table(settings, group.grads, group.row, groups, slot, slots)
    return lr, table, _are_aligned(group.grads)


def _split_lr(lr: float | Tensor) -> tuple[Tensor | None, float]:
    """(lr, 0.0) for a tensor lr, else (None, lr)."""
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))


def _are_aligned(grads: Sequence[Tensor | None]) -> bool:
    """Whether the address of every gradient is a multiple of 16 bytes."""
    return not any(g is not None and g.data_ptr() & 15 for g in grads)


def _block_table(flat: FlatParameters) -> Tensor:
    """[programs, 2] int32: the parameter of a program, and the index of its BLOCK."""
    if "blocks" not in flat.workspace:
        listed = []
        for i, (_, count, _) in enumerate(flat.bounds):
            listed += [(i, block) for block in range(-(-count // BLOCK))]
        flat.workspace["blocks"] = torch.tensor(listed, dtype=torch.int32).to(flat.param.device)
    return flat.workspace["blocks"]


def _workspace(flat: FlatParameters, name: str, count: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, kept from step to step: a CUDA graph records its address."""
    if name not in flat.workspace:
        flat.workspace[name] = torch.zeros(count, dtype=dtype, device=flat.param.device)
    return flat.workspace[name]


# ---------------------------------------------------------------- refusals


def prodigy_refusal(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    groups: Sequence[MovingGroup],
) -> str | None:
    """Why the kernels do not run on these arguments, or None."""
    if len({group.row for group in groups}) < len(groups):
        return "a group has parameters of several dtypes"
    if any(group.settings.sharded for group in groups):
        return "ranks share the sums (fsdp_in_use)"
    reasons = (_refuse(group.flat, group.settings.lr) for group in groups)
    return next((reason for reason in reasons if reason is not None), None)


def adamw_refusal(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    settings: AdamWSettings,
) -> str | None:
    """Why the kernel does not run on these arguments, or None."""
    return _refuse(flat, settings.lr)


def _refuse(flat: FlatParameters, lr: float | Tensor) -> str | None:
    reason = device_refusal(flat.param)
    if reason is None and isinstance(lr, Tensor) and lr.device != flat.param.device:
        return f"the tensor lr is on {lr.device}"
    if reason is None and not flat.param.numel():
        return "the parameters have no elements"
    return reason


# ---------------------------------------------------------------- ahead of time


def list_optimizer_builds(full: bool) -> list[Build]:
    """Builds for fp32 parameters, with the defaults and with every option.

    With `full` also for bf16 parameters, and with each option alone.
    """
    names = ("MOMENTUM", "COUPLED", "BIAS", "SAFEGUARD", "ALIGNED")
    everything = dict.fromkeys(names, True)
    plain = everything | {"COUPLED": False, "BIAS": False, "SAFEGUARD": False}
    variants = [("plain", plain, 1, False), ("all options", everything, 3, True)]
    for name in names if full else ():
        changed = plain | {name: not plain[name]}
        variants.append((f"{name.lower()}={changed[name]}", changed, 1, name == "BIAS"))
    found = []
    for dtype in ("fp32", "bf16") if full else ("fp32",):
        for name, flags, slice_p, scaled in variants:
            constants: dict[str, Any] = flags | {"SLICE": slice_p, "DECAYED": True}
            constants |= {"BLOCK": BLOCK, "ADDED": ADDED}
            if not scaled:
                constants |= dict.fromkeys(("found_inf", "grad_scale", "lr"))
            for kernel in (prodigy_reduce_kernel, prodigy_update_kernel, adamw_kernel):
                title = f"{kernel.__name__} {dtype} {name}"
                found.append(_make_build(kernel, title, dtype, constants))
    return found if full else found[:5]


def _make_build(kernel: Any, name: str, dtype: str, constants: Mapping[str, Any]) -> Build:
    types = {
        "table": "*i64",
        "blocks": "*i32",
        "geometry": "*i64",
        "param": f"*{dtype}",
        "counter": "*i32",
        "parameters": "i32",
    }
    fp32 = ("p0", "exp_avg", "exp_avg_sq", "s", "step", "found_inf", "grad_scale", "lr")
    types |= dict.fromkeys(fp32, "*fp32")
    types |= dict.fromkeys(("scalars", "scratch", "partials"), "*fp64")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    given = {name: constants[name] for name in names if name in constants}
    if kernel is prodigy_reduce_kernel:
        warps, registers = REDUCE_WARPS, REDUCE_REGISTERS
        return Build(kernel, signature, given, warps=warps, name=name, registers=registers)
    return Build(kernel, signature, given, warps=WARPS, name=name)
