"""Densities of timesteps, as quantile functions: u in [0, 1) -> fraction of the schedule.

0 is clean, 1 pure noise.

Write your own as `def my_density(u: Tensor) -> Tensor` and train with
`--noise.density my_density.py:my_density`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.plugins import describe_error, find_plugin

Density = Callable[[Tensor], Tensor]  # u [b] in [0, 1) -> fraction of the schedule [b]


def uniform_quantile(u: Tensor) -> Tensor:
    """Every timestep as often as every other."""
    return u


def logit_normal_quantile(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(fraction) ~ N(mean, std^2): the middle more often (arXiv 2403.03206 section 3.1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode_quantile(u: Tensor, scale: float = 1.29) -> Tensor:
    """The middle (scale above 0) or both ends (below 0) more often (arXiv 2403.03206)."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def cosmap_quantile(u: Tensor) -> Tensor:
    """2 / (pi - 2 pi f + 2 pi f^2): as often as a cosine schedule has f (arXiv 2403.03206)."""
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_quantile,
    "logit_normal": logit_normal_quantile,
    "mode": mode_quantile,
    "cosmap": cosmap_quantile,
}


def bind_density(name: str, /, **args: float) -> Density:
    """The density of that name with its arguments bound: u [b] in [0, 1) -> fraction [b].

    `name` is a key of DENSITIES or "path/to/file.py:fn". Fractions are of the schedule. A mean of
    logit_normal above 0 is more noise, as in arXiv 2403.03206. The logit_mean of diffusers' and
    kohya's flow scripts has the opposite sign, because they look the fraction up in a table that
    descends; their +1 is our -1. The other densities are symmetric. Raises UserError where
    `find_plugin` does, and for a function that fails or leaves 0..1 (mode: scale below -1).
    """
    density: Density = find_plugin(name, DENSITIES, "density", args)
    u = torch.linspace(0, 1, 1025, dtype=torch.float64)[:-1]
    try:
        fractions = density(u)
    except Exception as error:  # whatever the user's file raises
        raise UserError(
            f"density {name} is called as fn(u) and returns a fraction of the schedule for each u: "
            f"{describe_error(error, density)}"
        ) from error
    if not isinstance(fractions, Tensor) or fractions.shape != u.shape:
        is_tensor = isinstance(fractions, Tensor)
        got = list(fractions.shape) if is_tensor else type(fractions).__name__
        raise UserError(
            f"density {name} returned {got} for u {list(u.shape)}; "
            "expected a tensor of the same shape"
        )
    if not (fractions.min() >= 0 and fractions.max() <= 1):  # also where they are NaN
        given = f" with {args}" if args else ""
        raise UserError(
            f"density {name}{given} leaves the fractions 0..1 of the schedule; "
            "give values nearer to the default"
        )
    return density
