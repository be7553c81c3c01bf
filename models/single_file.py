"""Whole models in one file (.safetensors or .ckpt, with CompVis' or Stability's names).

They are opened as a family, written, and converted to a folder. The weights are the file's; the
networks' shapes come from configs in the diffusers layout: the folder of --model-config, or the
published model that the file's keys and shapes identify. Tokenizers come from the folder of
--model-config, else they are CLIP's, from the hub or its cache.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from lora_core.diffusion.noise import Schedule
from lora_core.errors import UserError, first_line
from lora_core.family import Family, LoadOptions
from lora_core.formats.known_formats import is_single_file
from lora_core.formats.layout import Layout
from lora_core.formats.model_files import (
    NetworkLocation,
    SingleFileFacts,
    describe_single_file,
    open_located_networks,
    split_networks,
    write_folder_from_single_file,
)
from lora_core.formats.recognition import describe_kind, recognize_keys
from lora_core.formats.weights import Weights, cast_weights, open_weights
from models import sd, sdxl
from models.components import (
    config_errors,
    load_network,
    open_tokenizer,
    read_encoder_config,
    read_json,
)
from models.hub_models import download_configs, download_model
from models.published import PUBLISHED_MODELS
from models.published_configs import MODEL_FILES, published_configs

Locations = tuple[NetworkLocation, ...]

UNET = NetworkLocation("unet", "model.diffusion_model.", "unet")
VAE = NetworkLocation("vae", "first_stage_model.", "vae")
# Where single files of a model hold its networks.
NETWORK_LOCATIONS: dict[str, Locations] = {
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
# Empty tensor that ComfyUI looks for (a marker) -> keys of scheduler_config.json that it sets.
SCHEDULER_MARKERS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
# CLIP and OpenCLIP have the same vocabulary.
TOKENIZERS = ("openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")
PAD_TOKENS = {"clip": "<|endoftext|>", "open_clip": "!"}


@dataclass(frozen=True)
class OpenedSingleFile:
    """A single-file model that is opened, with no weight read yet."""

    weights: Weights
    facts: SingleFileFacts
    folder: Path  # configs in the diffusers layout
    kind: str  # the published model whose configs they are; "" where the user named them
    marks: dict[str, Any]  # keys of scheduler_config.json that markers in the file set


def open_single_file(
    path: str | Path, config: str = "", changes: Mapping[str, Any] | None = None
) -> OpenedSingleFile:
    """Opens a single file and finds its configs.

    `changes` are `LoadOptions.scheduler`, for files that leave epsilon or v open. Raises
    UserError for a damaged file, one that is no model, and a model that is not known where no
    configs are given.
    """
    weights = open_weights(path)
    facts = describe_single_file(weights.shapes)
    if facts.channels is None:
        found = recognize_keys(weights.shapes)
        if found.kind not in ("model", "unknown"):
            raise UserError(
                f"{path} is {describe_kind(found)} where a model is expected; "
                "adapters go with --lora, models with --model"
            )
        other = ""
        if any("double_blocks." in key for key in weights.infos):
            other = "; Flux is read from a folder in the diffusers layout"
        raise UserError(
            f"{path} is not a checkpoint of Stable Diffusion: its keys give {facts}{other}; "
            "adapters go with --lora, models with --model"
        )
    edm = [name for name in facts.markers if name.startswith("edm")]
    if edm and (not config or any(name.startswith("edm_v") for name in edm)):
        raise UserError(
            f"{path} has the marker {edm[0]} of an EDM model; of these only epsilon ones are read, "
            "with their folder as --model-config"
        )
    marks: dict[str, Any] = {}
    for name, own in SCHEDULER_MARKERS.items():
        if name in facts.markers:
            marks |= own
    if config:
        return OpenedSingleFile(weights, facts, download_configs(config), "", marks)
    v = {**marks, **(changes or {})}.get("prediction_type") == "v_prediction"
    kind = recognize_checkpoint(facts, str(path), v=v)
    return OpenedSingleFile(weights, facts, published_configs(kind), kind, marks)


def recognize_checkpoint(facts: SingleFileFacts, source: str, *, v: bool = False) -> str:
    """The name of the published model that a single-file checkpoint belongs to.

    `v` selects Stable Diffusion 2's v model, which has the same keys. Raises UserError for other
    models.
    """
    unets = {}
    for kind, files in MODEL_FILES.items():
        if "unet/config.json" in files:
            unets[kind] = files["unet/config.json"]
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


# ---------------------------------------------------------------- as a family


def load(path: str, how: LoadOptions) -> Family:
    """The model in a single file.

    Raises UserError for a damaged file, missing networks, another family or another config.
    """
    if how.max_sequence_length:
        raise UserError(f"--max-sequence-length has no effect: {path} has no T5 text encoder")
    opened = open_single_file(path, how.config, how.scheduler)
    how = replace(how, scheduler=_scheduler_changes(opened, how.scheduler, path))
    folder = str(opened.folder)
    index = read_json(folder, "model_index.json")
    locations = locate_networks(folder)
    if how.vae:
        locations = tuple(own for own in locations if own.component != "vae")
    scheduler = read_json(folder, "scheduler/scheduler_config.json")
    if _is_sdxl(index):
        sdxl.sdxl_schedule(scheduler, how.scheduler)  # refuses before any weight is read
    modules = build_meta_networks(opened.folder, locations)
    tokens = load_tokenizers(opened.folder, locations, path, how.device)
    for name, weights in split_single_file(opened, locations, modules).items():
        dtype = how.vae_precision if name == "vae" else how.dtype
        _fill_network(modules[name], weights, dtype, how.device)
    if how.vae:
        modules["vae"] = load_network(AutoencoderKL, how.vae, "", how.vae_precision, how.device)
    unet: Any = modules["unet"]
    vae: Any = modules["vae"]
    encoders: dict[str, Any] = {name: modules[name] for name in tokens}
    if _is_sdxl(index):
        parts = sdxl.SDXLParts(unet, vae, encoders, tokens, index)
        return sdxl.StableDiffusionXL(parts, scheduler, how)
    text_encoder, tokenizer = encoders["text_encoder"], tokens["text_encoder"]
    family = sd.StableDiffusion(unet, vae, text_encoder, tokenizer, scheduler | how.scheduler)
    family.pipeline = index["_class_name"]
    family.clip_skip = sd.check_clip_skip(how.clip_skip, [text_encoder])
    family.max_token_length = sd.check_token_length(how.max_token_length)
    return family


def read_single_file_layout(path: str, config: str = "") -> Layout:
    """The layout of the model in a single file, from its keys and configs: no weight is read."""
    opened = open_single_file(path, config)
    folder = str(opened.folder)
    locate_networks(folder)  # refuses other families
    if _is_sdxl(read_json(folder, "model_index.json")):
        return sdxl.read_sdxl_layout(folder)
    return sd.read_sd_layout(folder)


def read_single_file_schedule(
    path: str, changes: Mapping[str, Any], resolution: int, config: str = ""
) -> tuple[Schedule, str]:
    """(noise schedule, prediction type) of the model in a single file.

    From its configs, then the markers in the file, then `changes`.
    """
    opened = open_single_file(path, config, changes)
    folder = str(opened.folder)
    both = {**opened.marks, **changes}
    if _is_sdxl(read_json(folder, "model_index.json")):
        return sdxl.read_sdxl_schedule(folder, both, resolution)
    return sd.read_sd_schedule(folder, both, resolution)


# ---------------------------------------------------------------- files and folders


def locate_networks(model: str | Path) -> Locations:
    """The locations of a model's networks in a single file, from its configs.

    `model` is a folder or a hub id. OpenCLIP's encoders are recognized by their activation, gelu;
    OpenAI's has quick_gelu. Raises UserError for other families.
    """
    index = read_json(str(model), "model_index.json")
    pipeline = index.get("_class_name", "")
    if pipeline in sdxl.PIPELINES:
        both = "text_encoder" in sdxl.present_encoders(str(model), index)
        return NETWORK_LOCATIONS["sdxl" if both else "refiner"]
    if pipeline in sd.PIPELINES:
        config = read_encoder_config(str(model), "text_encoder", CLIPTextConfig)
        return NETWORK_LOCATIONS["sd1" if config.hidden_act == "quick_gelu" else "sd2"]
    raise UserError(
        f"{model} is a {pipeline or 'model without _class_name'}; "
        "only Stable Diffusion 1, 2 and XL are read and written as single files"
    )


def open_parts(model: str, config: str = "") -> tuple[dict[str, Weights], Locations]:
    """The weights of a model's networks, not read yet, and their locations in a single file.

    The model is a folder, a hub id, or a single file. Raises UserError.
    """
    if is_single_file(model):
        opened = open_single_file(model, config)
        locations = locate_networks(opened.folder)
        modules = build_meta_networks(opened.folder, locations)
        return split_single_file(opened, locations, modules), locations
    folder = Path(model) if Path(model).is_dir() else download_model(model)
    locations = locate_networks(folder)
    return open_located_networks(folder, locations), locations


def convert_to_folder(
    path: str,
    folder: str | Path,
    config: str = "",
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the model in a single file as a folder in the diffusers layout.

    The folder has configs, tokenizers, scheduler and weights. Raises UserError.
    """
    opened = open_single_file(path, config)
    locations = locate_networks(opened.folder)
    shapes = _shapes_of_modules(build_meta_networks(opened.folder, locations))
    _check_present(opened, locations)
    with config_folder(opened, path) as configs:
        write_folder_from_single_file(
            path, locations, shapes, folder, configs=configs, dtype=dtype, overwrite=overwrite
        )


