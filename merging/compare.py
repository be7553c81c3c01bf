"""Comparisons of adapters from small matrices: inner products, angles between their spaces, and the best combination for a given update.

<A, B> = sum of the entries of A * B = s_a s_b sum((up_a^T up_b) * (down_a down_b^T)),   in fp64; the dense updates are never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank, factor_blocks, refuse_dora
from merging.svd import factor_svd


class PrincipalAngles(NamedTuple):
    """Principal angles in radians, ascending; 0 where the spaces share a direction. All groups of a grouped convolution together."""

    outputs: Tensor  # between the column spaces of the updates, [min of the two ranks] in fp64
    inputs: Tensor  # between their row spaces


class LeastSquaresFit(NamedTuple):
    """The least-squares combination of adapters that is nearest to an update."""

    coefficients: Tensor  # [k] in fp64; the shortest ones where the adapters are linearly dependent
    unexplained: float  # norm of what is left, relative to the norm of the update; 0 for an update that is zero


class GramSums(NamedTuple):
    """What `fit` needs to know of an update and k adapters; those of several layers add up."""

    gram: Tensor  # [k, k] inner products of the adapters, fp64
    products: Tensor  # [k] inner products of the update with each of them, fp64
    square: float  # squared norm of the update


def inner_product(first: LowRank, second: LowRank) -> float:
    """The inner product of two updates of one layer. Raises UserError for a DoRA."""
    refuse_dora(first)
    refuse_dora(second)
    (up_1, down_1), (up_2, down_2) = (
        [part.double() for part in factor_blocks(lr)] for lr in (first, second)
    )
    return first.scale * second.scale * float(((up_1.mT @ up_2) * (down_1 @ down_2.mT)).sum())


def frobenius_norm(lr: LowRank) -> float:
    """The Frobenius norm of the update. Raises UserError for a DoRA."""
    return math.sqrt(max(0.0, inner_product(lr, lr)))


def cosine_similarity(first: LowRank, second: LowRank) -> float:
    """The cosine of the angle between two updates as vectors; 0 when one of them is zero. Raises UserError for a DoRA."""
    norms = frobenius_norm(first) * frobenius_norm(second)
    return inner_product(first, second) / norms if norms else 0.0


def inner_product_with_dense(delta: Tensor, lr: LowRank) -> float:
    """The inner product of a dense update, with the shape of the base weight, and an adapter's: one thin product. Raises UserError for a DoRA."""
    refuse_dora(lr)
    up, down = (part.double() for part in factor_blocks(lr))
    dense = delta.double().reshape(*up.shape[:2], -1)
    return lr.scale * float(((dense @ down.mT) * up).sum())


def principal_angles(
    first: LowRank, second: LowRank, *, tolerance: float = 1e-5
) -> PrincipalAngles:
    """The angles between what two updates read and between what they write, near pi / 2 where they do not interfere.

    Directions whose singular value is below `tolerance` of the largest count as absent. Small angles are taken from their sines and large ones from
    their cosines (Bjorck and Golub 1973), so both ends are accurate. Raises UserError for a DoRA.
    """
    spaces = []
    for lr in (first, second):
        u, sigma, vh = factor_svd(lr)
        present = [int((row > tolerance * sigma.max()).sum()) for row in sigma]
        spaces.append(
            [(u[g, :, :k].double(), vh[g, :k].double().mT) for g, k in enumerate(present)]
        )
    outputs, inputs = (
        torch.cat([_angles_between(a[side], b[side]) for a, b in zip(*spaces)]).sort().values
        for side in (0, 1)
    )
    return PrincipalAngles(outputs, inputs)


def gram_sums(delta: Tensor, adapters: Sequence[LowRank | None]) -> GramSums:
    """Of one layer: a dense update and the adapters that files hold for it, None where a file holds none. Raises UserError for a DoRA."""
    k = len(adapters)
    gram, products = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    present = [(i, lr) for i, lr in enumerate(adapters) if lr is not None]
    for i, lr in present:
        products[i] = inner_product_with_dense(delta, lr)
        for j, other in present:
            gram[i, j] = inner_product(lr, other) if j <= i else 0.0
    return GramSums(gram + gram.tril(-1).T, products, float(delta.double().square().sum()))


def fit_coefficients(layers: Iterable[GramSums]) -> LeastSquaresFit:
    """The coefficients, the same in all layers, for which sum_i c_i delta W_i is nearest to the update.

    Raises ValueError without a layer.
    """
    rows = list(layers)
    if not rows:
        raise ValueError("there is no layer to fit")
    gram, products = (
        torch.stack([getattr(row, name) for row in rows]).sum(0) for name in ("gram", "products")
    )
    square = sum(row.square for row in rows)
    lengths = (
        gram.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    )  # files of any strength weigh alike in the cut-off below
    coefficients = (
        torch.linalg.pinv(gram / lengths[:, None] / lengths, rtol=1e-12, hermitian=True)
        @ (products / lengths)
        / lengths
    )
    left = square - 2 * float(coefficients @ products) + float(coefficients @ gram @ coefficients)
    return LeastSquaresFit(coefficients, math.sqrt(max(0.0, left) / square) if square else 0.0)


def _angles_between(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles [min] in fp64 between the spans of two orthonormal bases [n, k] and [n, l]."""
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    cosines = torch.linalg.svdvals(a.mT @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.mT @ b)).flip(0).clamp(max=1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())
