"""FLUX.2 [klein] and [dev]: a transformer on patched latents, VAE with a batch norm, one LLM.

The models are rectified flows. Hidden states of three layers of Qwen3 (klein) or Mistral Small
(dev), side by side, are the prompt embeddings; these text encoders learn nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from einops import rearrange
from torch import Tensor, nn
from transformers import Mistral3Model, PreTrainedTokenizerFast, Qwen2TokenizerFast, Qwen3Model

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.family import Conditioning, FamilyFunctions, LoadOptions
from lora_core.formats.layout import Layout, layout_of
from models import flow, language_encoders
from models.components import read_json
from models.flow import LONGEST, PATCH, FlowFamily
from models.flux2_names import original_flux2_names
from models.language_encoders import Chat, LanguageEncoder

# The text with which dev was trained, byte for byte, as its vocabulary is part of the model.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)
DISTILLED_STEPS = 4  # of the klein models without "base" in their names
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
PRESETS = {  # component -> preset -> globs; the counts are those of klein 4B, klein 9B and dev
    "transformer": {
        "attention": ATTENTION,  # 40, 56 and 80
        # 60, 80 and 128, diffusers' DreamBooth script for klein
        "dreambooth": (*ATTENTION, "single_transformer_blocks.*.attn.to_out"),
        # 100, 144 and 192, which are 80, 112 and 160 layers of the original code
        "kohya": ("transformer_blocks.*", "single_transformer_blocks.*"),
        "all-linear": ("*",),  # 109, 153 and 203
    }
}
DENOISER_PRESETS = tuple(PRESETS["transformer"])
# Attention heads of the transformer -> the model's name in files of musubi-tuner.
VERSIONS = {24: "klein_4b", 32: "klein_9b", 48: "dev"}


def klein_chat(prompt: str) -> Chat:
    """The conversation in which Qwen3 reads a prompt."""
    return [{"role": "user", "content": prompt}]


def dev_chat(prompt: str) -> Chat:
    """The conversation in which Mistral reads a prompt. The placeholder of images is left out."""
    texts = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
    return [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in texts.items()]


READERS = {  # `_class_name` of model_index.json -> its text encoder
    "Flux2KleinPipeline": LanguageEncoder(
        Qwen3Model,
        "qwen3",
        Qwen2TokenizerFast,
        (9, 18, 27),
        klein_chat,
        {"add_generation_prompt": True, "enable_thinking": False},
    ),
    "Flux2Pipeline": LanguageEncoder(
        Mistral3Model,
        "mistral3",
        PreTrainedTokenizerFast,
        (10, 20, 30),
        dev_chat,
        {"add_generation_prompt": False},
    ),
}
PIPELINES = tuple(READERS)


# ---------------------------------------------------------------- the family


class Flux2(FlowFamily):
    """The `Family` of FLUX.2. Its latents are the VAE's, 2 x 2 of them as channels of one."""

    name = "flux2"

    def __init__(
        self,
        modules: dict[str, Any],
        tokenizers: dict[str, Any],
        scheduler: dict[str, Any],
        length: int,
        index: Mapping[str, Any],
    ):
        super().__init__(modules, tokenizers, scheduler)
        self.length = length
        self.pipeline: str = index["_class_name"]
        self.reader = READERS[self.pipeline]
        self.encoder: Any = modules["text_encoder"]
        is_distilled = bool(index.get("is_distilled"))
        # The number of steps that the model was distilled to, else 0.
        self.own_steps = DISTILLED_STEPS if is_distilled else 0
        self.reads_guidance = bool(self.transformer.config.guidance_embeds)
        self.distilled_guidance = self.reads_guidance or is_distilled
        self.latent_channels *= PATCH * PATCH
        self.factor *= PATCH
        self.layout = flux2_layout(self.transformer)

    def schedule_at(self, height: int, width: int) -> Schedule:
        """The schedule for latents of that size, with the pipelines' steps of samplers.

        Where the shift is dynamic it is that of the scheduler's config (musubi-tuner's
        flux2_shift), and steps are shifted by a mu that depends on their number as well.
        """
        tokens = height * width
        schedule = flow.flow_schedule_from_config(self.scheduler, tokens)
        if not tokens or not self.has_dynamic_shift:
            return schedule
        return replace(schedule, step_sigmas=functools.partial(flow.empirical_steps, tokens))

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and, as std, zeros: the model was trained on means."""
        mean = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mean
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        patched = rearrange(mean, "b c (h ph) (w pw) -> b (c ph pw) h w", ph=PATCH, pw=PATCH)
        shift, scale = self._batch_norm(patched)
        latents = (patched - shift) / scale
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = self._batch_norm(latents)
        z = latents * scale + shift
        z = rearrange(z, "b (c ph pw) h w -> b c (h ph) (w pw)", ph=PATCH, pw=PATCH)
        return self.vae.decode(z.to(self.vae.dtype)).sample.clamp(-1, 1)

    def _batch_norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) of the VAE's batch norm, [1, c, 1, 1]."""
        norm = self.vae.bn
        mean, variance = norm.running_mean.to(like), norm.running_var.to(like)
        return mean.view(1, -1, 1, 1), (variance + norm.eps).sqrt().view(1, -1, 1, 1)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids [b, length] of the prompts in their conversations, and the mask of padding."""
        checked = self.checked_prompts["text_encoder"]
        tokens = language_encoders.tokenize_chats(
            self.tokenizers["text_encoder"], self.reader, prompts, self.length, checked
        )
        return {name: rows.to(self.device) for name, rows in tokens.items()}

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """Prompt embeddings [b, length, 3 d]: hidden states of three layers, side by side."""
        return Conditioning(language_encoders.read_hidden_states(self.encoder, self.reader, tokens))

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Conditioning,
        inpaint: Tensor | None = None,
        maps: list[AttentionMap] | None = None,
    ) -> Tensor:
        """The velocity eps - x0. No attention maps are recorded.

        The network gets sigma, which it multiplies by 1000, and guidance in fp32, and rounds both
        to its own dtype.
        """
        flow.refuse_masks(inpaint)
        height, width = x_t.shape[-2:]
        out = self.transformer(
            hidden_states=flow.pack_latents(x_t, patch=1).to(self.dtype),
            timestep=level.t,
            guidance=cond.extra["guidance"] if self.reads_guidance else None,
            encoder_hidden_states=cond.prompt_embeds.to(self.dtype),
            img_ids=position_ids(1, height, width, 1, device=x_t.device),
            txt_ids=position_ids(1, 1, 1, cond.prompt_embeds.shape[1], device=x_t.device),
        ).sample
        latents = flow.unpack_latents(out, height, width, patch=1)
        return latents.to(torch.promote_types(out.dtype, torch.float32))


def position_ids(*sizes: int, device: torch.device | str = "cpu") -> Tensor:
    """[tokens, 4] int64: time, row, column and place in the text of every token."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


