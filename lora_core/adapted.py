"""Adapted: a Linear or Conv2d with its adapters, standing in the layer's place; and where such layers are in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import UserError
from lora_core.kernels.reference import wide
from lora_core.kinds import Base


class Adapted(nn.Module):
    """A layer and its adapters, in the layer's place. Everything it does not have itself (weight, bias, stride ...) is the layer's."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.strengths: dict[str, float] = {}
        self.folded: dict[str, float] = {}  # name -> the strength that is in base.weight now
        self.original: Tensor | None
        self.register_buffer("original", None, persistent=False)  # the weight before folding; a buffer so that it moves with the model
        self.enabled = True
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def add(self, name: str, adapter: nn.Module, strength: float = 1.0) -> None:
        self.adapters[name] = adapter.train(self.training)
        self.strengths[name] = strength

    def adapter(self, name: str) -> Any:
        """The module of that name; what it offers is in kinds.py."""
        return self.adapters[name]

    def forward(self, x: Tensor) -> Tensor:
        active = [(self.adapter(name), t) for name, t in self.strengths.items() if self.enabled and t != 0 and name not in self.folded]
        if not active:
            return self.base(x)
        if self.folded:
            raise UserError(f"adapters {list(self.folded)} are folded but others are active; fold those too, unfold, or set their strength to 0")
        if len(active) == 1:
            adapter, strength = active[0]
            return adapter(self.base, x, strength)
        y0 = self.base(x)
        total = y0.to(wide(y0.dtype))
        for adapter, strength in active:
            total = total + adapter.update(self.base, x, y0, strength)
        return total.to(y0.dtype)

    @torch.no_grad()
    def refold(self, folded: dict[str, float], path: str) -> None:
        """base.weight = original + sum of strength * delta in fp32 or better, rounded once; with nothing folded, the original's very bits.

        Raises UserError, with the weight as it was, when the weight is not floating point or the result overflows its dtype.
        """
        weight = self.base.weight
        if not weight.is_floating_point():
            raise UserError(f"{path} stores its weight as {weight.dtype}, which cannot take an update; keep the adapter unfolded")
        current = weight.detach().clone()
        original = current if self.original is None else self.original
        try:
            weight.copy_(original)  # every delta is taken against the base weight
            if folded:
                weight.copy_(self._sum(original, folded, path))
        except BaseException:
            weight.copy_(current)
            raise
        self.folded, self.original = dict(folded), original if folded else None

    def _sum(self, original: Tensor, folded: dict[str, float], path: str) -> Tensor:
        total = original.to(wide(original.dtype))
        for name, strength in folded.items():
            total = total + strength * self.adapter(name).delta_weight(self.base)
        rounded = total.to(original.dtype)
        if not bool(rounded.isfinite().all()):
            raise UserError(f"folding {', '.join(folded)} into {path} overflows {original.dtype}; lower the strength or load the model in float32")
        return rounded


def layers(model: nn.Module) -> dict[str, Base | Adapted]:
    """Every Linear and Conv2d, adapted or not, by the path it has without adapters; a layer used in two places has its first path."""
    found: dict[str, Base | Adapted] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            if isinstance(child, (nn.Linear, nn.Conv2d, Adapted)):
                found[prefix + name] = child
            else:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


def places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> every (parent, attribute) that holds it."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    return places