@contextlib.contextmanager
def config_folder(opened: OpenedSingleFile, path: str) -> Iterator[Path]:
    """A folder with the configs and tokenizers of a single file's model.

    It is that of --model-config, or published configs with CLIP's tokenizers. Raises UserError
    when no tokenizer can be found.
    """
    if not opened.kind:
        yield opened.folder
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "configs"
        shutil.copytree(opened.folder, folder)
        tokenizers = load_tokenizers(opened.folder, locate_networks(opened.folder), path)
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        yield folder


# ---------------------------------------------------------------- networks


def build_meta_networks(folder: Path, locations: Sequence[NetworkLocation]) -> dict[str, nn.Module]:
    """The networks of `locations`, built on the meta device from the configs in a folder."""
    found: dict[str, nn.Module] = {}
    with torch.device("meta"), config_errors(str(folder)):
        for location in locations:
            name = location.component
            if name in sdxl.ENCODERS:
                config = read_encoder_config(str(folder), name, CLIPTextConfig)
                found[name] = sdxl.ENCODERS[name](config)
            else:
                make = UNet2DConditionModel if name == "unet" else AutoencoderKL
                found[name] = make.from_config(read_json(str(folder), f"{name}/config.json"))
    return found


def split_single_file(
    opened: OpenedSingleFile, locations: Locations, modules: Mapping[str, nn.Module]
) -> dict[str, Weights]:
    """The networks in a single file under the keys of `modules`.

    Raises UserError as `model_files.split_networks` does.
    """
    _check_present(opened, locations)
    # Keys of networks that are not built are skipped, not refused.
    others = [own for own in locate_networks(opened.folder) if own not in locations]
    return split_networks(opened.weights, (*locations, *others), _shapes_of_modules(modules))


