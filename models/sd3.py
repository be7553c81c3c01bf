"""Stable Diffusion 3 and 3.5: a transformer of joint blocks, VAE, CLIP-L, CLIP-G and T5.

The models are rectified flows (arXiv 2403.03206). Any of the text encoders may be missing; its part
of the prompt is zeros then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.errors import UserError
from lora_core.family import Conditioning, FamilyFunctions, LoadOptions
from lora_core.formats.layout import ENCODERS, Layout, layout_of
from lora_core.tokens import first_eos
from models import sd
from models.components import read_encoder_config, read_json, read_prompt_length, tokenize_prompts
from models.flow import (
    PATCH,
    TIMESTEPS,
    TRANSFORMER_CONFIG,
    FlowFamily,
    check_channels,
    check_fit,
    load_parts,
    open_tokenizers,
    prompt_length,
    read_flow_schedule,
    read_flow_scheduler,
    read_networks,
    refuse_masks,
    with_scheduler_steps,
)
from models.joint_attention import install_joint_attention, keep_maps
from models.sd3_names import original_sd3_names
from models.skip_layers import SkipLayers

PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
TEXTS = dict.fromkeys(CLIPS, CLIPTextModelWithProjection) | {T5: T5EncoderModel}
TOKENIZERS = dict.fromkeys(CLIPS, CLIPTokenizer) | {T5: T5TokenizerFast}
T5_LENGTH = 256  # tokens of a T5 prompt in the pipelines
CLIP_LENGTH = 77  # tokens of a prompt where both CLIP encoders are missing
ATTENTION = ("*.attn*.to_q", "*.attn*.to_k", "*.attn*.to_v", "*.attn*.to_out.0")
DREAMBOOTH = (
    *("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out.0"),
    *("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj", "*.attn.to_add_out"),
)
EMBEDDERS = ("context_embedder", "time_text_embed.*", "norm_out.linear", "proj_out")
PRESETS = {  # component -> preset -> globs; counts of 3 medium, 3.5 medium and 3.5 large
    "transformer": {
        "attention": ATTENTION,  # 96, 148, 152
        "dreambooth": DREAMBOOTH,  # 191, 191, 303: diffusers' script, first attentions alone
        "kohya": ("transformer_blocks.*",),  # 333, 385, 529: all layers of the blocks
        "all-linear": ("transformer_blocks.*", *EMBEDDERS),  # 340, 392, 536
    },
    "text_encoder": sd.PRESETS["text_encoder"],
    "text_encoder_2": sd.PRESETS["text_encoder"],
}
DENOISER_PRESETS = tuple(PRESETS["transformer"])


class StableDiffusion3(FlowFamily):
    """The `Family` of Stable Diffusion 3 and 3.5."""

    name = "sd3"
    pipeline_loads_tokens = False

    def __init__(
        self,
        modules: dict[str, Any],
        tokenizers: dict[str, Any],
        scheduler: dict[str, Any],
        how: LoadOptions,
    ):
        super().__init__(modules, tokenizers, scheduler)
        self.pipeline = PIPELINES[0]
        self.length = prompt_length(how.max_sequence_length, T5_LENGTH)
        self.clips = [name for name in CLIPS if name in modules]
        self.attended = tuple(self.clips)  # whose tokens are the first columns of attention maps
        self.clip_skip = how.clip_skip
        if self.clips:
            sd.check_clip_skip(how.clip_skip, [modules[name] for name in self.clips])
        self.widths = {}  # of pooled prompts; a missing encoder has what the others leave
        rest = self.transformer.config.pooled_projection_dim
        rest -= sum(modules[name].config.projection_dim for name in self.clips)
        for name in CLIPS:
            if name in modules:
                self.widths[name] = modules[name].config.projection_dim
            else:
                self.widths[name], rest = rest, 0
        self.layout = sd3_layout({name: modules[name] for name in modules if name != "vae"})
        self.joint_attention = install_joint_attention(self.transformer)
        # for --compile; diffusers 0.42 names the blocks for placement alone
        self.transformer._repeated_blocks = list(self.transformer._no_split_modules)
        self.skip_layers = SkipLayers()
        # sides of images, in pixels
        self.largest = PATCH * self.transformer.config.pos_embed_max_size * self.factor

    def schedule_at(self, height: int, width: int) -> Schedule:
        """The pipelines leave the steps of a sampler to diffusers' scheduler."""
        schedule = super().schedule_at(height, width)
        return with_scheduler_steps(schedule, dynamic=self.has_dynamic_shift)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of each encoder, and the position of the first end-of-text token for CLIP.

        The positions are found on the CPU, so that nothing waits for the device.
        """
        tokens = {}
        for name, tokenizer in self.tokenizers.items():
            length = self.length if name == T5 else read_prompt_length(tokenizer)
            ids = tokenize_prompts(tokenizer, prompts, length, self.checked_prompts[name])
            tokens[name] = ids.to(self.device)
            if name != T5:
                tokens[f"{name}.end"] = first_eos(ids, tokenizer.eos_token_id).to(self.device)
        return tokens

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """CLIP's second last hidden states side by side, then T5's last one: [b, 77 + length, d].

        The pooled prompts of CLIP-L and CLIP-G lie side by side, too; they are the projected last
        states at the first end-of-text token. clip_skip k takes the hidden states k layers earlier.
        diffusers pools at the largest token id where eos_token_id is 2, which would be a learned
        token. A missing encoder gives zeros; a missing T5 gives as many as it would have tokens.
        """
        count = len(next(iter(tokens.values())))
        config = self.transformer.config
        states, pooled = self._encode_clip(tokens, count)
        states = F.pad(states, (0, config.joint_attention_dim - states.shape[-1]))
        if T5 in tokens:
            words = self.modules[T5](tokens[T5]).last_hidden_state
        else:
            words = states.new_zeros(count, self.length, config.joint_attention_dim)
        embeds = torch.cat([states.to(words), words], dim=1)
        has_prompt = torch.ones(count, device=embeds.device)
        return Conditioning(embeds, {"pooled_prompt_embeds": pooled, "has_prompt": has_prompt})

    def _encode_clip(self, tokens: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """([b, 77, d_L + d_G] hidden states, [b, d_L + d_G] pooled prompts)."""
        length = tokens[self.clips[0]].shape[1] if self.clips else CLIP_LENGTH
        states, pooled = [], []
        for name, width in self.widths.items():
            if name not in tokens:
                zeros = torch.zeros(count, length, width, dtype=self.dtype, device=self.device)
                states.append(zeros)
                pooled.append(zeros[:, 0])
                continue
            encoder: Any = self.modules[name]
            out = encoder(tokens[name], output_hidden_states=True)
            states.append(out.hidden_states[-(self.clip_skip + 2)])
            end = tokens[f"{name}.end"]
            last = out.last_hidden_state[torch.arange(count, device=end.device), end]
            pooled.append(encoder.text_projection(last))
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)

    def set_skip_layers(self, skip: SkipLayers) -> None:
        """Have this skip-layer guidance from now on."""
        self.skip_layers = skip

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        cond = self.encode_prompts(prompts)
        return cond.with_extra(has_prompt=torch.zeros_like(cond.extra["has_prompt"]))

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Conditioning,
        inpaint: Tensor | None = None,
        maps: list[AttentionMap] | None = None,
    ) -> Tensor:
        """The velocity eps - x0, of prompts with skip-layer guidance where it is set."""
        refuse_masks(inpaint)
        height, width = x_t.shape[-2:]
        if max(height, width) * self.factor > self.largest:
            raise UserError(
                f"{width * self.factor} x {height * self.factor} pixels: the position table of "
                f"this model ends at {self.largest}; take smaller images"
            )
        with keep_maps(self.joint_attention, (height // PATCH, width // PATCH), maps):
            out = self._call(x_t, level, cond)
        if self.skip_layers.act_at(level):
            rows = cond.extra["has_prompt"] > 0
            own = NoiseLevel(*(values[rows] for values in level))
            without = self._call(x_t[rows], own, cond.rows(rows), list(self.skip_layers.blocks))
            out[rows] += self.skip_layers.weight * (out[rows] - without)
        return out

    def _call(
        self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, skipped: list[int] | None = None
    ) -> Tensor:
        out = self.transformer(
            hidden_states=x_t.to(self.dtype),
            timestep=level.t * TIMESTEPS,
            encoder_hidden_states=cond.prompt_embeds.to(self.dtype),
            pooled_projections=cond.extra["pooled_prompt_embeds"].to(self.dtype),
            skip_layers=skipped,
        ).sample
        return out.to(torch.promote_types(out.dtype, torch.float32))


# ---------------------------------------------------------------- loading


def load(path: str, how: LoadOptions) -> StableDiffusion3:
    """The model in a folder or on the hub, in the diffusers layout.

    Raises UserError, before any weight is read, for settings without effect on it, for a
    transformer with further input channels, and for text encoders that do not fit it.
    """
    if how.max_token_length:
        raise UserError(
            f"--max-token-length has no effect: the text encoders of {path} read one chunk of 77 "
            "tokens, and T5 --max-sequence-length tokens; leave it out"
        )
    scheduler = read_flow_scheduler(path, how.scheduler)
    texts = listed_encoders(path)
    prompt_length(how.max_sequence_length, T5_LENGTH)
    tokenizers = open_tokenizers(path, how, {name: TOKENIZERS[name] for name in texts})
    networks = {"transformer": SD3Transformer2DModel, **texts}
    modules = load_parts(path, how, networks, AutoencoderKL)
    family = StableDiffusion3(modules, tokenizers, scheduler, how)
    family.pipeline = read_json(path, "model_index.json")["_class_name"]
    return family


def listed_encoders(path: str) -> dict[str, Any]:
    """The classes of the text encoders that model_index.json lists.

    Raises UserError where there is none, or where they do not fit the transformer, which may not
    read a mask or a control image either.
    """
    index = read_json(path, "model_index.json")
    found = {name: kind for name, kind in TEXTS.items() if (index.get(name) or [None])[-1]}
    if not found:
        raise UserError(
            f"model_index.json of {path} lists no text encoder; it needs one of {', '.join(TEXTS)}"
        )
    config = read_json(path, TRANSFORMER_CONFIG)
    channels = read_json(path, "vae/config.json").get("latent_channels", 4)
    check_channels(config.get("in_channels", 16), channels)
    sizes = {}
    for name, kind in found.items():
        sizes[name] = read_encoder_config(path, name, kind.config_class)
    if all(name in sizes for name in CLIPS):
        pooled = sum(sizes[name].projection_dim for name in CLIPS)
        check_fit(path, config, {"pooled_projection_dim": pooled}, " and ".join(CLIPS))
    if T5 in sizes:
        check_fit(path, config, {"joint_attention_dim": sizes[T5].d_model}, T5)
    return found


def read_sd3_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    networks = {"transformer": SD3Transformer2DModel, **listed_encoders(path)}
    return sd3_layout(read_networks(path, networks))


FAMILY = FamilyFunctions(load, read_sd3_layout, read_flow_schedule)


# ---------------------------------------------------------------- names


def sd3_layout(modules: Mapping[str, nn.Module]) -> Layout:
    """Names and presets of a model of Stable Diffusion 3 or 3.5.

    T5 is included for its token rows and for reading files; it is never adapted.
    """
    config: Any = modules["transformer"].config
    version = "medium"
    if config.qk_norm:
        version = "5-medium" if config.dual_attention_layers else "5-large"
    plain = layout_of(
        modules,
        family="sd3",
        base_model_version=version,  # as kohya's sd3_train_network.py
        presets={name: presets for name, presets in PRESETS.items() if name in modules},
        encoders={name: ENCODERS[name] for name in modules if name in ENCODERS},
        architecture=f"stable-diffusion-3-{version}/lora",
    )
    network = plain.components["transformer"]
    named = replace(network, **original_sd3_names(network.modules))
    return replace(
        plain,
        components={**plain.components, "transformer": named},
        network_module="networks.lora_sd3",
    )
