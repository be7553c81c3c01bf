"""Configs of the published models as literal tables, and folders in the diffusers layout of them.

Values are from the config.json files of runwayml/stable-diffusion-v1-5 and -inpainting, of
stabilityai/stable-diffusion-2-base, -2, -2-inpainting, -xl-base-1.0, -xl-refiner-1.0,
-3-medium-diffusers, -3.5-medium and -3.5-large, of
diffusers/stable-diffusion-xl-1.0-inpainting-0.1, and of black-forest-labs/FLUX.1-dev and -schnell,
FLUX.2-klein-4B, -klein-9B (their bases are alike) and FLUX.2-dev.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from models.published_parts import (
    BIG_G,
    CLIP_H,
    CLIP_L,
    CLIP_L_PROJECTED,
    FLOW,
    FLOW_SD3,
    FLUX2_TRANSFORMER,
    FLUX_TRANSFORMER,
    KLEIN_4B,
    KLEIN_9B,
    MASKED,
    MISTRAL_SMALL,
    QWEN3_4B,
    QWEN3_8B,
    SD3_TRANSFORMER,
    SD35_LARGE,
    SD35_MEDIUM,
    STEPS,
    STEPS_XL,
    T5_XXL,
    UNET_1,
    UNET_2,
    UNET_REFINER,
    UNET_XL,
    V_PREDICTION,
    VAE,
    VAE_FLUX,
    VAE_FLUX2,
    VAE_SD3,
    VAE_XL,
    Config,
)

TOKENIZERS = {  # model_type of a text encoder -> class of its tokenizer
    "clip_text_model": "CLIPTokenizer",
    "t5": "T5TokenizerFast",
    "qwen3": "Qwen2TokenizerFast",
    "mistral3": "PixtralProcessor",
}


class PublishedModel(NamedTuple):
    """One published model."""

    title: str  # for messages
    files: Mapping[str, Config]  # of a folder in the diffusers layout: path -> its JSON
    like: str = ""  # the model with the same adapters, where it is a variant


def _config_files(
    pipeline: str, parts: Mapping[str, Config], scheduler: Config, **index: Any
) -> dict[str, Config]:
    """The JSON files of a model: its parts' configs and a model_index.json that lists them."""
    listed: Config = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler["_class_name"]]}
    for name, config in parts.items():
        if name.startswith("text_encoder"):
            listed[name] = ["transformers", config["architectures"][0]]
            tokenizer = TOKENIZERS[config["model_type"]]
            listed[name.replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
        else:
            listed[name] = ["diffusers", config["_class_name"]]
    files = {f"{name}/config.json": config for name, config in parts.items()}
    return {
        "model_index.json": listed | index,
        "scheduler/scheduler_config.json": scheduler,
        **files,
    }


def _sd_model(
    title: str, unet: Config, text: Config, scheduler: Config = STEPS, like: str = ""
) -> PublishedModel:
    inpainting = unet["in_channels"] == 9
    pipeline = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
    parts = {"unet": unet, "vae": VAE | {"sample_size": 8 * unet["sample_size"]}}
    nothing = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    files = _config_files(
        pipeline,
        parts | {"text_encoder": text},
        scheduler,
        **nothing,
        requires_safety_checker=False,
    )
    return PublishedModel(title, files, like)


def _sdxl_model(
    title: str,
    pipeline: str,
    unet: Config,
    texts: Mapping[str, Config],
    like: str = "",
    **index: Any,
) -> PublishedModel:
    parts = {"unet": unet, "vae": VAE_XL, **texts}
    return PublishedModel(title, _config_files(pipeline, parts, STEPS_XL, **index), like)


def _flux_model(title: str, scheduler: Config, like: str = "", *, guidance: bool) -> PublishedModel:
    parts: dict[str, Config] = {
        "transformer": FLUX_TRANSFORMER | {"guidance_embeds": guidance},
        "vae": VAE_FLUX,
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
    }
    return PublishedModel(title, _config_files("FluxPipeline", parts, scheduler), like)


def _sd3_model(title: str, transformer: Config, like: str = "") -> PublishedModel:
    parts: dict[str, Config] = {
        "transformer": transformer,
        "vae": VAE_SD3,
        "text_encoder": CLIP_L_PROJECTED,
        "text_encoder_2": BIG_G,
        "text_encoder_3": T5_XXL,
    }
    return PublishedModel(title, _config_files("StableDiffusion3Pipeline", parts, FLOW_SD3), like)


def _flux2_model(
    title: str, transformer: Config, text: Config, like: str = "", **index: Any
) -> PublishedModel:
    """A FLUX.2 model; klein's model_index.json says whether it is distilled."""
    parts = {"transformer": transformer, "vae": VAE_FLUX2, "text_encoder": text}
    pipeline = "Flux2KleinPipeline" if index else "Flux2Pipeline"
    return PublishedModel(title, _config_files(pipeline, parts, FLOW, **index), like)


BOTH = {"text_encoder": CLIP_L, "text_encoder_2": BIG_G}
SECOND = {"text_encoder_2": BIG_G}
SCORED = {  # further entries of the refiner's model_index.json
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "requires_aesthetics_score": True,
    "force_zeros_for_empty_prompt": False,
}
# Where a variant and its original both fit a file, the original is meant.
PUBLISHED_MODELS: dict[str, PublishedModel] = {
    "sd1": _sd_model("Stable Diffusion 1.x", UNET_1, CLIP_L),
    "sd1-inpainting": _sd_model(
        "Stable Diffusion 1.x inpainting", UNET_1 | MASKED, CLIP_L, like="sd1"
    ),
    "sd2": _sd_model("Stable Diffusion 2.x", UNET_2, CLIP_H),
    "sd2-v": _sd_model(
        "Stable Diffusion 2.x 768-v",
        UNET_2 | dict(sample_size=96, upcast_attention=True),
        CLIP_H,
        STEPS | V_PREDICTION,
        like="sd2",
    ),
    "sd2-inpainting": _sd_model(
        "Stable Diffusion 2.x inpainting", UNET_2 | MASKED, CLIP_H, like="sd2"
    ),
    "sdxl": _sdxl_model(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        UNET_XL,
        BOTH,
        force_zeros_for_empty_prompt=True,
    ),
    "sdxl-inpainting": _sdxl_model(
        "Stable Diffusion XL inpainting",
        "StableDiffusionXLInpaintPipeline",
        UNET_XL | MASKED,
        BOTH,
        like="sdxl",
    ),
    "sdxl-refiner": _sdxl_model(
        "Stable Diffusion XL's refiner",
        "StableDiffusionXLImg2ImgPipeline",
        UNET_REFINER,
        SECOND,
        like="sdxl",
        **SCORED,
    ),
    "flux-dev": _flux_model("Flux.1 dev", FLOW, guidance=True),
    "flux-schnell": _flux_model(
        "Flux.1 schnell",
        FLOW | dict(shift=1.0, use_dynamic_shifting=False),
        like="flux-dev",
        guidance=False,
    ),
    "sd3": _sd3_model("Stable Diffusion 3 medium", SD3_TRANSFORMER),
    "sd3.5-medium": _sd3_model("Stable Diffusion 3.5 medium", SD35_MEDIUM),
    "sd3.5-large": _sd3_model("Stable Diffusion 3.5 large", SD35_LARGE),
    "sd3.5-large-turbo": _sd3_model(
        "Stable Diffusion 3.5 large turbo", SD35_LARGE, like="sd3.5-large"
    ),
    "flux2-klein-base-4b": _flux2_model(
        "FLUX.2 klein base 4B", KLEIN_4B, QWEN3_4B, is_distilled=False
    ),
    "flux2-klein-4b": _flux2_model(
        "FLUX.2 klein 4B", KLEIN_4B, QWEN3_4B, like="flux2-klein-base-4b", is_distilled=True
    ),
    "flux2-klein-base-9b": _flux2_model(
        "FLUX.2 klein base 9B", KLEIN_9B, QWEN3_8B, is_distilled=False
    ),
    "flux2-klein-9b": _flux2_model(
        "FLUX.2 klein 9B", KLEIN_9B, QWEN3_8B, like="flux2-klein-base-9b", is_distilled=True
    ),
    "flux2-dev": _flux2_model("FLUX.2 dev", FLUX2_TRANSFORMER, MISTRAL_SMALL),
}
# Hub repositories of the models in the table, and of copies with the same configs.
HUB_NAMES = {
    "runwayml/stable-diffusion-v1-5": "sd1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "CompVis/stable-diffusion-v1-4": "sd1",
    "runwayml/stable-diffusion-inpainting": "sd1-inpainting",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "sd1-inpainting",
    "stabilityai/stable-diffusion-2-base": "sd2",
    "stabilityai/stable-diffusion-2-1-base": "sd2",
    "stabilityai/stable-diffusion-2": "sd2-v",
    "stabilityai/stable-diffusion-2-1": "sd2-v",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-inpainting",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "sdxl-inpainting",
    "stabilityai/stable-diffusion-xl-refiner-1.0": "sdxl-refiner",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.1-schnell": "flux-schnell",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    "stabilityai/stable-diffusion-3.5-large-turbo": "sd3.5-large-turbo",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base-4b",
    "black-forest-labs/FLUX.2-klein-4B": "flux2-klein-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2-klein-base-9b",
    "black-forest-labs/FLUX.2-klein-9B": "flux2-klein-9b",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
}
CONFIG_FOLDERS = tempfile.TemporaryDirectory(  # gone when the process ends
    prefix="lora_core-known-", ignore_cleanup_errors=True
)


@cache
def published_configs(kind: str) -> Path:
    """A folder in the diffusers layout with all configs of a model, for this process.

    It has no weights and no tokenizers.
    """
    root = Path(CONFIG_FOLDERS.name) / kind
    for name, config in PUBLISHED_MODELS[kind].files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(config, indent=2) + "\n")
    return root


def config_source(path: str) -> str:
    """A folder or hub id with the configs of a model: those in the table of published models for
    their hub ids and names (sdxl, flux-dev ...), which need no download; else `path`.
    """
    kind = HUB_NAMES.get(path, path)
    is_known = kind in PUBLISHED_MODELS and not Path(path).exists()
    return str(published_configs(kind)) if is_known else path
