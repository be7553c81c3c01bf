"""Singular values of updates, and the best adapter of a given rank or error.

An update scale * up @ down is decomposed without forming it: up = Q1 R1, down^T = Q2 R2 (Householder QR of thin matrices), and the SVD of the
small core scale * R1 R2^T gives that of the update. Cutting it off is optimal in Frobenius norm (Eckart and Young 1936). Kernels of convolutions
are flattened over (in, kh, kw); the groups of a grouped convolution are decomposed one by one, and a rank counts the rows of `down` over all groups.
Factors in fp32 are decomposed in fp32, the core in fp64: sigma is within 1e-6 of the largest one. Layers go one at a time: batching equal shapes
gains nothing on a CPU, where LAPACK takes them in turn (2-core EPYC, 64 columns: 1.4 ms a layer 1280 wide alone, 3.1 ms in a batch of eight).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank, factor_blocks, from_blocks, refuse_dora

ITERATIONS = 32  # of the randomised SVD; Gaussian matrices, which have no gap at all, take 5 to 15
EXCESS = 1e-3  # of the optimum: what the randomised SVD may lose on top of it


@dataclass(frozen=True)
class Keep:
    """How much of an update to keep: a rank, or the smallest rank with at most this relative Frobenius error or at least this energy."""

    rank: int | None = None
    max_error: float | None = None  # of the norm of the update
    energy: float | None = None  # of its square

    def __post_init__(self) -> None:
        given = [
            name for name in ("rank", "max_error", "energy") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"give one of rank, max_error and energy, got {' and '.join(given) or 'none'}"
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"a rank is at least 1, got {self.rank}")
        if self.rank is None and not 0 <= self.allowance <= 1:
            raise ValueError(
                f"{given[0]} is a share between 0 and 1, got {getattr(self, given[0])}"
            )

    @property
    def allowance(self) -> float:
        """The share of the squared norm that may be lost."""
        return (
            self.max_error * abs(self.max_error)
            if self.max_error is not None
            else 1 - (self.energy or 0.0)
        )

    def steps(self, squares: Tensor, groups: int) -> int:
        """How many singular triples of each group to keep, at least 1, of squared singular values [k] that are sums over the groups.

        Raises ValueError for a rank that the groups cannot share evenly.
        """
        if self.rank is None:
            return max(1, steps_within(squares, self.allowance * float(squares.sum())))
        if self.rank % groups:
            raise ValueError(
                f"rank {self.rank} cannot be shared by the {groups} groups of a convolution; choose a multiple of {groups}"
            )
        return min(self.rank // groups, len(squares))


class ApproximationReport(NamedTuple):
    """What an approximation kept. A rank above what the update has keeps all of it, and `rank` says so."""

    rank: int
    full: int  # rank before
    norm: float  # Frobenius norm of what was approximated
    lost: float  # and of the difference
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
    """Of all layers together: ranks add up, norms and losses add up in squares, the excess is the largest."""
    rows = list(reports)
    norm, lost = (
        math.sqrt(sum(getattr(row, name) ** 2 for row in rows)) for name in ("norm", "lost")
    )
    return ApproximationReport(
        sum(row.rank for row in rows),
        sum(row.full for row in rows),
        norm,
        lost,
        max((row.excess for row in rows), default=0.0),
    )


def factor_svd(lr: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """(u [g, out / g, k], sigma [g, k] in fp64, vh [g, k, fan in]) of the update, k = min(r / g, out / g, fan in).

    Raises UserError for a DoRA.
    """
    refuse_dora(lr)
    up, down = factor_blocks(lr)
    with one_thread():
        (q1, r1), (q2, r2) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
        u, sigma, vh = torch.linalg.svd(
            lr.scale * (r1.double() @ r2.double().mT), full_matrices=False
        )
        return q1 @ u.to(up.dtype), sigma, vh.to(up.dtype) @ q2.mT


def singular_values(lr: LowRank) -> Tensor:
    """Singular values [g, k] of the update in fp64, descending; half the work of `svd`. Raises UserError for a DoRA."""
    refuse_dora(lr)
    up, down = factor_blocks(lr)
    with one_thread():
        r1, r2 = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.mT, mode="r").R
        return torch.linalg.svdvals(lr.scale * (r1.double() @ r2.double().mT))


def compress_adapter(lr: LowRank, keep: Keep) -> tuple[LowRank, ApproximationReport]:
    """The nearest adapter of the wished rank or error, scale 1, sqrt(sigma) in either factor; fp32 or better. Raises UserError for a DoRA."""
    u, sigma, vh = factor_svd(lr)
    return _truncate(
        u, sigma, vh, lr.down.shape[2:], keep.steps(sigma.square().sum(0), len(sigma)), lr.rank
    )


def distill_update(
    delta: Tensor, keep: Keep, *, groups: int = 1, generator: torch.Generator | None = None
) -> tuple[LowRank, ApproximationReport]:
    """The nearest adapter of a dense update [out, in] or [out, in / groups, kh, kw], such as tuned - base; nothing is clamped.

    By the exact SVD; with a generator by the randomised one (arXiv 0909.4061, algorithm 4.4) in fp64, iterated until the estimated excess over the
    optimal error is below EXCESS; after ITERATIONS without success the exact one is taken. The estimate stands in the report, 0 for the exact one.

    Raises ValueError when a generator comes without a rank.
    """
    dense = delta.reshape(groups, delta.shape[0] // groups, -1).to(
        torch.promote_types(delta.dtype, torch.float32)
    )
    full = groups * min(dense.shape[1:])
    if generator is not None and keep.rank is None:
        raise ValueError(
            "the randomised SVD needs a rank; without a generator the exact one finds the rank for an error"
        )
    found = (
        _randomized_svd(dense.double(), keep.steps(torch.ones(full // groups), groups), generator)
        if generator
        else None
    )
    u, sigma, vh, excess = found or (*torch.linalg.svd(dense, full_matrices=False), 0.0)
    steps = keep.steps(sigma.double().square().sum(0), groups)
    adapter, report = _truncate(
        u.to(dense.dtype), sigma.double(), vh.to(dense.dtype), delta.shape[2:], steps, full
    )
    if found is None:
        return adapter, report
    square = float(dense.double().square().sum())
    lost = math.sqrt(max(0.0, square - float(sigma[:, :steps].square().sum())))
    return adapter, report._replace(norm=math.sqrt(square), lost=lost, excess=excess)


@contextmanager
def one_thread() -> Iterator[None]:
    """The block runs on one CPU thread of this process.

    Thin factorisations are thousands of tiny parallel regions. On 2 cores a second thread gains nothing even at best (1280 x 1280, 64 columns: 2.5 ms
    with one thread, 2.7 with two), and where other processes want the cores the threads wait for each other: a whole file took 7 s against 234 s.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steps_within(squares: Tensor, allowance: float) -> int:
    """The smallest number of leading entries of a descending [k] whose remainder sums to at most `allowance`."""
    tails = squares.flip(0).cumsum(0).flip(0)  # what is lost when the entries from i on are
    return int((tails > allowance).sum())


