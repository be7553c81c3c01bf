"""A small network with layers of many kinds, adapters injected into it, and inputs for it."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import Adapted, adaptable_layers
from lora_core.adapters.injection import AdapterSpec, inject

KINDS = ["lora", "dora"]


class Net(nn.Module):
    """Linear with and without bias, several convolutions, inside ModuleList and Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.mid = nn.ModuleList(
            [
                nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0)),
                nn.Conv2d(12, 8, 1, bias=False),
            ]
        )
        self.norm = nn.GroupNorm(2, 8)
        self.to_q = nn.Linear(8, 8)
        self.to_k = nn.Linear(8, 10, bias=False)
        self.to_out = nn.Sequential(nn.Linear(10, 6), nn.Identity())
        self.recompute = False

    def tail(self, x):
        return self.to_out(torch.tanh(self.to_k(torch.nn.functional.silu(self.to_q(x)))))

    def forward(self, x):
        x = torch.nn.functional.silu(self.conv_in(x))
        x = self.norm(self.mid[1](torch.tanh(self.mid[0](x)))).flatten(2).transpose(1, 2)
        return checkpoint(self.tail, x, use_reentrant=False) if self.recompute else self.tail(x)


TARGETS = ("conv_in", "mid.*", "to_q", "to_k", "to_out.0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def image(dtype=torch.float64, b=3, seed=1):
    return torch.randn(b, 4, 6, 5, generator=seeded(seed), dtype=torch.float64).to(dtype)


def shake(model, name="default", size=0.3, seed=5):
    """Moves every parameter of the adapter off its start, so that no branch is zero."""
    generator = seeded(seed)
    with torch.no_grad():
        for p in injection.adapter_parameters(model, name):
            p.add_(
                size
                * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                * (p.abs().mean() if p.ndim == 1 else 1)
            )


def injected(kind="lora", dtype=torch.float64, **settings):
    model = net(dtype)
    inject(
        model, AdapterSpec(**{"kind": kind, "rank": 2, "alpha": 3.0, "targets": TARGETS} | settings)
    )
    return model


def adapted_layers(model):
    return [
        (path, layer)
        for path, layer in adaptable_layers(model).items()
        if isinstance(layer, Adapted)
    ]
