"""Prodigy's step in torch operations on whole flat tensors, for any device.

The same step as steps.prodigy_step with a few calls for all the parameters of a group. It runs
where neither the compiled loops (loops.py) nor the Triton kernels (optimizers.py) do. No value is
read from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.flat import ALIGNED
from lora_core.kernels.steps import D_HAT, D_MAX, DENOMINATOR, NUMERATOR, D, K, MovingGroup

PIECE = 32768  # elements whose arrays stay in a CPU's second-level cache


def flat_prodigy_step(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    groups: Sequence[MovingGroup],
) -> tuple[Tensor, ...]:
    """steps.prodigy_step with each group's parameters updated together."""
    first, settings = groups[0].row, groups[0].settings
    updates = [GroupUpdate(scalars[g.row], g, found_inf, grad_scale) for g in groups]
    sums = torch.stack([torch.stack(update.update_state()) for update in updates])  # [groups, 2]
    if any(group.settings.sharded for group in groups):
        torch.distributed.all_reduce(sums)
    gains, sizes = sums.unbind(1)
    numerators = _sum_numerators(scalars, groups, gains)
    live = {u.group.row: u.live for u in updates if u.live is not None}
    numerator = torch.stack([_zero_unless(live.get(i), n) for i, n in numerators.items()]).sum()
    denominator = sizes.sum()

    # prodigyopt returns here if the denominator is 0; where() keeps the same values without a read
    # from the device. NaN != 0, so a NaN still shows in the weights.
    moves = denominator != 0
    if found_inf is not None:
        moves = moves & (found_inf.reshape(()) == 0)
    d, d_max, old_hat = (scalars[first, column] for column in (D, D_MAX, D_HAT))
    d_hat = torch.where(moves, settings.d_coef * numerator / denominator, old_hat)
    grown = torch.where(d == settings.d0, torch.fmax(d, d_hat), d)
    d_max = torch.where(moves, torch.fmax(d_max, d_hat), d_max)
    new_d = torch.where(moves, torch.fmin(d_max, grown * settings.growth_rate), d)
    for update in updates:
        update.update_parameters(new_d, moves)
    for index, total in numerators.items():
        steps = moves & live[index] if index in live else moves
        scalars[index, NUMERATOR].copy_(torch.where(steps, total, scalars[index, NUMERATOR]))
        scalars[index, K].add_(steps)
    denominator = torch.where(moves, denominator, scalars[first, DENOMINATOR])
    columns = {D: new_d, D_MAX: d_max, DENOMINATOR: denominator, D_HAT: d_hat}
    for column, value in columns.items():
        scalars[:, column].copy_(value)
    return tuple(group.flat.param for group in groups)


def _sum_numerators(
    scalars: Tensor, groups: Sequence[MovingGroup], gains: Tensor
) -> dict[int, Tensor]:
    """Group -> its decayed numerator with this step's gains."""
    found: dict[int, Tensor] = {}
    for group, gain in zip(groups, gains):
        if group.row not in found:
            found[group.row] = scalars[group.row, NUMERATOR] * group.settings.beta3
        found[group.row] = found[group.row] + gain
    return found


def _zero_unless(live: Tensor | None, value: Tensor) -> Tensor:
    return value if live is None else torch.where(live, value, torch.zeros_like(value))


class ParameterRun(NamedTuple):
    """Consecutive parameters of a flat tensor that all have a gradient."""

    grad: Tensor  # [n] in the state's dtype, overwritten by the update
    before: Tensor  # [n] the parameters in the state's dtype
    param: Tensor  # [n] the parameters themselves
    state: dict[str, Tensor]
    bounds: list[tuple[int, int]]  # start and elements of each parameter in these


