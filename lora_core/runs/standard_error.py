"""Standard error of a mean difference over seeds and images, both taken as random.

Seeds and images are crossed: every seed's run is measured on every image. With the differences
d[s, i] = mu + seed_s + image_i + rest_si of S seeds and I images, the variance of their mean is

    var_seed / S + var_image / I + var_rest / (S I).

The mean squares of the two-way layout estimate the three variances:

    MS_seed  = I sum_s (mean_s - mean)^2 / (S - 1)             expected: var_rest + I var_seed
    MS_image = S sum_i (mean_i - mean)^2 / (I - 1)             expected: var_rest + S var_image
    MS_rest  = sum_si (d_si - mean_s - mean_i + mean)^2 / ((S - 1) (I - 1))       var_rest

var_seed = (MS_seed - MS_rest) / I and var_image = (MS_image - MS_rest) / S, each at least 0. The
error's degrees of freedom are those of Satterthwaite (1946) for the mean squares in it.

Where the two sides have different seeds, only the images are paired: d_i is the difference of the
sides' means of image i, and each side has seeds of its own. The variance is then

    var(d_i) / I + sum over the sides of var_seed / S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev
from typing import NamedTuple

import torch
from torch import Tensor

ANGLES = 10_001  # of the numerical integral in `t_quantile`: exact to 6 digits


class Estimate(NamedTuple):
    """A mean with its standard error."""

    mean: float
    error: float  # nan where neither seeds nor images are several
    freedom: float  # degrees of freedom of the error

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval of the mean."""
        return self.error * t_quantile(self.freedom)

    @property
    def is_significant(self) -> bool:
        """Whether 0 is outside the 95 % confidence interval; False where there is no error."""
        return abs(self.mean) > self.margin


class _Part(NamedTuple):
    """A mean square in the variance of a mean, times its factor there."""

    value: float
    freedom: float


def paired_estimate(differences: Tensor) -> Estimate:
    """The mean over seeds and images of differences [S, I], paired by seed and image."""
    d = differences.double()
    return Estimate(d.mean().item(), *_crossed_error(d.mean(0), [d]))


def unpaired_estimate(a: Tensor, b: Tensor) -> Estimate:
    """The mean of b [S_b, I] - a [S_a, I], paired by image; the seeds of the sides are different.

    The seeds of a side with one seed add nothing to the error.
    """
    a, b = a.double(), b.double()
    d = b.mean(0) - a.mean(0)
    return Estimate(d.mean().item(), *_crossed_error(d, [a, b]))


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values; nan for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _crossed_error(per_image: Tensor, sides: Sequence[Tensor]) -> tuple[float, float]:
    """(standard error of the mean of `per_image` [I], its degrees of freedom), for the values
    [S, I] of each side that has seeds of its own.
    """
    images = len(per_image)
    seeds: list[_Part] = []  # positive and negative parts of the seeds' variances
    rests: list[_Part] = []
    for side in sides:
        count = len(side)
        if count == 1:
            continue
        of_seeds = _Part(side.mean(1).var().item() / count, count - 1)
        if images == 1:
            seeds.append(of_seeds)
            continue
        residuals = side - side.mean(1, keepdim=True) - side.mean(0) + side.mean()
        freedom = (count - 1) * (images - 1)
        rest = _Part(residuals.square().sum().item() / freedom / (count * images), freedom)
        rests.append(rest)
        if of_seeds.value > rest.value:  # else the variance of the seeds is 0
            seeds += [of_seeds, rest._replace(value=-rest.value)]
    parts = seeds
    if images > 1:
        of_images = _Part(per_image.var().item() / images, images - 1)
        least = sum(rest.value for rest in rests)
        counts = of_images.value > least or not rests
        parts = [*seeds, *([of_images] if counts else rests)]
    if not parts:
        return math.nan, math.nan
    variance = sum(part.value for part in parts)
    if not variance > 0:
        return 0.0, sum(part.freedom for part in parts)
    spread = sum(part.value**2 / part.freedom for part in parts)
    return math.sqrt(variance), max(1.0, variance**2 / spread)


def t_quantile(freedom: float, share: float = 0.95) -> float:
    """The x with a `share` of Student's t distribution between -x and x; nan for nan.

    With t = sqrt(v) tan(angle) the density is proportional to cos(angle)^(v - 1), which is summed
    over the angles from 0 to a right one. `freedom` v: at least 1; from 10,000 on it is that.
    """
    if math.isnan(freedom):
        return math.nan
    v = min(freedom, 1e4)
    angles = torch.linspace(0, math.pi / 2, ANGLES, dtype=torch.float64)
    summed = torch.cumulative_trapezoid(angles.cos().clamp(min=0) ** (v - 1), angles)
    place = int(torch.searchsorted(summed, share * summed[-1]))
    before = summed[place - 1].item() if place else 0.0
    step = (share * summed[-1].item() - before) / (summed[place].item() - before)
    angle = (place + step) * math.pi / 2 / (ANGLES - 1)
    return math.sqrt(v) * math.tan(angle)
