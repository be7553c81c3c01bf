"""Stable Diffusion XL: UNet2DConditionModel with sizes and pooled prompts as further conditioning, CLIP-L and OpenCLIP bigG, AutoencoderKL.

Base, inpainting (9 channels), refiner (bigG alone, an aesthetic score in place of the target size), and Playground v2.5 style models (EDM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_core.diffusion import noise
from lora_core.diffusion.noise import Schedule
from lora_core.diffusion.prediction import SIGMA_DATA
from lora_core.errors import UserError
from lora_core.family import (
    Conditioning,
    LoadOptions,
    Sizes,
    load_network,
    load_part,
    read_encoder_config,
    read_json,
    tokenize_prompts,
)
from lora_core.formats.compvis import unet_module_names
from lora_core.formats.layout import Component, Layout, layout_of
from lora_core.tokens import first_eos
from models import sd
from models.sd import StableDiffusion

PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
ENCODERS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}  # a refiner has the second only
SCORES = (
    6.0,
    2.5,
)  # aesthetic scores that a refiner is told for a prompt and for the negative one (diffusers' defaults)
PRESETS = {  # component -> preset -> globs; full-size counts: attention 560, kohya 722, b-lora 80 each; text encoders 48 / 128 and 72 / 192
    "unet": {  # arXiv 2403.14572: two blocks of the decoder separate what is drawn from how
        "b-lora-content": tuple(f"up_blocks.0.attentions.0.{glob}" for glob in sd.ATTENTION),
        "b-lora-style": tuple(f"up_blocks.0.attentions.1.{glob}" for glob in sd.ATTENTION),
    },
    "text_encoder": sd.PRESETS["text_encoder"],
    "text_encoder_2": sd.PRESETS["text_encoder"],
}


@dataclass(frozen=True)
class SDXLParts:
    """What a checkpoint is made of; components of one name in `encoders` and `tokenizers` belong together."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    index: dict[str, Any]  # model_index.json


