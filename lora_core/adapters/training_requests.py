"""Requests of a kind of adapter to training: own learning rates, a change of its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from lora_core.adapters.adapted_layer import layers_with_adapter
from lora_core.errors import UserError


def parameter_rates(model: nn.Module, name: str = "default") -> dict[Tensor, float]:
    """The parameters that a kind's `rates` name, and their learning rates relative to the others'.

    Raises UserError for a name that is no parameter, and a rate that is not a positive number.
    """
    found: dict[Tensor, float] = {}
    for path, layer in layers_with_adapter(model, name).items():
        adapter = layer.adapter(name)
        own = dict(adapter.named_parameters())
        for parameter, rate in getattr(adapter, "rates", {}).items():
            kind = type(adapter).__name__
            if parameter not in own:
                raise UserError(
                    f"rates of {kind} names {parameter!r}, which is no parameter of {path}; it has "
                    f"{', '.join(own) or 'none'}"
                )
            if not 0 < rate < math.inf:
                raise UserError(
                    f"the rate of {parameter!r} in rates of {kind} is {rate}; expected a positive "
                    "number, and a buffer for what does not train"
                )
            found[own[parameter]] = float(rate)
    return found


def gradient_hooks(model: nn.Module, name: str = "default") -> list[Callable[[], None]]:
    """`change_gradients` of every adapter that has it, in the model's order."""
    found = []
    for layer in layers_with_adapter(model, name).values():
        hook = getattr(layer.adapter(name), "change_gradients", None)
        if hook is not None:
            found.append(hook)
    return found
