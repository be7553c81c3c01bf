"""Fold adapters into the base weights of a model, in place or into a state dict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from lora_core.adapters.adapted_layer import Adapted, check_strength, layers_with_adapter
from lora_core.errors import UserError


def fold_adapter(model: nn.Module, name: str = "default", strength: float = 1.0) -> None:
    """Write W + strength * delta W into the base, in place with one rounding.

    The bias of a full update is written too. The adapter's own forward stops. Each layer keeps a
    copy of its weight and bias, so that `unfold_adapter` restores the bits; several folded adapters
    add up against that copy.

    Raises UserError, leaving the model unchanged, when the name is folded already, a weight is
    shared with another module, or the result overflows.
    """
    adapted = layers_with_adapter(model, name)
    check_strength(strength)
    for layer in adapted.values():
        if name in layer.folded:
            raise UserError(
                f"adapter {name!r} is folded already; unfold it before folding it at another "
                "strength"
            )
    _check_sharing(model, adapted, name)
    done: list[tuple[str, Adapted]] = []
    try:
        for path, layer in adapted.items():
            layer.refold({**layer.folded, name: strength}, path)
            done.append((path, layer))
    except BaseException:
        for path, layer in done:
            layer.refold(_without(layer.folded, name), path)
        raise


def unfold_adapter(model: nn.Module, name: str = "default") -> None:
    """Undo `fold_adapter`: the adapter acts in forward again, at its run-time strength.

    When none is folded any more, the weights have their original bits.
    """
    for path, layer in layers_with_adapter(model, name).items():
        if name not in layer.folded:
            raise UserError(f"adapter {name!r} is not folded; there is nothing to unfold")
        layer.refold(_without(layer.folded, name), path)


def merged_state_dict(
    model: nn.Module, name: str = "default", strength: float = 1.0
) -> dict[str, Tensor]:
    """The state dict with strength * this adapter folded in; the model is not changed.

    Keys are those of the model without adapters. Adapted weights (and the biases of a full update)
    are new tensors in the base's dtype, rounded once, bit for bit those that `fold_adapter` writes;
    the rest are the model's own tensors, not copies. Other adapters are left out. Norm layers and
    embeddings have no adapters and are the base's.

    Raises UserError, as `fold_adapter` does, for a shared weight or an overflow, and while any
    adapter is folded.
    """
    chosen = layers_with_adapter(model, name)
    check_strength(strength)
    _check_sharing(model, chosen, name)
    wrapped: dict[str, Adapted] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Adapted):
            wrapped[f"{path}."] = layer
            if layer.folded:
                raise UserError(
                    f"adapter {', '.join(layer.folded)} is folded into the weights; "
                    "unfold it before merging"
                )
    moved = {
        id(layer): layer.merged_parameters({name: strength}, path) for path, layer in chosen.items()
    }
    found = {}
    for key, value in model.state_dict().items():
        prefix = _adapted_prefix(key, wrapped)
        if not prefix:
            found[key] = value
        elif key.startswith(f"{prefix}base."):
            parameter = key.removeprefix(f"{prefix}base.")  # weight or bias
            own = moved.get(id(wrapped[prefix]), {})
            found[prefix + parameter] = own.get(parameter, value)
    return found


def folding_error(model: nn.Module, merged: Mapping[str, Tensor], name: str = "default") -> float:
    """The relative error (Frobenius norm over all layers) of the weights' updates in a result of
    `merged_state_dict` at strength 1, from rounding to the base's dtype; 0 without any update.
    """
    lost = whole = 0.0
    for path, layer in layers_with_adapter(model, name).items():
        weight = layer.base.weight.double()
        delta = layer.adapter(name).delta_weight(layer.base).double()
        moved = merged[f"{path}.weight"].double() - weight
        lost += float((moved - delta).square().sum())
        whole += float(delta.square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def _without(folded: Mapping[str, float], name: str) -> dict[str, float]:
    return {key: strength for key, strength in folded.items() if key != name}


def _check_sharing(model: nn.Module, adapted: Mapping[str, Adapted], name: str) -> None:
    """Raises UserError for a weight (or changed bias) that another module shares."""
    users: Counter[int] = Counter()
    for module in model.modules():
        users.update(id(p) for p in module._parameters.values() if p is not None)
    for path, layer in adapted.items():
        bias = layer.base.bias if hasattr(layer.adapter(name), "delta_bias") else None
        if users[id(layer.base.weight)] > 1 or users[id(bias)] > 1:
            raise UserError(
                f"the weight of {path} is shared with another module, which would change too; "
                "keep the adapter unfolded"
            )


def _adapted_prefix(key: str, wrapped: Mapping[str, Adapted]) -> str:
    """The path, with its dot, of the adapted layer that a key of the state dict belongs to."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end]) + "."
        if prefix in wrapped:
            return prefix
    return ""