class StableDiffusionXL(StableDiffusion):
    """See lora_core.family.Family. Conditioning.extra is the UNet's added_cond_kwargs: text_embeds [b, 1280] and, after `inform`, time_ids [b, 6].

    A refiner's rows also carry aesthetic_score [b, 1] until `inform` moves it into time_ids [b, 5].
    """

    name = "sdxl"

    def __init__(self, parts: SDXLParts, scheduler: Mapping[str, Any], how: LoadOptions):
        unet, vae, config = parts.unet, parts.vae, {**scheduler, **how.scheduler}
        self.unet, self.vae, self.encoders, self.tokenizers = (
            unet,
            vae,
            parts.encoders,
            parts.tokenizers,
        )
        self.modules: dict[str, nn.Module] = {"unet": unet, **parts.encoders, "vae": vae}
        self.pipeline, self.said = parts.index["_class_name"], set[str]()
        self.clip_skip = sd.check_clip_skip(how.clip_skip, list(parts.encoders.values()))
        self.zeros = (
            ("prompt_embeds", "text_embeds")
            if parts.index.get("force_zeros_for_empty_prompt", True)
            else ()
        )
        self.scored = parts.index.get("requires_aesthetics_score", False)
        self.schedule, self.prediction = sdxl_schedule(scheduler, how.scheduler)
        self.spacing, self.offset = (
            config.get("timestep_spacing", "leading"),
            config.get("steps_offset", 0),
        )
        self.latent_channels = vae.config.latent_channels
        self.factor = self.multiple = 2 ** (len(vae.config.block_out_channels) - 1)
        self.resolution = unet.config.sample_size * self.factor
        self.inpainting = sd.is_inpainting_unet(unet, self.latent_channels)
        self.layout = sdxl_layout(unet, parts.encoders)
        for module in self.modules.values():
            module.requires_grad_(False).eval()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids by encoder, and the place of the first EOS, where bigG is pooled: looked for on the CPU, so that nothing waits for the device."""
        found = {
            name: tokenize_prompts(t, prompts, t.model_max_length, self.said)
            for name, t in self.tokenizers.items()
        }
        found["end"] = first_eos(
            found["text_encoder_2"], self.tokenizers["text_encoder_2"].eos_token_id
        )
        return {name: value.to(self.device) for name, value in found.items()}

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """The second last hidden states of the encoders side by side, without final norm, and bigG's projected last state at the first EOS.

        clip_skip k takes the states k layers earlier; the pooled state stays. diffusers pools at the largest token id where the encoder's config
        says eos_token_id 2, which is a placeholder once tokens were added; kohya and ComfyUI pool at the EOS, as we do.
        """
        states, extra = [], {}
        for name, encoder in self.encoders.items():
            out = encoder(tokens[name], output_hidden_states=True)
            states.append(out.hidden_states[-(self.clip_skip + 2)])
            if name == "text_encoder_2":
                end = tokens["end"]
                extra["text_embeds"] = encoder.text_projection(
                    out.last_hidden_state[torch.arange(len(end), device=end.device), end]
                )
        return self._scored(Conditioning(torch.cat(states, dim=-1), extra), SCORES[0])

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts encoded; zeros for empty ones, where model_index.json says force_zeros_for_empty_prompt (as by default).

        clip_skip holds here too; diffusers encodes negative prompts without it.
        """
        cond = self.encode_prompts(prompts)
        kept = torch.tensor([float(bool(prompt)) for prompt in prompts])
        return self._scored(cond.zeroed(self.zeros, kept), SCORES[1])

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        """The conditioning with time_ids: original height and width, top and left of the crop, target height and width or the aesthetic score."""
        extra, places = dict(cond.extra), sizes.on(self.device)
        told = (
            torch.cat([places[:, :4], extra.pop("aesthetic_score")], dim=1)
            if self.scored
            else places
        )
        return Conditioning(cond.prompt_embeds, {**extra, "time_ids": told})

    def _scored(self, cond: Conditioning, score: float) -> Conditioning:
        if not self.scored:
            return cond
        return cond.with_extra(
            aesthetic_score=torch.full((len(cond.prompt_embeds), 1), score, device=self.device)
        )


# ---------------------------------------------------------------- loading


def load(path: str, how: LoadOptions) -> StableDiffusionXL:
    """The model in a folder or on the hub, in the diffusers layout. Raises UserError for a missing or broken part, and for parts that do not fit."""
    if how.max_sequence_length:
        raise UserError(f"--max-sequence-length has no effect: {path} has no T5 text encoder")
    index, scheduler = (
        read_json(path, "model_index.json"),
        read_json(path, "scheduler/scheduler_config.json"),
    )
    sdxl_schedule(scheduler, how.scheduler)  # refuses before any weight is read
    names = present_encoders(path, index)
    vae = load_network(
        AutoencoderKL, how.vae or path, "" if how.vae else "vae", how.exact, how.device
    )
    tokenizers = {
        name: load_part(
            CLIPTokenizer.from_pretrained, path, name.replace("text_encoder", "tokenizer")
        )
        for name in names
    }
    encoders = {
        name: load_network(ENCODERS[name], path, name, how.dtype, how.device) for name in names
    }
    unet = load_network(UNet2DConditionModel, path, "unet", how.dtype, how.device)
    return StableDiffusionXL(SDXLParts(unet, vae, encoders, tokenizers, index), scheduler, how)


def read_sdxl_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    names = present_encoders(path, read_json(path, "model_index.json"))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(path, "unet/config.json"))
        encoders = {
            name: ENCODERS[name](read_encoder_config(path, name, CLIPTextConfig)) for name in names
        }
    return sdxl_layout(unet, encoders)


