"""LyCORIS updates other than LoRA: LoHa, LoKr and full, read and written as their own tensors.

The products are in adapters.weight_updates. A LoKr of which both factors are whole has scale 1, and
so has a full update (`diff`): another scale is multiplied into w1 or `diff` when it is written.
LoCon with a core (`lora_mid`): down and core are multiplied into one down, so it is a LoRA.
The scale is alpha / rank (with rs_lora LyCORIS writes an alpha for which this holds too), or 1
without an alpha. A `scalar` in older files multiplies the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LARGEST_UPDATE, PRODUCTS, DenseUpdate, Parts
from lora_core.errors import UserError
from lora_core.formats.known_formats import LEAVES
from lora_core.formats.layout import Shape

LYCORIS_KINDS = {  # kind of update -> roles of its tensors
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full": ("diff",),
}
HEAD = "lycoris_"  # beginning of LyCORIS' own keys, which other tools read with our names
ROLES = frozenset().union(*LYCORIS_KINDS.values())
COMMON_ROLES = {"alpha", "magnitude", "dora_scale"}
# Kind of update -> the role of the tensor that a scale is multiplied into where none has a rank.
SCALED_ROLES = {"LoKr": "lokr_w1", "full": "diff"}


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
    own = {role: tensor for role, tensor in parts.items() if role in LYCORIS_KINDS[kind]}
    update = DenseUpdate(kind, shape, own, _resolve_factor(parts, kind, where))
    try:
        _check_product(update)
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
    return update


def encode_updates(
    updates: Mapping[str, DenseUpdate], starts: Mapping[str, str]
) -> dict[str, Tensor]:
    """Key -> tensor of updates by path, as LyCORIS writes them.

    `starts` has the beginning of each path's keys. Raises UserError for a part of a stored layer.
    """
    tensors = {}
    for path, update in updates.items():
        if not update.is_whole:
            raise UserError(
                f"{path} is a part of a {update.kind} update of a larger layer, which has no "
                f"{update.kind} of its own; make a LoRA of it: merge.py convert --as lora"
            )
        for role, tensor in tensors_to_store(update).items():
            tensors[starts[path] + LEAVES[role][0]] = tensor
    return tensors


def tensors_to_store(update: DenseUpdate) -> dict[str, Tensor]:
    """Role -> tensor of a whole update, with the scale as an alpha or multiplied into a tensor."""
    tensors = dict(fold_scale_without_rank(update).tensors)
    if update.kind != "full":
        rank = update.rank
        alpha = 1.0 if rank is None else update.scale * rank
        tensors["alpha"] = torch.tensor(alpha, dtype=torch.float32)
    magnitude = update.magnitude
    if magnitude is not None:
        if magnitude.ndim == 1:
            magnitude = magnitude.reshape(-1, *[1] * (len(update.shape) - 1))
        tensors["dora_scale"] = magnitude
    return tensors


def fold_scale_without_rank(update: DenseUpdate) -> DenseUpdate:
    """The update with scale 1, multiplied into a tensor, where no tensor has a rank.

    Multiplied in fp32 or better and rounded to the tensor's dtype.
    """
    if update.rank is not None or update.scale == 1:
        return update
    role = SCALED_ROLES[update.kind]
    tensor = update.tensors[role]
    scaled = (_to_fp32(tensor) * update.scale).to(tensor.dtype)
    return replace(update, tensors={**update.tensors, role: scaled}, scale=1.0)


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


def _check_product(update: DenseUpdate) -> None:
    """Raises KeyError, ValueError or another error where the tensors do not make up the weight."""
    tensors = {role: _to_fp32(tensor.to("meta")) for role, tensor in update.tensors.items()}
    product = PRODUCTS[update.kind](tensors)
    if product.shape[0] != update.shape[0]:
        raise ValueError("not as many rows as the weight has")
    product.reshape(update.shape)


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


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
