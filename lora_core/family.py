"""What a family of models offers to the scripts. A family is glue around library networks: no law
of noise, loss or sampling lives in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from lora_core.diffusion.generation import Sizes
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.diffusion.sampling import Spacing
from lora_core.errors import UserError
from lora_core.formats.layout import Layout

__all__ = [
    "Conditioning",
    "Family",
    "Layout",
    "LoadOptions",
    "Sizes",
    "read_encoder_config",
    "decode_latents",
    "encode_pixels",
    "load_network",
    "load_part",
    "read_json",
    "tokenize_prompts",
]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is opened."""

    dtype: torch.dtype = torch.float32  # of the denoiser and the text encoders
    device: torch.device | str = "cpu"
    vae: str = ""  # folder or hub id of another VAE
    vae_dtype: torch.dtype | None = None  # None: fp32, or better where dtype is
    scheduler: dict[str, Any] = field(
        default_factory=dict
    )  # replaces keys of scheduler_config.json (prediction_type, rescale_betas_zero_snr ...)
    clip_skip: int = 0  # last layers of the CLIP text encoders that are left out
    max_sequence_length: int = 0  # tokens of a T5 prompt; 0: the model's own
    config: str = ""  # folder or hub id with the configs and tokenizers of a single-file model

    @property
    def exact(self) -> torch.dtype:
        """The VAE's precision."""
        return self.vae_dtype or torch.promote_types(self.dtype, torch.float32)


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside the image and the noise level; one row per image."""

    prompt_embeds: Tensor  # [b, s, d]
    extra: dict[str, Tensor] = field(
        default_factory=dict
    )  # a family's own rows, e.g. pooled prompt embeds [b, d]

    def rows(self, index: slice | Tensor) -> Conditioning:
        return Conditioning(
            self.prompt_embeds[index], {name: value[index] for name, value in self.extra.items()}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        embeds = torch.cat([p.prompt_embeds for p in parts])
        return Conditioning(
            embeds, {name: torch.cat([p.extra[name] for p in parts]) for name in parts[0].extra}
        )

    def zeroed(self, names: Sequence[str], kept: Tensor) -> Conditioning:
        """The same with zeros in the members `names` of the rows whose `kept` [b] is 0; where it is
        1 they stay. On the device alone.
        """

        def part(name: str, rows: Tensor) -> Tensor:
            return rows * kept.to(rows).view(-1, *[1] * (rows.ndim - 1)) if name in names else rows

        return Conditioning(
            part("prompt_embeds", self.prompt_embeds),
            {name: part(name, rows) for name, rows in self.extra.items()},
        )

    def with_extra(self, **rows: Tensor) -> Conditioning:
        """The same with further rows."""
        return Conditioning(self.prompt_embeds, {**self.extra, **rows})


class Family(Protocol):
    """A loaded model. Images are [b, 3, h, w] in [-1, 1]; latents [b, c, h / factor, w / factor],
    shifted and scaled to about unit variance.
    """

    name: str
    pipeline: str  # `_class_name` of its model_index.json
    modules: dict[str, nn.Module]  # "unet" or "transformer", "text_encoder", ..., "vae"
    denoiser: str  # the key in `modules` of the network that is trained
    tokenizers: dict[str, Any]  # text encoder's key in `modules` -> its tokenizer
    layout: Layout  # its presets name the components that can be adapted
    schedule: Schedule
    prediction: str  # a row of PREDICTIONS
    # how samplers lay out their steps, as its scheduler_config.json says: leading, trailing,
    # linspace
    spacing: Spacing
    offset: int  # steps_offset of the leading spacing
    latent_channels: int
    factor: int  # pixels for one latent, each way
    multiple: int  # sides of images are multiples of this, pixels
    resolution: int  # pixels the model was made for
    inpainting: bool  # the denoiser reads a mask and a masked image beside x_t
    # the denoiser is told a guidance scale, so that sampling needs no second, unconditional call
    distilled_guidance: bool
    zeros: tuple[
        str, ...
        # members of Conditioning that guidance takes as zeros for an empty prompt; none where it is
        # encoded
    ]

    @property
    def device(self) -> torch.device: ...

    def schedule_at(self, height: int, width: int) -> Schedule:
        """The schedule for latents [b, c, height, width]: its own, but for flow models whose shift
        depends on the resolution.
        """
        ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents' posterior, fp32."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """encode(tokenize(prompts))"""
        ...

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders read, one row for each prompt, on their device."""
        ...

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning by the text encoders, on the device alone: a CUDA graph can hold it."""
        ...

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts as the unconditional rows of guidance; some models take zeros for the empty
        one.
        """
        ...

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        """The conditioning with what the denoiser is told beside the prompt: sizes, guidance scale,
        or nothing.
        """
        ...

    def denoise(
        self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None
    ) -> Tensor:
        """The network's raw output, fp32 or better, for x_t that is scaled by c_in. `inpaint` [b, 1
        + c, h, w]: mask (1 = to be painted) and the masked image's latents.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1], fp32."""
        ...

    def attention_maps(
        self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None
    ) -> list[Tensor]:
        """Probabilities [b, heads, h w, s] with which every layer's latents look at the prompt's
        tokens, by one more forward pass.
        """
        ...


