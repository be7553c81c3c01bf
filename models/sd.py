"""Stable Diffusion 1.x and 2.x: UNet, VAE and one CLIP text encoder.

Networks that predict epsilon or v, with 4 or 9 (inpainting) input channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_core.cross_attention import AttentionMap, CrossAttention, cross_attention_paths
from lora_core.diffusion import noise
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.diffusion.prediction import prediction_from_config
from lora_core.errors import UserError
from lora_core.family import Conditioning, FamilyFunctions, LoadOptions, Sizes
from lora_core.formats.compvis import unet_module_names
from lora_core.formats.layer_numbering import NUMBERINGS
from lora_core.formats.layout import Layout, layout_of
from lora_core.prompt_weights import WeightedPrompt
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
    read_resolution,
    tokenize_prompts,
)
from models.prompt_chunks import (
    CHUNK,
    check_token_length,
    join_chunks,
    long_prompt_length,
    split_chunks,
)
from models.weighted_prompts import emphasize_states, split_weights, tokenize_weighted

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
ATTENTION = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")
RESNETS = ("*.resnets.*.conv1", "*.resnets.*.conv2", "*.resnets.*.time_emb_proj")
FEED_FORWARD = ("*.ff.net.0.proj", "*.ff.net.2")
PROJECTIONS = ("*.attentions.*.proj_in", "*.attentions.*.proj_out")
TRANSFORMER = (*ATTENTION, *FEED_FORWARD, *PROJECTIONS)
PRESETS = {  # component -> preset -> globs; the counts are SD 1.5's
    "unet": {
        "attention": ATTENTION,  # 128 modules, diffusers' scripts
        "cloneofsimo": (*ATTENTION, "*.ff.net.0.proj"),  # 144, lora_pti
        # lora_pti --use_extended_lora with ResnetBlock2D among the classes
        "extended": (*ATTENTION, "*.ff.net.0.proj", *RESNETS, "*.conv_shortcut"),
        "kohya": TRANSFORMER,  # 192, networks.lora
        "all": (*TRANSFORMER, *RESNETS, "*.conv_shortcut"),
    },
    "text_encoder": {
        "attention": ("*.self_attn.*_proj",),  # 48
        "kohya": ("*.self_attn.*_proj", "*.mlp.fc?"),  # 72
        "all-linear": ("*.self_attn.*_proj", "*.mlp.fc?"),
    },
}
DENOISER_PRESETS = (*PRESETS["unet"], "all-linear")  # their names


class StableDiffusion:
    """The `Family` of Stable Diffusion 1.x and 2.x.

    The VAE stays in fp32 (its fp16 overflows on some images); UNet and text encoder are in the base
    precision.
    """

    name = "sd"
    denoiser = "unet"
    attended: tuple[str, ...] = ("text_encoder",)
    distilled_guidance = False
    embeds_sizes = False
    zeros: tuple[str, ...] = ()
    reads_weights = True  # of WeightedPrompts
    working_device: torch.device | None = None  # of networks that come there to work

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: dict[str, Any],
    ):
        self.modules: dict[str, nn.Module] = {
            "unet": unet,
            "text_encoder": text_encoder,
            "vae": vae,
        }
        self.tokenizers = {"text_encoder": tokenizer}
        self.pipeline = PIPELINES[0]
        self.clip_skip = 0
        self.max_token_length = CHUNK
        self.checked_prompts: set[str] = set()
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.schedule = noise.vp_schedule_from_config(scheduler)
        self.prediction = prediction_from_config(scheduler)
        self.latent_channels = vae.config.latent_channels
        self.spacing = scheduler.get("timestep_spacing", "leading")
        self.offset = scheduler.get("steps_offset", 0)
        self.factor = self.multiple = 2 ** (len(vae.config.block_out_channels) - 1)
        self.resolution = read_resolution(unet.config.sample_size, self.factor)
        check_tokenizers(self.tokenizers, self.modules)
        self.inpainting = is_inpainting_unet(unet, self.latent_channels)
        self.layout = sd_layout(unet, text_encoder, scheduler)
        self.cross_attention = CrossAttention(unet, self.layout.cross_attention)
        for module in self.modules.values():
            freeze_network(module)

    @property
    def device(self) -> torch.device:
        # diffusers' own property looks at every module
        return self.working_device or self.unet.conv_in.weight.device

    def schedule_at(self, height: int, width: int) -> Schedule:
        return self.schedule

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return encode_pixels(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.vae, latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        ids, weights = self.tokenize_for(self.tokenizer, prompts)
        tokens = {"ids": ids} if weights is None else {"ids": ids, "weights": weights}
        return {name: values.to(self.device) for name, values in tokens.items()}

    def tokenize_for(self, tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Token ids [b, s], and the weights [b, s] of WeightedPrompts."""
        length = long_prompt_length(tokenizer, self.max_token_length)
        if any(isinstance(prompt, WeightedPrompt) for prompt in prompts):
            return tokenize_weighted(tokenizer, prompts, length, self.checked_prompts)
        return tokenize_prompts(tokenizer, prompts, length, self.checked_prompts), None

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """Last hidden state after the final norm, as in every SD pipeline at inference.

        Padded to the tokenizer's length, BOS and EOS included. clip_skip k takes the state k layers
        earlier, through the same final norm. Long prompts are encoded in chunks.
        """
        ids = tokens["ids"]
        if self.max_token_length > CHUNK:
            ids = split_chunks(ids, self.tokenizer)
        if not self.clip_skip:
            states = self.text_encoder(ids).last_hidden_state
        else:
            every = self.text_encoder(ids, output_hidden_states=True).hidden_states
            states = final_norm(self.text_encoder)(every[-(self.clip_skip + 1)])
        if "weights" in tokens:
            states = emphasize_states(states, split_weights(tokens["weights"], self.tokenizer))
        if self.max_token_length > CHUNK:
            states = join_chunks(states, len(tokens["ids"]))
        return Conditioning(states)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode_prompts(prompts)

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        return cond

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Conditioning,
        inpaint: Tensor | None = None,
        maps: list[AttentionMap] | None = None,
    ) -> Tensor:
        if (inpaint is not None) != self.inpainting:
            raise UserError(
                "an inpainting UNet needs a mask and a masked image, and only such a UNet takes "
                "them"
            )
        x = x_t if inpaint is None else torch.cat([x_t, inpaint.to(x_t)], dim=1)
        dtype = self.unet.conv_in.weight.dtype
        attention: AbstractContextManager[None] = nullcontext()
        if cond.regions or maps is not None:
            size = x.shape[-2], x.shape[-1]
            attention = self.cross_attention.forward_pass(size, cond.regions, maps)
        with attention:
            out = self.unet(
                x.to(dtype),
                level.t,
                encoder_hidden_states=cond.prompt_embeds.to(dtype),
                added_cond_kwargs=cond.extra or None,
            ).sample
        return out.to(torch.promote_types(out.dtype, torch.float32))