# ---------------------------------------------------------------- loading


def load(path: str, how: LoadOptions) -> Flux2:
    """The model in a folder or on the hub, in the diffusers layout.

    Raises UserError, before any weight is read, for settings without effect and for parts that do
    not fit each other; then for a missing or broken part.
    """
    language_encoders.refuse_clip_options(path, how)
    index = read_json(path, "model_index.json")
    reader = READERS[index["_class_name"]]
    scheduler = flow.read_flow_scheduler(path, how.scheduler)
    check_parts(path, reader, how.vae)
    length = flow.prompt_length(how.max_sequence_length, LONGEST)
    tokenizers = {"text_encoder": language_encoders.open_chat_tokenizer(path, reader, how.device)}
    classes = {"transformer": Flux2Transformer2DModel, "text_encoder": reader.network}
    modules = flow.load_parts(path, how, classes, AutoencoderKLFlux2)
    modules["text_encoder"] = language_encoders.keep_read_layers(modules["text_encoder"], reader)
    return Flux2(modules, tokenizers, scheduler, length, index)


def check_parts(path: str, reader: LanguageEncoder, vae: str) -> None:
    """Raises UserError for a text encoder or a VAE that the transformer does not fit, by their
    config.json files. `vae`: folder or hub id of another VAE, or "".
    """
    config = read_json(path, flow.TRANSFORMER_CONFIG)
    width = language_encoders.check_language_encoder(path, reader)
    flow.check_fit(path, config, {"joint_attention_dim": width}, "text_encoder")
    vae_config = read_json(vae or path, "config.json" if vae else "vae/config.json")
    channels = PATCH * PATCH * vae_config.get("latent_channels", 32)
    flow.check_fit(path, config, {"in_channels": channels}, "vae")


def read_flux2_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    return flux2_layout(
        flow.read_networks(path, {"transformer": Flux2Transformer2DModel})["transformer"]
    )


FAMILY = FamilyFunctions(load, read_flux2_layout, flow.read_flow_schedule)


def flux2_layout(transformer: nn.Module) -> Layout:
    """Names and presets of a FLUX.2 model. Nothing but its transformer can be adapted."""
    config: Any = transformer.config
    version = VERSIONS.get(config.num_attention_heads, "klein")
    plain = layout_of(
        {"transformer": transformer},
        family="flux2",
        base_model_version=f"flux_2_{version}",
        presets=PRESETS,
        encoders={},
        architecture=f"Flux.2-{version.replace('_', '-')}/lora",
    )
    network = plain.components["transformer"]
    return replace(
        plain,
        components={"transformer": replace(network, **original_flux2_names(network.modules))},
        network_module="networks.lora_flux_2",
        implementation="https://github.com/black-forest-labs/flux2",
    )
