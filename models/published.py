"""Configs of the published models as literal tables, and folders in the diffusers layout of them.

Values are from the config.json files of runwayml/stable-diffusion-v1-5 and -inpainting, of
stabilityai/stable-diffusion-2-base, -2, -2-inpainting, -xl-base-1.0 and -xl-refiner-1.0, of
diffusers/stable-diffusion-xl-1.0-inpainting-0.1, and of black-forest-labs/FLUX.1-dev and -schnell.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Config = dict[str, Any]


class PublishedModel(NamedTuple):
    """One published model."""

    title: str  # for messages
    files: Mapping[str, Config]  # of a folder in the diffusers layout: path -> its JSON
    like: str = ""  # the model with the same adapters, where it is a variant


# ---------------------------------------------------------------- parts

CLIP_L: Config = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    hidden_act="quick_gelu",
    max_position_embeddings=77,
    vocab_size=49408,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    architectures=["CLIPTextModel"],
    model_type="clip_text_model",
)
# OpenCLIP's ViT-H; Stable Diffusion 2 reads the state before the last of its 24 layers, so the last
# is left out.
CLIP_H = CLIP_L | dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    projection_dim=512,
    hidden_act="gelu",
)
BIG_G = CLIP_L | dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
    architectures=["CLIPTextModelWithProjection"],
)
T5_XXL: Config = dict(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    architectures=["T5EncoderModel"],
    model_type="t5",
)
PLAIN_DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
PLAIN_UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
UNET_1: Config = dict(
    _class_name="UNet2DConditionModel",
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280, 1280],
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
    down_block_types=[CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
    up_block_types=[PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
)
UNET_2 = UNET_1 | dict(
    attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True
)
UNET_XL = UNET_2 | dict(
    sample_size=128,
    block_out_channels=[320, 640, 1280],
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    down_block_types=[PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN],
    up_block_types=[CROSS_UP, CROSS_UP, PLAIN_UP],
)
UNET_REFINER = UNET_XL | dict(
    block_out_channels=[384, 768, 1536, 1536],
    transformer_layers_per_block=4,
    attention_head_dim=[6, 12, 24, 24],
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
    down_block_types=[PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
    up_block_types=[PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP],
)
MASKED = dict(in_channels=9)
FLUX_TRANSFORMER: Config = dict(
    _class_name="FluxTransformer2DModel",
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
)
VAE: Config = dict(
    _class_name="AutoencoderKL",
    sample_size=512,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.18215,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
VAE_XL = VAE | dict(sample_size=1024, scaling_factor=0.13025)
VAE_FLUX = VAE | dict(
    sample_size=1024,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
STEPS_XL: Config = dict(
    _class_name="EulerDiscreteScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    steps_offset=1,
    prediction_type="epsilon",
    timestep_spacing="leading",
)
STEPS = STEPS_XL | dict(_class_name="DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
FLOW: Config = dict(
    _class_name="FlowMatchEulerDiscreteScheduler",
    num_train_timesteps=1000,
    shift=3.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)
V_PREDICTION = dict(prediction_type="v_prediction")
CLASSES = {  # entries of a model_index.json
    "unet": ["diffusers", "UNet2DConditionModel"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _config_files(
    pipeline: str, parts: Mapping[str, Config], scheduler: Config, **index: Any
) -> dict[str, Config]:
    """The JSON files of a model: its parts' configs and a model_index.json that lists them."""
    listed: Config = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler["_class_name"]]}
    for name, config in parts.items():
        if name.startswith("text_encoder"):
            listed[name] = ["transformers", config["architectures"][0]]
            kind = "T5TokenizerFast" if config["model_type"] == "t5" else "CLIPTokenizer"
            listed[name.replace("text_encoder", "tokenizer")] = ["transformers", kind]
        else:
            listed[name] = CLASSES[name]
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
