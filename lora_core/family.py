"""The protocol of a family of text-to-image models, and the types of its methods.

A `Family` is a loaded model: it encodes images and prompts, denoises, decodes. It connects the
networks of a library; noise, losses and sampling are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lora_core.cross_attention import AttentionMap, Region
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.diffusion.sampling import Spacing
from lora_core.formats.layout import Layout


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a model: dtypes, device, VAE, changes of its scheduler's config."""

    dtype: torch.dtype = torch.float32  # of the denoiser and the text encoders
    device: torch.device | str = "cpu"
    vae: str = ""  # folder or hub id of another VAE
    vae_dtype: torch.dtype | None = None  # None: fp32, or wider where dtype is
    # Replaces keys of scheduler_config.json (prediction_type, rescale_betas_zero_snr ...).
    scheduler: dict[str, Any] = field(default_factory=dict)
    clip_skip: int = 0  # last layers of the CLIP text encoders that are left out
    max_sequence_length: int = 0  # tokens of a T5 prompt; 0: the model's own
    max_token_length: int = 0  # tokens of a prompt for CLIP, a multiple of 75; 0: 75
    config: str = ""  # folder or hub id with the configs and tokenizers of a single-file model
    family: str = ""  # FILE.py:FAMILY of a family that is not built in

    @property
    def vae_precision(self) -> torch.dtype:
        """The VAE's dtype."""
        return self.vae_dtype or torch.promote_types(self.dtype, torch.float32)