def _truncate(
    u: Tensor, sigma: Tensor, vh: Tensor, kernel: Iterable[int], steps: int, full: int
) -> tuple[LowRank, ApproximationReport]:
    root = sigma[:, :steps].sqrt().to(u.dtype)
    adapter = from_blocks(
        u[..., :steps] * root[:, None, :], root[:, :, None] * vh[:, :steps], tuple(kernel)
    )
    norm, lost = (float(part.square().sum().sqrt()) for part in (sigma, sigma[:, steps:]))
    return adapter, ApproximationReport(adapter.rank, full, norm, lost)


def _randomized_svd(
    a: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """(u, sigma, vh, estimated excess of cutting after `steps`) of the leading triples of a [g, m, n]; None when the excess stays above EXCESS."""
    width = min(steps + max(8, steps // 2), *a.shape[1:])
    start = torch.randn(
        a.shape[0], a.shape[2], width, generator=generator, dtype=a.dtype, device=generator.device
    ).to(a.device)
    q = torch.linalg.qr(a @ start).Q
    square, kept = float(a.square().sum()), []
    for _ in range(ITERATIONS):
        y = a.mT @ q  # [g, n, width]
        kept.append(float(torch.linalg.eigvalsh(y.mT @ y)[:, -steps:].sum()))
        excess = _estimate_excess(square, kept)
        if excess < EXCESS:
            v, sigma, uh = torch.linalg.svd(y, full_matrices=False)
            return q @ uh.mT, sigma, v.mT, excess
        q = torch.linalg.qr(a @ torch.linalg.qr(y).Q).Q
    return None


def _estimate_excess(square: float, kept: list[float]) -> float:
    """Estimated lost / optimum - 1 from the energy kept after each iteration, which grows toward the optimum.

    Where the spectrum has a gap the gains shrink geometrically, by a ratio that grows toward its limit (so its square root is taken);
    where it has none the energy still missing after j iterations is of order 1 / j (arXiv 1504.05477), hence about j times the last gain.
    The first gains are the leading triples falling into place and say nothing about the rest.
    """
    lost = square - kept[-1]
    if lost <= 1e-13 * square:  # nothing but rounding is lost
        return 0.0
    if len(kept) < 5:
        return math.inf
    before, last = kept[-2] - kept[-3], kept[-1] - kept[-2]
    if last <= 1e-15 * square:
        return 0.0
    ratio = math.sqrt(min(last / before, 0.999)) if before > 0 else 0.999
    missing = last * max(ratio / (1 - ratio), len(kept))
    return math.sqrt(lost / (lost - missing)) - 1 if missing < lost else math.inf
