"""The layers that are compared: frozen, with our adapter, with peft's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters import injection
from lora_core.adapters.injection import AdapterSpec


def frozen_layer(weight: Tensor, bias: Tensor | None, stride: int = 1) -> Any:
    """A module whose .layer is a frozen linear layer or convolution with these weights."""
    out, fan_in, *window = weight.shape
    with torch.device("meta"):
        layer: Any = nn.Linear(fan_in, out)
        if window:
            layer = nn.Conv2d(fan_in, out, window[0], stride, window[0] // 2)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return nn.ModuleDict({"layer": layer})


def our_layer(host: Any, state: dict[str, Tensor], scale: float) -> nn.Module:
    """Our adapted layer with these factors, which replaces host.layer."""
    rank = len(state["down"])
    kind = "dora" if "magnitude" in state else "lora"
    injection.inject(host, AdapterSpec(("layer",), kind=kind, rank=rank, alpha=scale * rank))
    layer: Any = host["layer"]
    with torch.no_grad():
        for name, value in state.items():
            getattr(layer.adapter("default"), name).copy_(value)
    return layer


def peft_layer(host: Any, state: dict[str, Tensor], scale: float) -> nn.Module:
    """peft's layer with these factors, in fp32 by its default, which replaces host.layer."""
    from peft import LoraConfig, get_peft_model

    rank = len(state["down"])
    config = LoraConfig(
        r=rank,
        lora_alpha=int(scale * rank),
        target_modules=["layer"],
        use_dora="magnitude" in state,
    )
    model: Any = get_peft_model(host, config)
    layer: Any = model.base_model.model["layer"]
    names = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}
    with torch.no_grad():
        for name, value in state.items():
            parameter = getattr(layer, names[name])["default"].weight
            parameter.copy_(value.view(parameter.shape))
    layer.scaling["default"] = scale  # lora_alpha is a whole number
    return layer


def layer_call(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], list[Tensor]]:
    """(the layer on a copy of x, the tensors that it trains)"""
    x = x.detach().clone().requires_grad_()
    return lambda: layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)]


class SequentialLayers(nn.Module):
    """Layers on the same input, one after another."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)
