"""Singular values of updates, and the best adapter of a given rank or error.

An update scale * up @ down is decomposed without forming it: up = Q1 R1, down^T = Q2 R2
(Householder QR of thin matrices), and the SVD of the small core scale * R1 R2^T gives that of the
update. An update with more columns of factors than its layer is wide is formed instead, so that the
work grows linearly with them. Cutting it off is optimal in Frobenius norm (Eckart and Young 1936).
Kernels of convolutions are flattened over (in, kh, kw); the groups of a grouped convolution are
decomposed one by one, and a rank counts the rows of `down` over all groups.

Factors in fp32 are decomposed in fp32, the core in fp64: sigma is within 1e-6 of the largest one.
Layers are decomposed one at a time: batching equal shapes gains nothing on a CPU, where LAPACK runs
them in turn (2-core EPYC, 64 columns: 1.4 ms a layer 1280 wide alone, 3.1 ms in a batch of eight).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank, factor_blocks, from_blocks, refuse_dora
from merging.factor_sums import WeightedAdapters, concat_factors, one_thread
from merging.rounding import MOST_DOUBLES
from merging.survival import InputEnergies, energies_of_core
from merging.truncation import ApproximationReport, Keep

ITERATIONS = 32  # of the randomized SVD; Gaussian matrices, which have no gap at all, take 5 to 15
FINE = 1e-3  # an error below which the exact SVD works in fp64: fp32 adds about 3e-6 that it hides
EXCESS = 1e-3  # of the optimal error: the most that the randomized SVD may lose on top of it


def factor_svd(lr: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """(u [g, out / g, k], sigma [g, k] in fp64, vh [g, k, fan in]) of the update.

    k = min(r / g, out / g, fan in). Raises UserError for a DoRA.
    """
    refuse_dora(lr)
    with one_thread():
        core = _decompose_core(lr)
        return core.singular_triples()


class _Core(NamedTuple):
    """The factors in bases of each group, r1 = q1^T up and r2 = q2^T down^T, and the SVD of
    scale r1 r2^T, in fp64; a basis that is None is the identity.
    """

    q1: Tensor | None
    r1: Tensor
    q2: Tensor | None
    r2: Tensor
    u: Tensor
    sigma: Tensor
    vh: Tensor

    def singular_triples(self) -> tuple[Tensor, Tensor, Tensor]:
        u, vh = self.u.to(self.r1.dtype), self.vh.to(self.r2.dtype)
        u = u if self.q1 is None else self.q1 @ u
        return u, self.sigma, vh if self.q2 is None else vh @ self.q2.mT


def _decompose_core(lr: LowRank) -> _Core:
    up, down = factor_blocks(lr)
    if up.shape[2] > min(up.shape[1], down.shape[2]):
        return _decompose_product(up, down.mT, lr.scale)
    q1, r1 = torch.linalg.qr(up)
    q2, r2 = torch.linalg.qr(down.mT)
    core = lr.scale * (r1.double() @ r2.double().mT)
    return _Core(q1, r1, q2, r2, *torch.linalg.svd(core, full_matrices=False))


def _decompose_product(left: Tensor, right: Tensor, scale: float) -> _Core:
    """`_decompose_core` of scale left right^T, for more columns than the narrower side has rows.

    The narrower side keeps its own coordinates; the other gets a basis of the product.
    """
    if left.shape[1] > right.shape[1]:
        q1, r1, q2, r2, u, sigma, vh = _decompose_product(right, left, scale)
        return _Core(q2, r2, q1, r1, vh.mT, sigma, u.mT)
    basis, core = torch.linalg.qr(right @ left.mT)
    triples = torch.linalg.svd(scale * core.mT.double(), full_matrices=False)
    return _Core(None, left, basis, basis.mT @ right, *triples)


def singular_values(lr: LowRank) -> Tensor:
    """Singular values [g, k] of the update in fp64, descending; half the work of `factor_svd`.

    Raises UserError for a DoRA.
    """
    refuse_dora(lr)
    up, down = factor_blocks(lr)
    with one_thread():
        if up.shape[2] > min(up.shape[1], down.shape[2]):
            product = up @ down if up.shape[1] >= down.shape[2] else down.mT @ up.mT
            core = torch.linalg.qr(product, mode="r").R
            return torch.linalg.svdvals(lr.scale * core.double())
        r1 = torch.linalg.qr(up, mode="r").R
        r2 = torch.linalg.qr(down.mT, mode="r").R
        return torch.linalg.svdvals(lr.scale * (r1.double() @ r2.double().mT))


def compress_adapter(lr: LowRank, keep: Keep) -> tuple[LowRank, ApproximationReport]:
    """The nearest adapter of the given rank or error, and its report.

    It has scale 1 and sqrt(sigma) in each factor, fp32 or better. Raises UserError for a DoRA.
    """
    u, sigma, vh = factor_svd(lr)
    steps = keep.steps(sigma.square().sum(0), len(sigma))
    return _truncate(u, sigma, vh, lr.down.shape[2:], steps, lr.rank)


def compress_sum(
    weighted: WeightedAdapters, keep: Keep
) -> tuple[LowRank, ApproximationReport, InputEnergies]:
    """`compress_adapter` of a weighted sum, and the energies of its inputs (see survival.py)."""
    lr = concat_factors(weighted)
    with one_thread():
        core = _decompose_core(lr)
        steps = keep.steps(core.sigma.square().sum(0), len(core.sigma))
        factors = core.r1.double(), core.r2.double()
        inputs = energies_of_core(weighted, factors, (core.u, core.sigma, core.vh), steps)
        triples = core.singular_triples()
    return *_truncate(*triples, lr.down.shape[2:], steps, lr.rank), inputs


def distill_update(
    delta: Tensor, keep: Keep, *, groups: int = 1, generator: torch.Generator | None = None
) -> tuple[LowRank, ApproximationReport]:
    """The nearest adapter of a dense update, such as tuned - base, and its report.

    `delta` is [out, in] or [out, in / groups, kh, kw]; no entry is clamped. By the exact SVD, in
    fp64 for errors below FINE; with a generator by the randomized one (arXiv 0909.4061, algorithm
    4.4) in fp64, iterated until the estimated excess over the optimal error is below EXCESS; after
    ITERATIONS without success the exact one is taken. The estimate is in the report, 0 for the
    exact SVD.

    Raises ValueError when a generator comes without a rank.
    """
    if generator is not None and keep.rank is None:
        raise ValueError(
            "the randomized SVD needs a rank; without a generator the exact one finds the rank for "
            "an error"
        )
    dense = delta.reshape(groups, delta.shape[0] // groups, -1)
    dense = dense.to(torch.promote_types(delta.dtype, torch.float32))
    full = groups * min(dense.shape[1:])
    found, square = None, 0.0
    if generator is not None:
        steps = keep.steps(torch.ones(full // groups), groups)
        doubles = dense.double()
        square = _square_norm(doubles)
        found = _randomized_svd(doubles, steps, square, generator)
        del doubles
    is_fine = keep.rank is None and keep.allowance < FINE**2
    exact = dense.double() if is_fine else dense
    u, sigma, vh, excess = found or (*torch.linalg.svd(exact, full_matrices=False), 0.0)
    steps = keep.steps(sigma.double().square().sum(0), groups)
    u, sigma, vh = u.to(dense.dtype), sigma.double(), vh.to(dense.dtype)
    adapter, report = _truncate(u, sigma, vh, delta.shape[2:], steps, full)
    if found is None:
        return adapter, report
    lost = math.sqrt(max(0.0, square - float(sigma[:, :steps].square().sum())))
    return adapter, report._replace(norm=math.sqrt(square), lost=lost, excess=excess)


def _truncate(
    u: Tensor, sigma: Tensor, vh: Tensor, kernel: Iterable[int], steps: int, full: int
) -> tuple[LowRank, ApproximationReport]:
    """The first `steps` singular triples of each group as an adapter, and its report."""
    root = sigma[:, :steps].sqrt().to(u.dtype)
    up = u[..., :steps] * root[:, None, :]
    down = root[:, :, None] * vh[:, :steps]
    adapter = from_blocks(up, down, tuple(kernel))
    norm = float(sigma.square().sum().sqrt())
    lost = float(sigma[:, steps:].square().sum().sqrt())
    return adapter, ApproximationReport(adapter.rank, full, norm, lost)


def _square_norm(a: Tensor) -> float:
    """The squared norm, a part at a time."""
    return math.fsum(float(part.square().sum()) for part in a.reshape(-1).split(MOST_DOUBLES))


def _randomized_svd(
    a: Tensor, steps: int, square: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """(u, sigma, vh, estimated excess of cutting after `steps`) of the leading triples of a.

    `a` is [g, m, n], `square` its squared norm. None when the excess stays above EXCESS.
    """
    width = min(steps + max(8, steps // 2), *a.shape[1:])
    shape, device = (a.shape[0], a.shape[2], width), generator.device
    start = torch.randn(shape, generator=generator, dtype=a.dtype, device=device).to(a.device)
    q = torch.linalg.qr(a @ start).Q
    kept = []
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
    """Estimated lost / optimum - 1, from the energy kept after each iteration.

    The energy grows toward the optimum. Where the spectrum has a gap the gains shrink
    geometrically, by a ratio that grows toward its limit (so its square root is taken); where it
    has none the energy still missing after j iterations is of order 1 / j (arXiv 1504.05477), hence
    about j times the last gain. The first gains come from the leading triples and carry no
    information about the rest.
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
