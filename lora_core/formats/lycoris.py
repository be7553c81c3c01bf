"""LyCORIS updates other than LoRA: kept as the file's small tensors, built one layer at a time.

LoHa (arXiv 2108.06098): delta W = scale * (w1_a w1_b) o (w2_a w2_b), o the elementwise product;
with t1, t2 (Tucker form, convolutions) each bracket is the sum over i, j of
t[i, j, ...] a[i, out] b[j, in].
LoKr: delta W = scale * kron(w1, w2), each factor whole or as a product; a convolution's kernel is
all in w2. With both whole the scale is 1.
full: delta W itself, `diff`; it has no scale.
LoCon with a core (`lora_mid`): down and core are multiplied into one down, so it is a LoRA.
The scale is alpha / rank (with rs_lora LyCORIS writes an alpha for which this holds too), or 1
without an alpha. A `scalar` in older files multiplies the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LARGEST_UPDATE, DenseUpdate
from lora_core.errors import UserError
from lora_core.formats.layout import Shape

LYCORIS_KINDS = {  # kind of update -> roles of its tensors
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full": ("diff",),
}
ROLES = frozenset().union(*LYCORIS_KINDS.values())
COMMON_ROLES = {"alpha", "magnitude", "dora_scale"}
Parts = Mapping[str, Tensor]  # role -> tensor of one layer


def to_dense_update(parts: Parts, shape: Shape | None, where: str) -> DenseUpdate:
    """The module's update, without a magnitude; nothing is computed yet.

    `shape` is the base weight's. Raises UserError for tensors that are missing, of several kinds,
    or do not give the shape, and without a shape: only the model determines which columns of a flat
    tensor are a kernel.
    """
    if shape is None:
        raise UserError(
            f"{where} is a LyCORIS update, whose shape is known from a model's layout only; "
            "name the model it belongs to"
        )
    kind = next(kind for kind, roles in LYCORIS_KINDS.items() if not parts.keys().isdisjoint(roles))
    odd = [role for role in parts if role not in {"scalar", *COMMON_ROLES, *LYCORIS_KINDS[kind]}]
    if odd:
        raise UserError(
            f"{where} is a {kind} update with a {odd[0]}, which belongs to another kind; "
            "expected one kind"
        )
    build_kind = {"LoHa": _build_loha, "LoKr": _build_lokr, "full": _build_full}[kind]
    own = {role: tensor for role, tensor in parts.items() if role not in COMMON_ROLES}
    factor = _resolve_factor(parts, kind, where)

    def build(device: str | None = None) -> Tensor:
        placed = {role: t if device is None else t.to(device) for role, t in own.items()}
        built = build_kind({role: _to_fp32(tensor) for role, tensor in placed.items()})
        if built.shape[0] != shape[0]:
            raise ValueError("not as many rows as the weight has")
        return factor * built.reshape(shape)

    try:
        build("meta")
    except KeyError as error:
        raise UserError(
            f"{where} is a {kind} update without its {error.args[0]}; the file is incomplete"
        ) from None
    except (RuntimeError, IndexError, ValueError):
        got = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in own.items())
        raise UserError(
            f"{where} has {got}, which do not make up its weight {list(shape)}; "
            "is it for another model?"
        ) from None
    return DenseUpdate(kind, shape, build)


def add_dense_magnitude(dense: DenseUpdate, magnitude: Tensor) -> DenseUpdate:
    return replace(dense, magnitude=magnitude)


def merge_core(down: Tensor, mid: Tensor, where: str) -> Tensor:
    """down [r, in, kh, kw] of a convolution with a core, in fp32 or better.

    Its down [r, in (, 1, 1)] is followed by a core [r, r, kh, kw].
    """
    fits = down.ndim >= 2 and mid.ndim == 4 and down.shape[2:].numel() == 1
    is_small = fits and mid.shape[0] * mid.shape[2:].numel() * down.shape[1] <= LARGEST_UPDATE
    if not is_small or mid.shape[1] != down.shape[0]:
        raise UserError(
            f"{where} has down {list(down.shape)} and mid {list(mid.shape)}, "
            "expected [r, in, 1, 1] and [r, r, kh, kw]"
        )
    return torch.einsum("mnhw,ni->mihw", _to_fp32(mid), _to_fp32(down.flatten(1)))


def resolve_scale(parts: Parts, rank: int, where: str) -> float:
    """alpha / rank, or 1 without an alpha. Raises UserError for an alpha of several numbers."""
    if "alpha" not in parts:
        return 1.0
    if parts["alpha"].numel() != 1:
        shape = list(parts["alpha"].shape)
        raise UserError(f"{where} has an alpha of shape {shape}, expected one number")
    return float(parts["alpha"]) / rank


def resolve_scalar(parts: Parts, where: str) -> float:
    """The `scalar` of older files, or 1. Raises UserError for one of several numbers."""
    if "scalar" not in parts:
        return 1.0
    if parts["scalar"].numel() != 1:
        shape = list(parts["scalar"].shape)
        raise UserError(f"{where} has a scalar of shape {shape}, expected one number")
    return float(parts["scalar"])


def _resolve_factor(parts: Parts, kind: str, where: str) -> float:
    """The number that multiplies an update: its scale and its `scalar`."""
    scalar = resolve_scalar(parts, where)
    inner = {"LoHa": ("hada_w1_b",), "LoKr": ("lokr_w2_b", "lokr_w1_b"), "full": ()}[kind]
    split = next((parts[role] for role in inner if role in parts), None)
    if split is None:  # no tensor has a rank
        return scalar
    if not split.ndim or not len(split):
        raise UserError(
            f"{where} has a factor {list(split.shape)}, expected rows for a rank above 0"
        )
    return scalar * resolve_scale(parts, len(split), where)


def _build_loha(parts: Parts) -> Tensor:
    first, second = (
        _multiply_factors(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"))
        for i in "12"
    )
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise KeyError("hada_t2" if "hada_t1" in parts else "hada_t1")
    if first.shape != second.shape:
        raise ValueError("the two products differ in shape")
    return first * second


def _build_lokr(parts: Parts) -> Tensor:
    if "lokr_w1" in parts:
        w1 = parts["lokr_w1"]
    else:
        w1 = _multiply_factors(parts["lokr_w1_a"], parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
    else:
        w2 = _multiply_factors(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
    if w1.ndim != 2 or w2.ndim < 2:
        raise ValueError("a Kronecker factor is a matrix")
    wide = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
    return torch.kron(wide, w2.contiguous())  # torch 2.13 takes a view of it


def _build_full(parts: Parts) -> Tensor:
    return parts["diff"]


def _multiply_factors(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a [out, r] times b [r, in ...].

    With a core t [r, r, kh, kw], a is [r, out], b [r, in], and the result [out, in, kh, kw].
    """
    if core is not None:
        return torch.einsum("ijhw,io,jn->onhw", core, a, b)
    if a.ndim != 2:
        raise ValueError("a left factor is a matrix")
    return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
