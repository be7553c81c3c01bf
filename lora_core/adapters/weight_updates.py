"""Records of an adapter's tensors, and the weight update delta W of each.

LoRA (arXiv 2106.09685), where `scale` is alpha / rank, resolved when a file is read:
    delta W = scale * up @ down
DoRA (arXiv 2402.09353; rows as in peft), where n is the row norm of (W + scale * up @ down):
    delta W = m / n * (W + scale * up @ down) - W

Norms of columns (older LyCORIS) and updates that are not a product of two factors (LoHa, LoKr) are
read but not trained: see `DenseUpdate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError

# Numbers of an update: small factors announce products of terabytes. The largest weight of a known
# model, the embedding of T5-XXL, has half as many.
LARGEST_UPDATE = 1 << 28


class LowRank(NamedTuple):
    """One layer's adapter. `scale` multiplies up @ down; alpha exists in files only."""

    down: Tensor  # [r, in] or [r, in / groups, kh, kw]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    scale: float
    # DoRA only: [out], or by columns [1, in] or [1, in, 1, 1].
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class DenseUpdate:
    """One layer's update that a file stores in another form than two factors.

    It can be merged into its weight, or distilled to factors.
    """

    kind: str  # "LoHa", "LoKr" or "full"
    shape: tuple[int, ...]  # of the base weight
    # The update before any magnitude, fp32 or better, of that shape; computed anew in each call.
    build: Callable[[], Tensor]
    magnitude: Tensor | None = None  # as in LowRank

    def rows(self, start: int, stop: int) -> DenseUpdate:
        """The update of the outputs from start to stop.

        Raises ValueError for a magnitude by columns, whose norms need all rows.
        """
        if self.magnitude is not None and self.magnitude.ndim > 1:
            raise ValueError("the columns of a part have other norms than those of the whole")
        part = None if self.magnitude is None else self.magnitude[start:stop]
        shape = (stop - start, *self.shape[1:])
        return DenseUpdate(self.kind, shape, lambda: self.build()[start:stop], part)

    def rolled(self, shift: int) -> DenseUpdate:
        """The update with its outputs rotated by `shift`, as torch.roll does."""
        magnitude = self.magnitude
        if magnitude is not None and magnitude.ndim == 1:
            magnitude = magnitude.roll(shift)
        return replace(self, build=lambda: self.build().roll(shift, 0), magnitude=magnitude)


@dataclass
class AdapterState:
    """The content of an adapter file, whatever its format."""

    # "unet", "text_encoder" ... -> published dotted path -> factors
    components: dict[str, dict[str, LowRank]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)  # "clip_l" | "clip_g" | "t5": [n, d]
    token_names: tuple[str, ...] = ()  # n names, in the order of rows
    metadata: dict[str, str] = field(default_factory=dict)
    # Component -> path of a norm's weight or of a bias -> what is added to it, unscaled (LyCORIS'
    # w_norm, b_norm and diff_b).
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # Like components, in states that are read to be merged or applied only.
    dense: dict[str, dict[str, DenseUpdate]] = field(default_factory=dict)

    def updates(self) -> dict[str, dict[str, LowRank | DenseUpdate]]:
        """Component -> path -> update, of `components` and `dense`."""
        found: dict[str, dict[str, LowRank | DenseUpdate]] = {}
        for modules in (self.components, self.dense):
            for name, own in modules.items():
                found.setdefault(name, {}).update(own)
        return found

    @property
    def changed_components(self) -> list[str]:
        """The components that the file changes, in layers, norms or biases."""
        names = dict.fromkeys([*self.components, *self.dense, *self.parameters])
        return [name for name in names if any(own.get(name) for own in self.all_changes)]

    @property
    def all_changes(self) -> tuple[dict[str, Any], ...]:
        """The three tables of changes, each component -> path -> change."""
        return self.components, self.dense, self.parameters


def scaled_product(lr: LowRank | DenseUpdate) -> Tensor:
    """scale * up @ down in fp32 or better, with the shape of the base weight.

    [out, in] or [out, in / groups, kh, kw]. The factors of a grouped convolution are grouped alike,
    down [r, in / groups, kh, kw] and up [out, r / groups, 1, 1]: there are r / up.shape[1] groups,
    and each contributes its own block of rows. (peft keeps down dense over all inputs there,
    [r, in, kh, kw]; such an update has no weight of the base's shape, and peft cannot merge it.)

    Raises ValueError when up does not fit down, UserError for more than LARGEST_UPDATE numbers.
    """
    if isinstance(lr, DenseUpdate):
        shape = lr.shape
    else:
        shape = (*lr.up.shape[:1], *lr.down.shape[1:])
    if math.prod(shape) > LARGEST_UPDATE:
        raise UserError(
            f"an update has shape {list(shape)}, more than {LARGEST_UPDATE:,} numbers; "
            "no model has such a layer, is the file damaged?"
        )
    if isinstance(lr, DenseUpdate):
        return lr.build()
    up, down = factor_blocks(lr)
    return lr.scale * (up @ down).reshape(lr.up.shape[0], *lr.down.shape[1:])


