"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel, AutoencoderKL, one CLIP text encoder; epsilon or v, 4 or 9 input channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from lora_core import noise
from lora_core.errors import UserError
from lora_core.formats.layout import layout_of
from lora_core.noise import NoiseLevel
from models.family import Conditioning, part, read_json

logging.disable_progress_bar()  # a bar for a file that loads in a blink

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
ATTENTION = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")
RESNETS = ("*.resnets.*.conv1", "*.resnets.*.conv2", "*.resnets.*.time_emb_proj")
TRANSFORMER = (*ATTENTION, "*.ff.net.0.proj", "*.ff.net.2", "*.attentions.*.proj_in", "*.attentions.*.proj_out")
PRESETS = {  # component -> preset -> globs; the counts are SD 1.5's
    "unet": {
        "attention": ATTENTION,  # 128 modules, diffusers' scripts
        "cloneofsimo": (*ATTENTION, "*.ff.net.0.proj"),  # 144, lora_pti
        "extended": (*ATTENTION, "*.ff.net.0.proj", *RESNETS, "*.conv_shortcut"),  # lora_pti --use_extended_lora
        "kohya": TRANSFORMER,  # 192, networks.lora
        "all": (*TRANSFORMER, *RESNETS, "*.conv_shortcut"),
    },
    "text_encoder": {
        "attention": ("*.self_attn.*_proj",),  # 48
        "kohya": ("*.self_attn.*_proj", "*.mlp.fc?"),  # 72
    },
}


class StableDiffusion:
    """See models.family.Family. The VAE stays in fp32 (its fp16 overflows on some images); UNet and text encoder take the base precision."""

    name = "sd"
    denoiser = "unet"

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, scheduler: dict[str, Any]
    ):
        self.modules: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder, "vae": vae}
        self.tokenizers = {"text_encoder": tokenizer}
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule = noise.vp_from_config(scheduler)
        self.prediction = scheduler.get("prediction_type", "epsilon")
        self.latent_channels = vae.config.latent_channels
        self.spacing = scheduler.get("timestep_spacing", "leading")
        self.offset = scheduler.get("steps_offset", 0)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.resolution = unet.config.sample_size * self.factor
        self.inpainting = unet.config.in_channels != self.latent_channels
        if self.inpainting and unet.config.in_channels != 2 * self.latent_channels + 1:
            takes, c = unet.config.in_channels, self.latent_channels
            raise UserError(f"the UNet takes {takes} channels; expected {c}, or {2 * c + 1} for inpainting")
        v = self.prediction == "v_prediction"
        second = text_encoder.config.hidden_size == 1024  # SD 2.x has OpenCLIP's text encoder
        self.layout = layout_of(
            {"unet": unet, "text_encoder": text_encoder},
            family=self.name,
            base_model_version=("sd_v2" if second else "sd_v1") + ("_v" if v else ""),
            presets=PRESETS,
            architecture=f"stable-diffusion-v2-{'768-v' if v else '512'}/lora" if second else "stable-diffusion-v1/lora",
        )
        for module in self.modules.values():
            module.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the scaled latents [b, c, h / factor, w / factor] for pixels [b, 3, h, w] in [-1, 1]."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Last hidden state after the final norm, padded to the tokenizer's length, BOS and EOS included, as every SD pipeline does at inference."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return Conditioning(self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state)

    def denoise(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None) -> Tensor:
        if (inpaint is not None) != self.inpainting:
            raise UserError("an inpainting UNet needs a mask and a masked image, and only such a UNet takes them")
        x = x_t if inpaint is None else torch.cat([x_t, inpaint.to(x_t)], dim=1)
        out = self.unet(x.to(self.unet.dtype), level.t, encoder_hidden_states=cond.prompt_embeds.to(self.unet.dtype)).sample
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def attention_maps(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None) -> list[Tensor]:
        """softmax(q k^T / sqrt(d)) of all cross-attention layers, from the outputs of their to_q and to_k."""
        layers = {name: m for name, m in self.unet.named_modules() if name.endswith(".attn2")}
        seen: dict[tuple[str, str], Tensor] = {}
        hooks = [
            getattr(m, which).register_forward_hook(lambda _m, _i, out, key=(name, which): seen.__setitem__(key, out))
            for name, m in layers.items()
            for which in ("to_q", "to_k")
        ]
        try:
            self.denoise(x_t, level, cond, inpaint)
        finally:
            for hook in hooks:
                hook.remove()
        maps = []
        for name, m in layers.items():
            q, k = (seen[name, which].unflatten(-1, (m.heads, -1)).transpose(1, 2).float() for which in ("to_q", "to_k"))  # [b, heads, s, d]
            maps.append((q @ k.transpose(-1, -2) * m.scale).softmax(-1))
        return maps


def load(path: str, *, dtype: torch.dtype, device: torch.device | str, vae: str, scheduler: dict[str, Any]) -> StableDiffusion:
    """The model in a folder or on the hub, in the diffusers layout; `vae` names another VAE, `scheduler` replaces keys of its scheduler_config.json.

    Raises UserError for a missing or broken part.
    """
    scheduler = read_json(path, "scheduler/scheduler_config.json") | scheduler
    exact = torch.promote_types(dtype, torch.float32)
    tokenizer = part(CLIPTokenizer.from_pretrained, path, "tokenizer")
    text_encoder = part(CLIPTextModel.from_pretrained, path, "text_encoder", dtype=dtype).to(device)
    autoencoder = (part(AutoencoderKL.from_pretrained, path, "vae", torch_dtype=exact) if not vae else load_vae(vae, exact)).to(device)
    unet = part(UNet2DConditionModel.from_pretrained, path, "unet", torch_dtype=dtype).to(device)
    return StableDiffusion(unet, autoencoder, text_encoder, tokenizer, scheduler)


def load_vae(path: str, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE of its own: a folder or hub id with config.json at its top. Raises UserError."""
    try:
        return AutoencoderKL.from_pretrained(path, torch_dtype=dtype)
    except Exception as error:
        raise UserError(f"cannot load the VAE {path}: {(str(error).strip().splitlines() or ['?'])[0]}") from None
