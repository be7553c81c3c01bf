"""Adapted: the module that replaces a Linear or Conv2d and holds its adapters; finding such layers.

The form of the forward (the base alone, one adapter, a group of layers, a sum of updates) is chosen
when adapters, strengths or kernels change, and kept as a function of x.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_core import kernels
from lora_core.adapters.adapter_module import BaseLayer, has_dropout
from lora_core.adapters.kinds import DoRA, LoRA
from lora_core.errors import UserError
from lora_core.kernels import dispatch
from lora_core.kernels.reference import wide_dtype

Forward = Callable[[Tensor], Tensor]
UNRESOLVED = -1  # less than every generation of the kernels' choices


class Group(Protocol):
    """Layers that share one input (groups.LayerGroup)."""

    @property
    def acts(self) -> bool:
        """Whether the members' outputs are computed together now."""

    def watch_parent(self) -> None:
        """Start or stop acting, by the members' device and the kernels' mode."""

    def compute(self, index: int, x: Tensor) -> Tensor | None:
        """The output of one member, or None where it has to be computed alone."""

    def dissolve(self) -> None:
        """Remove the group from all its members."""


class Adapted(nn.Module):
    """A layer and its adapters, in place of the layer; other attributes are those of the layer.

    `strengths` and `folded` are read-only: the methods change them and resolve the forward again.
    """

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self._strengths: dict[str, float] = {}
        self.folded: dict[str, float] = {}  # adapter -> its strength in base.weight now
        # The weight and bias before folding: buffers, so that they move with the model.
        self.original: Tensor | None
        self.register_buffer("original", None, persistent=False)
        self.original_bias: Tensor | None
        self.register_buffer("original_bias", None, persistent=False)
        self.enabled = True  # False: the base alone
        self.group: Group | None = None
        self.index = 0  # of this layer in its group
        self.training = base.training
        self.generation = UNRESOLVED
        self.run: Forward | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.generation != dispatch.generation:
            self.resolve()
        if not self.enabled:
            return self._modules["base"](x)  # type: ignore[misc]
        return self.run(x)  # type: ignore[misc]

    def resolve(self) -> None:
        """Choose the forward for the current adapters, strengths and kernels.

        The functions hold the base and the adapters but not this module: a removed adapter is
        freed at once, without a pass of the garbage collector.
        """
        if self.group is not None:
            self.group.watch_parent()
        self.run = self._choose_forward()
        self.generation = dispatch.generation

    def _choose_forward(self) -> Forward:
        active = self.active()
        if not active:
            return _run_base(self.base)
        if self.folded:
            return _refuse(list(self.folded))
        if len(active) > 1:
            return _run_sum(self.base, active)
        adapter, strength = active[0]
        alone = _run_adapter(self.base, adapter, strength)
        if self.group is None or not self.group.acts:
            return alone
        return _run_grouped(self.group, self.index, alone)

    @property
    def strengths(self) -> Mapping[str, float]:
        """Adapter -> its strength; `set_strength` changes one."""
        return MappingProxyType(self._strengths)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, which resolve their own functions."""
        return self.__dict__ | {"run": None, "generation": UNRESOLVED}

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica.generation = UNRESOLVED
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Resolve again: on another device kernels and the use of groups can change."""
        super()._apply(fn, recurse)
        self.resolve()
        return self

    @torch.no_grad()
    def change_base(
        self, make: Callable[[BaseLayer], BaseLayer], device: torch.device | str
    ) -> None:
        """Move the layer to a device and put make(base) in place of its base.

        A DoRA keeps its gain, magnitude / norm: it is the identity on the new base where it was on
        the old one, and a file's acts as it did.
        """
        gains: dict[str, Tensor] = {}
        for name, adapter in self.adapters.items():
            if isinstance(adapter, DoRA):
                gains[name] = adapter.magnitude / adapter.norm(self.base)
        self.to(device)
        self.base = make(self.base)
        for name, gain in gains.items():
            dora = self.adapter(name)
            dora.magnitude.copy_(gain.to(device) * dora.norm(self.base))
        self.resolve()

    def add(self, name: str, adapter: nn.Module, strength: float = 1.0) -> None:
        self.adapters[name] = adapter.train(self.training)
        self.set_strength(name, strength)

    def discard(self, name: str) -> None:
        """Take one adapter out."""
        del self.adapters[name], self._strengths[name]
        self.resolve()

    def set_strength(self, name: str, strength: float) -> None:
        self._strengths[name] = float(strength)
        self.resolve()

    def adapter(self, name: str) -> Any:
        """The adapter of that name; kinds.py lists its methods."""
        return self.adapters[name]

    def active(self) -> list[tuple[Any, float]]:
        """(adapter, strength) of those that act: none while the layer is disabled."""
        found = []
        for name, strength in self._strengths.items():
            if strength != 0 and name not in self.folded:
                found.append((self.adapter(name), strength))
        return found

    @torch.no_grad()
    def refold(self, folded: dict[str, float], path: str) -> None:
        """Write original + sum of strength * delta into the base's weight and bias.

        Summed in fp32 or better and rounded once; with nothing folded, the original bits are back.
        Raises UserError, leaving the layer unchanged, when the weight is not floating point or the
        result overflows its dtype.
        """
        current = {name: p.detach().clone() for name, p in self.base.named_parameters()}
        originals = current
        if self.original is not None:
            originals = {"weight": self.original}
            if self.original_bias is not None:
                originals["bias"] = self.original_bias
        try:
            self._write(originals)  # every delta is taken against the base weight
            if folded:
                self._write(self.merged_parameters(folded, path))
        except BaseException:
            self._write(current)
            raise
        self.folded = dict(folded)
        self.original = originals["weight"] if folded else None
        self.original_bias = originals.get("bias") if folded else None
        self.resolve()

    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            getattr(self.base, name).copy_(value)

    @torch.no_grad()
    def merged_parameters(self, strengths: Mapping[str, float], path: str) -> dict[str, Tensor]:
        """New "weight", and "bias" if an adapter changes it: base + sum of strength * delta.

        Summed in fp32 or better, rounded once. Raises UserError when the weight is not floating
        point or the result overflows its dtype.
        """
        if "weight" not in self.base._parameters:
            raise UserError(
                f"{path} has a packed weight (--quantize), which cannot take an update; "
                "keep the adapter unfolded, or load the model without it"
            )
        dtype = self.base.weight.dtype
        if not dtype.is_floating_point:
            raise UserError(
                f"{path} stores its weight as {dtype}, which cannot take an update; "
                "keep the adapter unfolded"
            )
        totals = {name: p.to(wide_dtype(p.dtype)) for name, p in self.base.named_parameters()}
        moved = {"weight"}
        for key, strength in strengths.items():
            adapter = self.adapter(key)
            totals["weight"] = totals["weight"] + strength * adapter.delta_weight(self.base)
            shift = adapter.delta_bias(self.base) if hasattr(adapter, "delta_bias") else None
            if shift is not None:
                moved.add("bias")
                totals["bias"] = totals["bias"] + strength * shift
        rounded = {name: totals[name].to(getattr(self.base, name).dtype) for name in totals}
        merged = {name: value for name, value in rounded.items() if name in moved}
        if not all(bool(value.isfinite().all()) for value in merged.values()):
            raise UserError(
                f"folding {', '.join(strengths)} into {path} overflows {dtype}; "
                "lower the strength or load the model in float32"
            )
        return merged