# ---------------------------------------------------------------- reading a model's folder


def read_json(path: str, name: str) -> dict[str, Any]:
    """`name` (say "scheduler/scheduler_config.json") of a model in a folder or on the hub. Raises
    UserError when it is not there.
    """
    file = Path(path) / name
    if not Path(path).is_dir():
        try:
            file = Path(hf_hub_download(path, name))
        # the hub's client raises a dozen classes: no network, no such repository, no such file, bad
        # id
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--model {path} is no folder here, and the hub gave no {name} for it: {reason}"
            ) from None
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"the model folder {path} has no {name}; it must be in the diffusers layout"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def load_part(load: Callable[..., Any], path: str, subfolder: str, **settings: Any) -> Any:
    """One component of a model through its library class; the model itself where `subfolder` is
    empty. Raises UserError naming what is wrong.
    """
    if subfolder and Path(path).is_dir() and not (Path(path) / subfolder).is_dir():
        raise UserError(
            f"the model folder {path} has no {subfolder}/; it must be in the diffusers layout"
        )
    try:
        return load(path, subfolder=subfolder, **settings) if subfolder else load(path, **settings)
    # OSError, SafetensorError, JSONDecodeError, EnvironmentError ... by library and version
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load {subfolder + '/ of ' if subfolder else ''}{path}: {reason}"
        ) from None


def load_network(
    kind: Any, path: str, subfolder: str, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """A network of diffusers or transformers with its weights, on `device`; `subfolder` as in
    `part`.

    diffusers' default way of loading needs accelerate, which is no dependency here, and warns twice
    without it. The other way leaves weights that the files lack as they happened to lie in memory,
    and transformers draws them at random: both are refused. Raises UserError.
    """
    if kind.__module__.startswith("diffusers."):
        settings = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    else:
        settings = {"dtype": dtype}
    loaded, report = load_part(
        kind.from_pretrained, path, subfolder, output_loading_info=True, **settings
    )
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        where = f"{subfolder}/ of {path}" if subfolder else path
        raise UserError(
            f"cannot load {where}: its files lack {missing[0]}{more}; download them again"
        )
    return loaded.to(device)


def read_encoder_config(path: str, component: str, config_class: Any) -> Any:
    """A text encoder's configuration object, read without its weights."""
    return config_class(**read_json(path, f"{component}/config.json"))


# ---------------------------------------------------------------- what families share


def encode_pixels(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the posterior of pixels [b, 3, h, w] in the denoiser's units: (z - mean) /
    std * scaling where the VAE's config has latents_mean and latents_std, else (z - shift) *
    scaling.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    shift, scale = _units(vae, posterior.mean)
    exact = torch.promote_types(posterior.mean.dtype, torch.float32)
    return (posterior.mean.to(exact) - shift) * scale, posterior.std.to(exact) * scale


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pixels [b, 3, h, w] in [-1, 1]; undoes the units of `encode_pixels`."""
    shift, scale = _units(vae, latents)
    return vae.decode((latents / scale + shift).to(vae.dtype)).sample.clamp(-1, 1)


def _units(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, scale) such that the denoiser's latents are (z - shift) * scale, [1, c, 1, 1] or
    0-dim.
    """
    c = vae.config
    mean, std = (getattr(c, name, None) for name in ("latents_mean", "latents_std"))
    exact = torch.promote_types(like.dtype, torch.float32)
    if mean is not None and std is not None:
        shift, spread = (
            torch.tensor(values, dtype=exact, device=like.device).view(1, -1, 1, 1)
            for values in (mean, std)
        )
        return shift, c.scaling_factor / spread
    return tuple(
        torch.tensor(v, dtype=exact, device=like.device)
        for v in (getattr(c, "shift_factor", None) or 0.0, c.scaling_factor)
    )  # type: ignore[return-value]


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str], length: int, said: set[str]) -> Tensor:
    """Token ids [b, length] with the special tokens, padded as the tokenizer pads. What does not
    fit is named once a prompt; `said` remembers.
    """
    reader = type(tokenizer).__name__.removesuffix("Fast").removesuffix("Tokenizer")  # CLIP, T5
    for prompt in prompts:
        if prompt not in said:
            said.add(prompt)
            ids, inner = (
                tokenizer(prompt, add_special_tokens=special, verbose=False).input_ids
                for special in (True, False)
            )
            if len(ids) > length:
                lost = tokenizer.decode(
                    inner[length - (len(ids) - len(inner)) :], clean_up_tokenization_spaces=False
                ).strip()
                print(
                    f"warning: the prompt is {len(ids)} tokens long and {reader} reads {length}; "
                    f"cut off: {lost!r}",
                    file=sys.stderr,
                )
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
