"""The update of one layer that several concepts share, by least squares on their own inputs.

Gradient fusion of Mix-of-Show (arXiv 2305.18292, section 3.3): for updates D_c and inputs X_c
[n_c, in] of the layer in the model of concept c, D minimises sum_c |X_c (D - D_c)^T|^2. The source
runs LBFGS on the weight; here the minimum is solved for. With G_c = X_c^T X_c and G = sum_c G_c,

    D = sum_c D_c G_c G^+                       primal, for n >= in samples
      = sum_c D_c X_c^T (X X^T)^+ [c, :] X      dual, for fewer samples

is the minimiser of smallest norm: it is 0 for inputs that no concept has, so that the fused weight
is the base's there. D_c = up_c down_c gives D = [up_1, up_2 ...] [Z_1; Z_2 ...] with Z_c =
down_c G_c G^+, whose rank is at most the sum of ranks.

The very minimum fits directions in which inputs hardly vary with large numbers, which harm other
prompts. So a little more than the minimum is allowed, and of all D within that the one of least
norm is taken: it is D with (G + rho)^-1 in place of G^+ (Tikhonov), for the largest such rho. The
loss grows by sum_i |R v_i|^2 rho^2 / (l_i (l_i + rho)^2), for R = sum_c D_c G_c and the eigenvalues
l_i and eigenvectors v_i of G.

`towards_sum` takes the D of least distance to the sum S of the updates instead: the same problem
for D - S, whose targets are D_c - S = -(the updates of the other concepts). Inputs that no concept
has get the sum, and with a larger rho all of D is pulled to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 14  # rows that are in fp64 at a time
# Singular values of the inputs below this many units of their dtype are noise of a forward pass:
# rounding alone gives 2 (|E| <= eps rms (sqrt n + sqrt in), and the largest value is at least
# rms sqrt(max(n, in))), the layers before it some more.
NOISE_UNITS = 16


class Factors(NamedTuple):
    """An update up @ down; `up` is None for one that is given as a whole, in `down`."""

    up: Tensor | None  # [out, r]
    down: Tensor  # [r, in], or [out, in]


class InputMoments:
    """The inputs of a layer in one concept's model: rows, or their Gram matrix once it is smaller.

    Rows are kept in their dtype, the matrix is summed in fp64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.rows: list[Tensor] = []
        self.gram: Tensor | None = None  # [in, in] fp64
        self.unit = 0.0  # the relative rounding error of the inputs

    def add(self, rows: Tensor) -> None:
        """Adds inputs [n, in]."""
        self.count += len(rows)
        self.unit = max(self.unit, torch.finfo(rows.dtype).eps)
        if self.count < rows.shape[1]:
            self.rows.append(rows.clone())  # of a tensor that the network may write over
            return
        if self.gram is None:
            self.gram = torch.zeros(rows.shape[1:] * 2, dtype=torch.float64, device=rows.device)
        for part in (*self.rows, rows):
            _add_gram_(self.gram, part)
        self.rows = []

    def all_rows(self) -> Tensor:
        """The inputs [n, in] fp64, of fewer rows than columns."""
        return torch.cat(self.rows).double()

    def gram_matrix(self) -> Tensor:
        """X^T X, [in, in] fp64."""
        if self.gram is not None:
            return self.gram
        rows = self.all_rows()
        return rows.T @ rows

    def inner_products(self, factors: Tensor) -> Tensor:
        """A X^T X A^T of factors A [k, in], [k, k] fp64."""
        if self.gram is not None:
            return factors @ self.gram @ factors.T
        outputs = self.all_rows() @ factors.T
        return outputs.T @ outputs


@dataclass(frozen=True)
class Regularization:
    """How far above its minimum a loss may be, so that the update is small."""

    of_minimum: float = 1e-3  # share of the minimum
    # Share of sum_c |X_c D_c^T|^2: matters where the minimum is 0.
    of_energy: float = 1e-12
    ridge: float = 0.0  # the least rho, as a share of the mean eigenvalue of G
    towards_sum: bool = False  # whether D is to be near the sum of updates, not near 0


EXACT = Regularization(0.0, 0.0)  # the minimiser


