"""Reference steps of Prodigy and AdamW as in their papers, one tensor after another.

Faster implementations of the same steps, each tested against these:

    flat_steps.py   torch operations on whole flat tensors, on any device (Prodigy)
    loops.py        C, on the CPU
    optimizers.py   Triton, on a GPU

A step works in place, on the parameters and their state; no value is read from the device.

Prodigy is arXiv 2306.06101, algorithm 4, in the paper's letters: the state names x0 "p0", m
"exp_avg", v "exp_avg_sq" and r "d_numerator"; gamma_d is gamma_k d_k. Like the authors' package and
unlike the paper, r and s are sums without the factor 1 - beta3, divided by d0; d_hat has the factor
d_coef; d grows by at most growth_rate a step; eps is multiplied by the new d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.flat import FlatParameters, state_dtype

D, D_MAX, NUMERATOR, DENOMINATOR, D_HAT, K = range(6)  # columns of Prodigy's scalars


class ProdigySettings(NamedTuple):
    """Settings of one parameter group of Prodigy."""

    lr: float | Tensor  # a 0-dim tensor may change between replays of a CUDA graph; 0 freezes
    beta1: float
    beta2: float
    beta3: float
    eps: float
    weight_decay: float
    d0: float
    d_coef: float
    growth_rate: float
    decouple: bool
    bias_correction: bool
    safeguard: bool
    slice_p: int
    sharded: bool  # the sums are taken over the ranks of torch.distributed


class MovingGroup(NamedTuple):
    """The parameters of one group and one dtype that have a gradient in this step."""

    row: int  # the group's row of the scalars
    settings: ProdigySettings
    flat: (
        FlatParameters  # state: p0, s (every slice_p-th element), exp_avg if beta1 > 0, exp_avg_sq
    )
    grads: Sequence[Tensor | None]  # of each parameter, row-major; None: it is not updated


class AdamWSettings(NamedTuple):
    """Settings of one parameter group of AdamW."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def prodigy_step(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    groups: Sequence[MovingGroup],
) -> tuple[Tensor, ...]:
    """The flat parameters after a step of Prodigy's groups that share a distance d.

    scalars [groups, 6] float64 has the columns above; paused groups take the new d, nothing else.
    found_inf [] = 1: nothing changes. Gradients are divided by grad_scale [].
    """
    first, shared = groups[0].row, groups[0].settings
    d = scalars[first, D].clone()
    zero = torch.zeros_like(d)
    overflow = zero if found_inf is None else found_inf.reshape(())
    gamma_d, active, r, gain, norm = {}, {}, {}, {}, {}
    for i, a, _, _ in groups:
        gamma_d[i] = _learning_rate(d, scalars[i, K] + 1, a)
        active[i] = (gamma_d[i] != 0) & (overflow == 0)
        r[i], gain[i], norm[i] = a.beta3 * scalars[i, NUMERATOR], zero, zero

    for group in groups:
        i, a = group.row, group.settings
        for x, g, state in _iterate_tensors(group, grad_scale):
            x0, s, v = state["p0"], state["s"], state["exp_avg_sq"]
            inner = (g[:: a.slice_p] * (x0 - x[:: a.slice_p])).sum(dtype=d.dtype)
            gain[i] = gain[i] + d / a.d0 * gamma_d[i] * inner
            weight = d / a.d0 * (d if a.safeguard else gamma_d[i])
            _write(s, a.beta3 * s + weight * g[:: a.slice_p], active[i])
            norm[i] = norm[i] + s.abs().sum(dtype=d.dtype)
            if a.beta1 > 0:
                m = state["exp_avg"]
                _write(m, a.beta1 * m + (1 - a.beta1) * d * g, active[i])
            _write(v, a.beta2 * v + (1 - a.beta2) * (d * g) ** 2, active[i])

    numerator = denominator = zero
    for i, (new_gain, new_norm) in _sum_over_ranks(gain, norm, groups).items():
        r[i] = r[i] + new_gain
        numerator = numerator + torch.where(active[i], r[i], zero)
        denominator = denominator + torch.where(active[i], new_norm, zero)
    moves = denominator != 0  # the authors' code returns here if not
    d_hat = shared.d_coef * numerator / denominator
    d_max = torch.fmax(scalars[first, D_MAX], d_hat)
    grown = torch.where(d == shared.d0, torch.fmax(d, d_hat), d) * shared.growth_rate
    d = torch.fmin(d_max, grown)

    for group in groups:
        i, a = group.row, group.settings
        for x, g, state in _iterate_tensors(group, grad_scale):
            m = state["exp_avg"] if a.beta1 > 0 else d * g
            decay = a.weight_decay * x.to(g.dtype) if a.decouple else 0.0
            update = m / (state["exp_avg_sq"].sqrt() + d * a.eps) + decay
            _write(x, x.to(g.dtype) - gamma_d[i] * update, moves & active[i])
    for i in r:
        _write(scalars[i, NUMERATOR], r[i], moves & active[i])
        scalars[i, K].add_(moves & active[i])
    for column, value in ((D, d), (D_MAX, d_max), (DENOMINATOR, denominator), (D_HAT, d_hat)):
        _write(scalars[:, column], value, moves)
    return tuple(group.flat.param for group in groups)


