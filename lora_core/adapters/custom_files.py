"""Files of adapters of a class from outside: their own tensors, next to a LoRA or the merged model.

A class of `--adapter.kind my_adapter.py:Class` trains like any other. Its run writes
RUN_adapter.safetensors, with the state dict of each layer's adapter under "component.path.name";
and the LoRA files, where the class gives factors, or else model/ with every update folded in. To
put the adapters on a model again:

    patch(pipe, "RUN_adapter.safetensors", kind="my_adapter.py:Class")

The header names the class too, but a file never has code run: the caller names it again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import layers_with_adapter
from lora_core.adapters.adapter_module import BaseLayer
from lora_core.adapters.kinds import KINDS, build_adapters, kind_class
from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.formats import CUSTOM
from lora_core.formats.container import read_tensors
from lora_core.formats.training_metadata import TRAINED_BY
from lora_core.settings import AdapterSpec
from lora_core.toml import from_table, parse_toml

CUSTOM_ADAPTER_ENDING = CUSTOM  # after the run's name
# Errors that `state` and `delta_weight` may raise instead of giving tensors.
NO_FACTORS = (UserError, AttributeError, NotImplementedError)


def has_factors(model: nn.Module, name: str = "default") -> bool:
    """Whether adapter files can hold a model's adapters, as factors or as LyCORIS' tensors.

    Decided by the first adapter of the model.
    """
    layer = next(iter(layers_with_adapter(model, name).values()))
    if not getattr(layer.adapter(name), "is_linear", True):
        return False
    try:
        update = injection.stored_update(layer.adapter(name), layer.base)
        return isinstance(update, LowRank | DenseUpdate)
    except NO_FACTORS:
        return False


def is_foldable(model: nn.Module, name: str = "default") -> bool:
    """Whether the weights of a model can hold its adapters; decided by the first adapter.

    No weight does what those do that are not linear in x; and those that read the noise level may
    have no `delta_weight`.
    """
    layer = next(iter(layers_with_adapter(model, name).values()))
    adapter = layer.adapter(name)
    if not getattr(adapter, "is_linear", True):
        return False
    if not getattr(adapter, "reads_level", False):
        return True
    try:
        adapter.delta_weight(layer.base)
    except NO_FACTORS:
        return False
    return True


def check_custom_kind(
    models: Mapping[str, nn.Module], kind: str, run: str, name: str = "default"
) -> None:
    """Print the files that a run without factors will write.

    Raises UserError where an adapter cannot be folded, so that nothing could be written.
    """
    own = f"{run}{CUSTOM_ADAPTER_ENDING}, its own parameters"
    if not all(is_foldable(model, name) for model in models.values()):
        reads_level = getattr(kind_class(kind), "reads_level", False)
        reason = "depends on the noise level" if reads_level else "is not linear in its input"
        print(f"{kind} {reason}, so that no weight holds it: the run writes {own}")
        return
    for component, model in models.items():
        path, layer = next(iter(layers_with_adapter(model, name).items()))
        try:
            shape = layer.adapter(name).delta_weight(layer.base).shape
        except NO_FACTORS as error:
            raise UserError(
                f"{kind} gives neither factors nor a weight update "
                f"({type(error).__name__}: {error}) for {component}.{path}, so no file could hold "
                "it; add delta_weight, or derive the class from adapter_module.Adapter, which has "
                "it from `update`: see lora_core/adapters/kinds.py"
            ) from error
        if shape != layer.base.weight.shape:
            raise UserError(
                f"delta_weight of {kind} is {list(shape)} for {component}.{path}, "
                f"whose weight is {list(layer.base.weight.shape)}"
            )
    if kind not in KINDS:
        print(
            f"{kind} has no low-rank form: the run writes {own}, "
            "and model/, the whole model with them folded in"
        )


def adapter_tensors(models: Mapping[str, nn.Module], name: str = "default") -> dict[str, Tensor]:
    """The parameters and buffers of every adapter, as "component.path.name", on the CPU."""
    found = {}
    for component, model in models.items():
        for path, layer in layers_with_adapter(model, name).items():
            for key, value in layer.adapter(name).state_dict().items():
                tensor = value.detach().to("cpu", copy=True)
                found[f"{component}.{path}.{key}"] = tensor.contiguous()
    return found


def adapter_buffers(models: Mapping[str, nn.Module], name: str = "default") -> dict[str, Tensor]:
    """The tensors of `adapter_tensors` that no optimizer trains; none for the kinds in KINDS."""
    trained = set()
    for component, model in models.items():
        for path, layer in layers_with_adapter(model, name).items():
            for key, _ in layer.adapter(name).named_parameters(remove_duplicate=False):
                trained.add(f"{component}.{path}.{key}")
    every = adapter_tensors(models, name)
    return {key: tensor for key, tensor in every.items() if key not in trained}


@torch.no_grad()
def load_buffers(
    models: Mapping[str, nn.Module], saved: Mapping[str, Tensor], name: str = "default"
) -> None:
    """Copy `adapter_buffers` of these names and shapes back in place."""
    for component, model in models.items():
        for path, layer in layers_with_adapter(model, name).items():
            for key, buffer in layer.adapter(name).named_buffers(remove_duplicate=False):
                if (own := f"{component}.{path}.{key}") in saved:
                    buffer.copy_(saved[own])


def save_adapters(
    models: Mapping[str, nn.Module],
    file: str | Path,
    header: Mapping[str, str],
    name: str = "default",
) -> Path:
    """Write `adapter_tensors` with a header, whole or not at all."""
    file = Path(file)
    with atomic_write(file) as temporary:
        save_file(adapter_tensors(models, name), temporary, {"format": "pt", **header})
    return file


def load_adapters(models: Mapping[str, nn.Module], file: str | Path, name: str = "default") -> None:
    """Load a file into adapters that were injected with the settings of the run that wrote it.

    All or nothing: raises UserError before any change for a tensor that is missing, left over or of
    another shape.
    """
    saved, _ = read_tensors(Path(file))
    own = adapter_tensors(models, name)
    _check_tensors(saved, own, str(file))
    for component, model in models.items():
        for path, layer in layers_with_adapter(model, name).items():
            _load_state(layer.adapter(name), saved, f"{component}.{path}.")


def put_adapters(
    models: Mapping[str, nn.Module], state: AdapterState, kind: str, name: str, source: str
) -> None:
    """Put the custom adapters of a file on the layers that it names, with the run's settings.

    `kind` is the class, FILE.py:Class, whose code runs. All or nothing, as `load_adapters`.
    """
    spec, seed = read_spec(state.metadata, kind, source)
    built: dict[str, dict[str, nn.Module]] = {}
    saved, own = {}, {}
    for component, tensors in state.custom.items():
        found = injection.adaptable_layers(models[component])
        bases: dict[str, BaseLayer] = {}
        for key, tensor in tensors.items():
            saved[f"{component}.{key}"] = tensor
            path = layer_of_key(key, found, f"{component}.{key} of {source}")
            bases[path] = injection.adaptable_base(path, found[path])
        specs = {path: injection.layer_spec(spec, path, seed) for path in bases}
        built[component] = build_adapters(kind_class(kind), bases, specs)
        for path, adapter in built[component].items():
            for key, value in adapter.state_dict().items():
                own[f"{component}.{path}.{key}"] = value
    _check_tensors(saved, own, source)
    for component, adapters in built.items():
        for path, adapter in adapters.items():
            _load_state(adapter, saved, f"{component}.{path}.")
        injection.install_adapters(models[component], adapters, name, 1.0)


def read_spec(header: Mapping[str, str], kind: str, source: str) -> tuple[AdapterSpec, int]:
    """The adapter settings of the run that wrote a file, for this class; and the run's seed."""
    where = f"the header entry {TRAINED_BY} of {source}"
    config = parse_toml(header.get(TRAINED_BY, ""), where)
    table, seed = config.get("adapter", {}), config.get("seed", 0)
    if type(seed) is not int:
        raise UserError(f"{where} has a seed that is no integer; is the file damaged?")
    chosen = {"targets", "exclude", "kind"}
    names = {option.name for option in fields(AdapterSpec)} - chosen
    settings = {}
    if isinstance(table, dict):
        settings = {key: value for key, value in table.items() if key in names}
    return from_table({**settings, "targets": ["*"], "kind": kind}, AdapterSpec), seed


def layer_of_key(key: str, layers: Collection[str], where: str) -> str:
    """The layer of "path.name". Raises UserError where the network has none."""
    path = key
    while path and path not in layers:
        path = path.rpartition(".")[0]
    if not path:
        raise UserError(f"the network has no layer of {where}; is the file for another model?")
    return path


def _check_tensors(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    if odd := sorted(saved.keys() ^ own.keys()):
        where = "the file" if odd[0] in saved else "the model"
        raise UserError(
            f"{source} does not fit these adapters: only {where} has {odd[0]}; "
            "inject with the settings in the file's header"
        )
    for key, value in saved.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{source} does not fit these adapters: {key} is {list(value.shape)}, "
                f"expected {list(own[key].shape)}"
            )


def _load_state(adapter: nn.Module, saved: Mapping[str, Tensor], start: str) -> None:
    adapter.load_state_dict({key: saved[start + key] for key in adapter.state_dict()})