class FusedLayer(NamedTuple):
    """The fused update of a layer, and how well it does each concept's work.

    A residual is |X_c (D - D_c)^T|^2, an energy |X_c D_c^T|^2: kept = 1 - residual / energy.
    """

    update: Factors  # fp64
    residuals: tuple[float, ...]
    energies: tuple[float, ...]
    minimum: float  # the least possible sum of residuals

    @property
    def least_loss(self) -> float:
        """The relative sum of squares that no update avoids; 0 where every update is 0."""
        energy = sum(self.energies)
        return self.minimum / energy if energy else 0.0


@dataclass(frozen=True)
class InputSpectrum:
    """The inputs of a layer in the models of all concepts, decomposed once for all updates.

    `layers` that read the same inputs share it.
    """

    moments: Sequence[InputMoments]
    kept: Tensor  # [k] eigenvalues of X^T X above the noise, ascending
    vectors: Tensor  # their eigenvectors: of X^T X [in, k], in the dual form of X X^T [n, k]
    inputs: Tensor | None  # dual form: X [n, in]
    own_ranks: tuple[int, ...]  # dual form: directions that each concept has by itself

    @property
    def rank(self) -> int:
        """The number of independent inputs."""
        return len(self.kept)

    @property
    def condition(self) -> float:
        """The condition number of X, without the directions that are noise."""
        return math.sqrt(float(self.kept[-1] / self.kept[0])) if self.rank else 1.0

    def fuse(
        self, updates: Sequence[Factors], how: Regularization = Regularization()
    ) -> FusedLayer:
        """The fused update of a layer from one update for each concept."""
        wide = [_as_double(update, self.kept.device) for update in updates]
        energies = [_energy([own], moments) for own, moments in zip(wide, self.moments)]
        aims = [_without_others(wide, i) for i in range(len(wide))] if how.towards_sum else wide
        seen = [Factors(own.up, self._project(i, own.down)) for i, own in enumerate(aims)]
        solved = self._solve(seen, 0.0)
        least = sum(self._residuals(aims, solved))
        allowed = how.of_minimum * least + how.of_energy * sum(energies)
        squares = _column_squares(_join_factors(seen))
        mean = float(self.kept.sum()) / wide[0].down.shape[1]
        ridge = max(largest_ridge(self.kept, squares, allowed), how.ridge * mean)
        solved = self._solve(seen, ridge)
        residuals = self._residuals(aims, solved)
        parts = [*solved, *wide] if how.towards_sum else solved
        return FusedLayer(_join_factors(parts), tuple(residuals), tuple(energies), least)

    def lose_by_sum(self, updates: Sequence[Factors]) -> tuple[float, ...]:
        """The residual of each concept where the updates are added up instead."""
        wide = [_as_double(update, self.kept.device) for update in updates]
        found = []
        for i, moments in enumerate(self.moments):
            others = wide[:i] + wide[i + 1 :]
            found.append(_energy(others, moments) if others else 0.0)
        return tuple(found)

    def _project(self, concept: int, down: Tensor) -> Tensor:
        """down G_c V for the eigenvectors V of G, [r, k]."""
        if self.inputs is None:
            return down @ self.moments[concept].gram_matrix() @ self.vectors
        before = sum(own.count for own in self.moments[:concept])
        place = slice(before, before + self.moments[concept].count)
        return down @ self.inputs[place].T @ self.vectors[place] * self.kept.sqrt()

    def _solve(self, seen: Sequence[Factors], ridge: float) -> list[Factors]:
        """Z_c = down_c G_c V (L + ridge)^-1 V^T of every concept."""
        axes = self.vectors.T
        if self.inputs is not None:
            axes = (self.vectors / self.kept.sqrt()).T @ self.inputs
        return [Factors(up, down / (self.kept + ridge) @ axes) for up, down in seen]

    def _residuals(self, wide: Sequence[Factors], solved: Sequence[Factors]) -> list[float]:
        found = []
        for i, moments in enumerate(self.moments):
            rest = [*solved]
            rest[i] = Factors(wide[i].up, solved[i].down - wide[i].down)
            found.append(_energy(rest, moments))
        return found


