"""Records of an adapter's tensors, and the weight update delta W of each.

LoRA (arXiv 2106.09685), where `scale` is alpha / rank, resolved when a file is read:
    delta W = scale * up @ down
DoRA (arXiv 2402.09353; rows as in peft), where n is the row norm of (W + scale * up @ down):
    delta W = m / n * (W + scale * up @ down) - W

LoHa (arXiv 2108.06098), o the elementwise product; with cores t1, t2 (Tucker form, convolutions)
each bracket is the sum over i, j of t[i, j, ...] a[i, out] b[j, in]:
    delta W = scale * (w1_a w1_b) o (w2_a w2_b)
LoKr (KronA, arXiv 2212.10650; LyCORIS), each factor whole or as a product; a convolution's kernel
is all in w2:
    delta W = scale * kron(w1, w2)

Norms of columns (older LyCORIS) and whole updates (LyCORIS' full) are read but not trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
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


Parts = Mapping[str, Tensor]  # role in files -> tensor of one layer


@dataclass(frozen=True)
class DenseUpdate:
    """One layer's update in another form than two factors: the tensors that a file stores of it.

    The update itself is as wide as the layer and is computed when it is needed. It can be merged
    into its weight, or distilled to factors.
    """

    kind: str  # "LoHa", "LoKr" or "full": a key of PRODUCTS
    shape: tuple[int, ...]  # of the base weight
    tensors: Parts
    scale: float = 1.0  # factor of the tensors' product
    magnitude: Tensor | None = None  # as in LowRank
    # The outputs (start, stop) of the product that belong to this layer: files store some layers
    # as one (formats.joined_layers). None: all.
    outputs: tuple[int, int] | None = None
    shift: int = 0  # rotation of the outputs, as torch.roll does it

    @property
    def is_whole(self) -> bool:
        """Whether the product of the tensors is this layer's update, not one that contains it."""
        return self.outputs is None and self.shift == 0

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None where no tensor has a rank."""
        inner = (self.tensors[role] for role in INNER_ROLES if role in self.tensors)
        return next(map(len, inner), None)

    def build(self, device: str | None = None) -> Tensor:
        """The update before any magnitude, fp32 or better, in the weight's shape."""
        wide = {}
        for role, tensor in self.tensors.items():
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            wide[role] = tensor.to(device=device, dtype=dtype)
        product = PRODUCTS[self.kind](wide).reshape(-1, *self.shape[1:])
        if self.shift:
            product = product.roll(self.shift, 0)
        if self.outputs is not None:
            product = product[slice(*self.outputs)]
        return self.scale * product

    def scaled(self, factor: float) -> DenseUpdate:
        """`factor` times the update; of one with a magnitude only the part before it."""
        return self if factor == 1 else replace(self, scale=self.scale * factor)

    def cast(self, dtype: torch.dtype) -> DenseUpdate:
        """The update with its tensors in `dtype`; a magnitude is not cast."""
        tensors = {role: tensor.to(dtype) for role, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def rows(self, start: int, stop: int) -> DenseUpdate:
        """The update of the outputs from start to stop.

        Raises ValueError for a magnitude by columns, whose norms need all rows.
        """
        if self.magnitude is not None and self.magnitude.ndim > 1:
            raise ValueError("the columns of a part have other norms than those of the whole")
        part = None if self.magnitude is None else self.magnitude[start:stop]
        shape = (stop - start, *self.shape[1:])
        first = 0 if self.outputs is None else self.outputs[0]
        outputs = (first + start, first + stop)
        return replace(self, shape=shape, magnitude=part, outputs=outputs)

    def rolled(self, shift: int) -> DenseUpdate:
        """The update of a whole layer with its outputs rotated by `shift`."""
        magnitude = self.magnitude
        if magnitude is not None and magnitude.ndim == 1:
            magnitude = magnitude.roll(shift)
        return replace(self, shift=(self.shift + shift) % self.shape[0], magnitude=magnitude)


LayerUpdate = LowRank | DenseUpdate


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
    # Like components: the layers whose updates are not a product of two factors.
    dense: dict[str, dict[str, DenseUpdate]] = field(default_factory=dict)
    # Component -> "path.name" -> tensor of adapters of a class that the user wrote; only this class
    # knows what they do (adapters.custom_files).
    custom: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def updates(self) -> dict[str, dict[str, LayerUpdate]]:
        """Component -> path -> update, of `components` and `dense`."""
        found: dict[str, dict[str, LayerUpdate]] = {}
        for modules in (self.components, self.dense):
            for name, own in modules.items():
                found.setdefault(name, {}).update(own)
        return found

    @property
    def changed_components(self) -> list[str]:
        """The components that the file changes, in layers, norms or biases."""
        names = dict.fromkeys(chain.from_iterable(self.all_changes))
        return [name for name in names if any(own.get(name) for own in self.all_changes)]

    @property
    def all_changes(self) -> tuple[dict[str, Any], ...]:
        """The tables of changes, each component -> path -> change."""
        return self.components, self.dense, self.parameters, self.custom


def split_updates(
    updates: Mapping[str, Mapping[str, LayerUpdate]],
) -> tuple[dict[str, dict[str, LowRank]], dict[str, dict[str, DenseUpdate]]]:
    """The tables `components` and `dense` of an AdapterState."""
    factors: dict[str, dict[str, LowRank]] = {}
    dense: dict[str, dict[str, DenseUpdate]] = {}
    for name, modules in updates.items():
        for path, update in modules.items():
            if isinstance(update, DenseUpdate):
                dense.setdefault(name, {})[path] = update
            else:
                factors.setdefault(name, {})[path] = update
    return factors, dense


def scaled_product(lr: LayerUpdate) -> Tensor:
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


def delta_weight(lr: LayerUpdate, weight: Tensor | None = None) -> Tensor:
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


# ---------------------------------------------------------------- other products than up @ down


def hadamard_product(parts: Parts) -> Tensor:
    """(w1_a w1_b) o (w2_a w2_b) of a LoHa.

    Raises KeyError for a tensor that is missing, ValueError or RuntimeError for shapes that do not
    fit.
    """
    first, second = (
        multiply_pair(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"))
        for i in "12"
    )
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise KeyError("hada_t2" if "hada_t1" in parts else "hada_t1")
    if first.shape != second.shape:
        raise ValueError("the two products differ in shape")
    return first * second


def kronecker_factors(parts: Parts) -> tuple[Tensor, Tensor]:
    """w1 and w2 of a LoKr, multiplied out. Raises as `hadamard_product` does."""
    if "lokr_w1" in parts:
        w1 = parts["lokr_w1"]
    else:
        w1 = multiply_pair(parts["lokr_w1_a"], parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
    else:
        w2 = multiply_pair(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
    if w1.ndim != 2 or w2.ndim < 2:
        raise ValueError("a Kronecker factor is a matrix")
    return w1, w2


def kronecker_product(parts: Parts) -> Tensor:
    """kron(w1, w2) of a LoKr. Raises as `hadamard_product` does."""
    w1, w2 = kronecker_factors(parts)
    wide = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
    return torch.kron(wide, w2.contiguous())  # torch 2.13 takes a view of it


def multiply_pair(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a [out, r] times b [r, in ...].

    With a core t [r, r, kh, kw], a is [r, out], b [r, in], and the result [out, in, kh, kw].
    """
    if core is not None:
        return torch.einsum("ijhw,io,jn->onhw", core, a, b)
    if a.ndim != 2:
        raise ValueError("a left factor is a matrix")
    return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])


PRODUCTS: dict[str, Callable[[Parts], Tensor]] = {  # kind of update -> product of its tensors
    "LoHa": hadamard_product,
    "LoKr": kronecker_product,
    "full": lambda parts: parts["diff"],
}
# Roles of tensors whose length is the rank; the first that a layer has.
INNER_ROLES = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