class Sizes(NamedTuple):
    """Sizes and crops of the images of a batch, all (h, w) or (top, left) in pixels."""

    original: Sequence[tuple[int, int]]  # of the files
    crop: Sequence[tuple[int, int]]  # corner in the resized (and mirrored) image
    target: tuple[int, int]  # of the denoiser's image
    values: Tensor | None = None  # the result of `to_tensor`, already on the device

    def to_tensor(self, device: torch.device | str) -> Tensor:
        """[b, 6] fp32: original height and width, crop's top and left, target height and width."""
        if self.values is not None:
            return self.values
        rows = []
        for original, crop in zip(self.original, self.crop, strict=True):
            rows.append((*original, *crop, *self.target))
        return torch.tensor(rows, dtype=torch.float32, device=device)

    @staticmethod
    def uncropped(height: int, width: int, b: int) -> Sizes:
        """The sizes of b images that were neither scaled nor cropped, as in sampling."""
        return Sizes([(height, width)] * b, [(0, 0)] * b, (height, width))


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's inputs other than x_t and the noise level; one row per image."""

    # [b, s, d], or [b, layers, s, d] with a text for each cross-attention layer
    prompt_embeds: Tensor
    # A family's own rows, e.g. pooled prompt embeds [b, d].
    extra: dict[str, Tensor] = field(default_factory=dict)
    # Boxes of the image with prompt embeds of their own, in sampling only.
    regions: tuple[Region, ...] = ()

    def rows(self, index: slice | Tensor) -> Conditioning:
        """The conditioning of some images."""
        extra = {name: values[index] for name, values in self.extra.items()}
        regions = [Region(box, embeds[index]) for box, embeds in self.regions]
        return Conditioning(self.prompt_embeds[index], extra, tuple(regions))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, one part after another.

        If one part has a text for each layer, the others' texts are repeated for every layer. All
        parts have the same regions.
        """
        extra = {}
        for name in parts[0].extra:
            extra[name] = torch.cat([part.extra[name] for part in parts])
        regions = []
        for same_box in zip(*(part.regions for part in parts), strict=True):
            embeds = cat_prompt_embeds([region.prompt_embeds for region in same_box])
            regions.append(Region(same_box[0].box, embeds))
        embeds = cat_prompt_embeds([part.prompt_embeds for part in parts])
        return Conditioning(embeds, extra, tuple(regions))

    def zeroed(self, names: Sequence[str], kept: Tensor) -> Conditioning:
        """The conditioning with zeros in the members `names` of the rows whose `kept` [b] is 0.

        Rows with `kept` 1 are unchanged. Works on the device without a sync.
        """
        members = {"prompt_embeds": self.prompt_embeds, **self.extra}
        for name in names:
            if name in members:
                values = members[name]
                mask = kept.to(values).view(-1, *[1] * (values.ndim - 1))
                members[name] = values * mask
        return replace(self, prompt_embeds=members.pop("prompt_embeds"), extra=members)

    def with_extra(self, **rows: Tensor) -> Conditioning:
        """The conditioning with further members in `extra`."""
        return replace(self, extra={**self.extra, **rows})


def cat_prompt_embeds(parts: Sequence[Tensor]) -> Tensor:
    """[b, s, d] prompt embeds one after another, or [b, layers, s, d] if one has a layer axis."""
    layers = max((part.shape[1] for part in parts if part.ndim == 4), default=0)
    if not layers:
        return torch.cat(list(parts))
    wide = []
    for part in parts:
        wide.append(part if part.ndim == 4 else part[:, None].expand(-1, layers, -1, -1))
    return torch.cat(wide)


class Family(Protocol):
    """A loaded model.

    Images are [b, 3, h, w] in [-1, 1]; latents [b, c, h / factor, w / factor], shifted and scaled
    to about unit variance.
    """

    name: str
    pipeline: str  # `_class_name` of its model_index.json
    modules: dict[str, nn.Module]  # "unet" or "transformer", "text_encoder", ..., "vae"
    denoiser: str  # the key in `modules` of the network that is trained
    tokenizers: dict[str, Any]  # text encoder's key in `modules` -> its tokenizer
    attended: tuple[str, ...]  # the text encoders on whose tokens attention maps are
    layout: Layout  # its presets name the components that can be adapted
    schedule: Schedule
    prediction: str  # a key of PREDICTIONS
    spacing: Spacing  # timestep spacing of samplers, from its scheduler_config.json
    offset: int  # steps_offset of the leading spacing
    latent_channels: int
    factor: int  # pixels per latent pixel, in height and in width
    multiple: int  # sides of images are multiples of this, pixels
    resolution: int  # pixels that the model was trained at
    embeds_sizes: bool  # the denoiser reads the sizes and crops of the images
    inpainting: bool  # the denoiser takes a mask and a masked image in addition to x_t
    # The denoiser takes a guidance scale: sampling needs no second, unconditional call.
    distilled_guidance: bool
    # Members of Conditioning that are zeros for an empty prompt in guidance; none where the empty
    # prompt is encoded.
    zeros: tuple[str, ...]

    @property
    def device(self) -> torch.device: ...

    def schedule_at(self, height: int, width: int) -> Schedule:
        """The schedule for latents [b, c, height, width].

        It is `schedule`, except for flow models whose shift depends on the resolution.
        """
        ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents' posterior, fp32."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """encode(tokenize(prompts))"""
        ...

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of the text encoders on their device, one row per prompt.

        The first [b, s] tensors are the token ids, one for each of `tokenizers` and in their order.
        """
        ...

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        """The text encoders' conditioning, without a sync: a CUDA graph can capture it."""
        ...

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of the unconditional half of guidance.

        Some models use zeros for the empty prompt.
        """
        ...

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        """The conditioning with the numbers that the denoiser embeds in addition to the prompt.

        They are image sizes, a guidance scale, or none, by family.
        """
        ...

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Conditioning,
        inpaint: Tensor | None = None,
        maps: list[AttentionMap] | None = None,
    ) -> Tensor:
        """The network's raw output, fp32 or better; x_t is already scaled by c_in.

        `inpaint` [b, 1 + c, h, w]: mask (1 = to be painted) and the masked image's latents. To a
        list `maps`, the attention maps of this forward pass are appended, one for each layer that
        reads the text.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [-1, 1], fp32."""
        ...


class FamilyFunctions(NamedTuple):
    """The functions of a family; its file, in models/ or your own, exports them as FAMILY."""

    load: Callable[[str, LoadOptions], Family]
    read_layout: Callable[[str], Layout]
    read_schedule: Callable[[str, Mapping[str, Any], int], tuple[Schedule, str]]