def present_encoders(path: str, index: Mapping[str, Any]) -> list[str]:
    """The text encoders that model_index.json lists. Raises UserError when bigG is not among them, or they or the sizes do not fit the UNet."""
    names = [name for name in ENCODERS if (index.get(name) or [None])[-1] is not None]
    if "text_encoder_2" not in names:
        raise UserError(
            f"model_index.json of {path} lists no text_encoder_2, which every SDXL model has; the copy is incomplete"
        )
    unet, encoders = (
        read_json(path, "unet/config.json"),
        [read_encoder_config(path, name, CLIPTextConfig) for name in names],
    )
    numbers = 5 if index.get("requires_aesthetics_score", False) else 6
    told = numbers * (unet.get("addition_time_embed_dim") or 0) + encoders[-1].projection_dim
    expected = {  # key of the UNet's config.json -> what its neighbours make of it
        "cross_attention_dim": sum(config.hidden_size for config in encoders),
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": told,
    }
    for key, value in expected.items():
        if unet.get(key) != value:
            has = (
                f"has {key} {unet.get(key)}, with {' and '.join(names)} beside it expected {value}"
            )
            raise UserError(f"the UNet of {path} {has}; take all parts from one model")
    return names


def sdxl_schedule(config: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Schedule, str]:
    """(schedule, row of PREDICTIONS) of a scheduler_config.json with some keys changed; vp, or edm for the schedulers named so.

    Their training tables are Karras' sigmas too; EDMEulerScheduler's has one row more between the same ends.
    Raises UserError for a scheduler we do not have, and for changes that an edm scheduler has no use for.
    """
    name, merged = config.get("_class_name", ""), {**config, **changes}
    if "Flow" in name:
        raise UserError(
            f"the model's scheduler is a {name}; SDXL models are supported with diffusion and EDM schedulers only"
        )
    if "EDM" not in name:
        return noise.vp_schedule_from_config(merged), merged.get("prediction_type", "epsilon")
    known = {
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "num_train_timesteps": 1000,
    }  # diffusers' defaults
    for key in changes:
        if key not in known:
            raise UserError(
                f"the model's {name} takes no {key}; leave out --noise.prediction and --noise.zero-terminal-snr for EDM models"
            )
    for key, expected in (
        ("prediction_type", "epsilon"),
        ("sigma_data", SIGMA_DATA),
        ("sigma_schedule", "karras"),
    ):
        if config.get(key, expected) != expected:
            raise UserError(
                f"the model's {name} has {key} {config[key]!r}; this program knows EDM models with {expected!r} only"
            )
    low, high, rho, steps = (merged.get(key, default) for key, default in known.items())
    return noise.edm_schedule(sigma_min=low, sigma_max=high, rho=rho, steps=steps), "edm"


def read_sdxl_schedule(
    path: str, changes: Mapping[str, Any], resolution: int
) -> tuple[Schedule, str]:
    """(schedule, row of PREDICTIONS) of the model at `path`, from its scheduler_config.json with some keys changed."""
    return sdxl_schedule(read_json(path, "scheduler/scheduler_config.json"), changes)


# ---------------------------------------------------------------- names


def sdxl_layout(unet: UNet2DConditionModel, encoders: Mapping[str, Any]) -> Layout:
    """Names and presets of an SDXL model; kohya's files name the UNet's modules as Stability's code does."""
    kind = "base" if "text_encoder" in encoders else "refiner"
    found = layout_of(
        {"unet": unet, **encoders},
        family="sdxl",
        base_model_version=f"sdxl_{kind}_v1-0",
        presets={
            "unet": sd.unet_presets(unet) | PRESETS["unet"],
            **{name: PRESETS[name] for name in encoders},
        },
        architecture=f"stable-diffusion-xl-v1-{kind}/lora",
    )
    component: Component = found.components["unet"]
    named = replace(
        component,
        names=unet_module_names(component.shapes),
        blocks=sd.block_indices(component.shapes),
    )
    return replace(found, components={**found.components, "unet": named}, block_lists=(12, 20, 26))
