"""How much of an update is kept, and the error of the approximation. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """A criterion of truncation: a rank, a largest relative Frobenius error, or a share of energy.

    For error and energy the smallest rank that meets them is kept.
    """

    rank: int | None = None
    max_error: float | None = None  # relative to the norm of the update
    energy: float | None = None  # share of the squared norm

    def __post_init__(self) -> None:
        values = {"rank": self.rank, "max_error": self.max_error, "energy": self.energy}
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise ValueError(f"give one of rank, max_error and energy, got {names}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"a rank is at least 1, got {self.rank}")
        if self.rank is None and not 0 <= self.allowance <= 1:
            ((name, value),) = given.items()
            raise ValueError(f"{name} is a share between 0 and 1, got {value}")

    @property
    def allowance(self) -> float:
        """The share of the squared norm that may be lost."""
        if self.max_error is not None:
            return self.max_error * abs(self.max_error)
        return 1 - (self.energy or 0.0)

    def steps(self, squares: Tensor, groups: int) -> int:
        """How many singular triples of each group to keep, at least 1.

        `squares` [k] are squared singular values, summed over the groups. Raises ValueError for a
        rank that the groups cannot share evenly.
        """
        if self.rank is None:
            return max(1, steps_within(squares, self.allowance * float(squares.sum())))
        if self.rank % groups:
            raise ValueError(
                f"rank {self.rank} cannot be shared by the {groups} groups of a convolution; "
                f"choose a multiple of {groups}"
            )
        return min(self.rank // groups, len(squares))


class ApproximationReport(NamedTuple):
    """The rank and the error of an approximation.

    A rank above the update's own keeps all of it, and `rank` is then the update's.
    """

    rank: int
    full: int  # rank before
    norm: float  # Frobenius norm of the update that was approximated
    lost: float  # Frobenius norm of the difference
    excess: float = 0.0  # estimate of lost / optimum - 1; 0 where the decomposition is exact

    @property
    def error(self) -> float:
        """Relative Frobenius error; 0 for an update that is zero."""
        return self.lost / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """Share of the squared norm that was kept."""
        return 1 - self.error**2


def total_report(reports: Iterable[ApproximationReport]) -> ApproximationReport:
    """The report over all layers: sums of ranks, root sums of squared norms, the largest excess."""
    ranks = ranks_before = 0
    norm = lost = excess = 0.0
    for report in reports:
        ranks += report.rank
        ranks_before += report.full
        norm += report.norm**2
        lost += report.lost**2
        excess = max(excess, report.excess)
    return ApproximationReport(ranks, ranks_before, math.sqrt(norm), math.sqrt(lost), excess)


def steps_within(squares: Tensor, allowance: float) -> int:
    """The smallest n for which the entries [n:] of descending squares [k] sum to <= `allowance`."""
    tails = squares.flip(0).cumsum(0).flip(0)  # lost energy when the entries from i on are
    return int((tails > allowance).sum())
