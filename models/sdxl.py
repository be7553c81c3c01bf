"""Stable Diffusion XL: UNet, VAE, CLIP-L and OpenCLIP bigG.

The UNet is also conditioned on image sizes and pooled prompts. There are base models, inpainting (9
channels), refiners (bigG alone, an aesthetic score instead of the target size), and EDM models like
Playground v2.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_core.cross_attention import CrossAttention, cross_attention_paths
from lora_core.diffusion import noise
from lora_core.diffusion.noise import Schedule
from lora_core.diffusion.prediction import SIGMA_DATA, prediction_from_config
from lora_core.errors import UserError
from lora_core.family import Conditioning, FamilyFunctions, LoadOptions, Sizes
from lora_core.formats.compvis import unet_module_names
from lora_core.formats.layout import Component, Layout, layout_of
from lora_core.tokens import first_eos
from models import sd
from models.components import (
    check_tokenizers,
    config_errors,
    freeze_network,
    load_network,
    open_tokenizer,
    read_encoder_config,
    read_json,
    read_prompt_length,
    read_resolution,
)
from models.prompt_chunks import check_token_length, join_chunks, split_chunks
from models.sd import StableDiffusion
from models.weighted_prompts import emphasize_states, split_weights

PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
# A refiner has only the second.
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
# Aesthetic scores of a prompt and of the negative one for a refiner (diffusers' defaults).
SCORES = (6.0, 2.5)
# component -> preset -> globs; full-size counts: attention 560, kohya 722, b-lora 80 each; text
# encoders 48 / 128 and 72 / 192
PRESETS = {
    "unet": {  # arXiv 2403.14572: two blocks of the decoder separate content from style
        "b-lora-content": tuple(f"up_blocks.0.attentions.0.{glob}" for glob in sd.ATTENTION),
        "b-lora-style": tuple(f"up_blocks.0.attentions.1.{glob}" for glob in sd.ATTENTION),
    },
    "text_encoder": sd.PRESETS["text_encoder"],
    "text_encoder_2": sd.PRESETS["text_encoder"],
}


@dataclass(frozen=True)
class SDXLParts:
    """The components of a checkpoint; `encoders` and `tokenizers` have the same keys."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    index: dict[str, Any]  # model_index.json


