"""A family whose networks come to the device when one of its methods needs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel
from lora_core.family import Conditioning, Family
from lora_core.memory.residency import (
    DENOISER,
    TEXT_ENCODERS,
    VAE,
    Residency,
    model_parts,
    place_whole,
    to_device,
)
from lora_core.tensor_trees import map_tensors

REFINER = "refiner's "  # begins the names of a refiner's parts
PROMPTS_AT_ONCE = 64  # lists of prompts whose encodings are kept on the host


class PlacedFamily:
    """A `Family` with the methods of another one, each of which has the networks that it calls on
    the device; everything else is the other's own.

    With `keeps_texts`, for text encoders that do not change, the latest encodings of prompts are
    kept on the host, so that samples and validations need the encoders once. A second model that
    shares the residency has the parts of its `owner` (residency.model_parts).
    """

    def __init__(
        self, family: Family, residency: Residency, *, keeps_texts: bool, owner: str = ""
    ) -> None:
        self.family, self.residency, self.owner = family, residency, owner
        self.keeps_texts = keeps_texts
        self.texts: dict[tuple[str, ...], Conditioning] = {}  # method and prompts -> encoding
        family.working_device = residency.device  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    @property
    def device(self) -> torch.device:
        return self.residency.device

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self._use(VAE)
        return self.family.encode_images(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        self._use(VAE)
        return self.family.decode(latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self._encode_texts(self.family.encode_prompts, "prompts", prompts)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self._encode_texts(self.family.encode_negative, "negative", prompts)

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        self._use(TEXT_ENCODERS)
        return self.family.encode(tokens)

    def bring_denoiser(self) -> None:
        """Have the denoiser on the device, before something reads its weights."""
        self._use(DENOISER)

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Conditioning,
        inpaint: Tensor | None = None,
        maps: list[AttentionMap] | None = None,
    ) -> Tensor:
        self._use(DENOISER)
        return self.family.denoise(x_t, level, cond, inpaint, maps)

    def _use(self, part: str) -> None:
        self.residency.use(self.owner + part)

    def _encode_texts(
        self, encode: Callable[[Sequence[str]], Conditioning], method: str, prompts: Sequence[str]
    ) -> Conditioning:
        key = (method, *prompts)
        if key not in self.texts:
            self._use(TEXT_ENCODERS)
            cond = encode(prompts)
            if not self.keeps_texts:
                return cond
            if len(self.texts) >= PROMPTS_AT_ONCE:
                self.texts.pop(next(iter(self.texts)))
            self.texts[key] = map_tensors(cond, lambda t: t.detach().cpu())
        return map_tensors(self.texts[key], functools.partial(to_device, device=self.device))


def take_turns(
    family: Family,
    refiner: Family | None,
    device: torch.device,
    *,
    texts_change: bool,
    say: Callable[[str], None],
) -> tuple[Family, Family | None]:
    """A base model and a refiner that do not train, all on the host, as families whose networks
    come to the device to work: one part of both models at a time.

    `texts_change`: whether the base model's encodings of prompts change, with the strength of a
    LoRA on its text encoders.
    """
    parts = model_parts(family)
    if refiner is not None:
        parts |= model_parts(refiner, REFINER)
    residency = Residency(parts, device, moves=True, place=place_whole, say=say)
    base = PlacedFamily(family, residency, keeps_texts=not texts_change)
    if refiner is None:
        return cast(Family, base), None
    second = PlacedFamily(refiner, residency, keeps_texts=True, owner=REFINER)
    return cast(Family, base), cast(Family, second)
