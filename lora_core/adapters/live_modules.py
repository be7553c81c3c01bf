"""Networks in memory: the modules of a pipeline, a family, a dictionary or one, by component.

Their layout is found from the modules themselves and the names of their classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.cross_attention import cross_attention_paths
from lora_core.errors import UserError
from lora_core.formats.known_formats import COMPONENTS
from lora_core.formats.layer_numbering import CLASSES, NUMBERINGS
from lora_core.formats.layout import ENCODERS, Layout, layout_of
from lora_core.formats.recognition import read_key_shapes

# Class of a network in diffusers or transformers -> its component; the first that fits counts.
NETWORK_CLASSES = {
    "UNet2DConditionModel": "unet",
    "FluxTransformer2DModel": "transformer",
    "SD3Transformer2DModel": "transformer",
    "Flux2Transformer2DModel": "transformer",
    "CLIPTextModelWithProjection": "text_encoder_2",
    "CLIPTextModel": "text_encoder",
}
# Component -> how keys of files begin that adapt it.
KEY_BEGINNINGS = {name: (f"{name}.", f"{name}:") for name in COMPONENTS} | {
    "text_encoder": ("text_encoder.", "text_encoder:", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
T5_CLASSES = ("T5EncoderModel", "UMT5EncoderModel")
NOT_ADAPTED = ("vae", "safety_checker", "image_encoder", "feature_extractor", "scheduler")


def collect_modules(given: Any) -> dict[str, Any]:
    """Component -> module or tokenizer of a pipeline, a family, a dictionary or one network.

    A single network gets the component that its class has in pipelines. Raises UserError for
    anything else, and for a network whose class does not tell.
    """
    if isinstance(given, nn.Module):
        return {_component_of(given): given}
    if family_layout(given) is not None:
        parts = dict(given.modules)
        for encoder, tokenizer in given.tokenizers.items():
            parts[encoder.replace("text_encoder", "tokenizer")] = tokenizer
        return parts
    found = given if isinstance(given, Mapping) else getattr(given, "components", None)
    if not isinstance(found, Mapping):
        raise UserError(
            f"a {type(given).__name__} cannot be patched; pass a diffusers pipeline, one network, "
            'or a dictionary such as {"unet": unet, "text_encoder": text_encoder}'
        )
    return {name: part for name, part in found.items() if part is not None}


def family_layout(given: Any) -> Layout | None:
    """The layout of a loaded family; None for anything else."""
    layout = getattr(given, "layout", None)
    return layout if isinstance(layout, Layout) else None


def largest_timestep(given: Any) -> float | None:
    """The t of pure noise of a loaded family or a diffusers pipeline; None where it is not told."""
    if family_layout(given) is not None:
        found: float | None = given.schedule.t_max
        return found
    scheduler = getattr(getattr(given, "scheduler", None), "config", {})
    # those of diffusers that count timesteps up to 1000
    return scheduler["num_train_timesteps"] if "prediction_type" in scheduler else None


def networks_of(modules: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that adapter files may name."""
    networks = {}
    for name, module in modules.items():
        if isinstance(module, nn.Module) and name not in NOT_ADAPTED:
            networks[name] = module
    return networks


def live_layout(networks: Mapping[str, nn.Module]) -> Layout:
    """The layout of networks in memory, with the numbers of layers in cloneofsimo's files.

    It has the cross-attention modules of a UNet, in the order of files of per-layer tokens.

    A text encoder of T5's classes has T5's token rows, wherever it stands in the pipeline.
    """
    encoders = dict(ENCODERS)
    for name, network in networks.items():
        if name in ENCODERS and any(kind in _class_names(network) for kind in T5_CLASSES):
            encoders[name] = "t5"
    found = layout_of(networks, encoders=encoders)
    components = dict(found.components)
    for name, numbering in NUMBERINGS.items():
        if name in components and _has_numbered_classes(networks[name]):
            components[name] = replace(components[name], numbering=numbering)
    unet = components.get("unet")
    attention = cross_attention_paths(unet.modules) if unet else ()
    return replace(found, components=components, cross_attention=attention)


def networks_in_file(path: str | Path) -> list[str]:
    """The components that the keys of a file, or of the files in a run's folder, name."""
    place = Path(path)
    files = sorted(place.glob("[!.]*.safetensors")) if place.is_dir() else [place]
    found: dict[str, None] = {}
    for file in files:
        for key in read_key_shapes(file)[0]:
            for name, beginnings in KEY_BEGINNINGS.items():
                if key.startswith(beginnings):
                    found[name] = None
    return list(found)


def _component_of(network: nn.Module) -> str:
    names = _class_names(network)
    for kind, component in NETWORK_CLASSES.items():
        if kind in names:
            return component
    raise UserError(
        f"the class {type(network).__name__} does not tell which network of a pipeline this is; "
        f'pass {{"unet": network}}, or the name that it has: {", ".join(COMPONENTS)}'
    )


def _class_names(module: nn.Module) -> set[str]:
    """The names of a module's class and of those that it is derived from."""
    return {kind.__name__ for kind in type(module).__mro__}


def _has_numbered_classes(network: nn.Module) -> bool:
    """Whether a module in the network is of a class that cloneofsimo's files list."""
    return any(not CLASSES.keys().isdisjoint(_class_names(module)) for module in network.modules())
