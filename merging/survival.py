"""How much of each input's own update is left in a truncated or rounded sum.

A loud file hides the loss of a quiet one: the energy kept of their sum may be 99.99 % while most of
one input is gone. The sum S of the weighted updates D_i = w_i delta W_i has the singular vectors U
and V. A truncation that cuts the triples c loses E = sum_i U_c U_c^T D_i V_c V_c^T, and of input i

    lost_i = |U_c^T D_i V_c|^2 / |D_i|^2      the share of its energy in its part of E

(Frobenius norms). The parts add up to E exactly. What inputs cancel of each other is missing from S
already and does not count as lost. All of it is found in the small core of the sum's factors.

Rounding the factors changes column j of them, up_j down_j, by a relative error rho_j. Input i then
loses sum_j rho_j^2 e_ij more, where e_ij is its energy on that column: (u_j^T D_i v_j)^2 in a
truncated sum, and that of its own columns in an exact one. Errors of columns are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank, factor_blocks
from merging.factor_sums import WeightedAdapters, double_blocks, frobenius_norm, square_of_product
from merging.truncation import ApproximationReport

FAITHFUL = 0.9  # share of an input below which a warning is printed
ROUNDING = 5e-7  # of fp32 factors: singular values below this share of an input's norm are noise


class InputEnergies(NamedTuple):
    """Energies (squared norms) of the n inputs of one layer, in fp64."""

    whole: Tensor  # [n] |D_i|^2
    lost: Tensor  # [n] of the parts of D_i that are cut
    along: Tensor  # [n, g, r] of the parts of D_i on the columns of the result; with owners [g, r]
    # [r] the input that a column belongs to, where no other has a part of it: in an exact sum
    owners: Tensor | None = None

    def lost_by_rounding(self, shares: Tensor) -> Tensor:
        """[n] what each input loses; `shares` [g, r] are those of `rounding_shares`."""
        if self.owners is None:
            return (self.along * shares).sum((1, 2))
        by_column = (self.along * shares).sum(0)
        return torch.zeros_like(self.whole).index_add_(0, self.owners, by_column)


def energies_of_factors(weighted: WeightedAdapters, total: LowRank) -> tuple[float, InputEnergies]:
    """(norm of an exact sum, the energies of its inputs); `total` is from `concat_factors`."""
    up, down = double_blocks(total)
    norm = math.sqrt(max(0.0, square_of_product(up, down)))
    columns = _columns_of(weighted)
    whole = [square_of_product(up[..., own], down[:, own]) for own in columns]
    along = up.square().sum(1) * down.square().sum(2)
    widths = torch.tensor([own.stop - own.start for own in columns])
    owners = torch.arange(len(columns)).repeat_interleave(widths)
    stacked = torch.tensor(whole, dtype=torch.float64)
    return norm, InputEnergies(stacked, torch.zeros_like(stacked), along, owners)


def energies_of_core(
    weighted: WeightedAdapters,
    factors: tuple[Tensor, Tensor],
    triples: tuple[Tensor, Tensor, Tensor],
    steps: int,
) -> InputEnergies:
    """The energies of the inputs of a sum that is cut after `steps` triples of each group.

    factors: left and right [g, k, r], the sum's up and down^T in bases of their columns or, where
    these are more than a side is wide, of the sum's;
    triples: u [g, k, m], sigma [g, m] and vh [g, m, k] of the core left right^T. All in fp64.
    The work is linear in the number of inputs.
    """
    (left, right), (u, sigma, vh) = factors, triples
    rows, columns = u.mT @ left, vh @ right  # U^T D_i V is the product of these over its columns
    inputs = _columns_of(weighted)
    whole = [(weight * frobenius_norm(lr)) ** 2 for weight, lr in weighted]
    noise = ROUNDING * max(whole) ** 0.5
    is_real = sigma[:, steps:, None] > noise
    cut_rows, cut_columns = rows[:, steps:] * is_real, columns[:, steps:] * is_real
    lost, along = [], []
    for own in inputs:
        square = square_of_product(cut_rows[..., own], cut_columns[..., own].mT)
        lost.append(max(0.0, square))
        along.append((rows[:, :steps, own] * columns[:, :steps, own]).sum(2).square())
    energies = torch.tensor([whole, lost], dtype=torch.float64)
    return InputEnergies(energies[0], energies[1], torch.stack(along))


def energies_of_one(report: ApproximationReport, kept: LowRank) -> InputEnergies:
    """The energies of a layer that one input has: all that is lost is lost of it."""
    up, down = factor_blocks(kept)
    along = (up.square().sum(1) * down.square().sum(2)).double()  # kept.scale is 1
    whole, lost = torch.tensor([[report.norm**2], [report.lost**2]], dtype=torch.float64)
    return InputEnergies(whole, lost, along[None])


def energies_of_dense(parts: Sequence[Tensor], kept: LowRank) -> InputEnergies:
    """The energies of dense updates whose sum is approximated by the leading triples `kept`."""
    up, down = double_blocks(kept)
    u = torch.nn.functional.normalize(up, dim=1)
    v = torch.nn.functional.normalize(down, dim=2)
    whole, lost, along = [], [], []
    for part in parts:
        own = part.double().reshape(len(up), up.shape[1], -1)
        left = own - u @ (u.mT @ own)
        whole.append(own.square().sum())
        lost.append((left - (left @ v.mT) @ v).square().sum())
        along.append((u.mT @ own @ v.mT).diagonal(dim1=1, dim2=2).square())
    return InputEnergies(torch.stack(whole), torch.stack(lost), torch.stack(along))


def rounding_shares(exact: LowRank, cast: LowRank) -> Tensor:
    """rho^2 [g, r]: the squared relative error of each product of columns; 0 where one is zero."""
    (up, down), (up_cast, down_cast) = factor_blocks(exact), factor_blocks(cast)
    up_error, down_error = up - up_cast, down - down_cast
    cross = 2 * (up_error * up_cast).sum(1) * (down_error * down).sum(2)
    squares = up_error.square().sum(1) * down.square().sum(2)
    squares += up_cast.square().sum(1) * down_error.square().sum(2) + cross
    norms = up.square().sum(1) * down.square().sum(2)
    shares = squares.double() / norms.double()
    return torch.where(norms > 0, shares, 0.0).clamp(0, 1)


@dataclass
class SurvivalTally:
    """The energies of all inputs of a merge, summed over its layers."""

    count: int  # of inputs
    whole: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def add_layer(
        self, sources: Sequence[int], inputs: InputEnergies, rounded: Tensor | None = None
    ) -> None:
        """Adds a layer that the inputs `sources` have; `rounded`: see `rounding_shares`."""
        if not self.whole:
            self.whole, self.lost = [0.0] * self.count, [0.0] * self.count
        lost = inputs.lost
        if rounded is not None:
            lost = lost + inputs.lost_by_rounding(rounded)
        for place, own, gone in zip(sources, inputs.whole.tolist(), lost.tolist()):
            self.whole[place] += own
            self.lost[place] += gone

    def shares(self) -> list[float]:
        """The share of each input's energy that is kept; none without a loss."""
        if self.count < 2 or not any(self.lost):
            return []
        pairs = zip(self.whole, self.lost)
        return [max(0.0, 1 - lost / whole) if whole else 1.0 for whole, lost in pairs]


def _columns_of(weighted: WeightedAdapters) -> list[slice]:
    """The columns of each input in a sum by concatenation."""
    found, end = [], 0
    for _, lr in weighted:
        width = lr.up.shape[1]  # of each group
        found.append(slice(end, end + width))
        end += width
    return found