def _learning_rate(d: Tensor, k: Tensor, a: ProdigySettings) -> Tensor:
    """gamma_k d_k = d lr, with the bias correction of step k."""
    if not a.bias_correction:
        return d * a.lr
    return d * a.lr * (1 - a.beta2**k) ** 0.5 / (1 - a.beta1**k)


def _iterate_tensors(
    group: MovingGroup, grad_scale: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """x [n], g [n] and the state of each parameter; g unscaled, with coupled decay."""
    a = group.settings
    for x, g, state in group.flat.iterate_tensors(group.grads):
        g = g.to(state["s"].dtype)
        if grad_scale is not None:
            g = g / grad_scale.reshape(())
        if not a.decouple:
            g = g + a.weight_decay * x
        yield x, g, state


def _sum_over_ranks(
    gain: dict[int, Tensor], norm: dict[int, Tensor], groups: Sequence[MovingGroup]
) -> dict[int, Tensor]:
    """Group -> [2] its gain and norm, summed over the ranks of torch.distributed where each of them
    holds a shard of the parameters.
    """
    sums = torch.stack([torch.stack([gain[i], norm[i]]) for i in gain])
    if any(group.settings.sharded for group in groups):
        torch.distributed.all_reduce(sums)
    return dict(zip(gain, sums))


def _write(target: Tensor, value: Tensor, where: Tensor) -> None:
    """target <- value where the 0-dim condition holds; no branch on the device's value."""
    target.copy_(torch.where(where, value, target))


# ---------------------------------------------------------------- AdamW


def adamw_step(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    settings: AdamWSettings,
) -> tuple[Tensor, ...]:
    """(flat.param,) after a step of AdamW (arXiv 1711.05101, algorithm 2).

    As in torch.optim.AdamW the decay is lr * weight_decay. `param` is flat.param; the state is
    exp_avg, exp_avg_sq [n] and step [parameters] fp32, each parameter's own count. found_inf and
    grad_scale as in prodigy_step.
    """
    a = settings
    sound = torch.ones((), dtype=torch.bool, device=param.device)
    if found_inf is not None:
        sound = found_inf.reshape(()) == 0
    for x, g, state in flat.iterate_tensors(grads):
        m, v, step = state["exp_avg"], state["exp_avg_sq"], state["step"].reshape(())
        g = g.to(m.dtype)
        if grad_scale is not None:
            g = g / grad_scale.reshape(())
        k = step + 1 if step.device.type == "mps" else step.double() + 1
        lr = a.lr.to(k) if isinstance(a.lr, Tensor) else a.lr
        new_m = m + (g - m) * (1 - a.beta1)
        new_v = v * a.beta2 + g * g * (1 - a.beta2)
        rate = lr / (1 - a.beta1**k)
        root = (1 - a.beta2**k) ** 0.5
        update = new_m / (new_v.sqrt() / root.to(m.dtype) + a.eps)
        decayed = x.to(m.dtype) * (1 - lr * a.weight_decay)
        _write(x, decayed - rate.to(m.dtype) * update, sound)
        _write(m, new_m, sound)
        _write(v, new_v, sound)
        _write(step, step + 1, sound)
    return (param,)


# ---------------------------------------------------------------- examples


def prodigy_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    """Two groups with a shared distance in the middle of a run.

    Three parameters of odd sizes each, one of them without a gradient.
    """
    settings = ProdigySettings(
        lr=1.0,
        beta1=0.9,
        beta2=0.999,
        beta3=0.999**0.5,
        eps=1e-8,
        weight_decay=0.01,
        d0=1e-6,
        d_coef=1.0,
        growth_rate=math.inf,
        decouple=True,
        bias_correction=True,
        safeguard=False,
        slice_p=1,
        sharded=False,
    )
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for index in range(2):
        params, states, grads = _random_parameters(generator, dtype, device)
        for p, state in zip(params, states):
            p0 = torch.randn(p.numel(), generator=generator).to(device, state_dtype(p))
            state |= {"p0": p0, "s": torch.zeros_like(p0)}
        groups.append(MovingGroup(index, settings, FlatParameters(params, states), grads))
    row = [2e-6, 2e-6, 1e-9, 1.0, 2e-6, 3.0]
    scalars = torch.tensor([row] * 2, dtype=torch.float64, device=device)
    return scalars, None, None, tuple(groups)


def adamw_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    """Three parameters of odd sizes, one of them without a gradient, in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)
    params, states, grads = _random_parameters(generator, dtype, device)
    for i, state in enumerate(states):
        state["step"] = torch.tensor(float(i), device=device)
    flat = FlatParameters(params, states)
    return flat.param, None, None, flat, grads, AdamWSettings(1e-3, 0.9, 0.999, 1e-8, 0.01)


def _random_parameters(
    generator: torch.Generator, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[dict[str, Tensor]], list[Tensor | None]]:
    """Parameters, their moments, and their gradients: in fp64 the same numbers as in fp32."""
    shapes = (3, 7), (5,), (11, 97)
    wide = torch.promote_types(dtype, torch.float32)

    def sample(wanted: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device, wanted) for shape in shapes]

    m, v = sample(wide), sample(wide)
    first, _, last = sample(dtype)
    moments = [{"exp_avg": 2**-20 * a, "exp_avg_sq": 2**-40 * b.abs()} for a, b in zip(m, v)]
    return sample(dtype), moments, [first, None, last]