def load_tokenizers(
    folder: Path,
    locations: Sequence[NetworkLocation],
    path: str,
    device: torch.device | str = "cpu",
) -> dict[str, CLIPTokenizer]:
    """Text encoder -> its tokenizer: the folder's, else CLIP's from the hub's cache or the hub.

    Raises UserError when none can be found.
    """
    found = {}
    for location in locations:
        name = location.component
        own = name.replace("text_encoder", "tokenizer")
        if name not in sdxl.ENCODERS:
            continue
        if (folder / own).is_dir() or torch.device(device).type == "meta":
            found[name] = open_tokenizer(CLIPTokenizer, str(folder), own, device)
        else:
            config = read_encoder_config(str(folder), name, CLIPTextConfig)
            length = config.max_position_embeddings
            found[name] = _load_clip_tokenizer(PAD_TOKENS[location.grammar], length, path)
    return found


def _load_clip_tokenizer(pad: str, length: int, path: str) -> CLIPTokenizer:
    reason = ""
    for cached in (True, False):
        for name in TOKENIZERS:
            try:
                return CLIPTokenizer.from_pretrained(
                    name,
                    pad_token=pad,
                    model_max_length=length,
                    local_files_only=cached,
                    trust_remote_code=False,
                )
            except Exception as error:  # OSError, ValueError ... by library and version
                reason = reason or first_line(error)
    raise UserError(
        f"{path} has no tokenizer, and neither the hub nor its cache gave {TOKENIZERS[0]} "
        f"({reason}); name a folder with --model-config"
    )


def _fill_network(
    network: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Replaces a network's weights on the meta device by `weights`; for that device none."""
    if torch.device(device).type == "meta":
        nn.Module.to(network, dtype)  # diffusers' own `to` warns
        return
    exact = cast_weights(weights, dtype)
    copies = {}  # files are mapped into memory, and parts of a joined layer are views of it
    for key in exact.infos:
        copies[key] = exact.read(key).to(device, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(copies, assign=True)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "position_ids" and buffer.is_meta:  # files leave it out, it is 0, 1, 2 ...
                numbers = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module.register_buffer(name, numbers, persistent=False)


def _shapes_of_modules(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    shapes = {}
    for name, module in modules.items():
        shapes[name] = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    return shapes


def _check_present(opened: OpenedSingleFile, locations: Sequence[NetworkLocation]) -> None:
    """Raises UserError for a network of which the file has no tensor."""
    for location in locations:
        if not any(key.startswith(location.prefix) for key in opened.weights.infos):
            advice = "is it of another family, or only a part of a model?"
            if location.component == "vae":
                advice = "name one with --vae"
            raise UserError(
                f"{opened.weights.source} has no {location.component} at {location.prefix}, "
                f"only {opened.facts}; {advice}"
            )


def _scheduler_changes(
    opened: OpenedSingleFile, changes: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Changes of the scheduler's config: the file's markers, overridden by the user's changes.

    Prints the keys that markers set, and a warning where epsilon or v is left open.
    """
    if opened.marks:
        listed = ", ".join(f"{key} = {value}" for key, value in opened.marks.items())
        print(f"{path} sets {listed} by its markers", file=sys.stderr)
    elif opened.kind == "sd2" and "prediction_type" not in changes:
        print(
            f"{path} may be a 512 model (epsilon) or a 768-v one (v); it is read as epsilon; "
            "choose with --model-config or --noise.prediction",
            file=sys.stderr,
        )
    return {**opened.marks, **changes}


def _is_sdxl(index: Mapping[str, Any]) -> bool:
    return index.get("_class_name") in sdxl.PIPELINES
