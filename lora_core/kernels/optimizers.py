"""Prodigy's step in two launches per group and AdamW's in one, for any number of parameters.

    prodigy_reduce_kernel   m, v, s and the two sums that d is made of; the last program to end adds
                            the sums up and updates d
    prodigy_update_kernel   the parameters
    adamw_kernel            everything; the last program to end counts the step

A program works on BLOCK elements of one parameter. Gradients are read where autograd put them,
through a table of addresses. A sum is taken in fp64, first inside a program and then over the
programs in their order, so it has the same bits in every run; the only atomic is a counter that
finds the last program, which sets it back to zero.
Bytes of a parameter and step, in fp32: 36 + 16 for Prodigy, 28 for AdamW.

The table of a launch (int64; kernels/flat.py, DeviceTable) begins with the group's settings, as
doubles: SETTINGS names their places. Then come, for Prodigy, four whole numbers: the group's row of
the scalars, the number of rows, the launch's slot of the scratch, the number of slots. Then the
address of each parameter's gradient, 0 where it has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels import COSTS, Cost
from lora_core.kernels.ahead import Build
from lora_core.kernels.device import device_refusal
from lora_core.kernels.flat import FlatParameters
from lora_core.kernels.steps import AdamWSettings, MovingGroup

BLOCK, WARPS = 1024, 4  # elements of a program; a LoRA factor of rank 16 has 5,120 and more
# Left to itself, ptxas guesses a limit of registers for prodigy_reduce_kernel, and it depends on
# the release and the chip whether the guess spills 8 to 24 bytes. With this limit it takes 55 to
# 110.
REDUCE_WARPS, REDUCE_REGISTERS = 8, 128
ADDED = 1024  # partial sums that the last program reads at once

# Places in the table.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
ADAMW_EPS = tl.constexpr(3)
ADAMW_DECAY = tl.constexpr(4)
ADAMW_ADDRESSES = tl.constexpr(5)
BETA3 = tl.constexpr(3)
EPS = tl.constexpr(4)
DECAY = tl.constexpr(5)
D0 = tl.constexpr(6)
D_COEF = tl.constexpr(7)
GROWTH_RATE = tl.constexpr(8)
GROUP = tl.constexpr(9)
GROUPS = tl.constexpr(10)
SLOT = tl.constexpr(11)
SLOTS = tl.constexpr(12)
ADDRESSES = tl.constexpr(13)
# Columns of the scalars [groups, 6] (steps.D ...) and of the scratch [slots, 4].
D = tl.constexpr(0)
D_MAX = tl.constexpr(1)
NUMERATOR = tl.constexpr(2)
DENOMINATOR = tl.constexpr(3)
D_HAT = tl.constexpr(4)
K = tl.constexpr(5)
SLOT_NUMERATOR = tl.constexpr(0)
SLOT_DENOMINATOR = tl.constexpr(1)
SLOT_GROUP = tl.constexpr(2)
SLOT_RATE = tl.constexpr(3)


# ---------------------------------------------------------------- device functions


@triton.jit
def _load_setting(table, place):
    """The double at a place of the table."""
    return tl.load(table + place).to(tl.float64, bitcast=True)


@triton.jit
def _load_lr(table, lr):
    """The learning rate: the tensor lr where there is one, else that of the table."""
    if lr is not None:
        return tl.load(lr).to(tl.float64)
    else:
        return _load_setting(table, LR)


@triton.jit
def _locate_block(addresses, blocks, geometry, BLOCK: tl.constexpr):
    """This program's parameter, the address of its gradient, its start in the flat tensors, the
    elements, and the first one that is not there.

    Masks are made of limits: a scalar bool that is spread over a block becomes a number in Triton's
    interpreter.
    """
    block = blocks + 2 * tl.program_id(0)
    parameter, chunk = tl.load(block), tl.load(block + 1)
    address = tl.load(addresses + parameter)
    start, count = tl.load(geometry + 3 * parameter), tl.load(geometry + 3 * parameter + 1)
    element = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    limit = tl.where(address != 0, count, 0)
    return parameter, address, tl.multiple_of(start, 16), element, limit


@triton.jit
def _load_gradient(address, element, there, param, grad_scale, WIDE: tl.constexpr,
                   ALIGNED: tl.constexpr):  # fmt: skip
    """The unscaled gradient; ALIGNED: every gradient lies at a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(param.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    g = tl.load(pointer + element, mask=there, other=0.0).to(WIDE)
    if grad_scale is not None:
        g = g * (1.0 / tl.load(grad_scale)).to(WIDE)
    return g


@triton.jit
def _power(beta, k):
    return tl.exp(k * tl.log(beta))


@triton.jit
def _is_last(counter):
    """Whether every other program has come this far, with all that it wrote."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def _add_partials(partials, ADDED: tl.constexpr):
    """The two sums over all programs, in the order of the programs."""
    some = tl.arange(0, ADDED)
    first, second = tl.zeros((ADDED,), tl.float64), tl.zeros((ADDED,), tl.float64)
    for begin in range(0, tl.num_programs(0), ADDED):
        inside = begin + some < tl.num_programs(0)
        pair = partials + 2 * (begin + some)
        first += tl.load(pair, mask=inside, other=0.0, cache_modifier=".cg")
        second += tl.load(pair + 1, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _count_step(row, numerator):
    """A group that moves takes its new numerator and counts the step."""
    tl.store(row + NUMERATOR, numerator)
    tl.store(row + K, tl.load(row + K) + 1.0)


@triton.jit
def _update_distance(table, scalars, scratch, rate, numerator, denominator, found_inf):
    """Writes the new d and its sums to every group, and numerator and count to those that move.

    The sums are those of the earlier slots of the scratch, and of this, the last one. The place
    behind the slots is set to 1 where the parameters move, else to 0.
    """
    slots = tl.load(table + SLOTS)
    all_n, all_d = numerator, denominator
    for i in range(0, slots - 1):
        all_n += tl.load(scratch + 4 * i + SLOT_NUMERATOR)
        all_d += tl.load(scratch + 4 * i + SLOT_DENOMINATOR)
    moves = all_d != 0.0
    if found_inf is not None:
        moves = moves & (tl.load(found_inf) == 0)
    tl.store(scratch + 4 * slots, moves.to(tl.float64))
    if moves:
        row = scalars + 6 * tl.load(table + GROUP)
        d, d_max = tl.load(row + D), tl.load(row + D_MAX)
        d_hat = _load_setting(table, D_COEF) * all_n / all_d
        grown = tl.where((d == _load_setting(table, D0)) & (d_hat > d), d_hat, d)
        grown = grown * _load_setting(table, GROWTH_RATE)
        d_max = tl.where(d_hat > d_max, d_hat, d_max)
        for i in range(0, tl.load(table + GROUPS)):
            tl.store(scalars + 6 * i + D, tl.where(grown < d_max, grown, d_max))
            tl.store(scalars + 6 * i + D_MAX, d_max)
            tl.store(scalars + 6 * i + DENOMINATOR, all_d)
            tl.store(scalars + 6 * i + D_HAT, d_hat)
        for i in range(0, slots - 1):
            slot = scratch + 4 * i
            if tl.load(slot + SLOT_RATE) != 0.0:
                earlier = scalars + 6 * tl.load(slot + SLOT_GROUP).to(tl.int32)
                _count_step(earlier, tl.load(slot + SLOT_NUMERATOR))
        if rate != 0.0:
            _count_step(row, numerator)


@triton.jit
def _prodigy_rate(table, row, lr, BIAS: tl.constexpr):
    """d * lr * bias correction, with the d from before the step."""
    rate = tl.load(row + D) * _load_lr(table, lr)
    if BIAS:
        k = tl.load(row + K) + 1.0
        correction1 = 1.0 - _power(_load_setting(table, BETA1), k)
        correction2 = 1.0 - _power(_load_setting(table, BETA2), k)
        rate = rate * tl.sqrt(correction2) / correction1
    return rate


# ---------------------------------------------------------------- kernels


@triton.jit
def prodigy_reduce_kernel(table, blocks, geometry, param, p0, exp_avg, exp_avg_sq, s, scalars,
                          scratch, partials, counter, found_inf, grad_scale, lr,
                          MOMENTUM: tl.constexpr, COUPLED: tl.constexpr, BIAS: tl.constexpr,
                          SAFEGUARD: tl.constexpr, SLICE: tl.constexpr, ALIGNED: tl.constexpr,
                          BLOCK: tl.constexpr, ADDED: tl.constexpr):  # fmt: skip
    """m, v and s of a group, and its slot of the scratch: numerator, denominator, group, rate."""
    WIDE: tl.constexpr = exp_avg_sq.dtype.element_ty
    parameter, address, start, element, limit = _locate_block(
        table + ADDRESSES, blocks, geometry, BLOCK
    )
    there = element < limit
    group = tl.load(table + GROUP)
    row = scalars + 6 * group
    d, d0, beta3 = tl.load(row + D), _load_setting(table, D0), _load_setting(table, BETA3)
    rate = _prodigy_rate(table, row, lr, BIAS)
    sound = rate != 0.0  # a tensor lr of 0 freezes the group
    if found_inf is not None:
        sound = sound & (tl.load(found_inf) == 0)
    stored = element < tl.where(sound, limit, 0)

    g = _load_gradient(address, element, there, param, grad_scale, WIDE, ALIGNED)
    p = tl.load(param + start + element, mask=there, other=0.0).to(WIDE)
    if COUPLED:
        g = g + _load_setting(table, DECAY).to(WIDE) * p
    scaled = g * d.to(WIDE)
    if MOMENTUM:
        beta1 = _load_setting(table, BETA1)
        m = tl.load(exp_avg + start + element, mask=there, other=0.0)
        m = m * beta1.to(WIDE) + scaled * (1.0 - beta1).to(WIDE)
        tl.store(exp_avg + start + element, m, mask=stored)
    beta2 = _load_setting(table, BETA2)
    v = tl.load(exp_avg_sq + start + element, mask=there, other=0.0)
    v = v * beta2.to(WIDE) + scaled * scaled * (1.0 - beta2).to(WIDE)
    tl.store(exp_avg_sq + start + element, v, mask=stored)

    if SAFEGUARD:
        weight = d / d0 * d
    else:
        weight = d / d0 * rate
    at = tl.load(geometry + 3 * parameter + 2) + element // SLICE
    seen = there & (element % SLICE == 0)
    size = tl.load(s + at, mask=seen, other=0.0) * beta3.to(WIDE) + g * weight.to(WIDE)
    tl.store(s + at, size, mask=stored & (element % SLICE == 0))
    walked = tl.load(p0 + at, mask=seen, other=0.0) - p
    inner = tl.sum(tl.where(seen, g.to(tl.float64) * walked.to(tl.float64), 0.0), 0)
    norm = tl.sum(tl.where(seen, tl.abs(size).to(tl.float64), 0.0), 0)
    tl.store(partials + 2 * tl.program_id(0), inner)
    tl.store(partials + 2 * tl.program_id(0) + 1, norm)

    if _is_last(counter):
        tl.store(counter, 0)
        inner, norm = _add_partials(partials, ADDED)
        numerator = tl.load(row + NUMERATOR) * beta3 + d / d0 * rate * inner
        numerator, denominator = tl.where(sound, numerator, 0.0), tl.where(sound, norm, 0.0)
        slot = tl.load(table + SLOT)
        tl.store(scratch + 4 * slot + SLOT_NUMERATOR, numerator)
        tl.store(scratch + 4 * slot + SLOT_DENOMINATOR, denominator)
        tl.store(scratch + 4 * slot + SLOT_GROUP, group.to(tl.float64))
        tl.store(scratch + 4 * slot + SLOT_RATE, rate)
        if slot == tl.load(table + SLOTS) - 1:
            _update_distance(table, scalars, scratch, rate, numerator, denominator, found_inf)


@triton.jit
def prodigy_update_kernel(table, blocks, geometry, param, exp_avg, exp_avg_sq, scalars, scratch,
                          grad_scale, MOMENTUM: tl.constexpr, COUPLED: tl.constexpr,
                          DECAYED: tl.constexpr, ALIGNED: tl.constexpr,
                          BLOCK: tl.constexpr):  # fmt: skip
    """The parameters of a group, with the new d and the rate in the group's slot."""
    WIDE: tl.constexpr = exp_avg_sq.dtype.element_ty
    _, address, start, element, limit = _locate_block(table + ADDRESSES, blocks, geometry, BLOCK)
    there = element < limit
    rate = -tl.load(scratch + 4 * tl.load(table + SLOT) + SLOT_RATE)
    d = tl.load(scalars + 6 * tl.load(table + GROUP) + D)
    moves = (tl.load(scratch + 4 * tl.load(table + SLOTS)) != 0.0) & (rate != 0.0)
    stored = element < tl.where(moves, limit, 0)
    p = tl.load(param + start + element, mask=there, other=0.0).to(WIDE)
    if MOMENTUM:
        m = tl.load(exp_avg + start + element, mask=there, other=0.0)
        by = (rate / d).to(WIDE)
    else:
        m = _load_gradient(address, element, there, param, grad_scale, WIDE, ALIGNED)
        if COUPLED:
            m = m + _load_setting(table, DECAY).to(WIDE) * p
        by = rate.to(WIDE)
    v = tl.load(exp_avg_sq + start + element, mask=there, other=0.0)
    # both sides of the quotient are divided by d: eps stays a number
    divisor = tl.sqrt(v) * (1.0 / d).to(WIDE) + _load_setting(table, EPS).to(WIDE)
    change = m / divisor * by
    if DECAYED:
        change += (rate * _load_setting(table, DECAY)).to(WIDE) * p
    tl.store(param + start + element, (p + change).to(param.dtype.element_ty), mask=stored)


@triton.jit
def adamw_kernel(table, blocks, geometry, param, exp_avg, exp_avg_sq, step, counter, found_inf,
                 grad_scale, lr, parameters,
                 ALIGNED: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr):  # fmt: skip
    """Moments and parameters of a group, and the step of each parameter with a gradient."""
    WIDE: tl.constexpr = exp_avg_sq.dtype.element_ty
    addresses = table + ADAMW_ADDRESSES
    parameter, address, start, element, limit = _locate_block(addresses, blocks, geometry, BLOCK)
    there = element < limit
    beta1, beta2 = _load_setting(table, BETA1), _load_setting(table, BETA2)
    rate = _load_lr(table, lr)
    k = tl.load(step + parameter).to(tl.float64) + 1.0
    sound = rate == rate
    if found_inf is not None:
        sound = tl.load(found_inf) == 0
    g = _load_gradient(address, element, there, param, grad_scale, WIDE, ALIGNED)
    p = tl.load(param + start + element, mask=there, other=0.0).to(WIDE)
    m = tl.load(exp_avg + start + element, mask=there, other=0.0)
    v = tl.load(exp_avg_sq + start + element, mask=there, other=0.0)
    m += (g - m) * (1.0 - beta1).to(WIDE)
    v = v * beta2.to(WIDE) + g * g * (1.0 - beta2).to(WIDE)
    by = (rate / (1.0 - _power(beta1, k))).to(WIDE)
    root = (1.0 / tl.sqrt(1.0 - _power(beta2, k))).to(WIDE)
    shrink = (1.0 - rate * _load_setting(table, ADAMW_DECAY)).to(WIDE)
    divisor = tl.sqrt(v) * root + _load_setting(table, ADAMW_EPS).to(WIDE)
    p = p * shrink - by * (m / divisor)
    stored = element < tl.where(sound, limit, 0)
    tl.store(exp_avg + start + element, m, mask=stored)
    tl.store(exp_avg_sq + start + element, v, mask=stored)
    tl.store(param + start + element, p.to(param.dtype.element_ty), mask=stored)
    if _is_last(counter):
        tl.store(counter, 0)
        for begin in range(0, parameters, ADDED):
            some = begin + tl.arange(0, ADDED)
            counted = some < tl.where(sound, parameters, 0)
            moved = tl.load(addresses + some, mask=counted, other=0) != 0
            tl.store(step + some, tl.load(step + some, mask=moved, other=0.0) + 1.0, mask=moved)


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
    state, counter = flat.state, _workspace(flat, "counter", 1, torch.int32)
    moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
    where = table, _block_table(flat), flat.geometry
    _launch_adamw(*where, param, *moments, counter, found_inf, grad_scale, lr, aligned)
    return (param,)


def _prodigy_table(
    group: MovingGroup, groups: int, slot: int, slots: int
) -> tuple[Tensor | None, Tensor, bool]:
    """(a tensor lr or None, the table of a launch, whether its gradients are aligned)."""
    lr, number = _split_lr(group.settings.lr)
    settings = [number, *group.settings[1:9]]  # lr, beta1 ... growth_rate
    table = group.flat.send_table(settings, group.grads, group.row, groups, slot, slots)
    return lr, table, _are_aligned(group.grads)


def _split_lr(lr: float | Tensor) -> tuple[Tensor | None, float]:
    """lr as a tensor or a number."""
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))


def _are_aligned(grads: Sequence[Tensor | None]) -> bool:
    """Whether the address of every gradient is a multiple of 16 bytes."""
    return not any(g is not None and g.data_ptr() & 15 for g in grads)


def _block_table(flat: FlatParameters) -> Tensor:
    """[programs, 2] int32: the parameter of a program, and which BLOCK of it."""
    if "blocks" not in flat.workspace:
        listed = []
        for i, (_, count, _) in enumerate(flat.bounds):
            listed += [(i, block) for block in range(-(-count // BLOCK))]
        flat.workspace["blocks"] = torch.tensor(listed, dtype=torch.int32).to(flat.param.device)
    return flat.workspace["blocks"]


def _workspace(flat: FlatParameters, name: str, count: int, dtype: torch.dtype) -> Tensor:
    """Zeros the first time; kept, because a CUDA graph remembers the address."""
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
    """fp32 parameters with the defaults, and with every option.

    With full=True bf16 parameters, and each option alone, too.
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
