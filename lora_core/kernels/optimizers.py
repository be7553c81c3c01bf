"""Prodigy in two launches and AdamW in one, for any number of parameters: kernels/steps.py in Triton.

    prodigy_reduce_kernel   m, v, s and the two sums that d is made of; the last program to end adds them up and moves d
    prodigy_update_kernel   the parameters
    adamw_kernel            everything; the last program to end counts the step

Gradients are read where autograd put them, through a table of addresses. A sum is taken in fp64, first inside a program and then over the programs in
their order, so it has the same bits in every run; the only atomic is a counter that finds the last program, which sets it back to zero.
Bytes of a parameter and step, in fp32: 36 + 16 for Prodigy, 28 for AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.ahead import Build
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import device_refusal
from lora_core.kernels.flat import FlatParameters
from lora_core.kernels.steps import AdamWSettings, MovingGroup

BLOCK, WARPS = 1024, 4  # elements of a program; a LoRA factor of rank 16 has 5,120 and more
# Left to itself, ptxas guesses a limit of registers for prodigy_reduce_kernel, and it depends on the
# release and the chip whether the guess spills 8 to 24 bytes. Told this limit, it takes 55 to 110.
REDUCE_WARPS, REDUCE_REGISTERS = 8, 128
ADDED = 1024  # partial sums that the last program reads at once


@triton.jit
def _load_double(words, i):
    """The double at words[i]."""
    return tl.load(words + i).to(tl.float64, bitcast=True)


@triton.jit
def _locate_block(words, blocks, geometry, BLOCK: tl.constexpr):
    """What a program does: its parameter, the address of the gradient, the parameter's place in the arrays, the elements and how many of
    them count. Masks are made of limits: a scalar bool that is spread over a block becomes a number in Triton's interpreter."""
    parameter, chunk = (
        tl.load(blocks + 2 * tl.program_id(0)),
        tl.load(blocks + 2 * tl.program_id(0) + 1),
    )
    address, start, count = (
        tl.load(words + parameter),
        tl.load(geometry + 3 * parameter),
        tl.load(geometry + 3 * parameter + 1),
    )
    element = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return parameter, address, tl.multiple_of(start, 16), element, tl.where(address != 0, count, 0)


