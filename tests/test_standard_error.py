"""The error of a mean over seeds and images: known variances, a bootstrap, closed forms."""

import math

import pytest
import torch
from torch import Tensor

from lora_core.runs.standard_error import (
    paired_estimate,
    standard_error,
    t_quantile,
    unpaired_estimate,
)

SEEDS, IMAGES = 4, 12


def draw(
    generator: torch.Generator, sds: tuple[float, float, float], seeds: int, images: int
) -> Tensor:
    """[seeds, images] of mean 0 with these standard deviations of seeds, images and the rest."""
    parts = (torch.randn(seeds, 1, generator=generator, dtype=torch.float64),)
    parts += (torch.randn(1, images, generator=generator, dtype=torch.float64),)
    parts += (torch.randn(seeds, images, generator=generator, dtype=torch.float64),)
    return sum(sd * part for sd, part in zip(sds, parts))


@pytest.mark.parametrize(
    ("sds", "excess"),
    [
        ((1.0, 0.0, 0.3), 1.0),
        ((0.0, 1.0, 0.3), 1.0),
        ((0.0, 0.0, 1.0), 1.5),  # two variances of 0 are estimated as 0 or more
        ((0.5, 1.0, 1.0), 1.0),
        ((1.0, 1.0, 0.0), 1.0),
    ],
)
def test_the_interval_holds_the_truth_19_times_of_20(
    sds: tuple[float, float, float], excess: float
) -> None:
    """Two standard errors would hold it in 0.86 of the cases where seeds differ most."""
    generator = torch.Generator().manual_seed(1)
    count, inside, squares = 500, 0, 0.0
    for _ in range(count):
        found = paired_estimate(draw(generator, sds, SEEDS, IMAGES))
        inside += not found.is_significant  # the true mean is 0
        squares += found.error**2
    true = sds[0] ** 2 / SEEDS + sds[1] ** 2 / IMAGES + sds[2] ** 2 / (SEEDS * IMAGES)
    # 4 standard deviations of 500 such shares, 0.039, and Satterthwaite's 0.008
    assert 0.903 < inside / count < 0.995
    spread = math.sqrt(2 / 3 / count)  # of a variance with 3 degrees of freedom, the least here
    assert squares / count / true == pytest.approx(excess, abs=4 * spread * excess)


def test_the_interval_of_different_seeds_holds_the_truth_too() -> None:
    generator = torch.Generator().manual_seed(2)
    count, inside = 500, 0
    for _ in range(count):
        image = torch.randn(1, IMAGES, generator=generator, dtype=torch.float64)  # in both sides
        sides = [draw(generator, (0.6, 0.4, 0.5), n, IMAGES) + 5 * image for n in (3, 5)]
        inside += not unpaired_estimate(*sides).is_significant
    assert 0.903 < inside / count < 0.995


def test_it_is_the_variance_of_a_bootstrap_over_both() -> None:
    """Of seeds and of images drawn again with replacement (Owen 2007, which counts the rest three
    times, a fiftieth of the variance here).
    """
    generator = torch.Generator().manual_seed(3)
    d = draw(generator, (1.0, 1.5, 0.8), 30, 40)
    means = []
    for _ in range(3000):
        rows = torch.randint(30, (30,), generator=generator)
        columns = torch.randint(40, (40,), generator=generator)
        means.append(d[rows][:, columns].mean())
    found = paired_estimate(d)
    assert found.mean == pytest.approx(d.mean().item(), abs=1e-15)
    assert found.error == pytest.approx(torch.stack(means).std().item(), rel=0.06)


def test_the_mean_squares_are_those_of_the_two_way_layout() -> None:
    """The textbook's sums, cell by cell."""
    d = draw(torch.Generator().manual_seed(4), (1.0, 1.0, 0.5), 3, 5)
    rows = [[d[s, i].item() for i in range(5)] for s in range(3)]
    grand = sum(sum(row) for row in rows) / 15
    of_seed = [sum(row) / 5 for row in rows]
    of_image = [sum(row[i] for row in rows) / 3 for i in range(5)]
    ms_seed = 5 * sum((m - grand) ** 2 for m in of_seed) / 2
    ms_image = 3 * sum((m - grand) ** 2 for m in of_image) / 4
    rest = 0.0
    for s in range(3):
        rest += sum((rows[s][i] - of_seed[s] - of_image[i] + grand) ** 2 for i in range(5)) / 8
    var_seed, var_image = (ms_seed - rest) / 5, (ms_image - rest) / 3
    assert min(var_seed, var_image) > 0
    variance = var_seed / 3 + var_image / 5 + rest / 15
    found = paired_estimate(d)
    assert found.error**2 == pytest.approx(variance, rel=1e-12)
    satterthwaite = variance**2 / ((ms_seed**2 / 2 + ms_image**2 / 4 + rest**2 / 8) / 15**2)
    assert found.freedom == pytest.approx(max(1, satterthwaite), rel=1e-12)


def test_where_one_of_them_does_not_repeat_the_other_alone_counts() -> None:
    d = draw(torch.Generator().manual_seed(5), (1.0, 1.0, 1.0), 6, 7)
    one_seed, one_image = paired_estimate(d[:1]), paired_estimate(d[:, :1])
    assert one_seed.error == pytest.approx(d[0].std().item() / math.sqrt(7), rel=1e-12)
    assert standard_error(d[0].tolist()) == pytest.approx(one_seed.error, rel=1e-12)
    assert math.isnan(standard_error([1.0])) and math.isnan(standard_error([]))
    assert one_seed.freedom == pytest.approx(6)
    assert one_image.error == pytest.approx(d[:, 0].std().item() / math.sqrt(6), rel=1e-12)
    assert one_image.freedom == pytest.approx(5)
    assert math.isnan(paired_estimate(d[:1, :1]).error)
    assert not paired_estimate(d[:1, :1]).is_significant
    apart = unpaired_estimate(d[:1], d[1:2])  # as if paired, where each side has one seed
    assert apart == paired_estimate(d[1:2] - d[:1])
    sides = unpaired_estimate(d[:3, :1], d[3:, :1])  # Welch's formula
    welch = (d[:3, 0].var() / 3 + d[3:, 0].var() / 3).sqrt().item()
    assert sides.error == pytest.approx(welch, rel=1e-12)


def test_equal_runs_have_no_difference() -> None:
    for seeds, images in ((3, 4), (1, 4), (3, 1)):
        found = paired_estimate(torch.zeros(seeds, images))
        assert (found.mean, found.error, found.is_significant) == (0, 0, False)


@pytest.mark.parametrize(
    ("freedom", "x"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (10, 2.228), (30, 2.042), (1e9, 1.960)],
)  # fmt: skip
def test_the_quantiles_are_those_of_the_published_table(freedom: float, x: float) -> None:
    assert t_quantile(freedom) == pytest.approx(x, abs=6e-4)
    # closed form: for 1 it is the Cauchy distribution's
    assert t_quantile(1, 0.5) == pytest.approx(math.tan(math.pi / 4), rel=1e-6)
