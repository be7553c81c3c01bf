"""What a family of models offers to the scripts. A family is glue around library networks: no law of noise, loss or sampling lives in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.noise import NoiseLevel, Schedule
from lora_core.sampling import Spacing

__all__ = ["Conditioning", "Family", "Layout", "part", "read_json"]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside the image and the noise level; one row per image."""

    prompt_embeds: Tensor  # [b, s, d]
    extra: dict[str, Tensor] = field(default_factory=dict)  # a family's own rows, e.g. pooled prompt embeds [b, d]

    def rows(self, index: slice | Tensor) -> Conditioning:
        return Conditioning(self.prompt_embeds[index], {name: value[index] for name, value in self.extra.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        embeds = torch.cat([p.prompt_embeds for p in parts])
        return Conditioning(embeds, {name: torch.cat([p.extra[name] for p in parts]) for name in parts[0].extra})


class Family(Protocol):
    """A loaded model. Images are [b, 3, h, w] in [-1, 1]; latents [b, c, h / factor, w / factor], shifted and scaled to about unit variance."""

    name: str
    modules: dict[str, nn.Module]  # "unet" or "transformer", "text_encoder", ..., "vae"
    denoiser: str  # the key in `modules` of the network that is trained
    tokenizers: dict[str, Any]  # text encoder's key in `modules` -> its tokenizer
    layout: Layout
    schedule: Schedule
    prediction: str  # a row of PREDICTIONS
    spacing: Spacing  # how samplers lay out their steps, as its scheduler_config.json says: leading, trailing, linspace
    offset: int  # steps_offset of the leading spacing
    device: torch.device
    latent_channels: int
    factor: int  # pixels for one latent, each way
    resolution: int  # pixels the model was made for
    inpainting: bool  # the denoiser reads a mask and a masked image beside x_t

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents' posterior, fp32."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning: ...

    def denoise(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None) -> Tensor:
        """The network's raw output, fp32 or better. `inpaint` [b, 1 + c, h, w]: mask (1 = to be painted) and the masked image's latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1], fp32."""
        ...

    def attention_maps(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None = None) -> list[Tensor]:
        """Cross-attention probabilities [b, heads, h w, s] of every layer, by one more forward pass."""
        ...


def read_json(path: str, name: str) -> dict[str, Any]:
    """`name` (say "scheduler/scheduler_config.json") of a model in a folder or on the hub. Raises UserError when it is not there."""
    file = Path(path) / name
    if not Path(path).is_dir():
        try:
            file = Path(hf_hub_download(path, name))
        except Exception as error:  # the hub's client raises a dozen classes: no network, no such repository, no such file, bad id
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--model {path} is no folder here, and the hub gave no {name} for it: {reason}") from None
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"the model folder {path} has no {name}; it must be in the diffusers layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def part(load: Callable[..., Any], path: str, subfolder: str, **settings: Any) -> Any:
    """One component of a model through its library class. Raises UserError that names the missing or broken part."""
    if Path(path).is_dir() and not (Path(path) / subfolder).is_dir():
        raise UserError(f"the model folder {path} has no {subfolder}/; it must be in the diffusers layout")
    try:
        return load(path, subfolder=subfolder, **settings)
    except Exception as error:  # OSError, SafetensorError, JSONDecodeError, EnvironmentError ... by library and version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {subfolder}/ of {path}: {reason}") from None