class StableDiffusionXL(StableDiffusion):
    """The `Family` of Stable Diffusion XL.

    Conditioning.extra is the UNet's added_cond_kwargs: text_embeds [b, 1280] and, after
    `add_size_embeddings`, time_ids [b, 6]. A refiner's rows also have aesthetic_score [b, 1] until
    `add_size_embeddings` moves it into time_ids [b, 5].
    """

    name = "sdxl"
    embeds_sizes = True

    def __init__(self, parts: SDXLParts, scheduler: Mapping[str, Any], how: LoadOptions):
        unet, vae = parts.unet, parts.vae
        config = {**scheduler, **how.scheduler}
        self.unet = unet
        self.vae = vae
        self.encoders = parts.encoders
        self.tokenizers = parts.tokenizers
        self.modules: dict[str, nn.Module] = {"unet": unet, **parts.encoders, "vae": vae}
        self.pipeline = parts.index["_class_name"]
        self.checked_prompts: set[str] = set()
        self.clip_skip = sd.check_clip_skip(how.clip_skip, list(parts.encoders.values()))
        self.max_token_length = check_token_length(how.max_token_length)
        zeros_for_empty = parts.index.get("force_zeros_for_empty_prompt", True)
        self.zeros = ("prompt_embeds", "text_embeds") if zeros_for_empty else ()
        self.attended = tuple(parts.encoders)  # their hidden states lie side by side
        self.takes_score = parts.index.get("requires_aesthetics_score", False)
        self.schedule, self.prediction = sdxl_schedule(scheduler, how.scheduler)
        self.spacing = config.get("timestep_spacing", "leading")
        self.offset = config.get("steps_offset", 0)
        self.latent_channels = vae.config.latent_channels
        self.factor = self.multiple = 2 ** (len(vae.config.block_out_channels) - 1)
        self.resolution = read_resolution(unet.config.sample_size, self.factor)
        check_tokenizers(self.tokenizers, self.modules)
        self.inpainting = sd.is_inpainting_unet(unet, self.latent_channels)
        self.layout = sdxl_layout(unet, parts.encoders)
        self.cross_attention = CrossAttention(unet, self.layout.cross_attention)
        for module in self.modules.values():
            freeze_network(module)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids by encoder, and the position of the first EOS, where bigG is pooled.

        The position is found on the CPU, so that nothing waits for the device.
        """
        tokens = {}
        for name, tokenizer in self.tokenizers.items():
            tokens[name], weights = self.tokenize_for(tokenizer, prompts)
            if weights is not None:
                tokens[f"{name}.weights"] = weights
        pooled = self.tokenizers["text_encoder_2"]
        end = first_eos(tokens["text_encoder_2"], pooled.eos_token_id)
        tokens["end"] = end.clamp(max=read_prompt_length(pooled) - 1)  # of the first chunk
        return {name: value.to(self.device) for name, value in tokens.items()}

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """The encoders' second last hidden states, concatenated, and bigG's pooled prompt.

        The hidden states are before the final norm; the pooled prompt is the projected last state
        at the first EOS. clip_skip k takes the hidden states k layers earlier, not the pooled one.
        With eos_token_id 2 in the encoder's config, diffusers pools at the largest token id, which
        is a placeholder once tokens were added; kohya and ComfyUI pool at the EOS, as we do. Long
        prompts are encoded in chunks, and the first is pooled (kohya).
        """
        states = []
        extra = {}
        for name, encoder in self.encoders.items():
            count = len(tokens[name])
            ids = split_chunks(tokens[name], self.tokenizers[name])
            out = encoder(ids, output_hidden_states=True)
            hidden = out.hidden_states[-(self.clip_skip + 2)]
            if f"{name}.weights" in tokens:
                own = split_weights(tokens[f"{name}.weights"], self.tokenizers[name])
                hidden = emphasize_states(hidden, own)
            states.append(join_chunks(hidden, count))
            if name == "text_encoder_2":
                end = tokens["end"]
                rows = torch.arange(count, device=end.device)
                firsts = out.last_hidden_state[:: len(ids) // count]
                extra["text_embeds"] = encoder.text_projection(firsts[rows, end])
        return self._add_score(Conditioning(torch.cat(states, dim=-1), extra), SCORES[0])

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """The encoded prompts, with zeros for empty ones.

        With force_zeros_for_empty_prompt = false in model_index.json, empty prompts are encoded
        like others. clip_skip applies here too; diffusers encodes negative
        prompts without it.
        """
        cond = self.encode_prompts(prompts)
        kept = torch.tensor([float(bool(prompt)) for prompt in prompts])
        return self._add_score(cond.zeroed(self.zeros, kept), SCORES[1])

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        """The conditioning with time_ids [b, 6], or [b, 5] for a refiner.

        They are original height and width, top and left of the crop, then target height and width,
        or a refiner's aesthetic score.
        """
        extra = dict(cond.extra)
        time_ids = sizes.to_tensor(self.device)
        if self.takes_score:
            time_ids = torch.cat([time_ids[:, :4], extra.pop("aesthetic_score")], dim=1)
        return replace(cond, extra={**extra, "time_ids": time_ids})

    def _add_score(self, cond: Conditioning, score: float) -> Conditioning:
        if not self.takes_score:
            return cond
        scores = torch.full((len(cond.prompt_embeds), 1), score, device=self.device)
        return cond.with_extra(aesthetic_score=scores)


# ---------------------------------------------------------------- loading


def load(path: str, how: LoadOptions) -> StableDiffusionXL:
    """The model in a folder or on the hub, in the diffusers layout.

    Raises UserError for a missing or broken part, and for parts that do not fit.
    """
    if how.max_sequence_length:
        raise UserError(f"--max-sequence-length has no effect: {path} has no T5 text encoder")
    index = read_json(path, "model_index.json")
    scheduler = read_json(path, "scheduler/scheduler_config.json")
    sdxl_schedule(scheduler, how.scheduler)  # raises before any weight is read
    names = present_encoders(path, index)
    vae_folder = "" if how.vae else "vae"
    vae = load_network(AutoencoderKL, how.vae or path, vae_folder, how.vae_precision, how.device)
    tokenizers, encoders = {}, {}
    for name in names:
        folder = name.replace("text_encoder", "tokenizer")
        tokenizers[name] = open_tokenizer(CLIPTokenizer, path, folder, how.device)
    for name in names:
        encoders[name] = load_network(ENCODERS[name], path, name, how.dtype, how.device)
    unet = load_network(UNet2DConditionModel, path, "unet", how.dtype, how.device)
    return StableDiffusionXL(SDXLParts(unet, vae, encoders, tokenizers, index), scheduler, how)


def read_sdxl_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    names = present_encoders(path, read_json(path, "model_index.json"))
    with torch.device("meta"), config_errors(path):
        unet = UNet2DConditionModel.from_config(read_json(path, "unet/config.json"))
        encoders = {}
        for name in names:
            encoders[name] = ENCODERS[name](read_encoder_config(path, name, CLIPTextConfig))
    return sdxl_layout(unet, encoders)


def present_encoders(path: str, index: Mapping[str, Any]) -> list[str]:
    """The names of the text encoders that model_index.json lists.

    Raises UserError when bigG is not among them, or they or the sizes do not fit the UNet.
    """
    names = [name for name in ENCODERS if (index.get(name) or [None])[-1] is not None]
    if "text_encoder_2" not in names:
        raise UserError(
            f"model_index.json of {path} lists no text_encoder_2, which every SDXL model has; "
            "the copy is incomplete"
        )
    unet = read_json(path, "unet/config.json")
    encoders = [read_encoder_config(path, name, CLIPTextConfig) for name in names]
    numbers = 5 if index.get("requires_aesthetics_score", False) else 6
    embedded = numbers * (unet.get("addition_time_embed_dim") or 0)
    expected = {  # key of the UNet's config.json -> its value by the other components
        "cross_attention_dim": sum(config.hidden_size for config in encoders),
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": embedded + encoders[-1].projection_dim,
    }
    for key, value in expected.items():
        if unet.get(key) != value:
            listed = " and ".join(names)
            raise UserError(
                f"the UNet of {path} has {key} {unet.get(key)}, expected {value} next to {listed}; "
                "take all parts from one model"
            )
    return names


def sdxl_schedule(config: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Schedule, str]:
    """(noise schedule, prediction type) of a scheduler_config.json with some keys changed.

    The schedule is edm for schedulers with EDM in their class name, else vp. Training tables of EDM
    schedulers are also Karras' sigmas; EDMEulerScheduler's has one more between the same ends.
    Raises UserError for another scheduler, and for changes that an edm scheduler does not take.
    """
    name = config.get("_class_name", "")
    merged = {**config, **changes}
    if "Flow" in name:
        raise UserError(
            f"the model's scheduler is a {name}; SDXL models are supported with diffusion and EDM "
            "schedulers only"
        )
    if "EDM" not in name:
        return noise.vp_schedule_from_config(merged), prediction_from_config(merged)
    # diffusers' defaults
    known = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "num_train_timesteps": 1000}
    for key in changes:
        if key not in known:
            raise UserError(
                f"the model's {name} takes no {key}; leave out --noise.prediction and "
                "--noise.zero-terminal-snr for EDM models"
            )
    only = {"prediction_type": "epsilon", "sigma_data": SIGMA_DATA, "sigma_schedule": "karras"}
    for key, expected in only.items():
        if config.get(key, expected) != expected:
            raise UserError(
                f"the model's {name} has {key} {config[key]!r}; "
                f"this program knows EDM models with {expected!r} only"
            )
    low, high, rho, steps = (merged.get(key, default) for key, default in known.items())
    return noise.edm_schedule(sigma_min=low, sigma_max=high, rho=rho, steps=steps), "edm"


def read_sdxl_schedule(
    path: str, changes: Mapping[str, Any], resolution: int
) -> tuple[Schedule, str]:
    """(noise schedule, prediction type) of the model at `path`.

    From its scheduler_config.json with some keys changed.
    """
    return sdxl_schedule(read_json(path, "scheduler/scheduler_config.json"), changes)


FAMILY = FamilyFunctions(load, read_sdxl_layout, read_sdxl_schedule)


# ---------------------------------------------------------------- names


def sdxl_layout(unet: UNet2DConditionModel, encoders: Mapping[str, Any]) -> Layout:
    """Names and presets of an SDXL model.

    kohya's files name the UNet's modules as Stability's code does.
    """
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
        names=unet_module_names(component.modules),
        blocks=sd.block_indices(component.modules),
    )
    return replace(
        found,
        components={**found.components, "unet": named},
        block_lists=(12, 20, 26),
        cross_attention=cross_attention_paths(component.modules),
    )
