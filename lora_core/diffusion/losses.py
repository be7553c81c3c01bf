"""Losses and their weightings: a loss is a pure function of one StepOutput and returns [b], one number per example, unreduced.

Write your own as `def my_loss(step: StepOutput) -> Tensor` and train with `--loss my_loss.py:my_loss`; `mse` below is an example. One that does the
same operations every step and reads nothing back to the host may say `my_loss.capturable = True`: then a CUDA graph can hold its step.
Weightings are one law: an error e in the network's output is an error |d x0 / d out| e in x0, so whatever the network predicts,
weight = W(snr) * |d x0 / d out|^2, with W the weighting of the squared error of x0. A published weighting is one W.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.prediction import PREDICTIONS, to_loss_space
from lora_core.errors import UserError
from lora_core.kernels import call
from lora_core.kernels.reference import masked_mean, wide_dtype
from lora_core.plugins import check_names_file, load_from_file, name_function


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
    lazy: dict[str, Callable[..., Any]] = field(
        default_factory=dict
    )  # base_out(), preserved(), attention(), and decode(latents) for pixels
    t_max: float | None = None  # the schedule's t of pure noise, if its t counts noise up from 0
    network: str = ""  # the row of what base_out() and preserved() return, where `prediction` is not that row but "sample"

    @cached_property
    def x0_pred(self) -> Tensor:
        """[b, c, h, w] the clean latents that the output stands for."""
        return PREDICTIONS[self.prediction].x0(self.x_t, self.out, self.level)

    @cached_property
    def base_out(self) -> Tensor:
        """[b, c, h, w] the output with all adapters off, without gradient; comparable to `out`."""
        return self._comparable(self._call("base_out"))

    @cached_property
    def preserved(self) -> tuple[Tensor, Tensor]:
        """The outputs [b, c, h, w] on the captions with the classes in place of the placeholders: with adapters, and the base model's without
        gradient; comparable to `out`."""
        now, before = self._call("preserved")
        return self._comparable(now), self._comparable(before.detach())

    @cached_property
    def attention(self) -> Any:
        """Cross-attention maps of the denoiser."""
        return self._call("attention")

    @cached_property
    def pixels(self) -> Tensor:
        """[b, 3, h, w] x0_pred, decoded, in [-1, 1]; gradients pass."""
        return self._call("decode", self.x0_pred)

    def _comparable(self, out: Tensor) -> Tensor:
        """A network's raw output in the row of `out`."""
        space = "model" if self.network in ("", self.prediction) else "edm"
        return to_loss_space(
            self.network or self.prediction, space, out, self.x0, self.eps, self.level
        )[0]

    def _call(self, name: str, *args: Tensor) -> Any:
        if name not in self.lazy:
            raise UserError(
                f"this loss reads step.{name}, which the caller does not offer; it offers {', '.join(self.lazy) or 'no lazy member'}"
            )
        return self.lazy[name](*args)


# ---------------------------------------------------------------- losses: StepOutput -> [b]


def mse(step: StepOutput) -> Tensor:
    """[b] mean squared error of the output (arXiv 2006.11239 eq. 14)."""
    _check_shapes(step)
    return call("snr_weighted_mse", step.out, step.target, step.mask, None)


def l1(step: StepOutput) -> Tensor:
    """[b] mean absolute error of the output."""
    return masked_mean(_difference(step).abs(), step.mask)


DeltaSchedule = Literal["constant", "snr", "exponential"]


def huber(step: StepOutput, *, delta: float = 0.1, schedule: DeltaSchedule = "constant") -> Tensor:
    """[b] pseudo-Huber loss 2c (sqrt(d^2 + c^2) - c): d^2 where d << c, 2c |d| where d >> c (arXiv 2403.16728, kohya's factor 2c)."""
    c = huber_delta(step.level, step.t_max, delta=delta, schedule=schedule).reshape(-1, 1, 1, 1)
    return masked_mean(2 * c * _above(_difference(step), c), step.mask)


def smooth_l1(
    step: StepOutput, *, delta: float = 0.1, schedule: DeltaSchedule = "constant"
) -> Tensor:
    """[b] the same curve in units of l1, 2 (sqrt(d^2 + c^2) - c): d^2 / c where d << c, 2 |d| where d >> c (kohya)."""
    c = huber_delta(step.level, step.t_max, delta=delta, schedule=schedule).reshape(-1, 1, 1, 1)
    return masked_mean(2 * _above(_difference(step), c), step.mask)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "smooth_l1": smooth_l1,
}