def largest_ridge(values: Tensor, squares: Tensor, allowed: float) -> float:
    """The largest rho, to a relative 1e-3, by which the loss grows by at most `allowed`.

    `values` are the eigenvalues of G, `squares` the squared norms of R v. At most the largest
    eigenvalue, beyond which an update shrinks as a whole.
    """
    low, high = 0.0, float(values[-1]) if len(values) else 0.0
    while high - low > 1e-3 * high:
        middle = (low * high) ** 0.5 if low else high * 1e-4
        growth = float((squares * middle**2 / (values * (values + middle) ** 2)).sum())
        if growth <= allowed:
            low = middle
        elif low or middle > float(values[0]) * 1e-12:
            high = middle
        else:
            return 0.0
    return low


def decompose_inputs(moments: Sequence[InputMoments]) -> InputSpectrum:
    """The eigenvectors of X^T X, or of X X^T where there are fewer samples than inputs.

    Eigenvalues that are noise are dropped: those below the rounding error of the inputs, squared,
    or of the decomposition, in fp64, times the largest. Raises ValueError for NaN or Inf.
    """
    features = _count_features(moments)
    unit = max(own.unit for own in moments)
    noise = max((NOISE_UNITS * unit) ** 2, features * torch.finfo(torch.float64).eps)
    is_dual = sum(own.count for own in moments) < features
    if not is_dual:
        matrix = torch.stack([own.gram_matrix() for own in moments]).sum(0)
        values, vectors = _eigenvectors(matrix)
        above = values > noise * values[-1]
        return InputSpectrum(moments, values[above], vectors[:, above], None, ())
    inputs = torch.cat([own.all_rows() for own in moments])
    products = inputs @ inputs.T
    values, vectors = _eigenvectors(products)
    least = noise * float(values[-1])
    above = values > least
    ranks = []
    start = 0
    for own in moments:
        block = products[start : start + own.count, start : start + own.count]
        ranks.append(int((torch.linalg.eigvalsh(block) > least).sum()))
        start += own.count
    return InputSpectrum(moments, values[above], vectors[:, above], inputs, tuple(ranks))


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.isfinite(matrix).all():
        raise ValueError("its inputs hold NaN or Inf; is a file damaged, or a strength too high?")
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _count_features(moments: Sequence[InputMoments]) -> int:
    first = moments[0]
    return first.gram.shape[0] if first.gram is not None else first.rows[0].shape[1]


def _add_gram_(gram: Tensor, rows: Tensor) -> None:
    for part in rows.split(CHUNK):
        wide = part.double()
        gram.addmm_(wide.T, wide)


def _as_double(update: Factors, device: torch.device) -> Factors:
    up = None if update.up is None else update.up.to(device, torch.float64)
    return Factors(up, update.down.to(device, torch.float64))


def _without_others(updates: Sequence[Factors], number: int) -> Factors:
    """D_c - S of one concept: minus the sum of the other concepts' updates."""
    joined = _join_factors([*updates[:number], *updates[number + 1 :]])
    if joined.up is None:
        return Factors(None, -joined.down)
    return Factors(-joined.up, joined.down)


def _join_factors(updates: Sequence[Factors]) -> Factors:
    """The sum of updates: their factors side by side, or one matrix where one is whole."""
    ups = [update.up for update in updates if update.up is not None]
    if len(ups) == len(updates):
        return Factors(torch.cat(ups, 1), torch.cat([update.down for update in updates]))
    parts = []
    for up, down in updates:
        parts.append(down if up is None else up @ down)
    return Factors(None, torch.stack(parts).sum(0))


def _column_squares(factors: Factors) -> Tensor:
    """The squared norm of every column of an update."""
    up, down = factors
    if up is None:
        return down.square().sum(0)
    return (down * ((up.T @ up) @ down)).sum(0)


def _energy(updates: Sequence[Factors], moments: InputMoments) -> float:
    """|X D^T|^2 of a sum of updates D."""
    up, down = _join_factors(updates)
    products = moments.inner_products(down)
    if up is None:
        return float(products.diagonal().sum())
    return float(((up.T @ up) * products).sum())
