"""Whole models in one file (.safetensors or .ckpt, with CompVis' or Stability's names): opened as a family, written, and turned into a folder.

The weights are the file's. What the networks look like comes from a folder of configs in the diffusers layout: the one that --model-config names, or
that of the published model the file's keys and shapes tell. So do the tokenizers; without --model-config they are CLIP's, from the hub or its cache.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from lora_core.diffusion.noise import Schedule
from lora_core.errors import UserError
from lora_core.family import Family, LoadOptions
from lora_core.formats.layout import Layout
from lora_core.formats.weights import PICKLED, Weights, cast_weights, open_weights
from lora_core.formats.whole_models import (
    NetworkLocation,
    SingleFileFacts,
    describe_single_file,
    open_located_networks,
    split_networks,
    write_checkpoint_file,
    write_folder_from_single_file,
)
from models import sd, sdxl
from models.components import load_network, load_part, read_encoder_config, read_json
from models.published import PUBLISHED_MODELS, published_configs

UNET, VAE = (
    NetworkLocation("unet", "model.diffusion_model.", "unet"),
    NetworkLocation("vae", "first_stage_model.", "vae"),
)
NETWORK_LOCATIONS: dict[str, tuple[NetworkLocation, ...]] = {  # where the networks of a model lie
    "sd1": (UNET, VAE, NetworkLocation("text_encoder", "cond_stage_model.transformer.", "clip")),
    "sd2": (
        UNET,
        VAE,
        NetworkLocation("text_encoder", "cond_stage_model.model.", "open_clip", spare=1),
    ),
    "sdxl": (
        UNET,
        VAE,
        NetworkLocation("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
        NetworkLocation("text_encoder_2", "conditioner.embedders.1.model.", "open_clip"),
    ),
    "refiner": (
        UNET,
        VAE,
        NetworkLocation("text_encoder_2", "conditioner.embedders.0.model.", "open_clip"),
    ),
}
SCHEDULER_MARKERS: dict[
    str, dict[str, Any]
] = {  # empty tensor that ComfyUI looks for -> keys of scheduler_config.json
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
TOKENIZERS = (
    "openai/clip-vit-large-patch14",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
)  # CLIP and OpenCLIP have one vocabulary
PAD_TOKENS = {"clip": "<|endoftext|>", "open_clip": "!"}  # what they pad with
CONFIG_FILES = ("*.json", "*.txt", "*.model")  # of a model on the hub, without its weights
HUB_WEIGHT_FILES = ("*/diffusion_pytorch_model*.safetensors", "*/model*.safetensors")


@dataclass(frozen=True)
class OpenedSingleFile:
    """A single file and what is known of it; no weight is read yet."""

    weights: Weights
    facts: SingleFileFacts
    folder: Path  # configs in the diffusers layout
    kind: str  # the published model whose configs they are; "" where the user named them
    marks: dict[str, Any]  # what the file says of its scheduler


def is_single_file(path: str) -> bool:
    """Whether a model's path means a file, there or not."""
    return Path(path).is_file() or Path(path).suffix in (".safetensors", *PICKLED)


def open_single_file(
    path: str | Path, config: str = "", changes: Mapping[str, Any] | None = None
) -> OpenedSingleFile:
    """A single file with its configs. `changes` are those of `Loading.scheduler`, for files that do not tell epsilon from v.

    Raises UserError for a damaged file, one that is no model, and a model that is not known where no configs are given.
    """
    weights = open_weights(path)
    facts = describe_single_file(weights.shapes)
    if facts.channels is None:
        other = (
            "; Flux is read from a folder in the diffusers layout"
            if any("double_blocks." in key for key in weights.infos)
            else ""
        )
        raise UserError(
            f"{path} is no checkpoint of Stable Diffusion: its keys tell of {facts}{other}; adapters go with --lora, models with --model"
        )
    edm = [name for name in facts.markers if name.startswith("edm")]
    if edm and (not config or any(name.startswith("edm_v") for name in edm)):
        raise UserError(
            f"{path} has the marker {edm[0]} of an EDM model; of these only epsilon ones are read, with their folder as --model-config"
        )
    marks = {
        key: value
        for name, own in SCHEDULER_MARKERS.items()
        if name in facts.markers
        for key, value in own.items()
    }
    if config:
        return OpenedSingleFile(weights, facts, find_configs(config), "", marks)
    v = {**marks, **(changes or {})}.get("prediction_type") == "v_prediction"
    kind = recognize_checkpoint(facts, str(path), v=v)
    return OpenedSingleFile(weights, facts, published_configs(kind), kind, marks)


