"""Adapted: a Linear or Conv2d with its adapters, standing in the layer's place; and where such layers are in a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core.adapters.kinds import BaseLayer
from lora_core.errors import UserError
from lora_core.kernels.reference import wide_dtype

if TYPE_CHECKING:
    from lora_core.adapters.groups import LayerGroup


class Adapted(nn.Module):
    """A layer and its adapters, in the layer's place. Everything it does not have itself (weight, bias, stride ...) is the layer's."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.strengths: dict[str, float] = {}
        self.folded: dict[str, float] = {}  # name -> the strength that is in base.weight now
        self.original: Tensor | None
        self.register_buffer(
            "original", None, persistent=False
        )  # the weight before folding; a buffer so that it moves with the model
        self.original_bias: Tensor | None
        self.register_buffer("original_bias", None, persistent=False)
        self.enabled = True
        self.group: LayerGroup | None = (
            None  # the layers that see the same x, and which of them this is
        )
        self.seat = 0
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

    def active(self) -> list[tuple[Any, float]]:
        """The adapters that act now, each with its strength."""
        return [
            (self.adapter(name), t)
            for name, t in self.strengths.items()
            if self.enabled and t != 0 and name not in self.folded
        ]

    def forward(self, x: Tensor) -> Tensor:
        together = None if self.group is None else self.group.take(self.seat, x)
        if together is not None:
            return together
        active = self.active()
        if not active:
            return self.base(x)
        if self.folded:
            raise UserError(
                f"adapters {list(self.folded)} are folded but others are active; fold those too, unfold, or set their strength to 0"
            )
        if len(active) == 1:
            adapter, strength = active[0]
            return adapter(self.base, x, strength)
        y0 = self.base(x)
        total = y0.to(wide_dtype(y0.dtype))
        for adapter, strength in active:
            total = total + adapter.update(self.base, x, y0, strength)
        return total.to(y0.dtype)

    @torch.no_grad()
    def refold(self, folded: dict[str, float], path: str) -> None:
        """base.weight (and bias) = original + sum of strength * delta in fp32 or better, rounded once; with nothing folded, the original's very bits.

        Raises UserError, with the layer as it was, when the weight is not floating point or the result overflows its dtype.
        """
        current = {name: p.detach().clone() for name, p in self.base.named_parameters()}
        originals = current
        if self.original is not None:
            originals = {"weight": self.original} | (
                {} if self.original_bias is None else {"bias": self.original_bias}
            )
        try:
            self._write(originals)  # every delta is taken against the base weight
            if folded:
                self._write(self.merged(folded, path))
        except BaseException:
            self._write(current)
            raise
        self.folded = dict(folded)
        self.original, self.original_bias = (
            (originals["weight"], originals.get("bias")) if folded else (None, None)
        )

    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            getattr(self.base, name).copy_(value)

    @torch.no_grad()
    def merged(self, strengths: Mapping[str, float], path: str) -> dict[str, Tensor]:
        """New "weight" (and "bias", where an adapter moves it): + strength * delta of each adapter, summed in fp32 or better, rounded once.

        Raises UserError when the weight is not floating point or the result overflows its dtype.
        """
        totals = {name: p.to(wide_dtype(p.dtype)) for name, p in self.base.named_parameters()}
        dtype = self.base.weight.dtype
        if not dtype.is_floating_point:
            raise UserError(
                f"{path} stores its weight as {dtype}, which cannot take an update; keep the adapter unfolded"
            )
        moved = {"weight"}
        for key, strength in strengths.items():
            adapter = self.adapter(key)
            totals["weight"] = totals["weight"] + strength * adapter.delta_weight(self.base)
            shift = adapter.delta_bias(self.base) if hasattr(adapter, "delta_bias") else None
            if shift is not None:
                moved.add("bias")
                totals["bias"] = totals["bias"] + strength * shift
        rounded = {
            name: total.to(getattr(self.base, name).dtype)
            for name, total in totals.items()
            if name in moved
        }
        if not all(bool(value.isfinite().all()) for value in rounded.values()):
            raise UserError(
                f"folding {', '.join(strengths)} into {path} overflows {dtype}; lower the strength or load the model in float32"
            )
        return rounded


def adaptable_layers(model: nn.Module) -> dict[str, BaseLayer | Adapted]:
    """Every Linear and Conv2d, adapted or not, by the path it has without adapters; a layer used in two places has its first path."""
    found: dict[str, BaseLayer | Adapted] = {}
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


def module_parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> every (parent, attribute) that holds it."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    return places