def is_capturable(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss does the same operations every step and reads nothing back to the host, so that a CUDA graph can hold it: the rows of LOSSES do,
    and functions with the attribute `capturable = True`; with arguments bound to them or without."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss in LOSSES.values() or getattr(loss, "capturable", False) is True


def huber_delta(level: NoiseLevel, t_max: float | None, *, delta: float, schedule: str) -> Tensor:
    """[b] the c of each example, from its own noise level (kohya draws one timestep for a whole batch here; arXiv 2403.16728).

    constant: delta.   exponential: delta^(t / t_max), from 1 down to delta; t_max is Schedule.t_max, the t of pure noise.
    snr: (1 - delta) / (1 + sigma / alpha)^2 + delta, from 1 down to delta.
    """
    if delta <= 0:
        raise UserError(f"delta of a Huber loss must be above 0, got {delta:g}")
    if schedule == "constant":
        return torch.full_like(level.t, delta)
    if schedule == "exponential":
        if t_max is None:
            raise UserError(
                "the exponential schedule of a Huber loss needs timesteps that count up from 0, which this model has not; choose snr"
            )
        return delta ** (level.t / t_max)
    if schedule == "snr":
        return (1 - delta) / (1 + level.sigma / level.alpha) ** 2 + delta
    raise UserError(
        f"unknown schedule {schedule!r} of a Huber loss; choose constant, snr or exponential"
    )


def add_preservation(
    loss: Callable[[StepOutput], Tensor], weight: float
) -> Callable[[StepOutput], Tensor]:
    """The loss plus `weight` times the mean squared difference [b] between the outputs with adapters and of the base model, both on the caption
    with the class in place of the placeholder (differential output preservation, ai-toolkit).

    The mask does not count here: what is to be preserved is everywhere. The sum is weighed by noise level like any loss. Costs two more
    forward passes, one of them with gradient.
    """

    def preserving_loss(step: StepOutput) -> Tensor:
        now, before = step.preserved
        return loss(step) + weight * call("snr_weighted_mse", now, before, None, None)

    preserving_loss.capturable = is_capturable(loss)  # type: ignore[attr-defined]
    return preserving_loss


def _above(d: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, without the cancellation at small d."""
    return d**2 / ((d**2 + c**2).sqrt() + c)


def _difference(step: StepOutput) -> Tensor:
    _check_shapes(step)
    dtype = wide_dtype(step.out.dtype)
    return step.out.to(dtype) - step.target.to(dtype)


def _check_shapes(step: StepOutput) -> None:
    if step.out.shape != step.target.shape:
        raise ValueError(
            f"the network returned {list(step.out.shape)} where the target is {list(step.target.shape)}"
        )


# ---------------------------------------------------------------- weightings: W(snr), the weight of the squared error of x0

WEIGHTINGS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,  # uniform in the space of the network's output: weight 1
    "min_snr": lambda snr, *, gamma=5.0: snr.clamp(max=gamma),  # arXiv 2303.09556
    "soft_min_snr": lambda snr, *, gamma=5.0: (
        snr * gamma / (snr + gamma)
    ),  # arXiv 2401.11605 (there gamma = 4)
    "debiased": lambda snr: snr**0.5,  # arXiv 2310.08442: 1 / sqrt(snr) for epsilon
    "p2": lambda snr, *, k=1.0, gamma=1.0: (
        snr / (k + snr) ** gamma
    ),  # arXiv 2204.00227: 1 / (k + snr)^gamma for epsilon
    "snr": lambda snr: (
        snr
    ),  # 1 for epsilon, alpha^2 for v; diffusers' 1 / sigma^2 of EDM-style training (arXiv 2206.00364: x / alpha)
    # The next two are diffusers' --weighting_scheme: 1 / sigma^2 and 2 / (pi (1 - 2 sigma + 2 sigma^2)) for flow, sigma = 1 / (1 + sqrt(snr)).
    "sigma_sqrt": lambda snr: (1 + snr**0.5) ** 4,
    "cosmap": lambda snr: 2 / math.pi * (1 + snr**0.5) ** 4 / (1 + snr),
}

# Where alpha or sigma is 0 the product W * jacobian^2 has a limit that 0 * inf would hide. 2^-12 is what diffusers puts for alpha at
# zero terminal SNR, and less than any sigma of the schedules here (edm's smallest is 0.002).
LEVEL_FLOOR = 2.0**-12


def loss_weights(
    name: str, level: NoiseLevel, prediction: str, *, space: str = "model", **args: float
) -> Tensor:
    """[b] weight of each row's squared error in a space of `compared`: W(snr) |d x0 / d out|^2, finite at zero terminal SNR.

    min_snr gives min(snr, g) / snr for epsilon, min(snr, g) / (snr + 1) for v (several public scripts take min(snr, g) / snr + 1, which
    is neither the paper nor this law) and min(snr, g) sigma^2 for flow. Instance rows and prior rows are weighted alike; diffusers' scripts leave the
    prior rows unweighted. kohya's debiased differs: it caps snr at 1000 and takes 1 / (snr + 1) for v, which is not this law.

    In "edm" space the error is x0's own and its weight W(snr); none is snr there, diffusers' 1 / sigma^2, but for networks of the edm row,
    which diffusers leaves unweighed. diffusers refuses min-SNR with EDM; here it is min(snr, g), the law it is in any space.
    """
    law = find_function(name, WEIGHTINGS, args)
    if law is None and space == "edm" and prediction != "edm":
        law = WEIGHTINGS["snr"]
    if law is None:
        return torch.ones_like(level.sigma)
    jacobian = PREDICTIONS["sample" if space == "edm" else prediction].jacobian
    exact, floored = (
        level,
        level._replace(
            alpha=level.alpha.clamp(min=LEVEL_FLOOR), sigma=level.sigma.clamp(min=LEVEL_FLOOR)
        ),
    )
    rows, limits = (law(at.snr) * jacobian(at) ** 2 for at in (exact, floored))
    return torch.where(torch.isfinite(rows), rows, limits)


_LAWS = {  # weighting -> W in words
    "min_snr": "min(snr, {gamma:g})",
    "soft_min_snr": "{gamma:g} snr / (snr + {gamma:g})",
    "debiased": "sqrt(snr)",
    "p2": "snr / ({k:g} + snr)^{gamma:g}",
    "snr": "snr",
    "sigma_sqrt": "(1 + sqrt(snr))^4",
    "cosmap": "2/pi (1 + sqrt(snr))^4 / (1 + snr)",
}
_OUTPUTS = {  # row of PREDICTIONS -> the output's name, and the squared Jacobian on the schedule it was published for
    "epsilon": ("epsilon", " / snr"),
    "v_prediction": ("v", " / (snr + 1)"),
    "sample": ("x0", ""),
    "flow": ("the velocity eps - x0", " sigma^2"),
    "edm": ("EDM's preconditioned output", " c_out^2"),
}


def describe_loss(
    weighting: str, prediction: str, space: str = "model", *, loss: str = "mse", **args: float
) -> str:
    """One line that says what a loss, a weighting and a space compute together, e.g. "loss: mse of x0, weighed by min(snr, 5)".

    Raises UserError for what `resolve` refuses.
    """
    law = find_function(weighting, WEIGHTINGS, args)
    output, jacobian = _OUTPUTS["sample" if space == "edm" else prediction]
    words = "not weighed"
    if law is not None:
        values = {
            name: value.default
            for name, value in list(inspect.signature(law).parameters.items())[1:]
        }
        words = f"weighed by {_LAWS[weighting].format(**values) if weighting in _LAWS else f'{weighting} of snr'}{jacobian}"
    elif space == "edm" and prediction != "edm":
        words = "weighed by snr = 1 / sigma^2"
    read = (
        f", read from {_OUTPUTS[prediction][0]}"
        if space == "edm" and prediction != "sample"
        else ""
    )
    return f"loss: {loss} of {output}{read}, {words}"


# ---------------------------------------------------------------- finding, checking and adding up


def find_function(
    spec: str, table: Mapping[str, Callable[..., Any] | None], args: Mapping[str, Any] | None = None
) -> Any:
    """The row `spec` of a table, or function `fn` of a file for "path/to/file.py:fn", with `args` bound to it.

    Raises UserError for an unknown name (naming the nearest), a missing file or function, and an argument the function does not take.
    """
    check_names_file(spec, "loss")
    path, colon, name = spec.rpartition(":")
    function = load_from_file(path, name, "function") if colon else _from_table(spec, table)
    return bind_arguments(function, spec, args or {})


def bind_arguments(function: Any, name: str, args: Mapping[str, Any]) -> Any:
    """`function` with `args` bound to it. Raises UserError, which calls it `name`, for an argument that it does not take, or for a
    text where its default is a number."""
    if not args:
        return function
    parameters = (
        list(inspect.signature(function).parameters.values())[1:] if function else []
    )  # all but the StepOutput or the snr
    known = [p.name for p in parameters]
    numbers = {
        p.name
        for p in parameters
        if isinstance(p.default, int | float) and not isinstance(p.default, bool)
    }
    for arg, value in args.items():
        if arg in numbers and isinstance(value, str):
            raise UserError(f"argument {arg} of {name} is {value!r}, expected a number")
        if arg not in known and not any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters
        ):
            raise UserError(
                f"{name} takes no argument {arg!r}; it takes {', '.join(known) or 'none'}"
            )
    return functools.partial(function, **args)


def name_and_arguments(loss: Callable[..., Tensor]) -> tuple[str, dict[str, Any]]:
    """(name, arguments) with which `resolve` finds a function again, or a name in "<...>" that it refuses where no file gives it back.

    Arguments that functools.partial has bound by name are among them, where a config can hold them.
    """
    inner: Any = loss
    if (
        isinstance(loss, functools.partial)
        and not loss.args
        and all(isinstance(v, bool | int | float | str) for v in loss.keywords.values())
    ):
        inner = loss.func
    name = name_function(inner, LOSSES)
    return (name, {}) if inner is loss or name.startswith("<") else (name, dict(loss.keywords))  # type: ignore[attr-defined]


def _from_table(name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        near = get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown name {name!r}, the nearest is {near!r}; choose {', '.join(table)} or path/to/file.py:function"
        )
    return table[name]


def check_weighting(name: str, args: Mapping[str, Any]) -> None:
    """Raises UserError for a weighting that `resolve` refuses, or that gives negative weights, none at all, or NaN."""
    law = find_function(name, WEIGHTINGS, args)
    weights = law(torch.logspace(-4, 4, 9)) if law else torch.ones(1)
    if not (weights.isfinite().all() and weights.min() >= 0 and weights.max() > 0):
        given = " ".join(f"{key}={value}" for key, value in args.items())
        raise UserError(
            f"weighting {name} with {given} gives weights from {weights.min():g} to {weights.max():g}; expected numbers of at least 0"
        )


def check_loss_rows(rows: Tensor, name: str, b: int) -> None:
    """Raises UserError where loss `name` returned anything but [b] finite numbers. Reads the
    values, so it waits for a GPU.
    """
    check_loss_shape(rows, name, b)
    bad = (~torch.isfinite(rows.detach())).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"loss {name} returned {rows[bad[0]].item():g} for row {bad[0]} of {b}; "
            "lower the learning rate or look at that example"
        )


def check_loss_shape(rows: Tensor, name: str, b: int) -> None:
    """Raises UserError where loss `name` returned anything but a tensor [b]; waits for nothing.

    Check before weighting: a scalar times the weights [b] is [b] again.
    """
    if not isinstance(rows, Tensor):
        raise UserError(
            f"loss {name} returned {type(rows).__name__}, expected a tensor [{b}], "
            "one number per example"
        )
    if rows.shape != (b,):
        got = "a scalar" if rows.ndim == 0 else f"shape {list(rows.shape)}"
        raise UserError(
            f"loss {name} returned {got}, expected [{b}], one number per example; "
            "take the mean over c, h, w only"
        )


def sum_losses(rows: Tensor, is_prior: Tensor, *, prior_weight: float, instances: int) -> Tensor:
    """Scalar sum of the weighed rows [b] / instances, where rows of the prior count prior_weight times as much.

    With as many prior rows as instances this is mean(instances) + prior_weight * mean(prior) (DreamBooth, arXiv 2208.12242 eq. 2).
    `instances` counts those of the whole step, so that the totals of its micro-batches add up to the step's own.
    """
    return torch.where(is_prior, prior_weight * rows, rows).sum() / instances
