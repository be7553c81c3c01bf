"""Flux.1 dev and schnell: FluxTransformer2DModel on packed latents, AutoencoderKL, CLIP-L for one
pooled vector, T5 for the rest; rectified flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.utils import logging

from lora_core.diffusion import noise
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.diffusion.sampling import Spacing
from lora_core.errors import UserError
from lora_core.family import (
    Conditioning,
    LoadOptions,
    Sizes,
    decode_latents,
    encode_pixels,
    load_network,
    load_part,
    read_encoder_config,
    read_json,
    tokenize_prompts,
)
from lora_core.formats.layout import Layout, layout_of
from lora_core.tokens import first_eos
from models import sd

logging.disable_progress_bar()

PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
ADAPTABLE = ("transformer", "text_encoder", "text_encoder_2")  # what files may name
PATCH = 2  # latents for one token, each way
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
PRESETS = {  # component -> preset -> globs; the counts are those of 19 double and 38 single blocks
    "transformer": {
        "attention": ATTENTION,  # 190, four names
        "fal": (*ATTENTION, *ADDED, *FEED_FORWARD),  # 342, diffusers' scripts
        "ostris": (
            *ATTENTION,
            *ADDED,
            *FEED_FORWARD,
            "norm1.linear",
            "norm1_context.linear",
            "norm.linear",
            "proj_mlp",
            "proj_out",
        ),  # 495
        "kohya": (
            "transformer_blocks.*",
            "single_transformer_blocks.*",
        ),  # 494, which are 304 of the original code's
        "all-linear": ("*",),
    },
    "text_encoder": sd.PRESETS["text_encoder"],
}
SHIFTS = (
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)  # what is read of a scheduler
OTHER_STEPS = (
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
LENGTHS = {
    True: 512,
    False: 256,
}  # tokens of a T5 prompt, with and without a guidance embedding (dev and schnell)
LONGEST = 512  # what the pipelines allow

NAMES = {  # our path -> the original code's, in which kohya's files speak
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    **{
        f"time_text_embed.{ours}_embedder.linear_{i}": f"{theirs}.{layer}_layer"
        for ours, theirs in (
            ("timestep", "time_in"),
            ("guidance", "guidance_in"),
            ("text", "vector_in"),
        )
        for i, layer in ((1, "in"), (2, "out"))
    },
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SWAPPED = frozenset({"norm_out.linear"})  # scale and shift here, shift and scale there
DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
QKV, ADDED_QKV = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
BLOCKS: dict[
    str, tuple[str, dict[str, str], dict[str, tuple[str, ...]]]
] = {  # our blocks -> theirs, names within, layers they compute in one
    "transformer_blocks": (
        "double_blocks",
        DOUBLE,
        {"img_attn.qkv": QKV, "txt_attn.qkv": ADDED_QKV},
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {"proj_out": "linear2", "norm.linear": "modulation.lin"},
        {"linear1": (*QKV, "proj_mlp")},
    ),
}


class Flux:
    """See lora_core.family.Family. The VAE stays in fp32 or better; transformer and text encoders
    take the base precision.
    """

    name = "flux"
    denoiser = "transformer"
    prediction = "flow"
    inpainting = False
    spacing: Spacing = (
        "trailing"  # a flow has one layout of its steps; spacing and offset say nothing
    )
    offset = 0

    def __init__(
        self,
        modules: dict[str, Any],
        tokenizers: dict[str, Any],
        scheduler: dict[str, Any],
        length: int,
    ):
        self.modules: dict[str, nn.Module] = modules
        self.tokenizers, self.scheduler, self.length = tokenizers, scheduler, length
        self.transformer, self.vae, self.clip, self.t5 = (
            modules[name] for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
        )
        self.pipeline, self.said = PIPELINES[0], {name: set[str]() for name in tokenizers}
        self.schedule = flux_schedule(scheduler)
        self.distilled_guidance = bool(self.transformer.config.guidance_embeds)
        self.zeros: tuple[str, ...] = ()
        self.latent_channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.multiple = PATCH * self.factor
        self.resolution = self.vae.config.sample_size
        check_channels(self.transformer.config.in_channels, self.latent_channels)
        self.layout = flux_layout({name: modules[name] for name in ADAPTABLE})
        for module in modules.values():
            module.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return (
            self.transformer.x_embedder.weight.device
        )  # diffusers' own property looks at every module

    def schedule_at(self, height: int, width: int) -> Schedule:
        return flux_schedule(self.scheduler, (height // PATCH) * (width // PATCH))

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return encode_pixels(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.vae, latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Ids for CLIP and T5, and the place of the first end-of-text token of CLIP's, looked for
        on the CPU.
        """
        tokenizer = self.tokenizers["text_encoder"]
        ids = tokenize_prompts(
            tokenizer, prompts, tokenizer.model_max_length, self.said["text_encoder"]
        )
        t5 = tokenize_prompts(
            self.tokenizers["text_encoder_2"], prompts, self.length, self.said["text_encoder_2"]
        )
        end = first_eos(ids, tokenizer.eos_token_id)
        return {
            "clip": ids.to(self.clip.device),
            "end": end.to(self.clip.device),
            "t5": t5.to(self.t5.device),
        }

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """T5's last hidden state [b, length, d], padding included and unmasked, and CLIP's vector
        at the first end-of-text token.

        transformers' pooler looks for the largest id where a config says eos_token_id 2, and finds
        a learned token there. Every encoder reads the same string; one that has not learned the
        tokens reads their names as plain text, as in diffusers.
        """
        hidden, end = self.clip(tokens["clip"]).last_hidden_state, tokens["end"]
        pooled = hidden[torch.arange(len(end), device=end.device), end]
        return Conditioning(
            self.t5(tokens["t5"]).last_hidden_state, {"pooled_prompt_embeds": pooled}
        )

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode_prompts(prompts)

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        """With the guidance scale [b] fp32 where the transformer is told one."""
        if not self.distilled_guidance:
            return cond
        embeds = cond.prompt_embeds
        return cond.with_extra(
            guidance=torch.full((len(embeds),), guidance, dtype=torch.float32, device=embeds.device)
        )

    def denoise(
        self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None
    ) -> Tensor:
        """The velocity eps - x0. The network gets sigma, which it multiplies by 1000, and guidance
        in fp32, and rounds both to its own dtype.
        """
        if inpaint is not None:
            raise UserError(
                "this model takes no mask and no masked image; "
                "leave them out or choose an inpainting model"
            )
        dtype, (height, width) = self.transformer.x_embedder.weight.dtype, x_t.shape[-2:]
        out = self.transformer(
            hidden_states=pack_latents(x_t).to(dtype),
            timestep=level.t,
            guidance=cond.extra["guidance"] if self.distilled_guidance else None,
            pooled_projections=cond.extra["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            img_ids=image_position_ids(height, width, x_t.device),
            txt_ids=torch.zeros(cond.prompt_embeds.shape[1], 3, device=x_t.device),
        ).sample
        return unpack_latents(out, height, width).to(torch.promote_types(out.dtype, torch.float32))

    def attention_maps(
        self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None
    ) -> list[Tensor]:
        """softmax(q k^T / sqrt(d)) of the double blocks over all keys, text and image, of which the
        text's columns are returned: rows sum to less than 1. One map [b, heads, tokens, s] a block,
        token (row, column) = one 2 x 2 patch of latents.

        q and k are the outputs of the norms; image tokens are then rotated by their place, text
        tokens have place 0 and are not.
        """
        layers = {
            name: m for name, m in self.transformer.named_modules() if hasattr(m, "norm_added_k")
        }
        seen: dict[tuple[str, str], Tensor] = {}
        hooks = [
            getattr(m, which).register_forward_hook(
                lambda _m, _i, out, key=(name, which): seen.__setitem__(key, out)
            )
            for name, m in layers.items()
            for which in ("norm_q", "norm_k", "norm_added_k")
        ]
        try:
            self.denoise(x_t, level, cond, inpaint)
        finally:
            for hook in hooks:
                hook.remove()
        cos, sin = self.transformer.pos_embed(
            image_position_ids(x_t.shape[-2], x_t.shape[-1], x_t.device)
        )  # [tokens, d]
        maps = []
        for name in layers:
            q, k, text = (
                seen[name, which].transpose(1, 2).float()
                for which in ("norm_q", "norm_k", "norm_added_k")
            )  # [b, heads, s, d]
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
            scores = q @ torch.cat([text, k], dim=2).transpose(-1, -2) * q.shape[-1] ** -0.5
            maps.append(scores.softmax(-1)[..., : text.shape[2]])
        return maps


# ---------------------------------------------------------------- packed latents


def pack_latents(latents: Tensor) -> Tensor:
    """Tokens [b, (h / 2) (w / 2), 4 c] of latents [b, c, h, w]: one for each 2 x 2 patch, channels
    outermost.
    """
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents [b, c, height, width]; undoes `pack`."""
    return rearrange(
        tokens,
        "b (h w) (c ph pw) -> b c (h ph) (w pw)",
        h=height // PATCH,
        w=width // PATCH,
        ph=PATCH,
        pw=PATCH,
    )


def image_position_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(0, row, column) of every token of latents [b, c, height, width]: [(h / 2) (w / 2), 3] fp32."""
    return torch.cartesian_prod(
        *(
            torch.arange(n, dtype=torch.float32, device=device)
            for n in (1, height // PATCH, width // PATCH)
        )
    )


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864 eq. 34) of x [b, heads, s, d]: each pair of neighbours
    turns by its angle, cos and sin [s, d].
    """
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


# ---------------------------------------------------------------- loading


def load(path: str, how: LoadOptions) -> Flux:
    """The model in a folder or on the hub, in the diffusers layout.

    Raises UserError, before any weight is read, for settings that mean nothing to a flow or to a
    pooled vector, and for a transformer with further input channels; then for a missing or broken
    part.
    """
    if how.clip_skip:
        raise UserError(
            f"--clip-skip has no effect: of the CLIP text encoder of {path} only the pooled vector "
            "is used; leave it out"
        )
    scheduler = _scheduler(path, how.scheduler)
    config = read_json(path, "transformer/config.json")
    check_channels(
        config.get("in_channels", 64), read_json(path, "vae/config.json").get("latent_channels", 4)
    )
    length = _length(how.max_sequence_length, bool(config.get("guidance_embeds")))
    tokenizers = {
        "text_encoder": load_part(CLIPTokenizer.from_pretrained, path, "tokenizer"),
        "text_encoder_2": load_part(T5TokenizerFast.from_pretrained, path, "tokenizer_2"),
    }
    modules = {
        "transformer": load_network(
            FluxTransformer2DModel, path, "transformer", how.dtype, how.device
        ),
        "text_encoder": load_network(CLIPTextModel, path, "text_encoder", how.dtype, how.device),
        "text_encoder_2": load_network(
            T5EncoderModel, path, "text_encoder_2", how.dtype, how.device
        ),
        "vae": load_network(
            AutoencoderKL, how.vae or path, "" if how.vae else "vae", how.exact, how.device
        ),
    }
    family = Flux(modules, tokenizers, scheduler, length)
    family.pipeline = read_json(path, "model_index.json")["_class_name"]
    return family


def read_flux_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(read_json(path, "transformer/config.json"))
        clip = CLIPTextModel(read_encoder_config(path, "text_encoder", CLIPTextConfig))
        t5 = T5EncoderModel(read_encoder_config(path, "text_encoder_2", T5Config))
    return flux_layout(dict(zip(ADAPTABLE, (transformer, clip, t5))))


def read_flux_schedule(
    path: str, changes: Mapping[str, Any], resolution: int
) -> tuple[Schedule, str]:
    """(schedule, row of PREDICTIONS) of the model at `path`, from its configs; with a resolution
    (pixels) in the shift for it.
    """
    side = resolution // (
        PATCH * 2 ** (len(read_json(path, "vae/config.json")["block_out_channels"]) - 1)
    )
    return flux_schedule(_scheduler(path, changes), side * side), "flow"


def flux_schedule(scheduler: dict[str, Any], tokens: int = 0) -> Schedule:
    """The flow of a scheduler_config.json. With use_dynamic_shifting its shift grows with the
    number of tokens (0: no shift), else it is constant.
    """
    c = scheduler
    if not c.get("use_dynamic_shifting"):
        return noise.flow_schedule(shift=c.get("shift", 1.0))
    if not tokens:
        return noise.flow_schedule()
    law = dict(
        base_tokens="base_image_seq_len",
        max_tokens="max_image_seq_len",
        base="base_shift",
        max="max_shift",
    )  # ours -> diffusers' key
    return noise.flow_schedule(
        shift=noise.resolution_shift(
            tokens, **{ours: c[key] for ours, key in law.items() if key in c}
        )
    )


def check_channels(takes: int, latent_channels: int) -> None:
    """Raises UserError for a transformer that reads more than packed latents, as those of Fill,
    Depth and Canny do.
    """
    expected = PATCH * PATCH * latent_channels
    if takes != expected:
        raise UserError(
            f"the transformer takes {takes} channels, expected {expected}; "
            "models that read a mask or a control image are not supported"
        )


def _scheduler(path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json with changes. Raises UserError for a change that a flow has no use for,
    and for a layout of levels that is not read.
    """
    for key in changes:
        if key not in SHIFTS:
            raise UserError(
                f"{key} has no effect on {path}, which is a flow; it can change {', '.join(SHIFTS)}"
            )
    scheduler = {**read_json(path, "scheduler/scheduler_config.json"), **changes}
    for key in OTHER_STEPS:
        if scheduler.get(key):
            raise UserError(
                f"the scheduler_config.json of {path} has {key} = {scheduler[key]}, which is not "
                "supported; expected a shifted flow"
            )
    if scheduler.get("time_shift_type", "exponential") != "exponential":
        raise UserError(
            f"the scheduler_config.json of {path} has time_shift_type "
            f"{scheduler['time_shift_type']}; expected exponential"
        )
    return scheduler


def _length(asked: int, guidance: bool) -> int:
    if not 0 <= asked <= LONGEST:
        raise UserError(
            f"--max-sequence-length is {asked}; expected 1 to {LONGEST} tokens, or 0 for the "
            f"model's own {LENGTHS[guidance]}"
        )
    return asked or LENGTHS[guidance]


# ---------------------------------------------------------------- names


def flux_layout(modules: Mapping[str, nn.Module]) -> Layout:
    """Names and presets; the T5 is in it for its token rows and for reading, nothing of it is
    adapted.
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
    components = {
        **plain.components,
        "transformer": replace(network, **_original(network.shapes), swapped=SWAPPED),
    }
    return replace(plain, components=components, network_module="networks.lora_flux")


def _original(paths: Iterable[str]) -> dict[str, Any]:
    """The names and fused layers of the original code for the transformer's paths."""
    names, fused = {}, {}
    for path in paths:
        kind, _, rest = path.partition(".")
        index, _, inner = rest.partition(".")
        if kind not in BLOCKS:
            names[path] = NAMES[path]
            continue
        original, plain, stacks = BLOCKS[kind]
        if inner in plain:
            names[path] = f"{original}.{index}.{plain[inner]}"
        for name, parts in stacks.items():
            fused[f"{original}.{index}.{name}"] = tuple(f"{kind}.{index}.{part}" for part in parts)
    return {"names": names, "fused": fused}