def _run_base(base: BaseLayer) -> Forward:
    def run(x: Tensor) -> Tensor:
        return base(x)

    return run


def _run_adapter(base: BaseLayer, adapter: Any, strength: float) -> Forward:
    """The layer with one adapter: `adapter.forward` with its choices made once.

    Without dropout a LoRA, or a DoRA of a Linear at strength 1, calls its kernel directly. The
    rest (other kinds and subclasses, dropout, a DoRA of a convolution) takes `adapter.forward`, and
    so does any layer while it has hooks or is compiled.
    """
    if type(adapter) in (LoRA, DoRA) and not has_dropout(adapter.spec):
        is_lora = type(adapter) is LoRA
        if type(base) is nn.Linear and (is_lora or strength == 1):
            return _run_linear(base, adapter, strength)
        if type(base) is nn.Conv2d and is_lora:
            return _run_convolution(base, adapter, strength)

    def run(x: Tensor) -> Tensor:
        return adapter(base, x, strength)

    return run


def _run_linear(base: nn.Linear, adapter: Any, strength: float) -> Forward:
    """Parameters are read in each call: casting the model replaces them."""
    own, frozen, hooks = adapter._parameters, base._parameters, _hook_tables(base, adapter)
    resolved: dict[Any, Callable[..., Tensor]] = {}  # shape, dtype and device of x -> kernel

    def run(x: Tensor) -> Tensor:
        is_plain = type(base) is nn.Linear and "forward" not in base.__dict__
        if torch.compiler.is_compiling() or not is_plain or any(hooks):
            return adapter(base, x, strength)
        magnitude = own.get("magnitude")
        norm = None if magnitude is None else adapter.norm(base)
        factors = own["down"], own["up"], adapter.scale * strength, magnitude, norm
        key = x.shape, x.dtype, x.device
        kernel = resolved.get(key)
        if kernel is None:
            weights = frozen["weight"], frozen["bias"]
            kernel = resolved[key] = kernels.resolve("lora_linear", x, *weights, *factors)
        return kernel(x, frozen["weight"], frozen["bias"], *factors)

    return run


