"""Triton kernels of Prodigy's and AdamW's steps; optimizers.py launches them.

    prodigy_reduce_kernel   m, v, s and the two sums of the distance d; the last program to finish
                            adds the sums up and updates d
    prodigy_update_kernel   the parameters
    adamw_kernel            moments and parameters; the last program to finish counts the step

A program works on BLOCK elements of one parameter. Gradients are read at autograd's addresses,
through a table. A sum is taken in fp64, first inside a program and then over the programs in their
order, so that it has the same bits in every run; the only atomic is a counter that identifies the
last program, which resets it to zero.

The table of a launch (int64; flat.py, DeviceTable) begins with the group's settings, as doubles.
Then come, for Prodigy, four integers: the group's row of the scalars, the number of rows, the
launch's slot of the scratch, the number of slots. Then the address of each parameter's gradient, 0
where it has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_core.kernels.device_functions import arrived_last

# Indices in the table.
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
    """The double at an index of the table."""
    return tl.load(table + place).to(tl.float64, bitcast=True)


@triton.jit
def _load_lr(table, lr):
    """The learning rate: the tensor lr if given, else that of the table."""
    if lr is not None:
        return tl.load(lr).to(tl.float64)
    else:
        return _load_setting(table, LR)


@triton.jit
def _locate_block(addresses, blocks, geometry, BLOCK: tl.constexpr):
    """(parameter of this program, address of its gradient, its start in the flat tensors, indices
    of the elements, their end).

    Masks compare with the end: a scalar bool that is broadcast over a block becomes a number in
    Triton's interpreter.
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
    """The unscaled gradient; ALIGNED: addresses of gradients are multiples of 16 bytes."""
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
    """Write the new numerator of a group that moves and count its step."""
    tl.store(row + NUMERATOR, numerator)
    tl.store(row + K, tl.load(row + K) + 1.0)


@triton.jit
def _update_distance(table, scalars, scratch, rate, numerator, denominator, found_inf):
    """Write the new d and its sums to every group, and numerator and count to those that move.

    The sums are over the earlier slots of the scratch and this, the last one. The element after the
    slots is set to 1 if the parameters move, else to 0.
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
    """Update m, v and s of a group, and its scratch slot: numerator, denominator, group, rate."""
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

    if arrived_last(counter, tl.num_programs(0)):
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
    """Update the parameters of a group, with the new d and the rate in the group's slot."""
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
    """Update moments and parameters of a group, and count the step of each with a gradient."""
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
    if arrived_last(counter, tl.num_programs(0)):
        for begin in range(0, parameters, ADDED):
            some = begin + tl.arange(0, ADDED)
            counted = some < tl.where(sound, parameters, 0)
            moved = tl.load(addresses + some, mask=counted, other=0) != 0
            tl.store(step + some, tl.load(step + some, mask=moved, other=0.0) + 1.0, mask=moved)
