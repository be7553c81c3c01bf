"""Flux.1 dev and schnell: a transformer on packed latents, VAE, CLIP-L and T5.

The models are rectified flows. CLIP-L gives one pooled vector, T5 the prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel
from lora_core.errors import UserError
from lora_core.family import Conditioning, FamilyFunctions, LoadOptions
from lora_core.formats.layout import Layout, layout_of
from lora_core.tokens import first_eos
from models import sd
from models.components import read_encoder_config, read_json, read_prompt_length, tokenize_prompts
from models.flow import (
    PATCH,
    TRANSFORMER_CONFIG,
    FlowFamily,
    check_channels,
    check_fit,
    load_parts,
    open_tokenizers,
    pack_latents,
    prompt_length,
    read_flow_schedule,
    read_flow_scheduler,
    read_networks,
    refuse_masks,
    unpack_latents,
)
from models.flux_names import original_flux_names
from models.joint_attention import install_joint_attention, keep_maps

PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
NETWORKS = {
    "transformer": FluxTransformer2DModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}
TOKENIZERS = {"text_encoder": CLIPTokenizer, "text_encoder_2": T5TokenizerFast}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
PRESETS = {  # component -> preset -> globs; the counts are those of 19 double and 38 single blocks
    "transformer": {
        "attention": ATTENTION,  # 190, four names
        "fal": (*ATTENTION, *ADDED, *FEED_FORWARD),  # 342, diffusers' scripts
        "ostris": (*ATTENTION, *ADDED, *FEED_FORWARD, *MODULATION, "proj_mlp", "proj_out"),  # 495
        # 494, which are 304 layers of the original code
        "kohya": ("transformer_blocks.*", "single_transformer_blocks.*"),
        "all-linear": ("*",),
    },
    "text_encoder": sd.PRESETS["text_encoder"],
}
DENOISER_PRESETS = tuple(PRESETS["transformer"])
# Tokens of a T5 prompt, with and without a guidance embedding (dev and schnell).
LENGTHS = {True: 512, False: 256}


class Flux(FlowFamily):
    """The `Family` of Flux.1."""

    name = "flux"
    attended: tuple[str, ...] = ("text_encoder_2",)

    def __init__(
        self,
        modules: dict[str, Any],
        tokenizers: dict[str, Any],
        scheduler: dict[str, Any],
        length: int,
    ):
        super().__init__(modules, tokenizers, scheduler)
        self.length = length
        self.clip = modules["text_encoder"]
        self.t5 = modules["text_encoder_2"]
        self.pipeline = PIPELINES[0]
        self.distilled_guidance = bool(self.transformer.config.guidance_embeds)
        self.own_steps = 0 if self.distilled_guidance else 4  # schnell was distilled to few
        self.layout = flux_layout({name: modules[name] for name in NETWORKS})
        self.joint_attention = install_joint_attention(self.transformer)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of CLIP and T5, and the position of CLIP's first end-of-text token.

        The position is found on the CPU, so that nothing waits for the device.
        """
        first, second = self.tokenizers["text_encoder"], self.tokenizers["text_encoder_2"]
        checked = self.checked_prompts
        ids = tokenize_prompts(first, prompts, read_prompt_length(first), checked["text_encoder"])
        t5 = tokenize_prompts(second, prompts, self.length, checked["text_encoder_2"])
        end = first_eos(ids, first.eos_token_id)
        return {"clip": ids.to(self.device), "end": end.to(self.device), "t5": t5.to(self.device)}

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """T5's last hidden state [b, length, d] and CLIP's vector at the first end-of-text token.

        T5's padding is included and unmasked. With eos_token_id 2 in the config,
        transformers' pooler takes the largest id, which would be a learned token. Every encoder
        reads the same string; one that has not learned the tokens reads their names as plain text,
        as in diffusers.
        """
        hidden = self.clip(tokens["clip"]).last_hidden_state
        end = tokens["end"]
        pooled = hidden[torch.arange(len(end), device=end.device), end]
        embeds = self.t5(tokens["t5"]).last_hidden_state
        return Conditioning(embeds, {"pooled_prompt_embeds": pooled})

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Conditioning,
        inpaint: Tensor | None = None,
        maps: list[AttentionMap] | None = None,
    ) -> Tensor:
        """The velocity eps - x0.

        The network gets sigma, which it multiplies by 1000, and guidance in fp32, and rounds both
        to its own dtype.
        """
        refuse_masks(inpaint)
        height, width = x_t.shape[-2:]
        grid = height // PATCH, width // PATCH
        with keep_maps(self.joint_attention, grid, maps):
            out = self.transformer(
                hidden_states=pack_latents(x_t).to(self.dtype),
                timestep=level.t,
                guidance=cond.extra["guidance"] if self.distilled_guidance else None,
                pooled_projections=cond.extra["pooled_prompt_embeds"].to(self.dtype),
                encoder_hidden_states=cond.prompt_embeds.to(self.dtype),
                img_ids=image_position_ids(height, width, x_t.device),
                txt_ids=torch.zeros(cond.prompt_embeds.shape[1], 3, device=x_t.device),
            ).sample
        return unpack_latents(out, height, width).to(torch.promote_types(out.dtype, torch.float32))


