"""From prompts to pictures with any family: start noise, guidance, sampler, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.adapters import injection
from lora_core.diffusion import sampling
from lora_core.diffusion.noise import RandomKeys
from lora_core.errors import UserError
from lora_core.settings import SamplerSettings


class Sizes(NamedTuple):
    """Where the images of a batch come from, all (h, w) or (top, left) in pixels."""

    original: Sequence[tuple[int, int]]  # of the files
    crop: Sequence[tuple[int, int]]  # corner in the resized (and mirrored) image
    target: tuple[int, int]  # of what the denoiser sees
    places: Tensor | None = None  # what `on` gave

    def on(self, device: torch.device | str) -> Tensor:
        """[b, 6] fp32: original height and width, top and left of the crop, target height and width."""
        if self.places is not None:
            return self.places
        rows = [
            (*original, *crop, *self.target)
            for original, crop in zip(self.original, self.crop, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float32, device=device)

    @staticmethod
    def whole(height: int, width: int, b: int) -> Sizes:
        """Of b images that were neither scaled nor cut, as in sampling."""
        return Sizes([(height, width)] * b, [(0, 0)] * b, (height, width))


def start_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """[b, *shape] unit noise, one CPU generator for each seed: what diffusers draws for `generator=[torch.Generator().manual_seed(s) ...]`."""
    return torch.cat(
        [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def generate_images(
    family: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: SamplerSettings,
    *,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    refiner: Any = None,
) -> Tensor:
    """Pixels [b, 3, h, w] in [-1, 1], one for each (prompt, seed). Prompts are given as the text encoder is to read them (placeholders bound).

    `init` [1 or b, 3, h, w] starts from a picture (strength < 1) or, for an inpainting model, is the picture to paint in; `mask` [1 or b, 1, h, w]
    is 1 where it is to be painted. `refiner` is a second family on the same latents, which runs the last steps (image to image without new noise).
    Raises UserError for sizes the model does not take, or an init or mask that does not fit.
    """
    height, width = recipe.height or family.resolution, recipe.width or family.resolution
    _check(family, recipe, (height, width), init, mask)
    schedule = family.schedule_at(height // family.factor, width // family.factor)
    path = sampling.sampler_levels(
        recipe.sampler,
        schedule,
        recipe.steps,
        spacing=family.spacing,
        offset=family.offset,
        strength=recipe.strength,
    )
    paths = (
        [path]
        if refiner is None
        else sampling.split_for_refiner(path, schedule, recipe.refiner_start)
    )
    shape = (family.latent_channels, height // family.factor, width // family.factor)
    eps = start_noise(seeds, shape).to(family.device)
    x0 = (
        family.encode_images(init)[0].expand(len(prompts), -1, -1, -1)
        if init is not None and recipe.strength < 1
        else None
    )
    x = sampling.start_latents(eps, path, x0)
    inpaint = (
        None
        if mask is None or init is None
        else encode_masked_image(family, init, mask).expand(len(prompts), -1, -1, -1)
    )
    sampler = sampling.SAMPLERS[recipe.sampler]
    noise = {"noise": _step_noise(seeds, shape, family.device)} if sampler.stochastic else {}
    for model, part in zip((family, refiner), paths):
        denoise = _denoiser(
            model, prompts, recipe, (height, width), inpaint if model is family else None
        )
        with injection.cache_dora_norms(model.modules[model.denoiser]):
            x = sampler.run(denoise, x, part, **noise)
    pixels = family.decode(x).float()
    _check_drawn(family, x, pixels, seeds)
    return pixels


def _check_drawn(family: Any, x: Tensor, pixels: Tensor, seeds: Sequence[int]) -> None:
    """Raises UserError for pictures that are no numbers, which would be saved black, naming the network they come from."""
    good_latents, good = (
        x.isfinite().flatten(1).all(1).tolist(),
        pixels.isfinite().flatten(1).all(1).tolist(),
    )
    bad = [i for i, whole in enumerate(good) if not whole]
    if not bad:
        return
    name = family.denoiser if not good_latents[bad[0]] else "vae"
    part = "the VAE's decoder" if name == "vae" else f"the denoiser ({name})"
    cure = (
        "give another --vae"
        if name == "vae"
        else "use --precision bf16 or fp32, a lower strength of the LoRA, or another model"
    )
    dtype = str(next(family.modules[name].parameters()).dtype).removeprefix("torch.")
    which = f"seed {seeds[bad[0]]} ({len(bad)} of {len(good)} pictures)"
    raise UserError(
        f"{part} drew NaN instead of a picture for {which}: its numbers overflow in {dtype}, or its weights are damaged; {cure}"
    )


def _denoiser(
    family: Any,
    prompts: Sequence[str],
    recipe: SamplerSettings,
    size: tuple[int, int],
    inpaint: Tensor | None,
) -> sampling.Denoise:
    """x_t and level -> x0, with guidance in the way the model takes it."""
    sizes = Sizes.whole(*size, len(prompts))
    cond = family.add_size_embeddings(family.encode_prompts(prompts), sizes, recipe.guidance)
    scale = 1.0 if family.distilled_guidance else recipe.guidance
    uncond = (
        family.add_size_embeddings(
            family.encode_negative([recipe.negative] * len(prompts)), sizes, recipe.guidance
        )
        if scale != 1
        else None
    )

    def network(x: Tensor, level: Any, rows: Any) -> Tensor:
        return family.denoise(
            x,
            level,
            rows,
            None if inpaint is None else inpaint.repeat(len(x) // len(inpaint), 1, 1, 1),
        )

    return sampling.guided_denoiser(network, family.prediction, cond, uncond, scale)


def _check(
    family: Any,
    recipe: SamplerSettings,
    size: tuple[int, int],
    init: Tensor | None,
    mask: Tensor | None,
) -> None:
    if size[0] % family.multiple or size[1] % family.multiple:
        raise UserError(
            f"{size[1]} x {size[0]} pixels is no multiple of {family.multiple}, which the sides of this model's images must be"
        )
    if init is None and (recipe.strength < 1 or family.inpainting):
        raise UserError(
            "strength below 1 and inpainting models need a picture to start from (--init-image)"
        )
    if (mask is not None) != family.inpainting:
        raise UserError(
            "an inpainting model needs a mask (--mask), and only such a model takes one"
        )
    if recipe.negative and family.distilled_guidance:
        raise UserError(
            "a negative prompt has no effect on a guidance-distilled model; leave it out"
        )


def encode_masked_image(family: Any, pixels: Tensor, mask: Tensor) -> Tensor:
    """[b, 1 + c, h, w] what an inpainting denoiser reads: the mask on the latent grid (nearest) and the latents of the picture with a grey hole."""
    mask = mask.to(pixels)
    latents = family.encode_images(pixels * (mask < 0.5))[0]
    return torch.cat(
        [F.interpolate(mask, latents.shape[-2:], mode="nearest").to(latents), latents], dim=1
    )


def random_hole_masks(keys: RandomKeys, height: int, width: int) -> Tensor:
    """[b, 1, h, w] masks for training an inpainting model, 1 = hole: 8 to 32 rectangles with sides of 1/32 to 1/4, or everything once in four times.

    The distribution of cloneofsimo's lora_pti (16 to 128 of 512 pixels), keyed by example and visit.
    """
    shape = keys.uniform("holes", (33, 4))
    masks = torch.zeros(len(shape), 1, height, width)
    for mask, rows in zip(masks, shape.tolist()):
        everything, count = rows[0][0] < 0.25, 8 + int(rows[0][1] * 25)
        for y, x, h, w in [] if everything else rows[1 : 1 + count]:
            tall, wide = (
                round(side * (1 / 32 + part * (1 / 4 - 1 / 32)))
                for side, part in ((height, h), (width, w))
            )
            top, left = int(y * (height - tall + 1)), int(x * (width - wide + 1))
            mask[:, top : top + tall, left : left + wide] = 1
        if everything:
            mask.fill_(1)
    return masks


def _step_noise(seeds: Sequence[int], shape: tuple[int, ...], device: Any) -> sampling.StepNoise:
    """Noise of step i for each seed; a stream of its own, so that no step repeats the start noise."""
    generators = [torch.Generator().manual_seed(seed + 2**31) for seed in seeds]
    return lambda _step: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(
        device
    )
