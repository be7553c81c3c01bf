"""A family whose networks come to the device when one of its methods needs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lora_core.config import Config
from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel
from lora_core.family import Conditioning, Family
from lora_core.settings import AdapterSpec
from training.cuda_graph import map_tensors
from training.networks import residency as places
from training.networks.residency import DENOISER, TEXT_ENCODERS, VAE, Residency, to_device

PROMPTS_AT_ONCE = 64  # lists of prompts whose encodings are kept on the host


class PlacedFamily:
    """A `Family` with the methods of another one, each of which has the networks that it calls on
    the device; everything else is the other's own.

    With `keeps_texts`, for text encoders that do not change, the latest encodings of prompts are
    kept on the host, so that samples and validations need the encoders once.
    """

    def __init__(self, family: Family, residency: Residency, *, keeps_texts: bool) -> None:
        self.family, self.residency = family, residency
        self.keeps_texts = keeps_texts
        self.texts: dict[tuple[str, ...], Conditioning] = {}  # method and prompts -> encoding
        family.working_device = residency.device  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    @property
    def device(self) -> torch.device:
        return self.residency.device

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.residency.use(VAE)
        return self.family.encode_images(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        self.residency.use(VAE)
        return self.family.decode(latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self._encode_texts(self.family.encode_prompts, "prompts", prompts)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self._encode_texts(self.family.encode_negative, "negative", prompts)

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        self.residency.use(TEXT_ENCODERS)
        return self.family.encode(tokens)

    def bring_denoiser(self) -> None:
        """Have the denoiser on the device, before something reads its weights."""
        self.residency.use(DENOISER)

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Conditioning,
        inpaint: Tensor | None = None,
        maps: list[AttentionMap] | None = None,
    ) -> Tensor:
        self.residency.use(DENOISER)
        return self.family.denoise(x_t, level, cond, inpaint, maps)

    def _encode_texts(
        self, encode: Callable[[Sequence[str]], Conditioning], method: str, prompts: Sequence[str]
    ) -> Conditioning:
        key = (method, *prompts)
        if key not in self.texts:
            self.residency.use(TEXT_ENCODERS)
            cond = encode(prompts)
            if not self.keeps_texts:
                return cond
            if len(self.texts) >= PROMPTS_AT_ONCE:
                self.texts.pop(next(iter(self.texts)))
            self.texts[key] = map_tensors(cond, lambda t: t.detach().cpu())
        return map_tensors(self.texts[key], functools.partial(to_device, device=self.device))


def place_family(
    config: Config, family: Family, plan: Mapping[str, AdapterSpec], device: torch.device
) -> tuple[Family, Residency]:
    """The family with networks that come and go, and its residency; the family itself where they
    stay. The networks that train, for `plan` or for learned tokens, are on the device: adapters and
    token rows are made there, and stay. With --quantize, --stream and --shard they are made on the
    host, and `base_weights.place_model` and `sharding.shard_denoiser` bring them.
    """
    residency = places.open_residency(config, family, device)
    if not residency.moves:
        return family, residency
    texts_change = config.trains("tokens") or any(name in family.tokenizers for name in plan)
    training = [TEXT_ENCODERS] if texts_change else []
    if family.denoiser in plan or config.shard:
        training.append(DENOISER)
    if config.shard:
        residency.fixed.add(DENOISER)  # its weights are divided there
    residency.trained = tuple(training)
    residency.bring_together([part for part in training if part not in places.late_parts(config)])
    placed = PlacedFamily(family, residency, keeps_texts=not texts_change)
    return cast(Family, placed), residency
