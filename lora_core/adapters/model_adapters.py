"""The adapters of a whole model in one call: inject, train, save, load, remove.

A model is a loaded family, a diffusers pipeline, a dictionary of its parts, or one network. These
are the functions that `lora_core` exports for notebooks: inject, parameters, state, save, load,
set_strength, remove.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core import formats
from lora_core.adapters import injection, noise_levels
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.adapters.live_modules import (
    collect_modules,
    family_layout,
    largest_timestep,
    live_layout,
    networks_in_file,
    networks_of,
)
from lora_core.adapters.targets import matches_pattern, nearest_paths
from lora_core.adapters.weight_updates import AdapterState, split_updates
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.settings import AdapterSpec

DENOISERS = ("unet", "transformer")


def inject_adapters(
    model: Any, spec: AdapterSpec, *, component: str = "", name: str = "default", seed: int = 0
) -> list[str]:
    """Put an adapter on every target of a network and return the targets' paths.

    The network is the model's denoiser, or `component` ("text_encoder"). Targets are globs on the
    paths of layers or, for a family, the names of its presets ("attention"). The base weights stop
    training. Raises UserError as `injection.inject` does.
    """
    if not isinstance(spec, AdapterSpec):
        raise UserError(f"expected an AdapterSpec, got {spec!r}; write AdapterSpec((target,))")
    networks = _networks(model)
    component = component or _denoiser_name(networks)
    if component not in networks:
        raise UserError(f"the model has no {component!r}; it has {', '.join(networks)}")
    network = networks[component]
    targets: list[str] = []
    if family_layout(model):
        presets = target_presets(model, component)
        for target in spec.targets:
            targets += presets.get(target, (target,))
    else:
        targets += spec.targets
        _check_no_presets(targets, list(injection.adaptable_layers(network)))
    _freeze_base(network)
    paths = injection.inject(network, replace(spec, targets=tuple(targets)), name=name, seed=seed)
    if (largest := largest_timestep(model)) is not None:
        noise_levels.set_largest_timestep(network, largest)
    return paths


def _check_no_presets(targets: Sequence[str], paths: Sequence[str]) -> None:
    """Raises UserError for a plain word that names no layer of a network without presets."""
    for target in targets:
        is_word = target.replace("-", "_").isidentifier()
        if is_word and not any(matches_pattern(path, target) for path in paths):
            near = ", ".join(nearest_paths(target, paths)) or "none"
            raise UserError(
                f"{target!r} names no layer (nearest: {near}), and presets belong to a model "
                "family; give paths or globs, or inject into load_family(PATH)"
            )


def target_presets(model: Any, component: str = "") -> dict[str, tuple[str, ...]]:
    """Name of each preset of targets -> its globs, for a family's denoiser or another component."""
    layout = family_layout(model)
    if layout is None:
        raise UserError("presets belong to a model family; load_family(PATH) gives one")
    return dict(layout.presets.get(component or _denoiser_name(_networks(model)), {}))


def trained_parameters(model: Any, name: str = "default") -> list[nn.Parameter]:
    """The trained parameters of the model's adapters, for an optimizer."""
    found: list[nn.Parameter] = []
    for network in _adapted(model, name).values():
        found += injection.adapter_parameters(network, name)
    return found


def adapter_state(model: Any, name: str = "default") -> AdapterState:
    """Copies of the tensors of the model's adapters, by published layer names, at strength 1.

    Raises UserError for a kind that has no form in adapter files.
    """
    layout = _layout(model)
    updates = {}
    for component, network in _adapted(model, name).items():
        own = injection.adapter_updates(network, name)
        updates[component] = {
            layout.published(component, path): update for path, update in own.items()
        }
    factors, dense = split_updates(updates)
    return AdapterState(factors, dense=dense)


def save_adapter(
    model: Any,
    path: str | Path,
    *,
    name: str = "default",
    format: str = "diffusers",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model's adapters to a file, for diffusers or in any other writable format.

    Raises UserError as `adapter_state` and `formats.save` do.
    """
    state = adapter_state(model, name)
    formats.save(state, path, format=format, layout=_layout(model), dtype=dtype)


def load_adapter(
    model: Any, path: str | Path, *, name: str = "default", strength: float = 1.0
) -> None:
    """Load an adapter file of any readable format into a model, to be trained further.

    Layers that have an adapter of this name are overwritten, others get one of the file's kind and
    rank. `patch` instead puts a file on a model for inference, with learned tokens, and takes it
    off again. Raises UserError for learned tokens, for changes of norms and biases, and for a
    network that the file adapts and the model lacks.
    """
    networks, layout = _networks(model), _layout(model)
    if str(path).endswith(".safetensors"):
        for component in networks_in_file(path):
            if component not in networks:
                raise UserError(f"{path} adapts {component}; the model has {', '.join(networks)}")
    state = formats.load(path, layout)
    if state.tokens or any(state.parameters.values()):
        what = "learned tokens" if state.tokens else "changes of norms and biases"
        raise UserError(f"{path} holds {what}, which are not loaded for training; use patch")
    for component, own in state.updates().items():
        factors = {layout.module_path(component, key): update for key, update in own.items()}
        injection.load_factors(networks[component], factors, name, strength)


def set_adapter_strength(model: Any, strength: float, name: str = "default") -> None:
    """Make the model's adapters act as W + strength * delta W; 0 is exactly the base model."""
    for network in _adapted(model, name).values():
        injection.set_strength(network, name, strength)


def remove_adapters(model: Any, name: str = "default") -> None:
    """Take the model's adapters off; layers without others are the same modules as before."""
    for network in _adapted(model, name).values():
        injection.remove(network, name)


def _freeze_base(network: nn.Module) -> None:
    """Stop the training of all parameters but those of adapters that are there already."""
    adapters: set[nn.Parameter] = set()
    for layer in adapted_layers(network):
        adapters.update(layer.adapters.parameters())
    for parameter in network.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)


def _networks(model: Any) -> dict[str, nn.Module]:
    """Component -> network that adapter files may name."""
    networks = networks_of(collect_modules(model))
    layout = family_layout(model)
    if layout is None:
        return networks
    return {name: network for name, network in networks.items() if name in layout.components}


def _layout(model: Any) -> Layout:
    return family_layout(model) or live_layout(_networks(model))


def _denoiser_name(networks: dict[str, nn.Module]) -> str:
    if len(networks) == 1:
        return next(iter(networks))
    return next((name for name in DENOISERS if name in networks), "unet")


def _adapted(model: Any, name: str) -> dict[str, nn.Module]:
    """The networks with an adapter of this name. Raises UserError where none has one."""
    found = dict(_named(_networks(model), name))
    if not found:
        raise UserError(f"no network of the model has an adapter {name!r}; inject one first")
    return found


def _named(networks: dict[str, nn.Module], name: str) -> Iterator[tuple[str, nn.Module]]:
    for component, network in networks.items():
        if any(name in layer.adapters for layer in adapted_layers(network)):
            yield component, network
