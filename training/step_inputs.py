"""What a training step is given: latents, noise and its level, text, sizes. Drawn on the host, keyed by image and visit, and brought to the device
ahead of the step, which then works on the device alone. Functions of an open Session."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core import tokens
from lora_core.adapters import injection
from lora_core.config import Stage
from lora_core.data.dataset import Batch
from lora_core.diffusion import generation, noise
from lora_core.diffusion.noise import NoiseLevel, RandomKeys
from lora_core.errors import UserError
from lora_core.family import Sizes
from lora_core.runs.run_folder import nonfinite_names
from models import Conditioning, Family
from training import model_checks

if TYPE_CHECKING:
    from training.setup import Session

TextInput = (
    Conditioning | dict[str, Tensor]
)  # encoded, or token ids (and KEPT) where something in the text encoders trains


@dataclass(frozen=True)
class StepInputs:
    """Of one micro-batch, all on the device."""

    x0: Tensor  # [b, c, h, w] sampled from the VAE's posterior
    eps: Tensor  # [b, c, h, w] the noise that the target is made of
    eps_in: Tensor  # [b, c, h, w] the noise that x_t is made with
    level: NoiseLevel  # rows [b]
    mask: Tensor | None  # [b, 1, h, w] in [0, 1]
    inpaint: Tensor | None  # [b, 1 + c, h, w] what an inpainting model sees beside x_t
    text: TextInput
    sizes: Sizes  # with `values`
    is_prior: Tensor  # [b] bool
    rows: Tensor | None  # [b] int64, what adapter dropout is keyed by
    step: Tensor  # [] int64
    swapped: (
        tuple[TextInput, Conditioning] | None
    )  # prior.swap: text with the classes in place of the words, and the base model's conditioning for it


KEPT = (
    "kept"  # key of token ids: [b] 0 in the rows of dropped captions that zeros stand for, else 1
)


def make_step_inputs(s: Session, batch: Batch, stage: Stage, step: int) -> StepInputs:
    """Randomness is keyed by image and visit: a row does not depend on the batch around it."""
    keys, n = RandomKeys(s.config.seed, batch.keys, batch.visits), s.config.noise
    x0, mask, inpaint = _make_latents(s, batch, keys, stage)
    low, high = (
        n.low if stage.low is None else stage.low,
        n.high if stage.high is None else stage.high,
    )
    schedule = s.family.schedule_at(*x0.shape[-2:]) if n.dynamic_shift else s.family.schedule
    level = noise.sample_levels(
        schedule, keys, low=low, high=high, density=s.density, shift=n.shift
    )
    eps, eps_in = noise.sample_noise(keys, tuple(x0.shape[1:]), s.noise)
    swapped = None
    if s.config.prior.swap:
        other = replace(
            batch,
            captions=[
                model_checks.swap_words(caption, s.config.prior.swap) for caption in batch.captions
            ],
        )
        swapped = (_make_text(s, other), _make_base_text(s, other))
    eps = _to_device(eps, s.device, x0.dtype)
    return StepInputs(
        x0=x0,
        eps=eps,
        eps_in=_to_device(eps_in, s.device, x0.dtype) if s.noise.perturbation else eps,
        level=NoiseLevel(*(_to_device(row, s.device) for row in level)),
        mask=mask,
        inpaint=inpaint,
        text=_make_text(s, batch),
        sizes=_image_sizes(batch)._replace(
            values=_to_device(_image_sizes(batch).to_tensor("cpu"), s.device)
        ),
        is_prior=_to_device(batch.is_prior, s.device),
        rows=_to_device(keys.hashes("dropout"), s.device) if s.drops else None,
        step=torch.full((), step, dtype=torch.int64, device=s.device),
        swapped=swapped,
    )


def _to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device; from pinned memory to a GPU, so that the host need not wait."""
    x = x if dtype is None else x.to(dtype)
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and x.device.type == "cpu"
        else x.to(device)
    )


def _image_sizes(batch: Batch) -> Sizes:
    return Sizes(
        batch.original_sizes, batch.crops, (batch.pixels.shape[-2], batch.pixels.shape[-1])
    )


