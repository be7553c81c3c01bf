"""Add updates to a base weight, and measure how much of them survives rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import delta_weight
from merging.factor_sums import WeightedAdapters

MOST_DOUBLES = 1 << 20  # numbers that are compared at a time: 8 MB in fp64


class Rounding(NamedTuple):
    """How much of an update a rounded weight contains; layers are summed field by field."""

    square: float  # squared norm of the exact update
    product: float  # its inner product with the effective one, rounded - base
    effective: float  # squared norm of the effective update

    @property
    def kept(self) -> float:
        """The effective update's component along the exact one, 1 when all survived.

        1 for an update that is zero.
        """
        return self.product / self.square if self.square else 1.0

    @property
    def cosine(self) -> float:
        """The cosine of the angle between both updates.

        0 when nothing survived, 1 for an update that is zero.
        """
        if not self.square:
            return 1.0
        if not self.effective:
            return 0.0
        return self.product / math.sqrt(self.square * self.effective)


def add_updates(weight: Tensor, weighted: WeightedAdapters) -> Tensor:
    """The base weight plus the weighted updates, in fp32 or better, for the caller to round once.

    Each DoRA contributes its update of the base weight alone, W + t (W_dora - W), so the order does
    not matter. Raises ValueError when shapes do not fit.
    """
    folded = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for strength, lr in weighted:
        update = delta_weight(lr, weight)
        folded = folded.to(torch.promote_types(folded.dtype, update.dtype))
        folded += update.mul_(strength)
    return folded


def round_weight(weight: Tensor, folded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Rounding]:
    """`folded` in the output dtype, and how much of the update folded - weight it contains.

    folded - result is the rounding loss. In fp64 only MOST_DOUBLES numbers are at a time.
    """
    result = folded.to(dtype)
    square = product = effective = 0.0
    parts = [tensor.reshape(-1).split(MOST_DOUBLES) for tensor in (weight, folded, result)]
    for before, sum_there, rounded in zip(*parts):
        start = before.double()
        exact, found = sum_there.double() - start, rounded.double() - start
        square += float((exact * exact).sum())
        product += float((exact * found).sum())
        effective += float((found * found).sum())
    return result, Rounding(square, product, effective)