def recognize_checkpoint(facts: SingleFileFacts, source: str, *, v: bool = False) -> str:
    """The published model that a single-file checkpoint is of.

    `v` tells Stable Diffusion 2's v model, which keys do not. Raises UserError for other models.
    """
    unets = {}
    for kind, row in PUBLISHED_MODELS.items():
        if "unet/config.json" in row.files:
            unets[kind] = row.files["unet/config.json"]
    for kind, unet in unets.items():
        label = unet.get("projection_class_embeddings_input_dim")
        sizes = (unet["in_channels"], unet["cross_attention_dim"], label)
        if sizes == (facts.channels, facts.context, facts.label):
            return "sd2-v" if v and kind == "sd2" else kind
    titles = ", ".join(PUBLISHED_MODELS[kind].title for kind in unets)
    raise UserError(
        f"{source} has {facts}, which is none of {titles}; "
        "give a folder with its configs as --model-config"
    )


def load(path: str, how: LoadOptions) -> Family:
    """The model in a single file. Raises UserError for a damaged file, missing networks, another family or another config."""
    if how.max_sequence_length:
        raise UserError(f"--max-sequence-length has no effect: {path} has no T5 text encoder")
    opened = open_single_file(path, how.config, how.scheduler)
    how = replace(how, scheduler=_scheduler_changes(opened, how.scheduler, path))
    folder, index = str(opened.folder), read_json(str(opened.folder), "model_index.json")
    rows = tuple(
        row for row in locate_networks(opened.folder) if not (how.vae and row.component == "vae")
    )
    scheduler = read_json(folder, "scheduler/scheduler_config.json")
    if _is_sdxl(index):
        sdxl.sdxl_schedule(scheduler, how.scheduler)  # refuses before any weight is read
    modules, tokens = (
        build_meta_networks(opened.folder, rows),
        load_tokenizers(opened.folder, rows, path),
    )
    for name, weights in split_single_file(opened, rows, modules).items():
        _fill_network(
            modules[name], weights, how.vae_precision if name == "vae" else how.dtype, how.device
        )
    if how.vae:
        modules["vae"] = load_network(AutoencoderKL, how.vae, "", how.vae_precision, how.device)
    unet, vae, encoders = modules["unet"], modules["vae"], {name: modules[name] for name in tokens}
    if _is_sdxl(index):
        return sdxl.StableDiffusionXL(
            sdxl.SDXLParts(unet, vae, encoders, tokens, index), scheduler, how
        )
    family = sd.StableDiffusion(
        unet, vae, encoders["text_encoder"], tokens["text_encoder"], scheduler | how.scheduler
    )
    family.pipeline, family.clip_skip = (
        index["_class_name"],
        sd.check_clip_skip(how.clip_skip, list(encoders.values())),
    )
    return family


def outline(path: str, config: str = "") -> Layout:
    """The layout of the model in a single file, from its keys and configs: no weight is read."""
    opened = open_single_file(path, config)
    index = read_json(str(opened.folder), "model_index.json")
    locate_networks(opened.folder)
    read = sdxl.read_sdxl_layout if _is_sdxl(index) else sd.read_sd_layout
    return read(str(opened.folder))


def noise_of(
    path: str, changes: Mapping[str, Any], resolution: int, config: str = ""
) -> tuple[Schedule, str]:
    """(schedule, row of PREDICTIONS) of the model in a single file: its configs', what markers in the file say, and then `changes`."""
    opened = open_single_file(path, config, changes)
    index = read_json(str(opened.folder), "model_index.json")
    read = sdxl.read_sdxl_schedule if _is_sdxl(index) else sd.read_sd_schedule
    return read(str(opened.folder), {**opened.marks, **changes}, resolution)