def factor_blocks(lr: LowRank) -> tuple[Tensor, Tensor]:
    """The factors as matrices, one pair for each group, in fp32 or better, without the scale.

    up [g, out / g, r / g] and down [g, r / g, in / g * kh * kw]. Raises ValueError when up does not
    fit down.
    """
    rank, (out, per_group) = lr.down.shape[0], lr.up.shape[:2]
    groups = rank // per_group
    if groups * per_group != rank or out % groups:
        expected = f"[out, {rank} / groups] with out a multiple of groups"
        raise ValueError(
            f"up {list(lr.up.shape)} does not fit down {list(lr.down.shape)}: expected {expected}"
        )
    dtype = torch.promote_types(lr.down.dtype, lr.up.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    up = lr.up.to(dtype).reshape(groups, out // groups, per_group)
    return up, lr.down.to(dtype).reshape(groups, per_group, -1)


def from_blocks(
    up: Tensor, down: Tensor, kernel: tuple[int, ...], *, scale: float = 1.0
) -> LowRank:
    """The adapter of blocks up [g, out / g, k] and down [g, k, fan in].

    `kernel` is (kh, kw) of a convolution, () of a linear layer.
    """
    groups, per_group, fan_in = down.shape
    fan = fan_in // torch.Size(kernel).numel()
    ones = [1] * len(kernel)
    joined = down.reshape(groups * per_group, fan, *kernel)
    return LowRank(joined, up.reshape(-1, per_group, *ones), scale)


def refuse_dora(lr: LowRank) -> None:
    """Raises UserError for a DoRA: its update is not low rank and depends on the base weight."""
    if lr.magnitude is not None:
        raise UserError(
            "a DoRA has no sum, product or rank of its own, its update depends on the base weight; "
            "give the base model or fold it"
        )


def delta_weight(lr: LowRank | DenseUpdate, weight: Tensor | None = None) -> Tensor:
    """delta W in fp32 or better, so that W + t * delta W is the adapted weight at strength t.

    DoRA needs the base weight: (m / n)(W + P) - W = (m / n - 1) W + (m / n) P with
    P = scaled_product(lr). Plain LoRA uses it for the check of shapes only. The norms n are those
    of W + P by rows, or by columns [1, in] where m is (LyCORIS adds an epsilon of the dtype to n,
    we do not).

    Raises ValueError when the shapes do not fit, or when DoRA gets no weight.
    """
    update = scaled_product(lr)
    if weight is not None and weight.shape != update.shape:
        raise ValueError(
            f"the update has shape {list(update.shape)}, the base weight {list(weight.shape)}; "
            "these factors belong to another layer"
        )
    if lr.magnitude is None:
        return update
    if weight is None:
        raise ValueError("the update of a DoRA depends on the base weight; pass it")
    dtype = torch.promote_types(weight.dtype, update.dtype)
    base, update = weight.to(dtype), update.to(dtype)
    gain = _dora_gain(base + update, lr.magnitude)
    return (gain - 1) * base + gain * update


def column_gain(lr: LowRank, weight: Tensor) -> Tensor:
    """m / n of a DoRA by columns, [1, in] or [1, in, 1, 1], in fp32 or better."""
    assert lr.magnitude is not None and lr.magnitude.ndim > 1
    update = scaled_product(lr)
    return _dora_gain(
        weight.to(torch.promote_types(weight.dtype, update.dtype)) + update, lr.magnitude
    )


def _dora_gain(tuned: Tensor, magnitude: Tensor) -> Tensor:
    """m / n, n the norms of W + P over all axes but the one that the magnitude goes by."""
    axis = 0 if magnitude.ndim == 1 else 1
    others = [d for d in range(tuned.ndim) if d != axis]
    norm = torch.linalg.vector_norm(tuned, dim=others, keepdim=True)
    return magnitude.to(tuned.dtype).reshape(norm.shape) / norm
