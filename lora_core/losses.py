"""Losses and their weightings: a loss is a pure function of one StepOutput and returns [b], one number per example, unreduced.

Write your own as `def my_loss(step: StepOutput) -> Tensor` and train with `--loss my_loss.py:my_loss`; `mse` below is an example.
Weightings are one law: an error e in the network's output is an error |d x0 / d out| e in x0, so whatever the network predicts,
weight = W(snr) * |d x0 / d out|^2, with W the weighting of the squared error of x0. A published weighting is one W.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.noise import NoiseLevel
from lora_core.plugins import from_file
from lora_core.prediction import PREDICTIONS


@dataclass
class StepOutput:
    """Everything a loss may look at. Members that cost another forward pass are computed when first touched."""

    out: Tensor  # [b, c, h, w] what the network said
    target: Tensor  # [b, c, h, w] what it should have said
    x0: Tensor  # [b, c, h, w] clean latents
    eps: Tensor  # [b, c, h, w] their noise
    x_t: Tensor  # [b, c, h, w] what the network saw (before c_in)
    level: NoiseLevel  # rows [b]
    prediction: str  # a row of PREDICTIONS
    mask: Tensor | None  # [b, 1, h, w] in [0, 1]
    is_prior: Tensor  # [b] bool, rows of prior preservation
    step: int
    lazy: dict[str, Callable[..., Any]] = field(default_factory=dict)  # base_out() and attention() for those members, decode(latents) for pixels

    @cached_property
    def x0_pred(self) -> Tensor:
        """[b, c, h, w] the clean latents that the output stands for."""
        return PREDICTIONS[self.prediction].x0(self.x_t, self.out, self.level)

    @cached_property
    def base_out(self) -> Tensor:
        """[b, c, h, w] the output with all adapters off, without gradient."""
        return self._call("base_out")

    @cached_property
    def attention(self) -> Any:
        """Cross-attention maps of the denoiser."""
        return self._call("attention")

    @cached_property
    def pixels(self) -> Tensor:
        """[b, 3, h, w] x0_pred, decoded, in [-1, 1]; gradients pass."""
        return self._call("decode", self.x0_pred)

    def _call(self, name: str, *args: Tensor) -> Any:
        if name not in self.lazy:
            raise UserError(f"this loss reads step.{name}, which the caller does not offer; it offers {', '.join(self.lazy) or 'no lazy member'}")
        return self.lazy[name](*args)


# ---------------------------------------------------------------- losses: StepOutput -> [b]


def mse(step: StepOutput) -> Tensor:
    """[b] mean squared error of the output (arXiv 2006.11239 eq. 14)."""
    return masked_mean(_difference(step) ** 2, step.mask)


def l1(step: StepOutput) -> Tensor:
    """[b] mean absolute error of the output."""
    return masked_mean(_difference(step).abs(), step.mask)


DeltaSchedule = Literal["constant", "snr", "exponential"]


def huber(step: StepOutput, *, delta: float = 0.1, schedule: DeltaSchedule = "constant", horizon: float = 1000.0) -> Tensor:
    """[b] pseudo-Huber loss 2c (sqrt(d^2 + c^2) - c): d^2 where d << c, 2c |d| where d >> c (arXiv 2403.16728, kohya's factor 2c)."""
    c = huber_delta(step.level, delta=delta, schedule=schedule, horizon=horizon).reshape(-1, 1, 1, 1)
    return masked_mean(2 * c * _above(_difference(step), c), step.mask)


def smooth_l1(step: StepOutput, *, delta: float = 0.1, schedule: DeltaSchedule = "constant", horizon: float = 1000.0) -> Tensor:
    """[b] the same curve in units of l1, 2 (sqrt(d^2 + c^2) - c): d^2 / c where d << c, 2 |d| where d >> c (kohya)."""
    c = huber_delta(step.level, delta=delta, schedule=schedule, horizon=horizon).reshape(-1, 1, 1, 1)
    return masked_mean(2 * _above(_difference(step), c), step.mask)


LOSSES: dict[str, Callable[..., Tensor]] = {"mse": mse, "l1": l1, "huber": huber, "smooth_l1": smooth_l1}


def huber_delta(level: NoiseLevel, *, delta: float, schedule: str, horizon: float) -> Tensor:
    """[b] the c of each example, from its own noise level (kohya draws one timestep for a whole batch here; arXiv 2403.16728).

    constant: delta.   exponential: delta^(t / horizon), from 1 down to delta; horizon is the t of pure noise, 1000 for vp and 1 for flow.
    snr: (1 - delta) / (1 + sigma / alpha)^2 + delta, from 1 down to delta.
    """
    if delta <= 0 or horizon <= 0:
        raise UserError(f"delta and horizon of a Huber loss must be above 0, got {delta:g} and {horizon:g}")
    if schedule == "constant":
        return torch.full_like(level.t, delta)
    if schedule == "exponential":
        return delta ** (level.t / horizon)
    if schedule == "snr":
        return (1 - delta) / (1 + level.sigma / level.alpha) ** 2 + delta
    raise UserError(f"unknown schedule {schedule!r} of a Huber loss; choose constant, snr or exponential")


def _above(d: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, without the cancellation at small d."""
    return d**2 / ((d**2 + c**2).sqrt() + c)


def _difference(step: StepOutput) -> Tensor:
    if step.out.shape != step.target.shape:
        raise ValueError(f"the network returned {list(step.out.shape)} where the target is {list(step.target.shape)}")
    wide = torch.promote_types(step.out.dtype, torch.float32)
    return step.out.to(wide) - step.target.to(wide)


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """[b] the mean over c, h, w of error [b, c, h, w]; with a mask m [b, 1, h, w] it is sum(m e) / (c sum(m)).

    So a small mask weighs as much as a big one (kohya divides by the whole area; cloneofsimo weighs with m^2). An empty mask gives 0.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    if mask.shape != (len(error), 1, *error.shape[2:]):
        raise ValueError(f"the mask is {list(mask.shape)}, expected {[len(error), 1, *error.shape[2:]]}; resize it to the latents")
    area = mask.to(error.dtype).sum((1, 2, 3)) * error.shape[1]
    return (mask * error).sum((1, 2, 3)) / area.clamp(min=torch.finfo(error.dtype).tiny)


# ---------------------------------------------------------------- weightings: W(snr), the weight of the squared error of x0

WEIGHTINGS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,  # uniform in the space of the network's output: weight 1
    "min_snr": lambda snr, *, gamma=5.0: snr.clamp(max=gamma),  # arXiv 2303.09556
    "soft_min_snr": lambda snr, *, gamma=5.0: snr * gamma / (snr + gamma),  # arXiv 2401.11605 (there gamma = 4)
    "debiased": lambda snr: snr**0.5,  # arXiv 2310.08442: 1 / sqrt(snr) for epsilon
    "p2": lambda snr, *, k=1.0, gamma=1.0: snr / (k + snr) ** gamma,  # arXiv 2204.00227: 1 / (k + snr)^gamma for epsilon
}

# Where alpha or sigma is 0 the product W * jacobian^2 has a limit that 0 * inf would hide. 2^-12 is what diffusers puts for alpha at
# zero terminal SNR, and less than any sigma of the schedules here (edm's smallest is 0.002).
LEVEL_FLOOR = 2.0**-12


def weight(name: str, level: NoiseLevel, prediction: str, **args: float) -> Tensor:
    """[b] weight of each row's squared output error: W(snr) |d x0 / d out|^2, finite at zero terminal SNR.

    min_snr gives min(snr, g) / snr for epsilon, min(snr, g) / (snr + 1) for v (several public scripts take min(snr, g) / snr + 1, which
    is neither the paper nor this law) and min(snr, g) sigma^2 for flow. Instance rows and prior rows are weighted alike; diffusers' scripts leave the
    prior rows unweighted. kohya's debiased differs: it caps snr at 1000 and takes 1 / (snr + 1) for v, which is not this law.
    """
    law = resolve(name, WEIGHTINGS, args)
    if law is None:
        return torch.ones_like(level.sigma)
    floored = level._replace(alpha=level.alpha.clamp(min=LEVEL_FLOOR), sigma=level.sigma.clamp(min=LEVEL_FLOOR))
    return law(floored.snr) * PREDICTIONS[prediction].jacobian(floored) ** 2


# ---------------------------------------------------------------- finding, checking and adding up


def resolve(spec: str, table: Mapping[str, Callable[..., Any] | None], args: Mapping[str, Any] | None = None) -> Any:
    """The row `spec` of a table, or function `fn` of a file for "path/to/file.py:fn", with `args` bound to it.

    Raises UserError for an unknown name (naming the nearest), a missing file or function, and an argument the function does not take.
    """
    path, colon, name = spec.rpartition(":")
    function = from_file(path, name, "function") if colon else _from_table(spec, table)
    if not args:
        return function
    known = list(inspect.signature(function).parameters)[1:] if function else []  # all but the StepOutput or the snr
    for arg in args:
        if arg not in known:
            raise UserError(f"{spec} takes no argument {arg!r}; it takes {', '.join(known) or 'none'}")
    return functools.partial(function, **args)


def _from_table(name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        near = get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown name {name!r}, the nearest is {near!r}; choose {', '.join(table)} or path/to/file.py:function")
    return table[name]


def check_rows(rows: Tensor, name: str, b: int) -> None:
    """Refuses what loss `name` returned unless it is [b] finite numbers. Reads the values, so it waits for a GPU.

    Check before weighing: a scalar times the weights [b] is [b] again.
    """
    if not isinstance(rows, Tensor):
        raise UserError(f"loss {name} returned {type(rows).__name__}, expected a tensor [{b}], one number per example")
    if rows.shape != (b,):
        got = "a scalar" if rows.ndim == 0 else f"shape {list(rows.shape)}"
        raise UserError(f"loss {name} returned {got}, expected [{b}], one number per example; take the mean over c, h, w only")
    bad = (~torch.isfinite(rows.detach())).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"loss {name} returned {rows[bad[0]].item():g} for row {bad[0]} of {b}; lower the learning rate or look at that example")


def total(rows: Tensor, is_prior: Tensor, *, prior_weight: float, instances: int) -> Tensor:
    """Scalar sum of the weighed rows [b] / instances, where rows of the prior count prior_weight times as much.

    With as many prior rows as instances this is mean(instances) + prior_weight * mean(prior) (DreamBooth, arXiv 2208.12242 eq. 2).
    `instances` counts those of the whole step, so that the totals of its micro-batches add up to the step's own.
    """
    return (rows * torch.where(is_prior, prior_weight, 1.0)).sum() / instances
