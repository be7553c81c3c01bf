"""The family of a checkpoint, found and opened.

A family's file is imported when a model of that family is opened.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from lora_core import distributed
from lora_core.diffusion.noise import Schedule
from lora_core.errors import UserError, first_line
from lora_core.family import Family, FamilyFunctions, LoadOptions
from lora_core.formats.known_formats import is_single_file
from lora_core.formats.layout import Layout
from lora_core.plugins import find_plugin
from models.components import read_json

DTYPES = {  # --precision
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
DEFAULT_LOADING = LoadOptions()  # fp32 on the CPU
FAMILIES = {  # `_class_name` of model_index.json -> the family's file
    "StableDiffusionPipeline": "models.sd",
    "StableDiffusionImg2ImgPipeline": "models.sd",
    "StableDiffusionInpaintPipeline": "models.sd",
    "StableDiffusionXLPipeline": "models.sdxl",
    "StableDiffusionXLImg2ImgPipeline": "models.sdxl",
    "StableDiffusionXLInpaintPipeline": "models.sdxl",
    "FluxPipeline": "models.flux",
    "FluxImg2ImgPipeline": "models.flux",
    "Flux2KleinPipeline": "models.flux2",
    "Flux2Pipeline": "models.flux2",
    "StableDiffusion3Pipeline": "models.sd3",
    "StableDiffusion3Img2ImgPipeline": "models.sd3",
}


def load_family(path: str, how: LoadOptions = DEFAULT_LOADING) -> Family:
    """The model at `path`, frozen and in eval mode.

    `path` is a folder in the diffusers layout, a hub id, or a single file. Raises UserError for a
    path that does not exist, another family, a missing or broken part, and a `config` for a model
    that has its own. `how.family` names a family of the caller's own, which reads the path itself.
    """
    if is_single_file(path) and not how.family:
        return _single_file().load(path, how)
    family = _find_family(path, how.config, how.family).load(path, how)
    _check_text_options(family, how)
    return family


def read_layout(path: str, config: str = "", family: str = "") -> Layout:
    """The layout of the model at `path`: its adaptable layers and their names in files.

    Reads its configs, not its weights. `config` and `family` are those of `LoadOptions`. Raises
    UserError like `load_family`.
    """
    if is_single_file(path) and not family:
        return _single_file().read_single_file_layout(path, config)
    return _find_family(path, config, family).read_layout(path)


def read_schedule(
    path: str, changes: Mapping[str, Any], resolution: int = 0, config: str = "", family: str = ""
) -> tuple[Schedule, str]:
    """(noise schedule, prediction type) that the model at `path` trains with, from its configs.

    With a `resolution` (pixels), the schedule has the scheduler's shift for it. `changes`, `config`
    and `family` are `scheduler`, `config` and `family` of `LoadOptions`. Raises UserError like
    `load_family`.
    """
    if is_single_file(path) and not family:
        return _single_file().read_single_file_schedule(path, changes, resolution, config)
    return _find_family(path, config, family).read_schedule(path, changes, resolution)


def families_with_preset(preset: str) -> tuple[str, ...]:
    """The built-in families whose denoiser has a preset of targets of that name."""
    owners: dict[str, None] = {}
    for pipeline, name in FAMILIES.items():
        if preset in _import_family(name, pipeline).DENOISER_PRESETS:
            owners[name.removeprefix("models.")] = None
    return tuple(owners)


def save_family(
    family: Family,
    path: str,
    folder: Path,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    config: str = "",
) -> None:
    """Writes a whole model in the diffusers layout to `folder`.

    The components named in `states` get those weights, everything else is copied from `path`.
    """
    if is_single_file(path):
        _single_file().convert_to_folder(path, folder, config, overwrite=True)
        for name, state in states.items():
            _save_network(family.modules[name], state, folder / name)
        return
    source = Path(path)
    if not source.is_dir():
        source = Path(hf_hub_download(path, "model_index.json")).parent
    index = read_json(path, "model_index.json")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "model_index.json", folder)
    for name in index:
        if name in states:
            _save_network(family.modules[name], states[name], folder / name)
        elif Path(name).name == name != ".." and (source / name).is_dir():  # one of its own
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)


def choose_device(name: str) -> torch.device:
    """The device of that name, a GPU with its number; auto is CUDA where there is one. Of several
    processes each has the GPU of its number on its machine.

    Raises UserError when it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.process_count() > 1:
        name = f"cuda:{distributed.local_rank()}"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        # no such device, or a torch that was built without it
        why = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(
            f"--device {name} cannot be used ({why}); leave --device out to take what there is"
        ) from None


def use_device(name: str) -> torch.device:
    """`choose_device`, made torch's current device, on which Triton launches its kernels.

    torch takes no GPU without a number there.
    """
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _save_network(network: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a network's config with other weights, in its library's layout.

    diffusers' save_pretrained takes no state dict.
    """
    with torch.device("meta"):
        if hasattr(network, "from_config"):
            config = dict(network.config)
            config.pop("_name_or_path", None)  # a folder of this computer, which people publish
            bare = type(network).from_config(config)
        else:
            bare = type(network)(network.config)
    bare.load_state_dict(dict(state), assign=True)
    bare.save_pretrained(folder)


def _check_text_options(family: Family, how: LoadOptions) -> None:
    """Raises UserError for options of CLIP's text that a family of the caller's own lacks."""
    if how.clip_skip and not hasattr(family, "clip_skip"):
        raise UserError(
            f"--clip-skip {how.clip_skip} has no effect: the family {how.family} reads the "
            "text encoders' last layer; leave it out"
        )
    if how.max_token_length and not hasattr(family, "max_token_length"):
        raise UserError(
            f"--max-token-length {how.max_token_length} has no effect: the family {how.family} "
            "does not read prompts in chunks; leave it out"
        )


def _single_file() -> Any:
    return importlib.import_module("models.single_file")


def _find_family(path: str, config: str, own: str) -> FamilyFunctions:
    """The functions of the family that model_index.json names, or `own`, FILE.py:FAMILY."""
    if path and config:
        raise UserError(
            f"--model-config {config} has no effect: {path} has configs of its own; "
            "it is for models in a single file"
        )
    if not path:
        raise UserError("no base model; name a folder, a file or a hub id with --model")
    if own:
        found = find_plugin(own, {}, "family", noun="family")
        if not isinstance(found, FamilyFunctions):
            raise UserError(
                f"--family {own} is a {type(found).__name__}; expected a "
                "lora_core.family.FamilyFunctions, as FAMILY of models/sd.py"
            )
        return found
    name = read_json(path, "model_index.json").get("_class_name", "")
    if not isinstance(name, str) or name not in FAMILIES:
        kind = name or "model without _class_name"
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{path} is a {kind}, which is not supported; supported are {known} (train.py and "
            "infer.py also take a family of yours, FILE.py:FAMILY)"
        )
    return _import_family(FAMILIES[name], name).FAMILY


def _import_family(module: str, pipeline: str) -> Any:
    """The file of a built-in family. Raises UserError where an installed library is too old."""
    try:
        with without_collection():
            return importlib.import_module(module)
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("diffusers", "transformers"):
            raise
        installed = importlib.metadata.version(library)
        raise UserError(
            f"models of a {pipeline} need a newer {library} than {installed}: "
            f"{first_line(error).partition(' (')[0]}; install the versions of constraints.txt"
        ) from None


@contextmanager
def without_collection() -> Iterator[None]:
    """A context in which Python does not look for garbage: while diffusers and transformers are
    imported it would look through all of their objects again and again, a quarter of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
