"""Prediction types: the training target of a network, and the x0 that its output predicts.

Each entry of PREDICTIONS is a few lines of algebra on x_t = alpha x0 + sigma eps:

    row           out                             x0
    epsilon       eps                             (x_t - sigma out) / alpha
    v_prediction  alpha eps - sigma x0            (alpha x_t - sigma out) / (alpha^2 + sigma^2)
    sample        x0                              out
    flow          eps - x0                        (x_t - sigma out) / (alpha + sigma)
    edm           (sigma/s x0 - alpha s eps) / N  c_skip x_t + c_out out

with s = sigma_data and N^2 = alpha^2 s^2 + sigma^2. The Jacobian |d x0 / d out| is the factor of
`out` in the last column, without its sign. The denominators are 1 on the schedule for which a type
was published (vp for v, flow for flow, alpha = 1 for edm); with them every type is valid on every
schedule, as the tests check. All in fp32 or better.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.diffusion.noise import NoiseLevel, add_noise
from lora_core.errors import UserError

# Standard deviation of the data that EDM's preconditioning assumes (arXiv 2206.00364 table 1).
SIGMA_DATA = 0.5


class Prediction(NamedTuple):
    """One prediction type: the network's target, and how its output is read."""

    # (x0, eps, level) -> the target of `out` [b, c, h, w]
    target: Callable[[Tensor, Tensor, NoiseLevel], Tensor]
    # (x_t, out, level) -> the prediction of x0 [b, c, h, w]
    x0: Callable[[Tensor, Tensor, NoiseLevel], Tensor]
    # level -> |d x0 / d out| [b]: an error e in `out` is an error jacobian * e in x0
    jacobian: Callable[[NoiseLevel], Tensor]
    # level -> the factor [b] of x_t in the network's input
    c_in: Callable[[NoiseLevel], Tensor]


def _widen(x: Tensor) -> Tensor:
    """x in fp32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _one(level: NoiseLevel) -> Tensor:
    return torch.ones_like(level.sigma)


# epsilon: DDPM, arXiv 2006.11239 eq. 14 (target) and eq. 15 (x0).
# Undefined at alpha = 0: a schedule that ends there needs v or sample.


def _epsilon_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    return _widen(eps)


def _epsilon_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    _, alpha, sigma = level.like(x_t)
    return (_widen(x_t) - sigma * _widen(out)) / alpha


# v: progressive distillation, arXiv 2202.00512 section 4 and appendix D.


def _v_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    _, alpha, sigma = level.like(x0)
    return alpha * _widen(eps) - sigma * _widen(x0)


def _v_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    _, alpha, sigma = level.like(x_t)
    return (alpha * _widen(x_t) - sigma * _widen(out)) / (alpha**2 + sigma**2)


# sample: the network's output is x0 itself.


def _sample_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    return _widen(x0)


def _sample_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    return _widen(out)


# flow: velocity of the straight line from data to noise, arXiv 2209.03003 eq. 1
# (there from noise to data).


def _flow_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    return _widen(eps) - _widen(x0)


def _flow_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    _, alpha, sigma = level.like(x_t)
    return (_widen(x_t) - sigma * _widen(out)) / (alpha + sigma)


# edm: preconditioning of arXiv 2206.00364 (table 1, appendix B.6), where alpha = 1. The same
# derivation (unit variance of the network's input and of its target, least amplification of its
# error) gives the factors for any alpha; at s = 1 on vp the row is -v.


def _edm_norm(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha**2 * SIGMA_DATA**2 + sigma**2).sqrt()


def _edm_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """(x0 - c_skip x_t) / c_out, multiplied out so that nothing cancels at small sigma."""
    _, alpha, sigma = level.like(x0)
    target = sigma / SIGMA_DATA * _widen(x0) - alpha * SIGMA_DATA * _widen(eps)
    return target / _edm_norm(alpha, sigma)


def _edm_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    _, alpha, sigma = level.like(x_t)
    norm = _edm_norm(alpha, sigma)
    c_skip = alpha * SIGMA_DATA**2 / norm**2
    c_out = sigma * SIGMA_DATA / norm
    return c_skip * _widen(x_t) + c_out * _widen(out)


def _v_jacobian(level: NoiseLevel) -> Tensor:
    return level.sigma / (level.alpha**2 + level.sigma**2)


def _edm_jacobian(level: NoiseLevel) -> Tensor:
    return level.sigma * SIGMA_DATA / _edm_norm(level.alpha, level.sigma)


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(
        _epsilon_target, _epsilon_x0, jacobian=lambda level: level.sigma / level.alpha, c_in=_one
    ),
    "v_prediction": Prediction(_v_target, _v_x0, jacobian=_v_jacobian, c_in=_one),
    "sample": Prediction(_sample_target, _sample_x0, jacobian=_one, c_in=_one),
    "flow": Prediction(
        _flow_target,
        _flow_x0,
        jacobian=lambda level: level.sigma / (level.alpha + level.sigma),
        c_in=_one,
    ),
    "edm": Prediction(
        _edm_target,
        _edm_x0,
        jacobian=_edm_jacobian,
        c_in=lambda level: 1 / _edm_norm(level.alpha, level.sigma),
    ),
}


def prediction_from_config(config: Mapping[str, Any]) -> str:
    """The prediction type of a model's `scheduler_config.json`; epsilon where it names none.

    Raises UserError for one that is not in PREDICTIONS.
    """
    name = config.get("prediction_type", "epsilon")
    if not isinstance(name, str) or name not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise UserError(
            f"scheduler_config.json has prediction_type {name!r:.40}; this program knows {known}"
        )
    return name


def eps_from_x0(x_t: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The noise in x_t if its clean image is x0: (x_t - alpha x0) / sigma, [b, c, h, w].

    fp32 or better.
    """
    _, alpha, sigma = level.like(x_t)
    return (_widen(x_t) - alpha * _widen(x0)) / sigma


def scale_input(prediction: str, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """The network's input c_in x_t, computed in fp32 or better, in x_t's dtype.

    x_t itself for prediction types without a c_in.
    """
    c_in = PREDICTIONS[prediction].c_in
    if c_in is _one:
        return x_t
    return (c_in(level.like(x_t)) * _widen(x_t)).to(x_t.dtype)


def to_loss_space(
    prediction: str, space: str, out: Tensor, x0: Tensor, eps: Tensor, level: NoiseLevel
) -> tuple[Tensor, Tensor, str]:
    """(out, target, prediction type of both): the pair that a loss compares.

    Both are [b, c, h, w]. "model": the network's output and its target. "edm": the predicted x0,
    and x0 (arXiv 2206.00364 eq. 2). Under input perturbation x0 is computed as if x_t had eps
    alone: then an error of the output is the same error in both spaces, times the Jacobian.
    """
    if space == "edm":
        x0_pred = PREDICTIONS[prediction].x0(add_noise(x0, eps, level), out, level)
        return x0_pred, _widen(x0), "sample"
    return out, PREDICTIONS[prediction].target(x0, eps, level), prediction