@triton.jit
def _load_gradient(
    address, element, there, param, grad_scale, WIDE: tl.constexpr, ALIGNED: tl.constexpr
):
    pointer = address.to(tl.pointer_type(param.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    g = tl.load(pointer + element, mask=there, other=0.0).to(WIDE)
    if grad_scale is not None:
        g = g * (1.0 / tl.load(grad_scale)).to(WIDE)
    return g


@triton.jit
def _learning_rate(lr, words, at):
    if lr is not None:
        return tl.load(lr).to(tl.float64)
    else:
        return _load_double(words, at)


@triton.jit
def _power(beta, k):
    return tl.exp(k * tl.log(beta))


@triton.jit
def _is_last(counter):
    """Whether every other program has come this far, with all that it wrote."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def prodigy_reduce_kernel(words, blocks, geometry, param, p0, exp_avg, exp_avg_sq, s, scalars, scratch, partials, counter, found_inf, grad_scale, lr,
                          parameters, group, groups, slot, slots, ADAM: tl.constexpr, COUPLED: tl.constexpr, BIAS: tl.constexpr,
                          SAFEGUARD: tl.constexpr, SLICE: tl.constexpr, LAST: tl.constexpr, ALIGNED: tl.constexpr,
                          BLOCK: tl.constexpr, ADDED: tl.constexpr):  # fmt: skip
    """numbers behind the addresses in `words`: lr, beta1, beta2, beta3, eps, weight_decay, d0, d_coef, growth_rate. scratch: for each slot (a group
    that moves) N, D, its group and dlr, then whether anything moves. LAST: the launch of the last slot."""
    WIDE: tl.constexpr = exp_avg_sq.dtype.element_ty
    parameter, address, start, element, limit = _locate_block(words, blocks, geometry, BLOCK)
    there = element < limit
    beta1, beta2, beta3 = (
        _load_double(words, parameters + 1),
        _load_double(words, parameters + 2),
        _load_double(words, parameters + 3),
    )
    d, k, d0 = (
        tl.load(scalars + 6 * group),
        tl.load(scalars + 6 * group + 5) + 1.0,
        _load_double(words, parameters + 6),
    )
    rate = d * _learning_rate(lr, words, parameters)
    if BIAS:
        rate = rate * tl.sqrt(1.0 - _power(beta2, k)) / (1.0 - _power(beta1, k))
    sound = rate != 0.0  # a tensor lr of 0 freezes the group
    if found_inf is not None:
        sound = sound & (tl.load(found_inf) == 0)
    stored = element < tl.where(sound, limit, 0)

    g = _load_gradient(address, element, there, param, grad_scale, WIDE, ALIGNED)
    p = tl.load(param + start + element, mask=there, other=0.0).to(WIDE)
    if COUPLED:
        g = g + _load_double(words, parameters + 5).to(WIDE) * p
    scaled = g * d.to(WIDE)
    if ADAM:
        m = tl.load(exp_avg + start + element, mask=there, other=0.0)
        tl.store(
            exp_avg + start + element,
            m * beta1.to(WIDE) + scaled * (1.0 - beta1).to(WIDE),
            mask=stored,
        )
    v = tl.load(exp_avg_sq + start + element, mask=there, other=0.0)
    tl.store(
        exp_avg_sq + start + element,
        v * beta2.to(WIDE) + scaled * scaled * (1.0 - beta2).to(WIDE),
        mask=stored,
    )
    if SAFEGUARD:
        weight = d / d0 * d
    else:
        weight = d / d0 * rate
    at = tl.load(geometry + 3 * parameter + 2) + element // SLICE
    seen = there & (element % SLICE == 0)
    size = tl.load(s + at, mask=seen, other=0.0) * beta3.to(WIDE) + g * weight.to(WIDE)
    tl.store(s + at, size, mask=stored & (element % SLICE == 0))
    inner = g.to(tl.float64) * (tl.load(p0 + at, mask=seen, other=0.0) - p).to(tl.float64)
    tl.store(partials + 2 * tl.program_id(0), tl.sum(tl.where(seen, inner, 0.0), 0))
    tl.store(
        partials + 2 * tl.program_id(0) + 1,
        tl.sum(tl.where(seen, tl.abs(size).to(tl.float64), 0.0), 0),
    )

    if _is_last(counter):
        tl.store(counter, 0)
        some = tl.arange(0, ADDED)
        inners, sizes = tl.zeros((ADDED,), tl.float64), tl.zeros((ADDED,), tl.float64)
        for begin in range(0, tl.num_programs(0), ADDED):
            inside = begin + some < tl.num_programs(0)
            inners += tl.load(
                partials + 2 * (begin + some), mask=inside, other=0.0, cache_modifier=".cg"
            )
            sizes += tl.load(
                partials + 2 * (begin + some) + 1, mask=inside, other=0.0, cache_modifier=".cg"
            )
        numerator = tl.load(scalars + 6 * group + 2) * beta3 + d / d0 * rate * tl.sum(inners, 0)
        numerator, denominator = (
            tl.where(sound, numerator, 0.0),
            tl.where(sound, tl.sum(sizes, 0), 0.0),
        )
        tl.store(scratch + 4 * slot, numerator)
        tl.store(scratch + 4 * slot + 1, denominator)
        tl.store(scratch + 4 * slot + 2, group + 0.0)
        tl.store(scratch + 4 * slot + 3, rate)
        if LAST:
            all_n, all_d = numerator, denominator
            for i in range(0, slots - 1):
                all_n += tl.load(scratch + 4 * i)
                all_d += tl.load(scratch + 4 * i + 1)
            moves = all_d != 0.0
            if found_inf is not None:
                moves = moves & (tl.load(found_inf) == 0)
            tl.store(scratch + 4 * slots, moves.to(tl.float64))
            if moves:
                d_max, d_hat = (
                    tl.load(scalars + 6 * group + 1),
                    _load_double(words, parameters + 7) * all_n / all_d,
                )
                grown = tl.where((d == d0) & (d_hat > d), d_hat, d) * _load_double(
                    words, parameters + 8
                )
                d_max = tl.where(d_hat > d_max, d_hat, d_max)
                for i in range(0, groups):
                    tl.store(scalars + 6 * i, tl.where(grown < d_max, grown, d_max))
                    tl.store(scalars + 6 * i + 1, d_max)
                    tl.store(scalars + 6 * i + 3, all_d)
                    tl.store(scalars + 6 * i + 4, d_hat)
                for i in range(0, slots - 1):
                    if tl.load(scratch + 4 * i + 3) != 0.0:
                        row = scalars + 6 * tl.load(scratch + 4 * i + 2).to(tl.int32)
                        tl.store(row + 2, tl.load(scratch + 4 * i))
                        tl.store(row + 5, tl.load(row + 5) + 1.0)
                if rate != 0.0:
                    tl.store(scalars + 6 * group + 2, numerator)
                    tl.store(scalars + 6 * group + 5, k)


@triton.jit
def prodigy_update_kernel(words, blocks, geometry, param, exp_avg, exp_avg_sq, scalars, scratch, grad_scale, parameters, group, slot, slots,
                          ADAM: tl.constexpr, COUPLED: tl.constexpr, DECAYED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    WIDE: tl.constexpr = exp_avg_sq.dtype.element_ty
    _, address, start, element, limit = _locate_block(words, blocks, geometry, BLOCK)
    there = element < limit
    rate, d = -tl.load(scratch + 4 * slot + 3), tl.load(scalars + 6 * group)
    stored = element < tl.where((tl.load(scratch + 4 * slots) != 0.0) & (rate != 0.0), limit, 0)
    p = tl.load(param + start + element, mask=there, other=0.0).to(WIDE)
    if ADAM:
        m = tl.load(exp_avg + start + element, mask=there, other=0.0)
        by = (rate / d).to(WIDE)
    else:
        m = _load_gradient(address, element, there, param, grad_scale, WIDE, ALIGNED)
        if COUPLED:
            m = m + _load_double(words, parameters + 5).to(WIDE) * p
        by = rate.to(WIDE)
    v = tl.load(exp_avg_sq + start + element, mask=there, other=0.0)
    change = (
        m / (tl.sqrt(v) * (1.0 / d).to(WIDE) + _load_double(words, parameters + 4).to(WIDE)) * by
    )
    if DECAYED:
        change += (rate * _load_double(words, parameters + 5)).to(WIDE) * p
    tl.store(param + start + element, (p + change).to(param.dtype.element_ty), mask=stored)


@triton.jit
def adamw_kernel(words, blocks, geometry, param, exp_avg, exp_avg_sq, step, counter, found_inf, grad_scale, lr, parameters,
                 ALIGNED: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr):  # fmt: skip
    """numbers behind the addresses in `words`: lr, beta1, beta2, eps, weight_decay."""
    WIDE: tl.constexpr = exp_avg_sq.dtype.element_ty
    parameter, address, start, element, limit = _locate_block(words, blocks, geometry, BLOCK)
    there = element < limit
    beta1, beta2, rate = (
        _load_double(words, parameters + 1),
        _load_double(words, parameters + 2),
        _learning_rate(lr, words, parameters),
    )
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
    by, root = (
        (rate / (1.0 - _power(beta1, k))).to(WIDE),
        (1.0 / tl.sqrt(1.0 - _power(beta2, k))).to(WIDE),
    )
    p = p * (1.0 - rate * _load_double(words, parameters + 4)).to(WIDE) - by * (
        m / (tl.sqrt(v) * root + _load_double(words, parameters + 3).to(WIDE))
    )
    stored = element < tl.where(sound, limit, 0)
    tl.store(exp_avg + start + element, m, mask=stored)
    tl.store(exp_avg_sq + start + element, v, mask=stored)
    tl.store(param + start + element, p.to(param.dtype.element_ty), mask=stored)
    if _is_last(counter):
        tl.store(counter, 0)
        for begin in range(0, parameters, ADDED):
            some = begin + tl.arange(0, ADDED)
            moved = tl.load(words + some, mask=some < tl.where(sound, parameters, 0), other=0) != 0
            tl.store(step + some, tl.load(step + some, mask=moved, other=0.0) + 1.0, mask=moved)


# ---------------------------------------------------------------- launches


@torch.library.custom_op(
    "lora_core::prodigy_reduce",
    mutates_args=("exp_avg", "exp_avg_sq", "s", "scalars", "scratch", "partials", "counter"),
)
def _reduce(
    words: Tensor, blocks: Tensor, geometry: Tensor, param: Tensor, p0: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Tensor, scalars: Tensor,
    scratch: Tensor, partials: Tensor, counter: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None, lr: Tensor | None,
    group: int, slot: int, slots: int, flags: list[bool], slice_p: int,
) -> None:  # fmt: skip
    adam, coupled, bias, safeguard, aligned = flags
    prodigy_reduce_kernel[(len(blocks),)](
        words, blocks, geometry, param, p0, exp_avg, exp_avg_sq, s, scalars, scratch, partials, counter, found_inf, grad_scale, lr,
        len(geometry), group, len(scalars), slot, slots, adam, coupled, bias, safeguard, slice_p, slot == slots - 1, aligned, BLOCK, ADDED,
        num_warps=REDUCE_WARPS, maxnreg=REDUCE_REGISTERS,
    )  # fmt: skip


@torch.library.custom_op("lora_core::prodigy_update", mutates_args=("param",))
def _update(
    words: Tensor, blocks: Tensor, geometry: Tensor, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, scratch: Tensor,
    grad_scale: Tensor | None, group: int, slot: int, slots: int, flags: list[bool],
) -> None:  # fmt: skip
    adam, coupled, decayed, aligned = flags
    prodigy_update_kernel[(len(blocks),)](
        words, blocks, geometry, param, exp_avg, exp_avg_sq, scalars, scratch, grad_scale, len(geometry), group, slot, slots,
        adam, coupled, decayed, aligned, BLOCK, num_warps=WARPS,
    )  # fmt: skip


@torch.library.custom_op(
    "lora_core::adamw", mutates_args=("param", "exp_avg", "exp_avg_sq", "step", "counter")
)
def _adamw(
    words: Tensor, blocks: Tensor, geometry: Tensor, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, counter: Tensor,
    found_inf: Tensor | None, grad_scale: Tensor | None, lr: Tensor | None, aligned: bool,
) -> None:  # fmt: skip
    adamw_kernel[(len(blocks),)](
        words, blocks, geometry, param, exp_avg, exp_avg_sq, step, counter, found_inf, grad_scale, lr, len(geometry), aligned, BLOCK, ADDED,
        num_warps=WARPS,
    )  # fmt: skip


for _op in (_reduce, _update, _adamw):
    _op.register_fake(lambda *args: None)


def _reduce_cost(
    words: Tensor,
    blocks: Tensor,
    geometry: Tensor,
    param: Tensor,
    p0: Tensor,
    m: Tensor,
    v: Tensor,
    s: Tensor,
    *rest: Any,
) -> Cost:
    return Cost(1, 2 * param.nbytes + p0.nbytes + 2 * (m.nbytes + v.nbytes + s.nbytes))


def _update_cost(
    words: Tensor, blocks: Tensor, geometry: Tensor, param: Tensor, m: Tensor, v: Tensor, *rest: Any
) -> Cost:
    return Cost(1, 2 * param.nbytes + (m.nbytes or param.nbytes) + v.nbytes)


def _adamw_cost(
    words: Tensor, blocks: Tensor, geometry: Tensor, param: Tensor, m: Tensor, v: Tensor, *rest: Any
) -> Cost:
    return Cost(1, 3 * param.nbytes + 2 * (m.nbytes + v.nbytes))


COSTS.update(
    {
        "lora_core::prodigy_reduce": _reduce_cost,
        "lora_core::prodigy_update": _update_cost,
        "lora_core::adamw": _adamw_cost,
    }
)


def triton_prodigy_step(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    rows: Sequence[MovingGroup],
) -> tuple[Tensor, ...]:
    """steps.prodigy_step in two launches for each group."""
    slots, sent = len(rows), []
    scratch = _workspace(rows[0].flat, f"scratch {slots}", 4 * slots + 1, torch.float64)
    empty = _workspace(rows[0].flat, "empty", 0, torch.float32)
    for slot, row in enumerate(rows):
        recipe, flat, state = row.recipe, row.flat, row.flat.state
        lr, number = _split_lr(recipe.lr)
        numbers = [
            number,
            recipe.beta1,
            recipe.beta2,
            recipe.beta3,
            recipe.eps,
            recipe.weight_decay,
            recipe.d0,
            recipe.d_coef,
            recipe.growth_rate,
        ]
        words, aligned = _send_table(flat, row.grads, numbers)
        blocks, adam, coupled = (
            _block_table(flat),
            recipe.beta1 > 0,
            bool(recipe.weight_decay) and not recipe.decouple,
        )
        moments = state["exp_avg"] if adam else empty, state["exp_avg_sq"]
        _reduce(
            words, blocks, flat.geometry, flat.param, state["p0"], *moments, state["s"], scalars, scratch,
            _workspace(flat, "partials", 2 * len(blocks), torch.float64), _workspace(flat, "counter", 1, torch.int32), found_inf, grad_scale, lr,
            row.group, slot, slots, [adam, coupled, recipe.bias_correction, recipe.safeguard, aligned], recipe.slice_p,
        )  # fmt: skip
        flags = [adam, coupled, bool(recipe.weight_decay) and recipe.decouple, aligned]
        sent.append(
            (
                words,
                blocks,
                flat.geometry,
                flat.param,
                *moments,
                scalars,
                scratch,
                grad_scale,
                row.group,
                slot,
                slots,
                flags,
            )
        )
    for update in sent:
        _update(*update)
    return tuple(row.flat.param for row in rows)


def triton_adamw_step(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    recipe: AdamWSettings,
) -> tuple[Tensor, ...]:
    """steps.adamw_step in one launch."""
    lr, number = _split_lr(recipe.lr)
    words, aligned = _send_table(
        flat, grads, [number, recipe.beta1, recipe.beta2, recipe.eps, recipe.weight_decay]
    )
    state, counter = flat.state, _workspace(flat, "counter", 1, torch.int32)
    moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
    _adamw(
        words,
        _block_table(flat),
        flat.geometry,
        param,
        *moments,
        counter,
        found_inf,
        grad_scale,
        lr,
        aligned,
    )
    return (param,)


def prodigy_refusal(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    rows: Sequence[MovingGroup],
) -> str | None:
    """Why the kernels do not run on these arguments, or None."""
    if len({row.group for row in rows}) < len(rows):
        return "a group has parameters of several dtypes"
    if any(row.recipe.sharded for row in rows):
        return "ranks share the sums (fsdp_in_use)"
    return next(
        (said for row in rows if (said := _refuse(row.flat, row.recipe.lr)) is not None), None
    )


def adamw_refusal(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    recipe: AdamWSettings,
) -> str | None:
    """Why the kernel does not run on these arguments, or None."""
    return _refuse(flat, recipe.lr)


def _refuse(flat: FlatParameters, lr: float | Tensor) -> str | None:
    said = device_refusal(flat.param)
    if said is None and isinstance(lr, Tensor) and lr.device != flat.param.device:
        return f"the tensor lr is on {lr.device}"
    return said if flat.param.numel() else "the parameters have no elements"


def _split_lr(lr: float | Tensor) -> tuple[Tensor | None, float]:
    """lr as a tensor or a number."""
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))


def _send_table(
    flat: FlatParameters, grads: Sequence[Tensor | None], numbers: list[float]
) -> tuple[Tensor, bool]:
    """The table of a launch, and whether every gradient lies at a multiple of 16 bytes."""
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    return flat.words.send(addresses, numbers), not any(address & 15 for address in addresses)


def _block_table(flat: FlatParameters) -> Tensor:
    """[programs, 2] int32: parameter, and which BLOCK of it."""
    if "blocks" not in flat.room:
        listed = [
            (i, block)
            for i, (_, count, _) in enumerate(flat.bounds)
            for block in range(-(-count // BLOCK))
        ]
        flat.room["blocks"] = torch.tensor(listed, dtype=torch.int32).to(flat.param.device)
    return flat.room["blocks"]


def _workspace(flat: FlatParameters, name: str, count: int, dtype: torch.dtype) -> Tensor:
    """Zeros the first time; kept, as a CUDA graph remembers where they are."""
    if name not in flat.room:
        flat.room[name] = torch.zeros(count, dtype=dtype, device=flat.param.device)
    return flat.room[name]


# ---------------------------------------------------------------- ahead of time


def list_optimizer_builds(full: bool) -> list[Build]:
    """fp32 parameters with the defaults, and with every option; with full=True bf16 parameters and each option alone too."""
    everything = {
        "ADAM": True,
        "COUPLED": True,
        "BIAS": True,
        "SAFEGUARD": True,
        "LAST": True,
        "ALIGNED": True,
    }
    plain = everything | {"COUPLED": False, "BIAS": False, "SAFEGUARD": False}
    variants = [("plain", plain, 1, False), ("all options", everything, 3, True)]
    if full:
        variants += [
            (
                f"{name.lower()}={not plain[name]}",
                plain | {name: not plain[name]},
                1,
                name == "BIAS",
            )
            for name in plain
        ]
    found = []
    for dtype in ("fp32", "bf16") if full else ("fp32",):
        for name, chosen, slice_p, scaled in variants:
            optional = (
                {"found_inf": "*fp32", "grad_scale": "*fp32", "lr": "*fp32"}
                if scaled
                else dict.fromkeys(("found_inf", "grad_scale", "lr"))
            )
            constants = (
                chosen
                | {"SLICE": slice_p, "DECAYED": True, "BLOCK": BLOCK, "ADDED": ADDED}
                | {k: v for k, v in optional.items() if not v}
            )
            for kernel in (prodigy_reduce_kernel, prodigy_update_kernel, adamw_kernel):
                found.append(_build(kernel, f"{kernel.__name__} {dtype} {name}", dtype, constants))
    return found if full else found[:5]


def _build(kernel: Any, name: str, dtype: str, constants: dict[str, Any]) -> Build:
    types = {
        "words": "*i64",
        "blocks": "*i32",
        "geometry": "*i64",
        "param": f"*{dtype}",
        "counter": "*i32",
    }
    types |= dict.fromkeys(
        ("p0", "exp_avg", "exp_avg_sq", "s", "step", "found_inf", "grad_scale", "lr"), "*fp32"
    )
    types |= dict.fromkeys(("scalars", "scratch", "partials"), "*fp64") | dict.fromkeys(
        ("parameters", "group", "groups", "slot", "slots"), "i32"
    )
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    given = {arg: constants[arg] for arg in kernel.arg_names if arg in constants}
    if kernel is prodigy_reduce_kernel:
        return Build(
            kernel, signature, given, warps=REDUCE_WARPS, name=name, registers=REDUCE_REGISTERS
        )
    return Build(kernel, signature, given, warps=WARPS, name=name)