# ---------------------------------------------------------------- files and folders


def locate_networks(model: str | Path) -> tuple[NetworkLocation, ...]:
    """Where the networks of a model lie in a single file, from its configs: a folder or a hub id. Raises UserError for other families.

    OpenCLIP's encoders are told by their activation, gelu; OpenAI's has quick_gelu.
    """
    index = read_json(str(model), "model_index.json")
    pipeline = index.get("_class_name", "")
    if pipeline in sdxl.PIPELINES:
        return NETWORK_LOCATIONS[
            "sdxl" if "text_encoder" in sdxl.present_encoders(str(model), index) else "refiner"
        ]
    if pipeline in sd.PIPELINES:
        return NETWORK_LOCATIONS[
            "sd1"
            if read_encoder_config(str(model), "text_encoder", CLIPTextConfig).hidden_act
            == "quick_gelu"
            else "sd2"
        ]
    raise UserError(
        f"{model} is a {pipeline or 'model without _class_name'}; only Stable Diffusion 1, 2 and XL are read and written as single files"
    )


def open_parts(
    model: str, config: str = ""
) -> tuple[dict[str, Weights], tuple[NetworkLocation, ...]]:
    """The weights of a model's networks, each tensor read when it is asked for, and where they lie in a single file.

    The model is a folder, a hub id, or a single file. Raises UserError.
    """
    if is_single_file(model):
        opened = open_single_file(model, config)
        rows = locate_networks(opened.folder)
        return split_single_file(opened, rows, build_meta_networks(opened.folder, rows)), rows
    folder = find_configs(model, weights=True)
    rows = locate_networks(folder)
    return open_located_networks(folder, rows), rows


def save_single_file(
    model: str,
    path: str | Path,
    *,
    config: str = "",
    dtype: torch.dtype | None = None,
    header: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model (a folder, a hub id, a single file) as one .safetensors or .ckpt, as `whole_models.write_checkpoint_file` does."""
    weights, rows = open_parts(model, config)
    write_checkpoint_file(weights, rows, path, dtype=dtype, header=header, overwrite=overwrite)


def convert_to_folder(
    path: str,
    folder: str | Path,
    config: str = "",
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the model in a single file as a folder in the diffusers layout: configs, tokenizers, scheduler and weights. Raises UserError."""
    opened = open_single_file(path, config)
    rows = locate_networks(opened.folder)
    shapes = _shapes_of_modules(build_meta_networks(opened.folder, rows))
    _check_present(opened, rows)
    with tempfile.TemporaryDirectory() as place:
        source = opened.folder
        if opened.kind:  # published configs have no tokenizers beside them
            source = Path(place) / "configs"
            shutil.copytree(opened.folder, source)
            for name, tokenizer in load_tokenizers(opened.folder, rows, path).items():
                tokenizer.save_pretrained(source / name.replace("text_encoder", "tokenizer"))
        write_folder_from_single_file(
            path, rows, shapes, folder, configs=source, dtype=dtype, overwrite=overwrite
        )


def find_configs(model: str, *, weights: bool = False) -> Path:
    """A model's folder, or a copy of it from the hub: its configs and tokenizers, with or without weights. Raises UserError where there is none."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=[*CONFIG_FILES, *(HUB_WEIGHT_FILES if weights else ())]
            )
        )
    except (
        Exception
    ) as error:  # the hub's client raises a dozen classes: no network, no such repository, bad id
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{model} is no folder here, and the hub gave no model of that name: {reason}"
        ) from None


# ---------------------------------------------------------------- networks


def build_meta_networks(folder: Path, rows: tuple[NetworkLocation, ...]) -> dict[str, nn.Module]:
    """The networks that `rows` name, on the meta device, from the configs in a folder."""
    found: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name in (row.component for row in rows):
            if name in sdxl.ENCODERS:
                found[name] = sdxl.ENCODERS[name](
                    read_encoder_config(str(folder), name, CLIPTextConfig)
                )
            else:
                make = UNet2DConditionModel if name == "unet" else AutoencoderKL
                found[name] = make.from_config(read_json(str(folder), f"{name}/config.json"))
    return found


def split_single_file(
    opened: OpenedSingleFile, rows: tuple[NetworkLocation, ...], modules: Mapping[str, nn.Module]
) -> dict[str, Weights]:
    """The networks in a single file under the keys of `modules`. Raises UserError as `whole_models.split_networks` does."""
    _check_present(opened, rows)
    left = tuple(
        row for row in locate_networks(opened.folder) if row not in rows
    )  # passed over, not unknown
    return split_networks(opened.weights, (*rows, *left), _shapes_of_modules(modules))


def load_tokenizers(
    folder: Path, rows: tuple[NetworkLocation, ...], path: str
) -> dict[str, CLIPTokenizer]:
    """Text encoder -> its tokenizer: the folder's, else CLIP's from the hub's cache, else from the hub. Raises UserError where none is to be had."""
    found = {}
    for row in rows:
        own = row.component.replace("text_encoder", "tokenizer")
        if row.component in sdxl.ENCODERS and (folder / own).is_dir():
            found[row.component] = load_part(CLIPTokenizer.from_pretrained, str(folder), own)
        elif row.component in sdxl.ENCODERS:
            length = read_encoder_config(
                str(folder), row.component, CLIPTextConfig
            ).max_position_embeddings
            found[row.component] = _load_clip_tokenizer(PAD_TOKENS[row.grammar], length, path)
    return found


def _load_clip_tokenizer(pad: str, length: int, path: str) -> CLIPTokenizer:
    reason = ""
    for cached in (True, False):
        for name in TOKENIZERS:
            try:
                return CLIPTokenizer.from_pretrained(
                    name, pad_token=pad, model_max_length=length, local_files_only=cached
                )
            except Exception as error:  # OSError, ValueError ... by library and version
                reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
        f"{path} has no tokenizer, and neither the hub nor its cache gave {TOKENIZERS[0]} ({reason}); name a folder with --model-config"
    )