def load(path: str, how: LoadOptions) -> StableDiffusion:
    """The model in a folder or on the hub, in the diffusers layout.

    Raises UserError for a missing or broken part.
    """
    if how.max_sequence_length:
        raise UserError(f"--max-sequence-length has no effect: {path} has no T5 text encoder")
    scheduler = read_json(path, "scheduler/scheduler_config.json") | how.scheduler
    tokenizer = open_tokenizer(CLIPTokenizer, path, "tokenizer", how.device)
    text_encoder = load_network(CLIPTextModel, path, "text_encoder", how.dtype, how.device)
    vae_folder = "" if how.vae else "vae"
    vae = load_network(AutoencoderKL, how.vae or path, vae_folder, how.vae_precision, how.device)
    unet = load_network(UNet2DConditionModel, path, "unet", how.dtype, how.device)
    family = StableDiffusion(unet, vae, text_encoder, tokenizer, scheduler)
    family.pipeline = read_json(path, "model_index.json")["_class_name"]
    family.clip_skip = check_clip_skip(how.clip_skip, [text_encoder])
    family.max_token_length = check_token_length(how.max_token_length)
    return family


def read_sd_layout(path: str) -> Layout:
    """The layout of the model at `path`, from its configs alone: no weight is read."""
    with torch.device("meta"), config_errors(path):
        unet = UNet2DConditionModel.from_config(read_json(path, "unet/config.json"))
        text_encoder = CLIPTextModel(read_encoder_config(path, "text_encoder", CLIPTextConfig))
    return sd_layout(unet, text_encoder, read_json(path, "scheduler/scheduler_config.json"))


