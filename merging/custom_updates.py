"""Updates of adapters of a user's class, computed by the class for the weights of a base model.

A class that gives factors gives a LoRA. The update of another is as wide as its layer, and is
computed each time that it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import formats
from lora_core.adapters import custom_files, injection
from lora_core.adapters.adapter_module import BaseLayer, LayerSpec
from lora_core.adapters.kinds import kind_class
from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats.known_formats import CUSTOM_KIND
from lora_core.formats.layout import Shape
from lora_core.formats.model_folders import parameter_key, weight_key
from merging.base_models import BaseModel
from merging.commands import FileReadOptions
from merging.opening import open_adapter


def open_updates(
    path: str, base: BaseModel, reading: FileReadOptions, kind: str = ""
) -> AdapterState:
    """The adapter in a file, as `open_adapter` reads it, or that of the user's class `kind`.

    `kind` is FILE.py:Class, whose code is run, and has no effect on other files.
    """
    if kind and is_custom(path, base):
        state = formats.load(path, base.layout, custom=True)
        return compute_updates(state, base, kind, path)
    return open_adapter(path, base.layout, reading, merging=True)


def is_custom(path: str, base: BaseModel) -> bool:
    """Whether a file, or a run's folder, has the tensors of a user's class."""
    return bool(formats.load(path, base.layout, merging=True, custom=True).custom)


def compute_updates(state: AdapterState, base: BaseModel, kind: str, source: str) -> AdapterState:
    """A file's adapters of a user's class as updates of the layers of a base model.

    Raises UserError for tensors that do not fit the class, and for updates that no weight holds.
    """
    spec, seed = custom_files.read_spec(state.metadata, kind, source)
    components: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Tensor]] = {}
    for component, tensors in state.custom.items():
        part = base.layout.component(component)
        paths = [path.removeprefix(part.module_prefix) for path in part.shapes]
        own: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            path = custom_files.layer_of_key(key, paths, f"{component}.{key} of {source}")
            own.setdefault(path, {})[key.removeprefix(f"{path}.")] = tensor
        names = {path: base.layout.published(component, path) for path in own}
        specs = {path: injection.layer_spec(spec, path, seed) for path in own}
        shared = _shared_module(kind, [part.shapes[name] for name in names.values()], specs)
        for path, saved in own.items():
            layer = CustomLayer(
                base, component, names[path], kind, replace(specs[path], shared=shared), saved
            )
            components.setdefault(component, {})[names[path]] = layer.read_update()
            if (shift := layer.read_shift()) is not None:
                parameters.setdefault(component, {})[f"{names[path]}.bias"] = shift
    header = {key: text for key, text in state.metadata.items() if key != CUSTOM_KIND}
    return replace(state, components=components, parameters=parameters, custom={}, metadata=header)


def _shared_module(kind: str, shapes: list[Shape], specs: Mapping[str, LayerSpec]) -> Any:
    """The module that the class's adapters share, made for layers of these shapes."""
    make_shared = getattr(kind_class(kind), "make_shared", None)
    if make_shared is None:
        return None
    bases = [_bare_layer(torch.empty(shape)) for shape in shapes]
    return make_shared(bases, next(iter(specs.values())))


@dataclass(frozen=True)
class CustomLayer:
    """One layer's adapter of a user's class, on the weight of a base model."""

    base: BaseModel
    component: str
    path: str  # published
    kind: str
    spec: LayerSpec
    saved: Mapping[str, Tensor]  # the adapter's state

    def read_update(self) -> LowRank | DenseUpdate:
        """The update as factors, where the class has them, else as wide as the weight."""
        layer, adapter = self._open()
        with suppress(*custom_files.NO_FACTORS):
            found = injection.stored_update(adapter, layer)
            if isinstance(found, LowRank | DenseUpdate):
                return found
        self._delta_weight()  # raises before anything is written
        shape = tuple(layer.weight.shape)
        return DenseUpdate("full", shape, ComputedParts({"diff": self._delta_weight}))

    def read_shift(self) -> Tensor | None:
        """The adapter's update of the bias; None for a class that changes none."""
        layer, adapter = self._open()
        return adapter.delta_bias(layer) if hasattr(adapter, "delta_bias") else None

    def _delta_weight(self) -> Tensor:
        layer, adapter = self._open()
        try:
            delta: Tensor = adapter.delta_weight(layer)
        except custom_files.NO_FACTORS as error:
            raise UserError(
                f"{self.kind} gives no update for the weight of {self.component}.{self.path}: "
                f"{error}; draw with infer.py --adapter-kind {self.kind}"
            ) from error
        return delta.detach()

    def _open(self) -> tuple[BaseLayer, Any]:
        """The layer with the base model's weight, and the adapter with its saved tensors."""
        weights, layout = self.base.model[self.component], self.base.layout
        weight = weights.read(weight_key(weights, layout, self.component, self.path))
        bias = None
        if f"{self.path}.bias" in layout.component(self.component).parameters:
            bias = weights.read(parameter_key(weights, layout, self.component, f"{self.path}.bias"))
        layer = _bare_layer(weight, bias)
        adapter = kind_class(self.kind)(layer, self.spec)
        try:
            adapter.load_state_dict(dict(self.saved))
        except RuntimeError as error:
            raise UserError(
                f"the tensors of {self.component}.{self.path} do not fit {self.kind}: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from error
        return layer, adapter


def _bare_layer(weight: Tensor, bias: Tensor | None = None) -> BaseLayer:
    """A Linear or Conv2d of this weight, without stride and padding, which no update depends on."""
    out, inner, *kernel = weight.shape
    with torch.device("meta"):
        layer: BaseLayer = nn.Linear(inner, out)
        if kernel:
            layer = nn.Conv2d(inner, out, (kernel[0], kernel[1]))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


class ComputedParts(Mapping[str, Tensor]):
    """Tensors by role, each computed when it is read: all layers at once would fill the memory."""

    def __init__(self, compute: Mapping[str, Callable[[], Tensor]]) -> None:
        self.compute = compute

    def __getitem__(self, role: str) -> Tensor:
        return self.compute[role]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.compute)

    def __len__(self) -> int:
        return len(self.compute)
