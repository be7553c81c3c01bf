"""Flux.1 dev and schnell: a transformer on packed latents, VAE, CLIP-L and T5.

The models are rectified flows. CLIP-L gives one pooled vector, T5 the prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion import noise
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.diffusion.sampling import Spacing
from lora_core.errors import UserError
from lora_core.family import Conditioning, FamilyFunctions, LoadOptions, Sizes
from lora_core.formats.layout import Layout, layout_of
from lora_core.tokens import first_eos
from models import sd
from models.components import (
    check_tokenizers,
    config_errors,
    decode_latents,
    encode_pixels,
    freeze_network,
    load_network,
    open_tokenizer,
    read_encoder_config,
    read_json,
    read_prompt_length,
    read_resolution,
    tokenize_prompts,
)
from models.flux_attention import install_joint_attention, keep_maps
from models.flux_names import original_flux_names

PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
# Components that adapter files may name.
ADAPTABLE = ("transformer", "text_encoder", "text_encoder_2")
PATCH = 2  # latent pixels per token, in height and in width
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
SHIFTS = (  # keys of scheduler_config.json that are read
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)
OTHER_STEPS = (  # keys that are refused
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
# Tokens of a T5 prompt, with and without a guidance embedding (dev and schnell).
LENGTHS = {True: 512, False: 256}
LONGEST = 512  # the pipelines' limit


class Flux:
    """The `Family` of Flux.1.

    The VAE stays in fp32 or better; transformer and text encoders are in the base precision.
    """

    name = "flux"
    denoiser = "transformer"
    attended: tuple[str, ...] = ("text_encoder_2",)
    prediction = "flow"
    inpainting = False
    embeds_sizes = False
    spacing: Spacing = "trailing"  # unused: a flow has one layout of its timesteps
    offset = 0  # unused
    working_device: torch.device | None = None  # of networks that come there to work

    def __init__(
        self,
        modules: dict[str, Any],
        tokenizers: dict[str, Any],
        scheduler: dict[str, Any],
        length: int,
    ):
        self.modules: dict[str, nn.Module] = modules
        self.tokenizers = tokenizers
        self.scheduler = scheduler
        self.length = length
        self.transformer = modules["transformer"]
        self.vae = modules["vae"]
        self.clip = modules["text_encoder"]
        self.t5 = modules["text_encoder_2"]
        self.pipeline = PIPELINES[0]
        self.checked_prompts = {name: set[str]() for name in tokenizers}
        self.schedule = flux_schedule(scheduler)
        self.distilled_guidance = bool(self.transformer.config.guidance_embeds)
        self.zeros: tuple[str, ...] = ()
        self.latent_channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.multiple = PATCH * self.factor
        self.resolution = read_resolution(self.vae.config.sample_size)
        check_tokenizers(self.tokenizers, self.modules)
        check_channels(self.transformer.config.in_channels, self.latent_channels)
        self.layout = flux_layout({name: modules[name] for name in ADAPTABLE})
        self.joint_attention = install_joint_attention(self.transformer)
        for module in modules.values():
            freeze_network(module)

    @property
    def device(self) -> torch.device:
        # diffusers' own property looks at every module
        return self.working_device or self.transformer.x_embedder.weight.device

    def schedule_at(self, height: int, width: int) -> Schedule:
        return flux_schedule(self.scheduler, (height // PATCH) * (width // PATCH))

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return encode_pixels(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.vae, latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(self.tokenize(prompts))

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

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode_prompts(prompts)

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        """The conditioning with the guidance scale [b] fp32, if the transformer takes one."""
        if not self.distilled_guidance:
            return cond
        embeds = cond.prompt_embeds
        scales = torch.full((len(embeds),), guidance, dtype=torch.float32, device=embeds.device)
        return cond.with_extra(guidance=scales)

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
        if inpaint is not None:
            raise UserError(
                "this model takes no mask and no masked image; "
                "leave them out or choose an inpainting model"
            )
        dtype = self.transformer.x_embedder.weight.dtype
        height, width = x_t.shape[-2:]
        grid = height // PATCH, width // PATCH
        with keep_maps(self.joint_attention, grid, maps):
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


# ---------------------------------------------------------------- packed latents


def pack_latents(latents: Tensor) -> Tensor:
    """Image tokens [b, (h / 2) (w / 2), 4 c] of latents [b, c, h, w].

    One token for each 2 x 2 patch, channels outermost.
    """
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents [b, c, height, width]; the inverse of `pack_latents`."""
    return rearrange(
        tokens,
        "b (h w) (c ph pw) -> b c (h ph) (w pw)",
        h=height // PATCH,
        w=width // PATCH,
        ph=PATCH,
        pw=PATCH,
    )


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
    scheduler = _read_scheduler(path, how.scheduler)
    config = read_json(path, "transformer/config.json")
    latent_channels = read_json(path, "vae/config.json").get("latent_channels", 4)
    check_channels(config.get("in_channels", 64), latent_channels)
    length = _prompt_length(how.max_sequence_length, bool(config.get("guidance_embeds")))
    tokenizers = {
        "text_encoder": open_tokenizer(CLIPTokenizer, path, "tokenizer", how.device),
        "text_encoder_2": open_tokenizer(T5TokenizerFast, path, "tokenizer_2", how.device),
    }
    classes = {
        "transformer": FluxTransformer2DModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    modules = {}
    for name, kind in classes.items():
        modules[name] = load_network(kind, path, name, how.dtype, how.device)
    vae_folder = "" if how.vae else "vae"
    modules["vae"] = load_network(
        AutoencoderKL, how.vae or path, vae_folder, how.vae_precision, how.device
    )
    family = Flux(modules, tokenizers, scheduler, length)
    family.pipeline = read_json(path, "model_index.json")["_class_name"]
    return family


def read_flux_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    with torch.device("meta"), config_errors(path):
        transformer = FluxTransformer2DModel.from_config(read_json(path, "transformer/config.json"))
        clip = CLIPTextModel(read_encoder_config(path, "text_encoder", CLIPTextConfig))
        t5 = T5EncoderModel(read_encoder_config(path, "text_encoder_2", T5Config))
    return flux_layout(dict(zip(ADAPTABLE, (transformer, clip, t5))))


def read_flux_schedule(
    path: str, changes: Mapping[str, Any], resolution: int
) -> tuple[Schedule, str]:
    """(noise schedule, prediction type) of the model at `path`, from its configs.

    With a `resolution` (pixels), the schedule has the shift for it.
    """
    levels = len(read_json(path, "vae/config.json")["block_out_channels"])
    side = resolution // (PATCH * 2 ** (levels - 1))
    return flux_schedule(_read_scheduler(path, changes), side * side), "flow"


FAMILY = FamilyFunctions(load, read_flux_layout, read_flux_schedule)


def flux_schedule(scheduler: dict[str, Any], tokens: int = 0) -> Schedule:
    """The rectified-flow schedule of a scheduler_config.json.

    With use_dynamic_shifting its shift grows with the number of tokens (0: no shift), else it is
    constant.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return noise.flow_schedule(shift=scheduler.get("shift", 1.0))
    if not tokens:
        return noise.flow_schedule()
    keys = {  # argument of resolution_shift -> diffusers' key
        "base_tokens": "base_image_seq_len",
        "max_tokens": "max_image_seq_len",
        "base": "base_shift",
        "max": "max_shift",
    }
    given = {name: scheduler[key] for name, key in keys.items() if key in scheduler}
    return noise.flow_schedule(shift=noise.resolution_shift(tokens, **given))


def check_channels(takes: int, latent_channels: int) -> None:
    """Raises UserError for a transformer with more input channels than packed latents.

    Flux Fill, Depth and Canny have such transformers.
    """
    expected = PATCH * PATCH * latent_channels
    if takes != expected:
        raise UserError(
            f"the transformer takes {takes} channels, expected {expected}; "
            "models that read a mask or a control image are not supported"
        )


def _read_scheduler(path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json with changes.

    Raises UserError for a change without effect on a flow, and for a spacing of sigmas that is not
    supported.
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


def _prompt_length(length: int, guidance: bool) -> int:
    """The number of tokens of a T5 prompt; a `length` of 0 gives the model's own."""
    if not 0 <= length <= LONGEST:
        raise UserError(
            f"--max-sequence-length is {length}; expected 1 to {LONGEST} tokens, or 0 for the "
            f"model's own {LENGTHS[guidance]}"
        )
    return length or LENGTHS[guidance]


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