def read_sd_schedule(
    path: str, changes: Mapping[str, Any], resolution: int
) -> tuple[Schedule, str]:
    """(noise schedule, prediction type) of the model at `path`.

    From its scheduler_config.json with some keys changed.
    """
    config = {**read_json(path, "scheduler/scheduler_config.json"), **changes}
    return noise.vp_schedule_from_config(config), prediction_from_config(config)


FAMILY = FamilyFunctions(load, read_sd_layout, read_sd_schedule)


def sd_layout(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, scheduler: dict[str, Any]
) -> Layout:
    """Names and presets of Stable Diffusion 1.x or 2.x (which has OpenCLIP's text encoder)."""
    is_sd2 = text_encoder.config.hidden_size == 1024
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    architecture = "stable-diffusion-v1/lora"
    if is_sd2:
        architecture = f"stable-diffusion-v2-{'768-v' if predicts_v else '512'}/lora"
    found = layout_of(
        {"unet": unet, "text_encoder": text_encoder},
        family="sd",
        base_model_version=("sd_v2" if is_sd2 else "sd_v1") + ("_v" if predicts_v else ""),
        presets=PRESETS | {"unet": unet_presets(unet)},
        architecture=architecture,
    )
    components = {
        name: replace(component, numbering=NUMBERINGS[name])
        for name, component in found.components.items()
    }
    components["unet"] = replace(
        components["unet"], blocks=block_indices(components["unet"].modules)
    )
    return replace(
        found,
        components=components,
        block_lists=(17, 26),
        cross_attention=cross_attention_paths(components["unet"].modules),
    )


def block_indices(paths: Iterable[str]) -> dict[str, int]:
    """Path of a layer or norm in one of the UNet's blocks -> its index into `block_weights.BLOCKS`.

    From 1 (conv_in) in the down blocks, 13 in the middle block, from 14 in the up blocks.
    """
    found = {}
    for path, name in unet_module_names(paths).items():
        kind, number, *_ = name.split(".")
        if kind == "input_blocks":
            found[path] = 1 + int(number)
        elif kind == "middle_block":
            found[path] = 13
        elif kind == "output_blocks":
            found[path] = 14 + int(number)
    return found


def unet_presets(unet: UNet2DConditionModel) -> dict[str, tuple[str, ...]]:
    """The UNet's presets, with all-linear.

    proj_in and proj_out of transformers are convolutions in 1.x and linear layers in later models.
    """
    around = PROJECTIONS if unet.config.use_linear_projection else ()
    embeddings = ("*.time_emb_proj", "*_embedding.linear_?")
    return {**PRESETS["unet"], "all-linear": (*ATTENTION, *FEED_FORWARD, *around, *embeddings)}


def is_inpainting_unet(unet: UNet2DConditionModel, latent_channels: int) -> bool:
    """Whether the UNet is for inpainting.

    Raises UserError for a number of input channels that is neither.
    """
    takes = unet.config.in_channels
    c = latent_channels
    if takes not in (c, 2 * c + 1):
        raise UserError(
            f"the UNet takes {takes} channels; expected {c}, or {2 * c + 1} for inpainting"
        )
    return takes != c


def final_norm(text_encoder: nn.Module) -> nn.Module:
    """The last layer norm of a CLIP text encoder.

    transformers 5 dropped the level that holds it.
    """
    inner: Any = getattr(text_encoder, "text_model", text_encoder)
    return inner.final_layer_norm


def check_clip_skip(clip_skip: int, encoders: Sequence[Any]) -> int:
    """clip_skip, checked against the number of layers of every encoder. Raises UserError."""
    layers = min(encoder.config.num_hidden_layers for encoder in encoders)
    if not 0 <= clip_skip < layers:
        raise UserError(
            f"--clip-skip is {clip_skip}; expected 0 to {layers - 1}, the text encoder has "
            f"{layers} layers"
        )
    return clip_skip
