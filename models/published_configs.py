"""Configs of the published models, and folders in the diffusers layout of them.

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
from typing import Any

from models.published import HUB_NAMES
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

Files = dict[str, Config]  # path in a folder in the diffusers layout -> its JSON
TOKENIZERS = {  # model_type of a text encoder -> class of its tokenizer
    "clip_text_model": "CLIPTokenizer",
    "t5": "T5TokenizerFast",
    "qwen3": "Qwen2TokenizerFast",
    "mistral3": "PixtralProcessor",
}


def _config_files(
    pipeline: str, parts: Mapping[str, Config], scheduler: Config, **index: Any
) -> Files:
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


def _sd_files(unet: Config, text: Config, scheduler: Config = STEPS) -> Files:
    inpainting = unet["in_channels"] == 9
    pipeline = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
    parts = {"unet": unet, "vae": VAE | {"sample_size": 8 * unet["sample_size"]}}
    nothing = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    return _config_files(
        pipeline,
        parts | {"text_encoder": text},
        scheduler,
        **nothing,
        requires_safety_checker=False,
    )


def _sdxl_files(pipeline: str, unet: Config, texts: Mapping[str, Config], **index: Any) -> Files:
    return _config_files(pipeline, {"unet": unet, "vae": VAE_XL, **texts}, STEPS_XL, **index)


def _flux_files(scheduler: Config, *, guidance: bool) -> Files:
    parts: dict[str, Config] = {
        "transformer": FLUX_TRANSFORMER | {"guidance_embeds": guidance},
        "vae": VAE_FLUX,
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
    }
    return _config_files("FluxPipeline", parts, scheduler)


def _sd3_files(transformer: Config) -> Files:
    parts: dict[str, Config] = {
        "transformer": transformer,
        "vae": VAE_SD3,
        "text_encoder": CLIP_L_PROJECTED,
        "text_encoder_2": BIG_G,
        "text_encoder_3": T5_XXL,
    }
    return _config_files("StableDiffusion3Pipeline", parts, FLOW_SD3)


def _flux2_files(transformer: Config, text: Config, **index: Any) -> Files:
    """Klein's model_index.json says whether the model is distilled."""
    parts = {"transformer": transformer, "vae": VAE_FLUX2, "text_encoder": text}
    pipeline = "Flux2KleinPipeline" if index else "Flux2Pipeline"
    return _config_files(pipeline, parts, FLOW, **index)


BOTH = {"text_encoder": CLIP_L, "text_encoder_2": BIG_G}
SECOND = {"text_encoder_2": BIG_G}
SCORED = {  # further entries of the refiner's model_index.json
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "requires_aesthetics_score": True,
    "force_zeros_for_empty_prompt": False,
}
XL = "StableDiffusionXL{}Pipeline"
SD2_V = UNET_2 | dict(sample_size=96, upcast_attention=True)
SCHNELL = FLOW | dict(shift=1.0, use_dynamic_shifting=False)
MODEL_FILES: dict[str, Files] = {  # name in PUBLISHED_MODELS -> its files
    "sd1": _sd_files(UNET_1, CLIP_L),
    "sd1-inpainting": _sd_files(UNET_1 | MASKED, CLIP_L),
    "sd2": _sd_files(UNET_2, CLIP_H),
    "sd2-v": _sd_files(SD2_V, CLIP_H, STEPS | V_PREDICTION),
    "sd2-inpainting": _sd_files(UNET_2 | MASKED, CLIP_H),
    "sdxl": _sdxl_files(XL.format(""), UNET_XL, BOTH, force_zeros_for_empty_prompt=True),
    "sdxl-inpainting": _sdxl_files(XL.format("Inpaint"), UNET_XL | MASKED, BOTH),
    "sdxl-refiner": _sdxl_files(XL.format("Img2Img"), UNET_REFINER, SECOND, **SCORED),
    "flux-dev": _flux_files(FLOW, guidance=True),
    "flux-schnell": _flux_files(SCHNELL, guidance=False),
    "sd3": _sd3_files(SD3_TRANSFORMER),
    "sd3.5-medium": _sd3_files(SD35_MEDIUM),
    "sd3.5-large": _sd3_files(SD35_LARGE),
    "sd3.5-large-turbo": _sd3_files(SD35_LARGE),
    "flux2-klein-base-4b": _flux2_files(KLEIN_4B, QWEN3_4B, is_distilled=False),
    "flux2-klein-4b": _flux2_files(KLEIN_4B, QWEN3_4B, is_distilled=True),
    "flux2-klein-base-9b": _flux2_files(KLEIN_9B, QWEN3_8B, is_distilled=False),
    "flux2-klein-9b": _flux2_files(KLEIN_9B, QWEN3_8B, is_distilled=True),
    "flux2-dev": _flux2_files(FLUX2_TRANSFORMER, MISTRAL_SMALL),
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
    for name, config in MODEL_FILES[kind].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(config, indent=2) + "\n")
    return root


def config_source(path: str) -> str:
    """A folder or hub id with the configs of a model: those in the table of published models for
    their hub ids and names (sdxl, flux-dev ...), which need no download; else `path`.
    """
    kind = HUB_NAMES.get(path, path)
    is_known = kind in MODEL_FILES and not Path(path).exists()
    return str(published_configs(kind)) if is_known else path
