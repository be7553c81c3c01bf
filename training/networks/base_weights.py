"""The frozen base weights of a run: their form on the device, and the model's own for files.

Adapters are injected, and files loaded into them, before the base is quantized: what starts from a
weight starts from the model's own. What is written fits the model's own weights too; for adapters
that depend on them, the model is read again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import adaptable_layers, layers_with_adapter
from lora_core.adapters.kinds import DoRA
from lora_core.adapters.weight_updates import LayerUpdate, LowRank
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.family import Family, LoadOptions
from lora_core.memory.quantized_weights import QuantizedLinear, check_installed
from models import DTYPES, load_family
from models.placement import place_networks
from training.networks.stage_residency import StageResidency
from training.run_adapters import group_of


def check_base_weights(c: Config) -> None:
    """Raises UserError for options that --quantize and --stream do not go with."""
    check_installed(c.quantize)
    if c.quantize != "none" and c.precision == "fp64":
        raise UserError(
            f"--quantize {c.quantize} packs weights of fp32, bf16 or fp16, and --precision is "
            "fp64; leave one of the two out"
        )
    if c.quantize in ("fp8", "int4") and c.compile:  # torchao 0.18 with torch 2.13
        raise UserError(
            f"--compile cannot trace the packed weights of --quantize {c.quantize}; take int8, or "
            "leave --compile out"
        )
    for option, given in (("--quantize", c.quantize != "none"), ("--stream", c.stream)):
        if given and c.shard:
            raise UserError(
                f"--shard divides the weights of a denoiser as it is, and {option} stores them in "
                "another way; leave one of the two out"
            )
    if not c.stream:
        return
    for option, is_given in (("--compile", c.compile), ("--cuda-graph", c.cuda_graph)):
        if is_given:
            raise UserError(
                f"{option} needs weights that stay where they are, and --stream moves them; leave "
                "one of the two out"
            )
    if c.gradient_checkpointing == "none":
        raise UserError(
            "--stream needs --gradient-checkpointing blocks: otherwise the saved activations of a "
            "step hold the weights of all blocks on the device"
        )


def place_model(config: Config, family: Family, residency: StageResidency) -> None:
    """Bring a family that was loaded to the host to the device, in the forms of the config, and
    print what was done. Where networks take turns, those that do not train stay on the host,
    packed. A denoiser to be divided (--shard) stays there, too, until it is.
    """
    moves, device = residency.moves, residency.device
    if config.shard and not moves:
        for name in family.modules.keys() - {family.denoiser}:
            family.modules[name].to(device)
    if config.quantize == "none" and not config.stream:
        return
    trained = [name for name in family.tokenizers if config.trains(group_of(family, name))]
    there = residency.networks_of(residency.trained)
    resident = [name for name, network in family.modules.items() if not moves or network in there]
    lines = place_networks(
        family, device, config.quantize, stream=config.stream, trained=trained, resident=resident
    )
    print("\n".join(lines))
    residency.note_arrival(residency.trained)


def networks_with_dora(
    config: Config, family: Family, adapted: Mapping[str, nn.Module]
) -> tuple[nn.Module, ...]:
    """The networks whose DoRA norms a step computes once. Those of a streamed denoiser are computed
    in each block's turn, since its weights are not there before.
    """
    found = []
    for name, network in adapted.items():
        if injection.has_dora(network) and not (config.stream and name == family.denoiser):
            found.append(network)
    return tuple(found)


# ---------------------------------------------------------------- for files


def updates_for_files(
    config: Config, adapted: Mapping[str, nn.Module]
) -> dict[str, dict[str, LayerUpdate]]:
    """Component -> path -> the adapters' tensors, as `injection.adapter_updates` gives them, for
    the model's own weights.

    An update that is added to a weight is the same for both. A DoRA's magnitudes are written so
    that its gain, magnitude / norm, is that of the trained layer; for those, and for classes whose
    factors depend on the weight, the model is read again.
    """
    found = {}
    own: dict[str, nn.Module] = {}
    for name, network in adapted.items():
        quantized = _layers_that_read_weights(network)
        if not quantized:
            found[name] = injection.adapter_updates(network)
            continue
        own = own or _load_networks(config)
        layers = adaptable_layers(own[name])
        updates = {}
        for path, layer in layers_with_adapter(network, "default").items():
            adapter = layer.adapter("default")
            if path not in quantized:
                updates[path] = injection.stored_update(adapter, layer.base)
                continue
            device = next(adapter.parameters()).device
            base = _layer_on(device, layer.base)  # a streamed one is on the host
            updates[path] = _update_for(adapter, base, _layer_on(device, layers[path]))
        found[name] = updates
    return found


def _layer_on(device: torch.device, layer: nn.Module) -> Any:
    """A layer with a frozen layer's tensors on a device; it stays where it is itself."""
    moved = copy.copy(layer)
    moved._parameters = {}
    for name, p in layer._parameters.items():
        moved._parameters[name] = None if p is None else nn.Parameter(p.detach().to(device), False)
    moved._buffers = {name: t if t is None else t.to(device) for name, t in layer._buffers.items()}
    return moved


def files_read_weights(adapted: Mapping[str, nn.Module]) -> bool:
    """Whether `updates_for_files` reads the weights of quantized layers."""
    return any(map(_layers_that_read_weights, adapted.values()))


def _layers_that_read_weights(network: nn.Module) -> set[str]:
    """Paths of quantized layers whose adapter's files depend on the weight."""
    found = set()
    for path, layer in layers_with_adapter(network, "default").items():
        adapter = layer.adapter("default")
        reads = isinstance(adapter, DoRA) or hasattr(adapter, "low_rank")
        if reads and isinstance(layer.base, QuantizedLinear):
            found.add(path)
    return found


@torch.no_grad()
def _update_for(adapter: Any, quantized: Any, own: Any) -> LayerUpdate:
    update = injection.stored_update(adapter, own)
    if isinstance(adapter, DoRA) and isinstance(update, LowRank):
        gain = adapter.magnitude / adapter.norm(quantized)
        update = update._replace(magnitude=gain * adapter.norm(own))
    return update


def networks_to_fold(config: Config, adapted: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Component -> network with the model's own weights and the trained adapters: the trained ones
    where they have these weights, else the model is read again, to the host, without token rows.
    """
    if config.quantize == "none" and not config.stream:
        return dict(adapted)
    own = _load_networks(config)
    for name, network in adapted.items():
        built = {}
        for path, layer in layers_with_adapter(network, "default").items():
            built[path] = copy.deepcopy(layer.adapter("default")).to("cpu")
        injection.install_adapters(own[name], built, "default", 1.0)
    return {name: own[name] for name in adapted}


def _load_networks(config: Config) -> dict[str, nn.Module]:
    """The networks of the model as they are in its files, on the host."""
    options = LoadOptions(
        DTYPES[config.precision],
        "cpu",
        config.vae,
        config=config.model_config,
        family=config.family,
    )
    return load_family(config.model, options).modules