def _make_latents(
    s: Session, batch: Batch, keys: RandomKeys, stage: Stage
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x0, the loss mask and the inpainting input; see Inputs."""
    mean, std = (_to_device(rows, s.device) for rows in _posterior_moments(s, batch))
    x0 = mean + std * _to_device(
        keys.normal("posterior", tuple(mean.shape[1:])), s.device, mean.dtype
    )
    mask = None
    if batch.mask is not None:
        small = _to_device(
            F.interpolate(batch.mask, x0.shape[-2:], mode="area"), s.device, x0.dtype
        )
        mask = _sharpen_mask(small, stage.mask_temperature)
    inpaint = None
    if s.family.inpainting:
        holes = generation.random_hole_masks(keys, batch.pixels.shape[-2], batch.pixels.shape[-1])
        with torch.no_grad():
            inpaint = generation.encode_masked_image(
                s.family, _to_device(batch.pixels, s.device), _to_device(holes, s.device)
            )
    return x0, mask, inpaint


def _sharpen_mask(mask: Tensor, temperature: float) -> Tensor:
    """The mask [b, 1, h, w] to the power of the temperature.

    Where this dtype would leave nothing of a row, relative to its brightest place; a loss that
    divides by the mask's sum is the same for both.
    """
    raised, brightest = mask**temperature, mask.amax((1, 2, 3), keepdim=True)
    return torch.where(brightest**temperature < 1e-30, (mask / brightest) ** temperature, raised)


@torch.no_grad()
def _posterior_moments(s: Session, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean and std of the latents; from the cache where an image's pixels come again."""
    if not s.folder.settings.is_random or s.folder.settings.variants:
        size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        names = [
            s.folder.cache_key(s.records[key], visit, size)
            for key, visit in zip(batch.keys, batch.visits)
        ]
        shape = (s.family.latent_channels, *(side // s.family.factor for side in size))
        rows = s.latent_cache.get(
            names,
            lambda i: _cached_moments(s, batch.rows(slice(i, i + 1))),
            {"mean": shape, "std": shape},
        )
        return rows["mean"], rows["std"]
    return _encode_images(
        s, batch, look=s.config.vae_precision == "fp16" or not s.checked
    )  # in the first step: to look means to wait for the device


def _cached_moments(s: Session, batch: Batch) -> dict[str, Tensor]:
    """What is kept of one image's latents."""
    mean, std = _encode_images(s, batch, look=True)
    return {"mean": mean[0], "std": std[0]}


def _encode_images(s: Session, batch: Batch, *, look: bool) -> tuple[Tensor, Tensor]:
    mean, std = s.family.encode_images(batch.pixels)
    good = (mean.isfinite() & std.isfinite()).flatten(1).all(1).tolist() if look else [True]
    if all(good):
        return mean, std
    if s.config.vae_precision == "fp16":
        raise UserError(
            "the VAE overflows in fp16 on these images; leave --vae-precision at fp32, or give a VAE made for fp16 with --vae"
        )
    path = s.records[batch.keys[good.index(False)]].path
    raise UserError(
        f"the VAE gives NaN or infinity for {path} in {s.config.vae_precision}: its weights are damaged; give another --vae"
    )


def _make_text(s: Session, batch: Batch) -> TextInput:
    """The prompts, placeholders bound: encoded, from a cache, while nothing in the text encoders trains."""
    prompts = [tokens.bind_placeholders(caption, s.abstractions) for caption in batch.captions]
    kept = _caption_kept(s, batch)
    if not s.text_trains:
        return _zero_dropped(s.family, _encode_cached(s, prompts, s.text_cache), kept)
    return s.family.tokenize(prompts) | ({} if kept is None else {KEPT: kept})


def encode_text(family: Family, text: Mapping[str, Tensor]) -> Conditioning:
    """The conditioning of token ids as `draw` gives them, on the device alone."""
    return _zero_dropped(
        family,
        family.encode({name: ids for name, ids in text.items() if name != KEPT}),
        text.get(KEPT),
    )


def _caption_kept(s: Session, batch: Batch) -> Tensor | None:
    """[b] 0 in the rows whose caption was dropped; None where no caption is dropped, or the encoding of the empty prompt stands for those."""
    if not model_checks.drops_to_zeros(s.config, s.family):
        return None
    return _to_device(torch.tensor([float(not dropped) for dropped in batch.dropped]), s.device)


def _zero_dropped(family: Family, cond: Conditioning, kept: Tensor | None) -> Conditioning:
    return cond if kept is None else cond.zeroed(family.zeros, kept)


def _make_base_text(s: Session, batch: Batch) -> Conditioning:
    """The conditioning without adapters."""
    with ExitStack() as stack:
        for encoder in s.encoders.values():
            stack.enter_context(injection.disable_adapters(encoder))
        return _zero_dropped(
            s.family, _encode_cached(s, batch.captions, s.base_text_cache), _caption_kept(s, batch)
        )


def _encode_cached(
    s: Session, prompts: Sequence[str], cache: dict[str, Conditioning]
) -> Conditioning:
    for prompt in dict.fromkeys(prompts):
        if prompt not in cache:
            with s.evaluating():
                cond = s.family.encode_prompts([prompt])
            if nonfinite_names({"prompt": cond.prompt_embeds, **cond.extra}):
                raise UserError(
                    f"the text encoder gives NaN or infinity for the prompt {prompt!r} in {s.config.precision}: "
                    "its weights are damaged or its numbers overflow; use --precision bf16 or fp32, or fetch the model again"
                )
            cache[prompt] = cond
    return Conditioning.cat([cache[prompt] for prompt in prompts])


def vae_fingerprint(vae: nn.Module) -> Mapping[str, str]:
    """What a cache on disk is keyed by: the very weights that encode, so that a retrained VAE at the same path does not get old latents."""
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in vae.state_dict().items():
        content.update(
            name.encode()
            + str(tensor.dtype).encode()
            + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return {"vae": content.hexdigest()}
