"""Losses and loss weightings of diffusion training.

A loss is a pure function of one StepOutput and returns [b], one number per example, unreduced.
Write your own as `def my_loss(step: StepOutput) -> Tensor` and train with
`--loss my_loss.py:my_loss`; `mse` below is an example. A loss declares its needs by attributes,
set in the lines below it:

    my_loss.reads_attention = True   reads step.attention or token places, which are recorded then
    my_loss.reads_pairs = True       compares the winners and losers of --data.pairs
    my_loss.weighting = "none"       is not weighted by noise level, as an error of x0 or of pixels
    my_loss.whole_batch = True       compares the examples of a batch, which is not to be divided
    my_loss.capturable = True        does the same operations in every step and reads nothing back
                                     to the host: a CUDA graph can hold its step

All weightings follow one law. An error e in the network's output is an error |d x0 / d out| e in
x0, so whatever the network predicts, weight = W(snr) * |d x0 / d out|^2, where W is the weighting
of the squared error of x0. A published weighting is one W.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lora_core.diffusion.attention_losses import attention_outside, mixofshow_regularization
from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.prediction import PREDICTIONS
from lora_core.diffusion.step_output import StepOutput
from lora_core.errors import UserError
from lora_core.kernels import call
from lora_core.kernels.reference import masked_mean, wide_dtype
from lora_core.plugins import describe_error, find_plugin, function_name

# ---------------------------------------------------------------- losses: StepOutput -> [b]


def mse(step: StepOutput) -> Tensor:
    """[b] mean squared error of the output (arXiv 2006.11239 eq. 14)."""
    if step.out.shape != step.target.shape:
        raise _shape_error(step)
    return call("snr_weighted_mse", step.out, step.target, step.mask, None)


def l1(step: StepOutput) -> Tensor:
    """[b] mean absolute error of the output."""
    return masked_mean(_error(step).abs(), step.mask)


DeltaSchedule = Literal["constant", "snr", "exponential"]


def huber(step: StepOutput, *, delta: float = 0.1, schedule: DeltaSchedule = "constant") -> Tensor:
    """[b] pseudo-Huber loss 2c (sqrt(d^2 + c^2) - c).

    It is d^2 where d << c and 2c |d| where d >> c (arXiv 2403.16728, kohya's factor 2c).
    """
    c = huber_delta(step.level, step.t_max, delta=delta, schedule=schedule).reshape(-1, 1, 1, 1)
    return masked_mean(2 * c * _pseudo_huber(_error(step), c), step.mask)


def smooth_l1(
    step: StepOutput, *, delta: float = 0.1, schedule: DeltaSchedule = "constant"
) -> Tensor:
    """[b] pseudo-Huber loss in units of l1, 2 (sqrt(d^2 + c^2) - c).

    It is d^2 / c where d << c and 2 |d| where d >> c (kohya).
    """
    c = huber_delta(step.level, step.t_max, delta=delta, schedule=schedule).reshape(-1, 1, 1, 1)
    return masked_mean(2 * _pseudo_huber(_error(step), c), step.mask)


def attention(
    step: StepOutput, *, attention_weight: float = 0.01, full_identity: bool = False
) -> Tensor:
    """[b] mse plus `attention_weight` times the share of attention outside the mask.

    `attention_outside` has the formula: the first learned token of a prompt is an adjective, the
    second the subject, which with `full_identity` is to cover the mask.
    """
    positions, mask = _attention_targets(step, attention_weight)
    share = attention_outside(step.attention, positions, mask, full_identity=full_identity)
    return mse(step) + attention_weight * share


def edlora(
    step: StepOutput, *, attention_weight: float = 0.01, full_identity: bool = True
) -> Tensor:
    """[b] the objective of Mix-of-Show's trainer (arXiv 2305.18292): masked mse times the number of
    latent channels, plus `attention_weight` times its attention regularization.

    The regularization is one number for the batch (`mixofshow_regularization`), which is added to
    every example but those of prior preservation. Weightings by noise level act on it, too.
    """
    positions, mask = _attention_targets(step, attention_weight)
    regularization = mixofshow_regularization(
        step.attention, positions, mask, full_identity=full_identity
    )
    rows = mse(step) * step.out.shape[1]
    return rows + attention_weight * torch.where(step.is_prior, 0, regularization)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "smooth_l1": smooth_l1,
    "attention": attention,
    "edlora": edlora,
}
ATTENTION_LOSSES = (attention, edlora)
for _loss in ATTENTION_LOSSES:
    _loss.reads_attention = True  # type: ignore[attr-defined]
edlora.whole_batch = True  # type: ignore[attr-defined]


def _attention_targets(step: StepOutput, weight: float) -> tuple[Tensor, Tensor]:
    """(positions of the learned tokens [b, n], masks [b, 1, h, w] as drawn).

    Raises UserError where there are no learned tokens that attention reads, or no masks, and for a
    negative weight, which would draw attention out of the masks.
    """
    if weight < 0:
        raise UserError(f"attention_weight must be 0 or more, got {weight:g}")
    if step.token_positions is None:
        raise UserError(
            "this loss compares the attention on learned tokens with masks, and the text encoder "
            "whose tokens the denoiser's attention reads learns none; train tokens "
            "(stages.0.groups, for a T5 encoder --tokens.encoders t5) or choose another --loss"
        )
    if step.drawn_mask is None:
        raise UserError(
            "this loss compares the attention on learned tokens with masks, and there are none; "
            "set --data.masks or choose another --loss"
        )
    return step.token_positions, step.drawn_mask


def is_capturable(loss: Callable[..., Tensor]) -> bool:
    """Whether a CUDA graph can hold a loss.

    It can if the loss does the same operations in every step and reads nothing back to the host.
    That holds for the entries of LOSSES and for functions with the attribute `capturable = True`,
    also with bound arguments.
    """
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss in LOSSES.values() or getattr(loss, "capturable", False) is True


def copy_declarations(made: Callable[..., Tensor], loss: Callable[..., Tensor]) -> Any:
    """A loss `made` of another, with its attributes and its name, which error messages give."""
    while isinstance(loss, functools.partial):
        vars(made).update(vars(loss))
        loss = loss.func
    vars(made).update(vars(loss))
    made.capturable = is_capturable(loss)  # type: ignore[attr-defined]
    made.__wrapped__ = loss  # type: ignore[attr-defined]  # errors name the line of its file
    made.__name__ = function_name(loss)
    return made


def huber_delta(level: NoiseLevel, t_max: float | None, *, delta: float, schedule: str) -> Tensor:
    """[b] the c of each example, from its own noise level (arXiv 2403.16728).

    constant: delta.
    exponential: delta^(t / t_max), from 1 down to delta; t_max is Schedule.t_max.
    snr: (1 - delta) / (1 + sigma / alpha)^2 + delta, from 1 down to delta.

    kohya draws one timestep for a whole batch here.
    """
    if delta <= 0:
        raise UserError(f"delta of a Huber loss must be above 0, got {delta:g}")
    if schedule == "constant":
        return torch.full_like(level.t, delta)
    if schedule == "exponential":
        if t_max is None:
            raise UserError(
                "the exponential schedule of a Huber loss needs timesteps that count up from 0, "
                "which this model has not; choose snr"
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
    """The loss plus `weight` times the preservation loss [b] (ai-toolkit's differential output).

    The preservation loss is the mean squared difference between the outputs with and without
    adapters, both on the caption with the class in place of the placeholder word. It ignores the
    mask, because everything is to be preserved. The sum is weighted by noise level like any loss.
    Costs two more forward passes, one of them with gradient.
    """

    def preserving_loss(step: StepOutput) -> Tensor:
        now, before = step.preserved
        return loss(step) + weight * call("snr_weighted_mse", now, before, None, None)

    return copy_declarations(preserving_loss, loss)


def _pseudo_huber(d: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, without the cancellation at small d."""
    return d**2 / ((d**2 + c**2).sqrt() + c)


def _error(step: StepOutput) -> Tensor:
    """[b, c, h, w] out - target, fp32 or better."""
    if step.out.shape != step.target.shape:
        raise _shape_error(step)
    dtype = wide_dtype(step.out.dtype)
    return step.out.to(dtype) - step.target.to(dtype)


def _shape_error(step: StepOutput) -> ValueError:
    out, target = list(step.out.shape), list(step.target.shape)
    return ValueError(f"the network returned {out} where the target is {target}")


# ------------------------------------------------- weightings: W(snr) of the squared error of x0


def min_snr(snr: Tensor, *, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma): no noise level weighs more than that of snr = gamma (arXiv 2303.09556)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, *, gamma: float = 5.0) -> Tensor:
    """snr gamma / (snr + gamma): min_snr without a corner (arXiv 2401.11605, there gamma = 4)."""
    return snr * gamma / (snr + gamma)


def debiased(snr: Tensor) -> Tensor:
    """sqrt(snr): 1 / sqrt(snr) for epsilon (arXiv 2310.08442)."""
    return snr**0.5


def p2(snr: Tensor, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """snr / (k + snr)^gamma: 1 / (k + snr)^gamma for epsilon (arXiv 2204.00227)."""
    return snr / (k + snr) ** gamma


def snr_weight(snr: Tensor) -> Tensor:
    """snr: 1 for epsilon, alpha^2 for v; diffusers' 1 / sigma^2 of EDM-style training.

    arXiv 2206.00364: x / alpha.
    """
    return snr


def sigma_sqrt(snr: Tensor) -> Tensor:
    """(1 + sqrt(snr))^4: diffusers' 1 / sigma^2 for flow, sigma = 1 / (1 + sqrt(snr))."""
    return (1 + snr**0.5) ** 4


def cosmap_weight(snr: Tensor) -> Tensor:
    """diffusers' 2 / (pi (1 - 2 sigma + 2 sigma^2)) for flow, sigma = 1 / (1 + sqrt(snr))."""
    return 2 / math.pi * (1 + snr**0.5) ** 4 / (1 + snr)


WEIGHTINGS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,  # 1 in the space of the network's output
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "debiased": debiased,
    "p2": p2,
    "snr": snr_weight,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap_weight,
}

# Where alpha or sigma is 0 the product W * jacobian^2 has a limit that 0 * inf would hide. 2^-12 is
# diffusers' alpha at zero terminal SNR, and less than any sigma of the schedules here (edm's
# smallest is 0.002).
LEVEL_FLOOR = 2.0**-12


def loss_weights(
    name: str, level: NoiseLevel, prediction: str, *, space: str = "model", **args: float
) -> Tensor:
    """[b] weights of the squared errors in a loss space: W(snr) |d x0 / d out|^2.

    `space` is "model" or "edm" (see `to_loss_space`); weights are finite at zero terminal SNR.
    min_snr gives min(snr, g) / snr for epsilon, min(snr, g) / (snr + 1) for v (several public
    scripts take min(snr, g) / snr + 1, which is neither the paper nor this law) and
    min(snr, g) sigma^2 for flow. Instances and prior examples are weighted alike; diffusers'
    scripts leave the prior unweighted. kohya's debiased differs: it caps snr at 1000 and takes
    1 / (snr + 1) for v, which is not this law.

    In "edm" space the error is x0's own and its weight W(snr); none is snr there, diffusers'
    1 / sigma^2, except for networks of the edm row, which diffusers leaves unweighted. diffusers
    refuses min-SNR with EDM; here it is min(snr, g), the same law as in any space.
    """
    law = _find_weighting(name, *args.items())
    if law is None and space == "edm" and prediction != "edm":
        law = WEIGHTINGS["snr"]
    if law is None:
        return torch.ones_like(level.sigma)
    jacobian = PREDICTIONS["sample" if space == "edm" else prediction].jacobian
    weights = law(level.snr) * jacobian(level) ** 2
    floored = level._replace(
        alpha=level.alpha.clamp(min=LEVEL_FLOOR), sigma=level.sigma.clamp(min=LEVEL_FLOOR)
    )
    limits = law(floored.snr) * jacobian(floored) ** 2
    return torch.where(torch.isfinite(weights), weights, limits)


@functools.lru_cache(maxsize=32)
def _find_weighting(name: str, *args: tuple[str, Any]) -> Callable[..., Tensor] | None:
    """W(snr) with its arguments bound, looked up once instead of in every step."""
    return find_plugin(name, WEIGHTINGS, "weighting", dict(args))


WEIGHTING_FORMULAS = {  # key of WEIGHTINGS -> W as text
    "min_snr": "min(snr, {gamma:g})",
    "soft_min_snr": "{gamma:g} snr / (snr + {gamma:g})",
    "debiased": "sqrt(snr)",
    "p2": "snr / ({k:g} + snr)^{gamma:g}",
    "snr": "snr",
    "sigma_sqrt": "(1 + sqrt(snr))^4",
    "cosmap": "2/pi (1 + sqrt(snr))^4 / (1 + snr)",
}
# Key of PREDICTIONS -> the output's name, and the squared Jacobian on the schedule for which that
# prediction type was published.
OUTPUT_NAMES = {
    "epsilon": ("epsilon", " / snr"),
    "v_prediction": ("v", " / (snr + 1)"),
    "sample": ("x0", ""),
    "flow": ("the velocity eps - x0", " sigma^2"),
    "edm": ("EDM's preconditioned output", " c_out^2"),
}


def describe_loss(
    weighting: str, prediction: str, space: str = "model", *, loss: str = "mse", **args: float
) -> str:
    """One line on a loss, a weighting and a space, e.g. "loss: mse of x0, weighted by min(snr, 5)".

    Raises UserError where `find_plugin` does.
    """
    law = find_plugin(weighting, WEIGHTINGS, "weighting", args)
    output, jacobian = OUTPUT_NAMES["sample" if space == "edm" else prediction]
    weighted = "not weighted"
    if law is not None:
        parameters = list(inspect.signature(law).parameters.items())[1:]
        values = {name: parameter.default for name, parameter in parameters}
        formula = f"{weighting} of snr"
        if weighting in WEIGHTING_FORMULAS:
            formula = WEIGHTING_FORMULAS[weighting].format(**values)
        weighted = f"weighted by {formula}{jacobian}"
    elif space == "edm" and prediction != "edm":
        weighted = "weighted by snr = 1 / sigma^2"
    converted = ""
    if space == "edm" and prediction != "sample":
        converted = f", read from {OUTPUT_NAMES[prediction][0]}"
    return f"loss: {loss} of {output}{converted}, {weighted}"


# ---------------------------------------------------------------- checking and summing


def check_weighting(name: str, args: Mapping[str, Any]) -> None:
    """Raises UserError for a weighting that is unknown, fails, or gives NaN, negative or no weight.

    To be called as a run begins: afterwards `loss_weights` finds a changed file's new function.
    """
    _find_weighting.cache_clear()
    law = find_plugin(name, WEIGHTINGS, "weighting", args)
    snr = torch.logspace(-4, 4, 9)
    try:
        weights = law(snr) if law else torch.ones(1)
    except Exception as error:  # whatever the user's file raises
        raise UserError(
            f"weighting {name} is called as fn(snr) and returns W(snr): "
            f"{describe_error(error, law)}"
        ) from error
    if not isinstance(weights, Tensor) or (law and weights.shape != snr.shape):
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise UserError(
            f"weighting {name} returned {got} for snr [9]; expected a tensor of the same shape"
        )
    if not (weights.isfinite().all() and weights.min() >= 0 and weights.max() > 0):
        given = " with " + " ".join(f"{key}={value}" for key, value in args.items())
        raise UserError(
            f"weighting {name}{given if args else ''} gives weights from {weights.min():g} to "
            f"{weights.max():g}; expected numbers of at least 0"
        )


def check_loss_shape(losses: Any, loss: Callable[..., Any], b: int) -> None:
    """Raises UserError unless `loss` returned a tensor [b]. Does not sync with the device.

    Check before weighting: a scalar times the weights [b] is [b] again.
    """
    if not isinstance(losses, Tensor):
        kind = type(losses).__name__
        raise UserError(
            f"loss {function_name(loss)} returned {kind}, expected a tensor [{b}], "
            "one number per example"
        )
    if losses.shape != (b,):
        got = "a scalar" if losses.ndim == 0 else f"shape {list(losses.shape)}"
        raise UserError(
            f"loss {function_name(loss)} returned {got}, expected [{b}], one number per example; "
            "take the mean over c, h, w only"
        )


def check_loss_finite(losses: Tensor, loss: Callable[..., Any]) -> None:
    """Raises UserError unless all losses [b] of `loss` are finite. Syncs with the device."""
    bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        b = len(losses)
        raise UserError(
            f"loss {function_name(loss)} returned {losses[first].item():g} for row {first} of {b}; "
            "lower the learning rate or look at that example"
        )


def sum_losses(losses: Tensor, is_prior: Tensor, *, prior_weight: float, instances: int) -> Tensor:
    """0-dim sum of the weighted losses [b] / instances, the prior's times prior_weight.

    With as many prior examples as instances this is mean(instances) + prior_weight * mean(prior)
    (DreamBooth, arXiv 2208.12242 eq. 2). `instances` is the number in the whole step, so that the
    sums of its micro-batches add up to that of the step.
    """
    return torch.where(is_prior, prior_weight * losses, losses).sum() / instances