class GroupUpdate:
    """A group's parameters of one dtype in one step.

    dlr is d * lr * bias correction, with the d from before the step.
    """

    def __init__(
        self,
        scalars: Tensor,
        group: MovingGroup,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        settings = group.settings
        self.group, self.settings = group, settings
        self.d = scalars[D]
        self.live: Tensor | None = None  # whether a tensor lr is not 0; None: lr is a number
        if isinstance(settings.lr, Tensor):
            self.live = settings.lr.reshape(()) != 0
        self.still = None if found_inf is None else found_inf.reshape(()) != 0
        if self.live is not None:
            self.still = ~self.live if self.still is None else self.still | ~self.live
        self.dtype = group.flat.state["s"].dtype
        self.dlr = self.d * settings.lr
        if settings.bias_correction:
            k = scalars[K] + 1
            self.dlr = self.dlr * (1 - settings.beta2**k) ** 0.5 / (1 - settings.beta1**k)
        self.runs = [
            self._run(begin, end, grad_scale) for begin, end in _gradient_runs(group.grads)
        ]

    def _run(self, begin: int, end: int, grad_scale: Tensor | None) -> ParameterRun:
        """Parameters begin ... end - 1; gradients unscaled, with coupled decay, 0 if the group is
        frozen.
        """
        flat, settings = self.group.flat, self.settings
        bounds = flat.bounds[begin:end]
        start, _, first = bounds[0]
        last_start, last_count, last_first = bounds[-1]
        whole = slice(start, last_start + last_count)
        sliced = slice(first, last_first - (-last_count // settings.slice_p))
        g = _join_gradients(self.group.grads[begin:end], bounds).to(self.dtype)
        param = flat.param[whole]
        before = param.to(self.dtype)
        if grad_scale is not None:
            g = g * (1 / grad_scale).reshape(())
        if settings.weight_decay and not settings.decouple:
            g = g.add(before, alpha=settings.weight_decay)
        if self.still is not None:
            # 0 * inf is NaN: an overflowed gradient has to be replaced, not multiplied away
            g = torch.where(self.still, torch.zeros_like(g), g)
        state = {
            name: value[sliced if name in ("p0", "s") else whole]
            for name, value in flat.state.items()
        }
        places = [(place - start, count) for place, count, _ in bounds]
        return ParameterRun(g, before, param, state, places)

    def update_state(self) -> tuple[Tensor, Tensor]:
        """(gain of the numerator, |s|_1) in float64, after updating m, v and s."""
        settings, d = self.settings, self.d
        decay1, decay2, decay3 = map(self._decay, (settings.beta1, settings.beta2, settings.beta3))
        weight = (d / settings.d0 * (d if settings.safeguard else self.dlr)).to(self.dtype)
        small_d = d.to(self.dtype)
        inner: list[Tensor] = []
        size: list[Tensor] = []
        for run in self.runs:
            state, grad, before = run.state, run.grad, run.before
            if settings.slice_p > 1:
                grad, before = self._slice(grad, run), self._slice(before, run)
            for g, p, p0, s in _pieces(grad, before, state["p0"], state["s"]):
                inner.append(_sum_float64(g * (p0 - p)))
                size.append(_sum_float64(s.mul_(decay3).add_(g * weight).abs()))
            m_or_g = state.get("exp_avg", run.grad)
            for g, m, v in _pieces(run.grad, m_or_g, state["exp_avg_sq"]):
                scaled = g * small_d
                if settings.beta1 > 0:  # otherwise there is no m
                    m.mul_(decay1).add_(scaled, alpha=1 - settings.beta1)
                v.mul_(decay2).addcmul_(scaled, scaled, value=1 - settings.beta2)
        gain = d / settings.d0 * self.dlr * torch.stack(inner).sum()
        return gain, _zero_unless(self.live, torch.stack(size).sum())

    def update_parameters(self, new_d: Tensor, moves: Tensor) -> None:
        """p <- p - dlr decay p - dlr m / (sqrt(v) + new_d eps); p unchanged unless `moves`."""
        settings, has_m = self.settings, self.settings.beta1 > 0
        inverse_d = (1 / new_d).to(self.dtype)
        back = -torch.where(moves, self.dlr, torch.zeros_like(self.dlr))
        decay = (back * settings.weight_decay).to(self.dtype)
        rate = (back / new_d if has_m else back).to(self.dtype)
        for run in self.runs:
            m_or_g = run.state["exp_avg"] if has_m else run.grad
            arrays = run.grad, m_or_g, run.state["exp_avg_sq"], run.before, run.param
            for change, m, v, p, q in _pieces(*arrays):
                # both sides of the quotient divided by d: eps stays a number
                divisor = v.sqrt().mul_(inverse_d).add_(settings.eps)
                torch.div(m, divisor, out=change).mul_(rate)
                if settings.weight_decay and settings.decouple:
                    change.add_(p * decay)
                q.add_(change)

    def _decay(self, beta: float) -> Any:
        """beta, or exactly 1 (a 0-dim tensor) where the group is frozen."""
        if self.still is None:
            return beta
        return torch.where(self.still, torch.ones_like(self.d), torch.full_like(self.d, beta))

    def _slice(self, flat: Tensor, run: ParameterRun) -> Tensor:
        """Every slice_p-th element of each parameter."""
        step = self.settings.slice_p
        return torch.cat([flat[start : start + count : step] for start, count in run.bounds])


def _gradient_runs(grads: Sequence[Tensor | None]) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive parameters that all have a gradient; usually one run."""
    for has_gradient, run in groupby(range(len(grads)), lambda i: grads[i] is not None):
        if has_gradient:
            numbers = list(run)
            yield numbers[0], numbers[-1] + 1


def _join_gradients(
    grads: Sequence[Tensor | None], bounds: Sequence[tuple[int, int, int]]
) -> Tensor:
    """The gradients concatenated in one call, with the padding of FlatParameters between them."""
    found: list[Tensor] = []
    zeros: Tensor | None = None
    end = bounds[0][0]
    for g, (start, count, _) in zip(grads, bounds):
        assert g is not None
        if start > end:
            zeros = g.new_zeros(ALIGNED) if zeros is None else zeros
            found.append(zeros[: start - end])
        found.append(g.reshape(-1))
        end = start + count
    return torch.cat(found)


def _pieces(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The arrays whole on an accelerator (fewest launches), by PIECE elements on a CPU."""
    if arrays[0].device.type != "cpu":
        return iter([arrays])
    return zip(*(array.split(PIECE) for array in arrays))


def _sum_float64(x: Tensor) -> Tensor:
    """The sum in float64: fp32 within a piece (torch sums pairwise), double across pieces."""
    return x.sum().to(torch.float32 if x.device.type == "mps" else torch.float64)
