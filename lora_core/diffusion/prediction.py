"""What a network predicts: one row per convention, each four lines of algebra on x_t = alpha x0 +
sigma eps.

    row           out                                x0                                          |d x0 / d out|
    epsilon       eps                                (x_t - sigma out) / alpha                   sigma / alpha
    v_prediction  alpha eps - sigma x0               (alpha x_t - sigma out) / (alpha^2+sigma^2) sigma / (alpha^2 + sigma^2)
    sample        x0                                 out                                         1
    flow          eps - x0                           (x_t - sigma out) / (alpha + sigma)         sigma / (alpha + sigma)
    edm           (sigma/s x0 - alpha s eps) / N     c_skip x_t + c_out out                      c_out

with s = sigma_data and N^2 = alpha^2 s^2 + sigma^2. The denominators are 1 on the schedule a row
was published for (vp for v, flow for flow, alpha = 1 for edm); written out, every row holds on
every schedule, and the tests demand it. All in fp32 or better.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.diffusion.noise import NoiseLevel, add_noise

LossSpace = Literal[
    "model", "edm"
]  # where outputs are compared: as the network puts them, or as the x0 they stand for

# standard deviation of the data that EDM's preconditioning assumes (arXiv 2206.00364 table 1)
SIGMA_DATA = 0.5


class Prediction(NamedTuple):
    """One convention: what the network is trained on, and how its output is read."""

    target: Callable[
        [Tensor, Tensor, NoiseLevel], Tensor
    ]  # (x0, eps, level) -> what `out` should be, [b, c, h, w]
    x0: Callable[
        [Tensor, Tensor, NoiseLevel], Tensor
    ]  # (x_t, out, level) -> the clean image `out` stands for, [b, c, h, w]
    jacobian: Callable[
        [NoiseLevel], Tensor
    ]  # level -> |d x0 / d out| [b]: an error e in `out` is an error jacobian * e in x0
    c_in: Callable[
        [NoiseLevel], Tensor
    ]  # level -> what x_t is multiplied with before the network sees it, [b]


def _wide(x: Tensor, y: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and y in fp32 or better, and alpha and sigma shaped to broadcast over them."""
    wide = level.like(x)
    return (
        x.to(torch.promote_types(x.dtype, torch.float32)),
        y.to(torch.promote_types(y.dtype, torch.float32)),
        wide.alpha,
        wide.sigma,
    )


def _one(level: NoiseLevel) -> Tensor:
    return torch.ones_like(level.sigma)


# epsilon: DDPM, arXiv 2006.11239 eq. 14 (target) and eq. 15 (x0). Undefined at alpha = 0: such a
# schedule needs v or sample.


def _epsilon_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    return _wide(x0, eps, level)[1]


def _epsilon_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    x_t, out, alpha, sigma = _wide(x_t, out, level)
    return (x_t - sigma * out) / alpha


# v: progressive distillation, arXiv 2202.00512 section 4 and appendix D.


def _v_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    x0, eps, alpha, sigma = _wide(x0, eps, level)
    return alpha * eps - sigma * x0


def _v_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    x_t, out, alpha, sigma = _wide(x_t, out, level)
    return (alpha * x_t - sigma * out) / (alpha**2 + sigma**2)


# sample: the network says x0 itself.


def _sample_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    return _wide(x0, eps, level)[0]


def _sample_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    return _wide(x_t, out, level)[1]


# flow: velocity of the straight line from data to noise, arXiv 2209.03003 eq. 1 (there from noise
# to data).


def _flow_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    x0, eps, _, _ = _wide(x0, eps, level)
    return eps - x0


def _flow_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    x_t, out, alpha, sigma = _wide(x_t, out, level)
    return (x_t - sigma * out) / (alpha + sigma)


# edm: preconditioning of arXiv 2206.00364 (table 1, appendix B.6), where alpha = 1. The same
# derivation (unit variance of the network's
# input and of its target, least amplification of its error) gives the factors for any alpha; at s =
# 1 on vp the row is -v.


def _edm_norm(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha**2 * SIGMA_DATA**2 + sigma**2).sqrt()


def _edm_target(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """(x0 - c_skip x_t) / c_out, multiplied out so that nothing cancels at small sigma."""
    x0, eps, alpha, sigma = _wide(x0, eps, level)
    return (sigma / SIGMA_DATA * x0 - alpha * SIGMA_DATA * eps) / _edm_norm(alpha, sigma)


def _edm_x0(x_t: Tensor, out: Tensor, level: NoiseLevel) -> Tensor:
    x_t, out, alpha, sigma = _wide(x_t, out, level)
    norm = _edm_norm(alpha, sigma)
    c_skip, c_out = alpha * SIGMA_DATA**2 / norm**2, sigma * SIGMA_DATA / norm
    return c_skip * x_t + c_out * out


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(
        _epsilon_target, _epsilon_x0, lambda level: level.sigma / level.alpha, _one
    ),
    "v_prediction": Prediction(
        _v_target, _v_x0, lambda level: level.sigma / (level.alpha**2 + level.sigma**2), _one
    ),
    "sample": Prediction(_sample_target, _sample_x0, _one, _one),
    "flow": Prediction(
        _flow_target, _flow_x0, lambda level: level.sigma / (level.alpha + level.sigma), _one
    ),
    "edm": Prediction(
        _edm_target,
        _edm_x0,
        lambda level: level.sigma * SIGMA_DATA / _edm_norm(level.alpha, level.sigma),
        lambda level: 1 / _edm_norm(level.alpha, level.sigma),
    ),
}


def eps_from_x0(x_t: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """The noise that x_t holds if its clean image is x0: (x_t - alpha x0) / sigma, [b, c, h, w],
    fp32 or better.
    """
    x_t, x0, alpha, sigma = _wide(x_t, x0, level)
    return (x_t - alpha * x0) / sigma


def scale_input(prediction: str, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """What the network is shown: c_in x_t, computed in fp32 or better, in x_t's dtype. x_t itself
    for rows without a c_in.
    """
    c_in = PREDICTIONS[prediction].c_in
    if c_in is _one:
        return x_t
    wide = torch.promote_types(x_t.dtype, torch.float32)
    return (c_in(level.like(x_t)) * x_t.to(wide)).to(x_t.dtype)


def to_loss_space(
    prediction: str, space: str, out: Tensor, x0: Tensor, eps: Tensor, level: NoiseLevel
) -> tuple[Tensor, Tensor, str]:
    """(out, target, row): what a loss compares, [b, c, h, w] each, and the row of PREDICTIONS that
    both are in.

    "model": the network's output and its target. "edm": the x0 that the output stands for, and x0
    (arXiv 2206.00364 eq. 2). Under input perturbation the output is read as if x_t held eps alone:
    then an error in it is the same error in both spaces, times the Jacobian.
    """
    if space == "edm":
        return (
            PREDICTIONS[prediction].x0(add_noise(x0, eps, level), out, level),
            PREDICTIONS["sample"].target(x0, eps, level),
            "sample",
        )
    return out, PREDICTIONS[prediction].target(x0, eps, level), prediction
