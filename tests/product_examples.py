"""Layers with LoKr and LoHa adapters, their update written out, and lycoris-lora's modules."""

from __future__ import annotations

import copy
import importlib.util
import itertools

import pytest
import torch
from torch import nn

from lora_core.adapters import injection
from lora_core.adapters.injection import AdapterSpec
from tests.injected_nets import seeded

needs_lycoris = pytest.mark.skipif(
    importlib.util.find_spec("lycoris") is None, reason="lycoris-lora is not installed"
)
LAYERS = {
    "linear": nn.Linear(12, 8),
    "prime": nn.Linear(7, 5, bias=False),
    "conv": nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "1x1": nn.Conv2d(6, 4, 1, bias=False),
    "grouped": nn.Conv2d(6, 4, 3, groups=2, padding=1),
}
PRODUCT_KINDS = ["lokr", "loha"]


def layer_with(kind, name, dtype=torch.float64, **settings):
    """A layer in a Sequential, with an adapter whose tensors are all off zero."""
    model = nn.Sequential(copy.deepcopy(LAYERS[name])).to(dtype)
    injection.inject(model, AdapterSpec(("0",), kind=kind, **{"rank": 2, "alpha": 3.0} | settings))
    generator = seeded(7)
    with torch.no_grad():
        for p in injection.adapter_parameters(model):
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return model


def layer_input(name, dtype=torch.float64, b=3):
    layer = LAYERS[name]
    if isinstance(layer, nn.Linear):
        shape = (b, 5, layer.in_features)
    else:
        shape = (b, layer.in_channels, 6, 5)
    return torch.randn(shape, generator=seeded(1), dtype=torch.float64).to(dtype)


def written_out(update):
    """An update's delta W entry by entry, in float64, by the papers' formulas."""
    parts = {role: tensor.double() for role, tensor in update.tensors.items()}
    out, *inner = update.shape
    delta = torch.zeros(out, inner[0], *inner[1:], dtype=torch.float64)
    if update.kind == "LoHa":
        flat = delta.view(out, -1)
        for o, i in itertools.product(range(out), range(flat.shape[1])):
            first = sum(parts["hada_w1_a"][o] * parts["hada_w1_b"][:, i])
            flat[o, i] = first * sum(parts["hada_w2_a"][o] * parts["hada_w2_b"][:, i])
        return update.scale * delta
    w1 = parts["lokr_w1"]
    kernel = inner[1:]
    i2 = inner[0] // w1.shape[1]
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
    else:
        w2 = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).view(-1, i2, *kernel)
    for o, i in itertools.product(range(out), range(inner[0])):
        delta[o, i] = w1[o // len(w2), i // i2] * w2[o % len(w2), i % i2]
    return update.scale * delta


def run_with(layer, weight, x):
    """The layer's operation with another weight."""
    with torch.no_grad():
        saved = layer.weight.detach().clone()
        layer.weight.copy_(weight)
        y = layer(x)
        layer.weight.copy_(saved)
    return y
