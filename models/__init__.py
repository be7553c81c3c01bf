"""Families of text-to-image models: one file each, and the table that finds the right one for a
checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download

from lora_core.diffusion.noise import Schedule
from lora_core.errors import UserError
from lora_core.family import Conditioning, Family, Layout, LoadOptions, Sizes, read_json
from models import flux, sd, sdxl, single_file
from models.known import recognize_adapter, recognize_path
from models.single_file import convert_to_folder, is_single_file, locate_networks, save_single_file

__all__ = [
    "DTYPES",
    "FAMILIES",
    "Conditioning",
    "Family",
    "Layout",
    "LoadOptions",
    "Sizes",
    "choose_device",
    "is_single_file",
    "load_family",
    "read_schedule",
    "read_layout",
    "recognize_adapter",
    "recognize_path",
    "save_family",
    "save_single_file",
    "locate_networks",
    "convert_to_folder",
]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}  # --precision


DEFAULT_LOADING = LoadOptions()  # fp32 on the CPU


class FamilyEntry(NamedTuple):
    load: Callable[[str, LoadOptions], Family]
    outline: Callable[[str], Layout]
    noise_of: Callable[[str, Mapping[str, Any], int], tuple[Schedule, str]]


FAMILIES: dict[str, FamilyEntry] = {  # `_class_name` of model_index.json -> its family
    **dict.fromkeys(sd.PIPELINES, FamilyEntry(sd.load, sd.read_sd_layout, sd.read_sd_schedule)),
    **dict.fromkeys(
        sdxl.PIPELINES, FamilyEntry(sdxl.load, sdxl.read_sdxl_layout, sdxl.read_sdxl_schedule)
    ),
    **dict.fromkeys(
        flux.PIPELINES, FamilyEntry(flux.load, flux.read_flux_layout, flux.read_flux_schedule)
    ),
}


def load_family(path: str, how: LoadOptions = DEFAULT_LOADING) -> Family:
    """The model at `path`, a folder in the diffusers layout, a hub id, or a single file, frozen and
    in eval mode.

    Raises UserError for a path that is not there, another family, a missing or broken part, and
    configs for what has its own.
    """
    if is_single_file(path):
        return single_file.load(path, how)
    _refuse_config(path, how.config)
    return _row(path).load(path, how)


def read_layout(path: str, config: str = "") -> Layout:
    """What can be adapted in the model at `path`, and how files name it; reads its configs, not its
    weights. `config` is that of `Loading`.

    Raises UserError like `load_family`.
    """
    if is_single_file(path):
        return single_file.outline(path, config)
    _refuse_config(path, config)
    return _row(path).outline(path)


def read_schedule(
    path: str, changes: Mapping[str, Any], resolution: int = 0, config: str = ""
) -> tuple[Schedule, str]:
    """(schedule, row of PREDICTIONS) that the model at `path` trains with, from its configs; with a
    resolution (pixels) in the shift that its scheduler takes for it. `changes` and `config` are
    those of `Loading`. Raises UserError like `load_family`.
    """
    if is_single_file(path):
        return single_file.noise_of(path, changes, resolution, config)
    _refuse_config(path, config)
    return _row(path).noise_of(path, changes, resolution)


def save_family(
    family: Family,
    path: str,
    folder: Path,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    config: str = "",
) -> None:
    """A whole model in the diffusers layout: the parts of the family named in `states` with those
    weights, everything else as it is at `path`.
    """
    if is_single_file(path):
        single_file.convert_to_folder(path, folder, config, overwrite=True)
        for name, state in states.items():
            _save(family.modules[name], state, folder / name)
        return
    source = (
        Path(path)
        if Path(path).is_dir()
        else Path(hf_hub_download(path, "model_index.json")).parent
    )
    index = read_json(path, "model_index.json")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "model_index.json", folder)
    for name in index:
        if name in states:
            _save(family.modules[name], states[name], folder / name)
        elif (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)


def _save(network: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """A network of that kind with other weights, in its library's layout. save_pretrained of
    diffusers takes no state dict.
    """
    with torch.device("meta"):
        bare = (
            type(network).from_config(network.config)
            if hasattr(network, "from_config")
            else type(network)(network.config)
        )
    bare.load_state_dict(dict(state), assign=True)
    bare.save_pretrained(folder)


def _refuse_config(path: str, config: str) -> None:
    if path and config:
        raise UserError(
            f"--model-config {config} has no effect: {path} has configs of its own; "
            "it is for models in a single file"
        )


def _row(path: str) -> FamilyEntry:
    if not path:
        raise UserError("no base model; name a folder, a file or a hub id with --model")
    name = read_json(path, "model_index.json").get("_class_name", "")
    if name not in FAMILIES:
        raise UserError(
            f"{path} is a {name or 'model without _class_name'}, which is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one. Raises UserError when it cannot be
    used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # no such device, or a torch that was built without it
        why = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(
            f"--device {name} cannot be used ({why}); leave --device out to take what there is"
        ) from None