def _run_convolution(base: nn.Conv2d, adapter: Any, strength: float) -> Forward:
    """As `_run_linear`; padding other than with zeros is left to `adapter.forward`."""
    own, frozen, hooks = adapter._parameters, base._parameters, _hook_tables(base, adapter)
    resolved: dict[Any, Callable[..., Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        is_plain = type(base) is nn.Conv2d and "forward" not in base.__dict__
        is_plain = is_plain and base.padding_mode == "zeros"
        if torch.compiler.is_compiling() or not is_plain or any(hooks):
            return adapter(base, x, strength)
        factors = own["down"], own["up"], adapter.scale * strength
        window = base.stride, base.padding, base.dilation, base.groups
        arguments = frozen["weight"], frozen["bias"], *factors, *window
        key = x.shape, x.dtype, x.device, base.stride
        kernel = resolved.get(key)
        if kernel is None:
            kernel = resolved[key] = kernels.resolve("lora_conv", x, *arguments)
        return kernel(x, *arguments)

    return run


def _hook_tables(*modules: nn.Module) -> list[Mapping[int, Any]]:
    """The modules' hooks, which torch puts into these tables in place; a kernel runs none."""
    tables: list[Mapping[int, Any]] = []
    for module in modules:
        tables += [module._forward_hooks, module._forward_pre_hooks]
        tables += [module._backward_hooks, module._backward_pre_hooks]
    return tables


def _run_sum(base: BaseLayer, active: list[tuple[Any, float]]) -> Forward:
    """base(x) + the update of each adapter, in fp32 or better."""

    def run(x: Tensor) -> Tensor:
        y0 = base(x)
        total = y0.to(wide_dtype(y0.dtype))
        for adapter, strength in active:
            total = total + adapter.update(base, x, y0, strength)
        return total.to(y0.dtype)

    return run


def _run_grouped(group: Group, index: int, alone: Forward) -> Forward:
    def run(x: Tensor) -> Tensor:
        y = group.compute(index, x)
        return alone(x) if y is None else y

    return run


def _refuse(folded: list[str]) -> Forward:
    def run(x: Tensor) -> Tensor:
        raise UserError(
            f"adapters {folded} are folded but others are active; "
            "fold those too, unfold, or set their strength to 0"
        )

    return run


def adaptable_layers(model: nn.Module) -> dict[str, BaseLayer | Adapted]:
    """Path without adapters -> every Linear and Conv2d, adapted or not.

    A layer that is used in two places is listed under its first path.
    """
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


def layers_with_adapter(model: nn.Module, name: str | None) -> dict[str, Adapted]:
    """Path -> layer, of the layers that have the adapter (any adapter for None).

    Raises UserError, with the existing names, when none has it.
    """
    every: dict[str, Adapted] = {}
    for path, layer in adaptable_layers(model).items():
        if isinstance(layer, Adapted):
            every[path] = layer
    chosen = {path: layer for path, layer in every.items() if name in (None, *layer.adapters)}
    if not chosen:
        names: dict[str, None] = {}
        for layer in every.values():
            names |= dict.fromkeys(layer.adapters)
        wanted = "" if name is None else f" {name!r}"
        raise UserError(
            f"the model has no adapter{wanted}; it has {', '.join(names) or 'none at all'}"
        )
    return chosen


def adapted_layers(model: nn.Module) -> list[Adapted]:
    """The adapted layers of a model, in its order; searched for once after each change."""
    known = _known_layers.get(model)
    if known is None:
        every = adaptable_layers(model).values()
        known = [weakref.ref(layer) for layer in every if isinstance(layer, Adapted)]
        _known_layers[model] = known
    return [layer for reference in known if (layer := reference()) is not None]


def forget_adapted_layers() -> None:
    """Clear the cache of `adapted_layers`, for all models: one may be a part of another."""
    _known_layers.clear()


_known_layers: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Adapted]]]
_known_layers = weakref.WeakKeyDictionary()


def module_parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> every (parent, attribute) that holds it."""
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, attribute))
    return parents


def check_strength(strength: float) -> None:
    """Raises UserError for a strength that is not finite."""
    if not math.isfinite(strength):
        raise UserError(f"strength is {strength}; expected a finite number")