def _fill_network(
    network: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Puts weights in the place of those on the meta device."""
    exact = cast_weights(weights, dtype)
    copies = {}  # files are mapped into memory, and parts of a fused layer are views of it
    for key in exact.infos:
        copies[key] = exact.read(key).to(device, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(copies, assign=True)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "position_ids" and buffer.is_meta:  # files leave it out, it is 0, 1, 2 ...
                module.register_buffer(
                    name,
                    torch.arange(buffer.shape[-1], device=device).expand(buffer.shape),
                    persistent=False,
                )


def _shapes_of_modules(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        name: {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        for name, module in modules.items()
    }


def _check_present(opened: OpenedSingleFile, rows: tuple[NetworkLocation, ...]) -> None:
    """Raises UserError for a part that is not in the file at all."""
    for row in rows:
        if not any(key.startswith(row.prefix) for key in opened.weights.infos):
            other = (
                "; name one with --vae"
                if row.component == "vae"
                else "; is it of another family, or only a part of a model?"
            )
            raise UserError(
                f"{opened.weights.source} has no {row.component} at {row.prefix}, only {opened.facts}{other}"
            )


def _scheduler_changes(
    opened: OpenedSingleFile, changes: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Changes of the scheduler's config, the file's own markers before the user's. Says what is read from markers, and what a file cannot tell."""
    if opened.marks:
        print(
            f"{path} says {', '.join(f'{key} = {value}' for key, value in opened.marks.items())}",
            file=sys.stderr,
        )
    elif opened.kind == "sd2" and "prediction_type" not in changes:
        print(
            f"{path} does not tell a 512 model (epsilon) from a 768-v one (v); read as epsilon, unless --model-config or --noise.prediction tell",
            file=sys.stderr,
        )
    return {**opened.marks, **changes}


def _is_sdxl(index: Mapping[str, Any]) -> bool:
    return index.get("_class_name") in sdxl.PIPELINES
