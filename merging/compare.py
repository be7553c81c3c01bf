"""Compare adapters in factor space, in fp64.

Principal angles between their row and column spaces, and the least-squares combination of adapters
for a given update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank
from merging.factor_sums import double_blocks, inner_product
from merging.svd import factor_svd


class PrincipalAngles(NamedTuple):
    """Principal angles in radians, ascending; 0 where the spaces share a direction.

    Those of a grouped convolution are over all its groups.
    """

    outputs: Tensor  # between the column spaces of the updates, [min of the two ranks] in fp64
    inputs: Tensor  # between their row spaces


class LeastSquaresFit(NamedTuple):
    """The least-squares combination of adapters that is nearest to an update."""

    coefficients: Tensor  # [k] in fp64; the shortest ones where adapters are linearly dependent
    unexplained: float  # relative norm of the residual; 0 for an update that is zero


class GramSums(NamedTuple):
    """The inner products of an update and k adapters, for `fit_coefficients`.

    Those of several layers add up.
    """

    gram: Tensor  # [k, k] inner products of the adapters, fp64
    products: Tensor  # [k] inner products of the update with each of them, fp64
    square: float  # squared norm of the update


def inner_product_with_dense(delta: Tensor, lr: LowRank) -> float:
    """The inner product of a dense update, in the shape of the base weight, and an adapter's.

    It costs one product with thin matrices. Raises UserError for a DoRA.
    """
    up, down = double_blocks(lr)
    dense = delta.double().reshape(*up.shape[:2], -1)
    return lr.scale * float(((dense @ down.mT) * up).sum())


def principal_angles(
    first: LowRank, second: LowRank, *, tolerance: float = 1e-5
) -> PrincipalAngles:
    """The angles between the output spaces of two updates, and between their input spaces.

    They are near pi / 2 where the updates do not interfere. Directions whose singular value is
    below `tolerance` of the largest are left out. Small angles are computed from their sines and
    large ones from their cosines (Bjorck and Golub 1973), so both are accurate. Raises UserError
    for a DoRA.
    """
    (out_1, in_1), (out_2, in_2) = _spaces(first, tolerance), _spaces(second, tolerance)
    outputs = [_angles_between(a, b) for a, b in zip(out_1, out_2)]
    inputs = [_angles_between(a, b) for a, b in zip(in_1, in_2)]
    return PrincipalAngles(torch.cat(outputs).sort().values, torch.cat(inputs).sort().values)


def gram_sums(delta: Tensor, adapters: Sequence[LowRank | None]) -> GramSums:
    """The inner products of one layer: of a dense update and the adapters of several files.

    An adapter is None if its file has none for the layer. Raises UserError for a DoRA.
    """
    k = len(adapters)
    gram = torch.zeros(k, k, dtype=torch.float64)
    products = torch.zeros(k, dtype=torch.float64)
    present = [(i, lr) for i, lr in enumerate(adapters) if lr is not None]
    for i, lr in present:
        products[i] = inner_product_with_dense(delta, lr)
        for j, other in present:
            gram[i, j] = inner_product(lr, other) if j <= i else 0.0
    return GramSums(gram + gram.tril(-1).T, products, float(delta.double().square().sum()))


def vector_sums(delta: Tensor, vectors: Sequence[Tensor | None]) -> GramSums:
    """`gram_sums` of one parameter: of its difference and what each file adds to it."""
    rows = torch.zeros(len(vectors), delta.numel(), dtype=torch.float64)
    for i, vector in enumerate(vectors):
        if vector is not None:
            rows[i] = vector.double()
    flat = delta.double().flatten()
    return GramSums(rows @ rows.mT, rows @ flat, float(flat.square().sum()))


def compare_parameters(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The cells of diff's table for the vectors that two files add to one network."""
    shared = first.keys() & second.keys()
    norm_a = math.sqrt(sum(float(change.double().square().sum()) for change in first.values()))
    norm_b = math.sqrt(sum(float(change.double().square().sum()) for change in second.values()))
    inner = sum(float(first[path].double() @ second[path].double()) for path in shared)
    distance = math.sqrt(max(0.0, norm_a**2 + norm_b**2 - 2 * inner))
    counts = len(shared), len(first) - len(shared), len(second) - len(shared)
    cosine = f"{inner / (norm_a * norm_b):.4f}" if norm_a * norm_b else "-"
    relative = f"{distance / norm_a:.4g}" if norm_a else "-"
    return (*map(str, counts), f"{norm_a:.4g}", f"{norm_b:.4g}", cosine, relative)


def fit_coefficients(layers: Iterable[GramSums]) -> LeastSquaresFit:
    """The coefficients, one set for all layers, with sum_i c_i delta W_i nearest to the update.

    Raises ValueError without a layer.
    """
    parts = list(layers)
    if not parts:
        raise ValueError("there is no layer to fit")
    gram = torch.stack([part.gram for part in parts]).sum(0)
    products = torch.stack([part.products for part in parts]).sum(0)
    square = sum(part.square for part in parts)
    # divided by the norms, so that the cut-off of the pseudo-inverse does not depend on strengths
    norms = gram.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.pinv(gram / norms[:, None] / norms, rtol=1e-12, hermitian=True)
    coefficients = inverse @ (products / norms) / norms
    left = square - 2 * float(coefficients @ products) + float(coefficients @ gram @ coefficients)
    return LeastSquaresFit(coefficients, math.sqrt(max(0.0, left) / square) if square else 0.0)


def _spaces(lr: LowRank, tolerance: float) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal bases [out, k] and [in, k] of an update's output and input space, by group."""
    u, sigma, vh = factor_svd(lr)
    outputs, inputs = [], []
    for g, values in enumerate(sigma):
        k = int((values > tolerance * sigma.max()).sum())
        outputs.append(u[g, :, :k].double())
        inputs.append(vh[g, :k].double().mT)
    return outputs, inputs


def _angles_between(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles [min] in fp64 between the spans of orthonormal bases [n, k] and [n, l]."""
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    cosines = torch.linalg.svdvals(a.mT @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.mT @ b)).flip(0).clamp(max=1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())
