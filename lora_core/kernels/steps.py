"""One step of Prodigy and of AdamW on flat parameters, in plain torch: the definitions that kernels/loops.py and kernels/optimizers.py equal.

Everything happens in place, in the parameters and their state alike; no value is read from the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.flat import ALIGNED, FlatParameters

D, D_MAX, NUMERATOR, DENOMINATOR, D_HAT, K = range(6)  # columns of Prodigy's scalars


class ProdigySettings(NamedTuple):
    """A group's settings of Prodigy."""

    lr: (
        float | Tensor
    )  # a 0-dim tensor on the device may change between two replays of a CUDA graph; where it is 0 the group is frozen
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
    """The parameters of one group and dtype that move in this step."""

    group: int  # its row of the scalars
    recipe: ProdigySettings
    flat: FlatParameters  # state: p0 and s (every slice_p-th element), exp_avg where beta1 > 0, exp_avg_sq
    grads: Sequence[Tensor | None]  # of each parameter, row-major; one without keeps its bits


class AdamWSettings(NamedTuple):
    """A group's settings of AdamW."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def prodigy_step(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    rows: Sequence[MovingGroup],
) -> tuple[Tensor, ...]:
    """The flat parameters after a step of the groups that share a distance (arXiv 2306.06101, algorithm 4; sums without prodigyopt's host syncs).

    scalars [groups, 6] fp64: the columns above, of the groups that pause too, which learn of the new d and nothing else. With found_inf [] = 1
    nothing changes; gradients are divided by grad_scale []. The moments carry one and two powers of d, so that m / sqrt(v) is of order 1.
    """
    first = rows[0]
    moving = [GroupUpdate(scalars[row.group], row, found_inf, grad_scale) for row in rows]
    sums = torch.stack(
        [total for m in moving for total in m.accumulate()]
    )  # N's increments at even, D's at odd places
    if any(row.recipe.sharded for row in rows):
        torch.distributed.all_reduce(sums)
    numerators = {row.group: scalars[row.group, NUMERATOR] * row.recipe.beta3 for row in rows}
    for m, gain in zip(moving, sums[0::2]):
        numerators[m.row.group] = numerators[m.row.group] + gain
    live = {m.row.group: m.live for m in moving if m.live is not None}
    counted = [
        torch.where(live[g], total, torch.zeros_like(total)) if g in live else total
        for g, total in numerators.items()
    ]
    numerator, denominator = torch.stack(counted).sum(), sums[1::2].sum()

    # prodigyopt returns here if D = 0; where() keeps the same values without asking the device. NaN != 0, so a NaN still shows in the weights.
    moves = denominator != 0
    if found_inf is not None:
        moves = moves & (found_inf.reshape(()) == 0)
    d, d_max = scalars[first.group, D], scalars[first.group, D_MAX]
    d_hat = torch.where(
        moves, first.recipe.d_coef * numerator / denominator, scalars[first.group, D_HAT]
    )
    grown = torch.where(d == first.recipe.d0, torch.fmax(d, d_hat), d)
    d_max = torch.where(moves, torch.fmax(d_max, d_hat), d_max)
    new_d = torch.where(moves, torch.fmin(d_max, grown * first.recipe.growth_rate), d)
    for m in moving:
        m.apply_(new_d, moves)
    for group, total in numerators.items():
        steps = moves & live[group] if group in live else moves
        scalars[group, NUMERATOR].copy_(torch.where(steps, total, scalars[group, NUMERATOR]))
        scalars[group, K].add_(steps)
    denominator = torch.where(moves, denominator, scalars[first.group, DENOMINATOR])
    for column, value in ((D, new_d), (D_MAX, d_max), (DENOMINATOR, denominator), (D_HAT, d_hat)):
        scalars[:, column].copy_(value)
    return tuple(row.flat.param for row in rows)


class ParameterRun(NamedTuple):
    """Consecutive parameters that all have a gradient."""

    grad: Tensor  # [n] ours to overwrite, in the state's dtype
    before: Tensor  # [n] the parameters, in the state's dtype
    param: Tensor  # [n] the parameters themselves
    state: dict[str, Tensor]
    bounds: list[tuple[int, int]]  # start and elements of each parameter in these


class GroupUpdate:
    """A group's parameters of one dtype in one step, and their learning rate dlr = d * lr * bias correction (old d)."""

    def __init__(
        self, scalars: Tensor, row: MovingGroup, found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        recipe = row.recipe
        self.row, self.recipe, self.d = row, recipe, scalars[D]
        self.live = (
            recipe.lr.reshape(()) != 0 if isinstance(recipe.lr, Tensor) else None
        )  # None: yes, with no need to ask
        self.still = None if found_inf is None else found_inf.reshape(()) != 0
        if self.live is not None:
            self.still = ~self.live if self.still is None else self.still | ~self.live
        self.dtype = row.flat.state["s"].dtype
        self.dlr = self.d * recipe.lr
        if recipe.bias_correction:
            k = scalars[K] + 1
            self.dlr = self.dlr * (1 - recipe.beta2**k) ** 0.5 / (1 - recipe.beta1**k)
        self.parts = [
            self._part(begin, end, grad_scale) for begin, end in _runs_with_gradient(row.grads)
        ]

    def _part(self, begin: int, end: int, grad_scale: Tensor | None) -> ParameterRun:
        """The parameters begin ... end - 1, gradients in the state's dtype, unscaled, with coupled decay, zero where the group stands still."""
        bounds, recipe = self.row.flat.bounds[begin:end], self.recipe
        (start, _, first), (last_start, last_count, last_first) = bounds[0], bounds[-1]
        at, picked = (
            slice(start, last_start + last_count),
            slice(first, last_first - (-last_count // recipe.slice_p)),
        )
        g, param = (
            _join_gradients(self.row.grads[begin:end], bounds).to(self.dtype),
            self.row.flat.param[at],
        )
        before = param.to(self.dtype)
        if grad_scale is not None:
            g = g * (1 / grad_scale).reshape(())
        if recipe.weight_decay and not recipe.decouple:
            g = g.add(before, alpha=recipe.weight_decay)
        if (
            self.still is not None
        ):  # 0 * inf is NaN: an overflown gradient has to be replaced, not multiplied away
            g = torch.where(self.still, torch.zeros_like(g), g)
        state = {
            name: value[picked if name in ("p0", "s") else at]
            for name, value in self.row.flat.state.items()
        }
        return ParameterRun(
            g, before, param, state, [(place - start, count) for place, count, _ in bounds]
        )

    def accumulate(self) -> tuple[Tensor, Tensor]:
        """(this step's gain of N, the new D = |s|_1), float64, after bringing m, v and s up to date.

        s and N are decayed sums without a (1 - beta3).
        """
        recipe, d = self.recipe, self.d
        decay1, decay2, decay3 = (
            self._decay(beta) for beta in (recipe.beta1, recipe.beta2, recipe.beta3)
        )
        weight = (d / recipe.d0 * (d if recipe.safeguard else self.dlr)).to(self.dtype)
        small_d, inner, size = d.to(self.dtype), [], []
        for part in self.parts:
            state, grad = part.state, part.grad
            seen, before = (
                (grad, part.before)
                if recipe.slice_p == 1
                else (self._picked(grad, part), self._picked(part.before, part))
            )
            for g, p, p0, s in zip(
                *(_cache_pieces(x) for x in (seen, before, state["p0"], state["s"]))
            ):
                inner.append(_sum_float64(g * (p0 - p)))
                size.append(_sum_float64(s.mul_(decay3).add_(g * weight).abs()))
            for g, m, v in zip(
                *(_cache_pieces(x) for x in (grad, state.get("exp_avg", grad), state["exp_avg_sq"]))
            ):
                scaled = g * small_d
                if recipe.beta1 > 0:  # else there is no m
                    m.mul_(decay1).add_(scaled, alpha=1 - recipe.beta1)
                v.mul_(decay2).addcmul_(scaled, scaled, value=1 - recipe.beta2)
        total = torch.stack(size).sum()
        if self.live is not None:
            total = torch.where(self.live, total, torch.zeros_like(total))
        return d / recipe.d0 * self.dlr * torch.stack(inner).sum(), total

    def apply_(self, new_d: Tensor, moves: Tensor) -> None:
        """p <- p - dlr decay p - dlr m / (sqrt(v) + d eps): dlr holds the old d, eps is multiplied by the new one; bit for bit p unless `moves`."""
        recipe, adam = self.recipe, self.recipe.beta1 > 0
        by_d = (1 / new_d).to(self.dtype)
        back = -torch.where(moves, self.dlr, torch.zeros_like(self.dlr))
        decay, rate = (
            (back * recipe.weight_decay).to(self.dtype),
            (back / new_d if adam else back).to(self.dtype),
        )
        for part in self.parts:
            moments = part.state["exp_avg"] if adam else part.grad
            for change, m, v, p, q in zip(
                *(
                    _cache_pieces(x)
                    for x in (part.grad, moments, part.state["exp_avg_sq"], part.before, part.param)
                )
            ):
                # both sides divided by d: eps stays a number
                torch.div(m, v.sqrt().mul_(by_d).add_(recipe.eps), out=change).mul_(rate)
                if recipe.weight_decay and recipe.decouple:
                    change.add_(p * decay)
                q.add_(change)

    def _decay(self, beta: float) -> Any:
        """beta, or exactly 1 (a 0-dim tensor) where the group stands still."""
        return (
            beta
            if self.still is None
            else torch.where(self.still, torch.ones_like(self.d), torch.full_like(self.d, beta))
        )

    def _picked(self, flat: Tensor, part: ParameterRun) -> Tensor:
        """Every slice_p-th element of each parameter."""
        return torch.cat(
            [flat[start : start + count : self.recipe.slice_p] for start, count in part.bounds]
        )


def adamw_step(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    recipe: AdamWSettings,
) -> tuple[Tensor, ...]:
    """(flat.param,) after a step of AdamW (arXiv 1711.05101, algorithm 2 as torch.optim.AdamW has it: the decay is lr * weight_decay).

    `param` is flat.param; state: exp_avg, exp_avg_sq [n] and step [parameters] fp32, each parameter's own count. found_inf and grad_scale as above.
    """
    still = None if found_inf is None else found_inf.reshape(()) != 0
    for (start, count, _), g, step in zip(flat.bounds, grads, flat.state["step"]):
        if g is None:
            continue
        m, v, p = (
            x[start : start + count]
            for x in (flat.state["exp_avg"], flat.state["exp_avg_sq"], flat.param)
        )
        g, wide = g.reshape(-1).to(m.dtype), p.to(m.dtype)
        if grad_scale is not None:
            g = g * (1 / grad_scale).reshape(())
        k = (step + 1).double() if step.device.type != "mps" else step + 1
        new_m = m + (g - m) * (1 - recipe.beta1)
        new_v = v * recipe.beta2 + g * g * (1 - recipe.beta2)
        lr = recipe.lr.to(k) if isinstance(recipe.lr, Tensor) else recipe.lr
        rate, root = lr / (1 - recipe.beta1**k), (1 - recipe.beta2**k) ** 0.5
        new_p = wide * (1 - lr * recipe.weight_decay) - rate.to(m.dtype) * (
            new_m / (new_v.sqrt() / root.to(m.dtype) + recipe.eps)
        )
        for old, new in ((m, new_m), (v, new_v), (p, new_p.to(p.dtype)), (step, step + 1)):
            old.copy_(new if still is None else torch.where(still, old, new))
    return (flat.param,)


def prodigy_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    """Two groups with a shared distance, three odd parameters each, one of them without a gradient, in the middle of a run."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for group, recipe in enumerate(
        (
            ProdigySettings(
                1.0,
                0.9,
                0.999,
                0.999**0.5,
                1e-8,
                0.01,
                1e-6,
                1.0,
                math.inf,
                True,
                True,
                False,
                1,
                False,
            ),
        )
        * 2
    ):
        params, states, grads = _random_parameters(generator, dtype, device)
        for p, state in zip(params, states):
            p0 = torch.randn(p.numel(), generator=generator).to(device, _state_dtype(dtype))
            state |= {"p0": p0, "s": torch.zeros_like(p0)}
        rows.append(MovingGroup(group, recipe, FlatParameters(params, states), grads))
    scalars = torch.tensor(
        [[2e-6, 2e-6, 1e-9, 1.0, 2e-6, 3.0]] * 2, dtype=torch.float64, device=device
    )
    return scalars, None, None, tuple(rows)


def adamw_example(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    """Three odd parameters, one of them without a gradient, in the middle of a run."""
    params, states, grads = _random_parameters(torch.Generator().manual_seed(seed), dtype, device)
    for i, state in enumerate(states):
        state["step"] = torch.tensor(float(i), device=device)
    flat = FlatParameters(params, states)
    return flat.param, None, None, flat, grads, AdamWSettings(1e-3, 0.9, 0.999, 1e-8, 0.01)


def _random_parameters(
    generator: torch.Generator, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[dict[str, Tensor]], list[Tensor | None]]:
    """Parameters, their moments, and their gradients: in fp64 the very numbers of fp32."""
    shapes = (3, 7), (5,), (11, 97)

    def draw(wanted: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device, wanted) for shape in shapes]

    m, v, (first, _, last) = draw(_state_dtype(dtype)), draw(_state_dtype(dtype)), draw(dtype)
    return (
        draw(dtype),
        [{"exp_avg": 2**-20 * a, "exp_avg_sq": 2**-40 * b.abs()} for a, b in zip(m, v)],
        [first, None, last],
    )


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _runs_with_gradient(grads: Sequence[Tensor | None]) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive parameters that all have a gradient; one run as a rule."""
    for there, run in groupby(range(len(grads)), lambda i: grads[i] is not None):
        if there:
            numbers = list(run)
            yield numbers[0], numbers[-1] + 1


def _join_gradients(
    grads: Sequence[Tensor | None], bounds: Sequence[tuple[int, int, int]]
) -> Tensor:
    """Gradients end to end in one call, zeros between them as in Flat."""
    found, zeros, end = [], None, bounds[0][0]
    for g, (start, count, _) in zip(grads, bounds):
        assert g is not None
        if start > end:
            zeros = g.new_zeros(ALIGNED) if zeros is None else zeros
            found.append(zeros[: start - end])
        found.append(g.reshape(-1))
        end = start + count
    return torch.cat(found)


def _cache_pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The whole on an accelerator (fewest launches); on a CPU pieces that stay in its cache."""
    return x.split(32768) if x.device.type == "cpu" else (x,)


def _sum_float64(x: Tensor) -> Tensor:
    """The sum in float64: fp32 within a piece (torch sums pairwise), double across pieces."""
    return x.sum().to(torch.float32 if x.device.type == "mps" else torch.float64)