def image_position_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """[(h / 2) (w / 2), 3] fp32: (0, row, column) of every token of latents of that size."""
    zero = torch.zeros(1, device=device)
    rows = torch.arange(height // PATCH, dtype=torch.float32, device=device)
    columns = torch.arange(width // PATCH, dtype=torch.float32, device=device)
    return torch.cartesian_prod(zero, rows, columns)


# ---------------------------------------------------------------- loading


def load(path: str, how: LoadOptions) -> Flux:
    """The model in a folder or on the hub, in the diffusers layout.

    Raises UserError, before any weight is read, for settings without effect on a flow or on a
    pooled vector, and for a transformer with further input channels; then for a missing or broken
    part.
    """
    if how.clip_skip:
        raise UserError(
            f"--clip-skip has no effect: of the CLIP text encoder of {path} only the pooled vector "
            "is used; leave it out"
        )
    if how.max_token_length:
        raise UserError(
            f"--max-token-length has no effect: of the CLIP text encoder of {path} only the pooled "
            "vector is used, and T5 reads --max-sequence-length tokens; leave it out"
        )
    scheduler = read_flow_scheduler(path, how.scheduler)
    config = read_json(path, TRANSFORMER_CONFIG)
    latent_channels = read_json(path, "vae/config.json").get("latent_channels", 4)
    check_channels(config.get("in_channels", 64), PATCH * PATCH * latent_channels)
    pooled = read_encoder_config(path, "text_encoder", CLIPTextConfig).hidden_size
    check_fit(path, config, {"pooled_projection_dim": pooled}, "text_encoder")
    width = read_encoder_config(path, "text_encoder_2", T5Config).d_model
    check_fit(path, config, {"joint_attention_dim": width}, "text_encoder_2")
    length = prompt_length(how.max_sequence_length, LENGTHS[bool(config.get("guidance_embeds"))])
    tokenizers = open_tokenizers(path, how, TOKENIZERS)
    modules = load_parts(path, how, NETWORKS, AutoencoderKL)
    family = Flux(modules, tokenizers, scheduler, length)
    family.pipeline = read_json(path, "model_index.json")["_class_name"]
    return family


def read_flux_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    return flux_layout(read_networks(path, NETWORKS))


FAMILY = FamilyFunctions(load, read_flux_layout, read_flow_schedule)


# ---------------------------------------------------------------- names


def flux_layout(modules: Mapping[str, nn.Module]) -> Layout:
    """Names and presets of a Flux model.

    T5 is included for its token rows and for reading files; it is never adapted.
    """
    guidance = modules["transformer"].config.guidance_embeds  # type: ignore[union-attr]
    plain = layout_of(
        modules,
        family="flux",
        base_model_version="flux1",
        presets=PRESETS,
        encoders={"text_encoder": "clip_l", "text_encoder_2": "t5"},
        architecture=f"flux-1-{'dev' if guidance else 'schnell'}/lora",
    )
    network = plain.components["transformer"]
    named = replace(network, **original_flux_names(network.modules))
    components = {**plain.components, "transformer": named}
    return replace(
        plain,
        components=components,
        network_module="networks.lora_flux",
        implementation="https://github.com/black-forest-labs/flux",
    )
