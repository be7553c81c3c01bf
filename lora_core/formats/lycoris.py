"""LyCORIS' updates beside LoRA: products of products, kept in a file's small tensors and built dense, one layer at a time.

LoHa (arXiv 2108.06098): delta W = scale * (w1_a w1_b) o (w2_a w2_b), o the product by entries; with t1, t2 (Tucker form, convolutions) each bracket
is the sum over i, j of t[i, j, ...] a[i, out] b[j, in].
LoKr: delta W = scale * kron(w1, w2), each factor whole or as a product; a convolution's kernel is all in w2. With both whole the scale is 1.
full: delta W itself, `diff`; it has no scale.
LoCon with a core (`lora_mid`): down and core multiply to one down, so it is a LoRA.
The scale is alpha / rank (LyCORIS writes an alpha that makes it so with rs_lora, too), without alpha 1. A `scalar` of older files multiplies all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import DenseUpdate
from lora_core.errors import UserError

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRON = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
FULL = ("diff",)
ROLES = (*HADA, *KRON, *FULL, "scalar")
LYCORIS_KINDS = {"LoHa": HADA, "LoKr": KRON, "full": FULL}
Parts = Mapping[str, Tensor]


def is_lycoris(parts: Parts) -> bool:
    """Whether a module's tensors are one of these updates."""
    return any(role in parts for roles in LYCORIS_KINDS.values() for role in roles)


def to_dense_update(parts: Parts, shape: tuple[int, ...] | None, where: str) -> DenseUpdate:
    """The module's update, without a magnitude; nothing is computed yet. `shape` is the base weight's.

    Raises UserError for tensors that are missing, of several kinds, or do not make up the shape, and without a shape: which of a flat tensor's
    columns are a kernel is known from a model only.
    """
    if shape is None:
        raise UserError(
            f"{where} is a LyCORIS update, whose shape is known from a model's layout only; name the model it belongs to"
        )
    kinds = [kind for kind, roles in LYCORIS_KINDS.items() if any(role in parts for role in roles)]
    known = {"alpha", "scalar", "magnitude", "dora_scale", *LYCORIS_KINDS[kinds[0]]}
    if odd := [role for role in parts if role not in known]:
        raise UserError(
            f"{where} is a {kinds[0]} update with a {odd[0]}, which belongs to another kind; expected one kind"
        )
    built = {"LoHa": _build_loha, "LoKr": _build_lokr, "full": _build_full}[kinds[0]]
    wide = {
        role: tensor
        for role, tensor in parts.items()
        if role not in ("alpha", "magnitude", "dora_scale")
    }
    factor = _resolve_factor(parts, kinds[0], where)

    def build(device: str | None = None) -> Tensor:
        made = built(
            {
                role: _to_fp32(tensor if device is None else tensor.to(device))
                for role, tensor in wide.items()
            }
        )
        if made.shape[0] != shape[0]:
            raise ValueError("as many rows as the weight has")
        return factor * made.reshape(shape)

    try:
        build("meta")
    except KeyError as error:
        raise UserError(
            f"{where} is a {kinds[0]} update without its {error.args[0]}; the file is incomplete"
        ) from None
    except (RuntimeError, IndexError, ValueError):
        got = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in wide.items())
        raise UserError(
            f"{where} has {got}, which do not make up its weight {list(shape)}; is it for another model?"
        ) from None
    return DenseUpdate(kinds[0], shape, build)


def add_dense_magnitude(dense: DenseUpdate, magnitude: Tensor) -> DenseUpdate:
    return replace(dense, magnitude=magnitude)


def merge_core(down: Tensor, mid: Tensor, where: str) -> Tensor:
    """down [r, in, kh, kw] of a convolution whose down [r, in (, 1, 1)] is followed by a core [r, r, kh, kw]; fp32 or better."""
    if (
        down.ndim < 2
        or mid.ndim != 4
        or down.shape[2:].numel() != 1
        or mid.shape[1] != down.shape[0]
    ):
        raise UserError(
            f"{where} has down {list(down.shape)} and mid {list(mid.shape)}, expected [r, in, 1, 1] and [r, r, kh, kw]"
        )
    return torch.einsum("mnhw,ni->mihw", _to_fp32(mid), _to_fp32(down.flatten(1)))


def resolve_scale(parts: Parts, rank: int, where: str) -> float:
    """alpha / rank, or 1 without an alpha. Raises UserError for an alpha that is no single number."""
    if "alpha" not in parts:
        return 1.0
    if parts["alpha"].numel() != 1:
        raise UserError(
            f"{where} has an alpha of shape {list(parts['alpha'].shape)}, expected one number"
        )
    return float(parts["alpha"]) / rank


def _resolve_factor(parts: Parts, kind: str, where: str) -> float:
    if "scalar" in parts and parts["scalar"].numel() != 1:
        raise UserError(
            f"{where} has a scalar of shape {list(parts['scalar'].shape)}, expected one number"
        )
    scalar = float(parts["scalar"]) if "scalar" in parts else 1.0
    inner = {"LoHa": ("hada_w1_b",), "LoKr": ("lokr_w2_b", "lokr_w1_b"), "full": ()}[kind]
    split = next((parts[role] for role in inner if role in parts), None)
    if split is None:  # nothing that has a rank
        return scalar
    if not split.ndim or not len(split):
        raise UserError(
            f"{where} has a factor {list(split.shape)}, expected rows for a rank above 0"
        )
    return scalar * resolve_scale(parts, len(split), where)


def _build_loha(parts: Parts) -> Tensor:
    one, two = (
        _multiply_factors(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"))
        for i in "12"
    )
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise KeyError("hada_t2" if "hada_t1" in parts else "hada_t1")
    if one.shape != two.shape:
        raise ValueError("the two products differ in shape")
    return one * two


def _build_lokr(parts: Parts) -> Tensor:
    w1 = (
        parts["lokr_w1"]
        if "lokr_w1" in parts
        else _multiply_factors(parts["lokr_w1_a"], parts["lokr_w1_b"])
    )
    w2 = (
        parts["lokr_w2"]
        if "lokr_w2" in parts
        else _multiply_factors(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
    )
    if w1.ndim != 2 or w2.ndim < 2:
        raise ValueError("a Kronecker factor is a matrix")
    return torch.kron(
        w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous()
    )  # torch 2.13 wants a view of it


def _build_full(parts: Parts) -> Tensor:
    return parts["diff"]


def _multiply_factors(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a [out, r] times b [r, in ...]; with a core t [r, r, kh, kw] and a [r, out], b [r, in]: [out, in, kh, kw]."""
    if core is not None:
        return torch.einsum("ijhw,io,jn->onhw", core, a, b)
    if a.ndim != 2:
        raise ValueError("a left factor is a matrix")
    return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
