"""Images from prompts with any family: start noise, guidance, sampling, decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.adapters import injection
from lora_core.cross_attention import Region
from lora_core.diffusion import sampling
from lora_core.diffusion.noise import NoiseLevel, RandomKeys
from lora_core.diffusion.regions import PromptRegion, check_regions
from lora_core.errors import UserError
from lora_core.family import Conditioning, Family, Sizes
from lora_core.layer_prompts import encode_layer_prompts
from lora_core.placeholders import Placeholder, Prompt, bind_layers
from lora_core.progress import ProgressBar
from lora_core.prompt_weights import WeightedPrompt
from lora_core.settings import SamplerSettings

# Images that wait, with their encoded prompts, for one network to be done with all of them: with
# Flux in bf16 about 7 MB each.
MOST_WAITING = 32


def start_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """[b, *shape] unit noise, one CPU generator per seed.

    diffusers draws the same for `generator=[torch.Generator().manual_seed(s) ...]`.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randn(1, *shape, generator=generator))
    return torch.cat(rows)


def _do_nothing(share: float | None = None, *, off: bool = False) -> None:
    pass


class ImageBatch(NamedTuple):
    """Images that are sampled together."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: SamplerSettings
    init: Tensor | None = None  # [1 or b, 3, h, w] in [-1, 1], the image to start from
    mask: Tensor | None = None  # [1 or b, 1, h, w], 1 where it is to be painted
    # Called before each network works for these images, it may set the strengths of LoRAs. With an
    # attribute `follows_level` it is called before each step, too, with the share of noise in it
    # (NoiseLevel.share). With `adapts`, the keyword off=True takes the LoRAs away.
    prepare: Callable[..., object] = _do_nothing
    count_step: Callable[[], object] = _do_nothing  # called after each step of the sampler


def generate_images(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    *,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    refiner: Family | None = None,
    regions: Sequence[PromptRegion] = (),
    placeholders: Sequence[Placeholder] = (),
) -> Tensor:
    """Pixels [b, 3, h, w] in [-1, 1], one for each (prompt, seed).

    `placeholders` are the words in prompts and negative prompts that tokens replace, but not for
    the refiner, which has not learned the tokens; `regions` are boxes of the images with prompts of
    their own. `init` [1 or b, 3, h, w] is the image to start from (strength < 1) or, with a mask,
    to paint in; `mask` [1 or b, 1, h, w] is 1 where it is to be painted. An inpainting model takes
    both as inputs; of any other model, the latents outside the mask are replaced before each step
    (`sampling.keep_latents`). The VAE decodes the whole image either way, so that pixels outside
    the mask change a little (as in diffusers' pipelines).
    `refiner` is a second family on the same latents, which runs the last steps (image to image
    without new noise). Raises UserError for sizes the model does not take, an init or mask that
    does not fit, and regions that cannot act.
    """
    batch = ImageBatch(prompts, seeds, settings, init, mask)
    (pixels,) = generate_batches(
        family, [batch], refiner=refiner, regions=regions, placeholders=placeholders
    )
    return pixels


@torch.no_grad()
def generate_batches(
    family: Family,
    batches: Sequence[ImageBatch],
    *,
    refiner: Family | None = None,
    regions: Sequence[PromptRegion] = (),
    placeholders: Sequence[Placeholder] = (),
    title: str = "",
) -> Iterator[Tensor]:
    """The pixels of each batch, as `generate_images` makes them, one network after the other for
    many batches: images to start from are encoded, then prompts, then latents sampled, then (by a
    refiner) prompts encoded and latents sampled again, then images decoded. Nothing is drawn before
    pixels are asked for. With a `title`, a bar of that name counts the steps of all batches.
    """
    steps = sum(int(batch.settings.strength * batch.settings.steps) for batch in batches)
    with ProgressBar(title, steps if title else 0, "step") as bar:
        for group in _group_batches(batches):
            under_way: list[Generator[Tensor | None, None, None]] = []
            for batch in group:
                counted = batch._replace(count_step=bar.advance)
                under_way.append(_generate(family, counted, refiner, regions, placeholders))
            phases = 4 if refiner is None else 6  # of `_generate`, which yields once in each
            for _ in range(phases):
                for batch, own in zip(group, under_way, strict=True):
                    batch.prepare()
                    pixels = next(own)
                    if pixels is not None:
                        own.close()  # its tensors would wait on the device for the other batches
                        yield pixels


def _group_batches(batches: Sequence[ImageBatch]) -> Iterator[list[ImageBatch]]:
    """Batches, in order, of at most MOST_WAITING images together, or one alone."""
    group: list[ImageBatch] = []
    count = 0
    for batch in batches:
        if group and count + len(batch.prompts) > MOST_WAITING:
            yield group
            group, count = [], 0
        group.append(batch)
        count += len(batch.prompts)
    if group:
        yield group


def _generate(
    family: Family,
    batch: ImageBatch,
    refiner: Family | None,
    regions: Sequence[PromptRegion],
    placeholders: Sequence[Placeholder],
) -> Generator[Tensor | None, None, None]:
    """None after each phase, and after the last one the pixels [b, 3, h, w]."""
    settings = batch.settings
    size = settings.height or family.resolution, settings.width or family.resolution
    _check_inputs(family, batch, size)
    shape = (family.latent_channels, size[0] // family.factor, size[1] // family.factor)
    schedule = family.schedule_at(*shape[1:])
    levels = sampling.sampler_levels(
        settings.sampler,
        schedule,
        settings.steps,
        spacing=family.spacing,
        offset=family.offset,
        strength=settings.strength,
    )
    start = _start_sampling(family, batch, shape, levels)
    if getattr(batch.prepare, "follows_level", False):
        batch.prepare.check_levels(levels.share[:-1].tolist())  # type: ignore[attr-defined]
    check_regions(family, regions, settings)
    noise = _step_noise(batch.seeds, shape, family.device)
    count = batch.count_step
    stages = [_SamplingStage(family, levels, count, start.inpaint, placeholders, is_adapted=True)]
    if refiner is not None:
        own, rest = sampling.split_for_refiner(levels, schedule, settings.refiner_start)
        stages[0] = stages[0]._replace(levels=own)
        stages.append(_SamplingStage(refiner, rest, count))
    yield None
    x = start.x
    for stage in stages:
        encode = functools.partial(
            encode_guidance, stage.family, batch.prompts, settings, size, stage.placeholders
        )
        text, base_text = encode(regions), None
        if stage.is_adapted and settings.adapter_guidance != 1:
            batch.prepare(off=True)
            base_text = encode(regions)
        yield None
        adapters = _Adapters(batch.prepare, settings.adapter_guidance, base_text)
        x = _run_stage(stage, text, settings, start, x, noise, adapters)
        del text, base_text, adapters  # they would wait on the device for the other batches
        yield None
    if start.kept is not None:
        x = torch.where(start.kept.hole, x, start.kept.x0)
    pixels = family.decode(x).float()
    _check_finite(family, x, pixels, batch.seeds)
    yield pixels


class _SamplingStage(NamedTuple):
    """The steps that one model does."""

    family: Family
    levels: NoiseLevel
    count_step: Callable[[], object]
    inpaint: Tensor | None = None  # [b, 1 + c, h, w] further inputs of an inpainting model
    placeholders: Sequence[Placeholder] = ()  # that it has learned: a refiner has none
    is_adapted: bool = False  # has the LoRAs


class _Adapters(NamedTuple):
    """The LoRAs of a stage: their strengths, and guidance away from the model without them."""

    prepare: Callable[..., object]  # of the batch
    guidance: float
    base_text: tuple[Conditioning, Conditioning | None] | None  # encoded without them; None: unread


class _Start(NamedTuple):
    """What sampling starts from."""

    x: Tensor  # [b, c, h, w] x_t at the first level
    t: float  # of that level
    kept: sampling.KeptLatents | None  # of a plain model that paints in an image
    inpaint: Tensor | None  # [b, 1 + c, h, w] further inputs of an inpainting model


def _start_sampling(
    family: Family, batch: ImageBatch, shape: tuple[int, ...], levels: NoiseLevel
) -> _Start:
    """Noise, or the noised image for strength below 1; and the image that a mask is painted in.

    `shape` [c, h, w] is that of one image's latents.
    """
    init, mask, strength = batch.init, batch.mask, batch.settings.strength
    eps = start_noise(batch.seeds, shape).to(family.device)
    count = len(eps)
    x0 = None
    kept = None
    inpaint = None
    if init is not None and mask is not None and family.inpainting:
        inpaint = encode_masked_image(family, init, mask).expand(count, -1, -1, -1)
    keeps = mask is not None and not family.inpainting
    if init is not None and (strength < 1 or keeps):
        x0 = family.encode_images(init)[0].expand(count, -1, -1, -1)
        if mask is not None and keeps:
            kept = sampling.KeptLatents(x0, eps, latent_mask(mask, x0) > 0.5)
    hole = kept.hole if kept is not None else inpaint
    if hole is not None and not hole[:, 0].any():
        side = family.factor
        raise UserError(
            f"nothing is left of the mask on the grid of the latents, {side} x {side} pixels each; "
            "paint a larger area (--mask)"
        )
    x = sampling.start_latents(eps, levels, x0 if strength < 1 else None)
    return _Start(x, levels.t[0].item(), kept, inpaint)


def _run_stage(
    stage: _SamplingStage,
    text: tuple[Conditioning, Conditioning | None],
    settings: SamplerSettings,
    start: _Start,
    x: Tensor,
    noise: sampling.StepNoise,
    adapters: _Adapters,
) -> Tensor:
    """The latents [b, c, h, w] after the steps of one model, from latents x."""
    model = stage.family
    denoise = _prompted_denoiser(model, text, settings, stage.inpaint)
    if stage.is_adapted:
        base = None
        if adapters.base_text is not None:
            base = _prompted_denoiser(model, adapters.base_text, settings, stage.inpaint)
        denoise = _adapted_denoiser(denoise, base, adapters)
    if start.kept is not None:
        denoise = sampling.keep_latents(denoise, start.kept, start=start.t)
    getattr(model, "bring_denoiser", bool)()  # its norms are read before it is called
    sampler = settings.sampler, settings.sampler_args

    def denoise_and_count(x_t: Tensor, level: NoiseLevel) -> Tensor:
        found = denoise(x_t, level)
        stage.count_step()
        return found

    with injection.cache_dora_norms(model.modules[model.denoiser]):
        return sampling.run_sampler(*sampler, denoise_and_count, x, stage.levels, noise)


def _check_finite(family: Family, x: Tensor, pixels: Tensor, seeds: Sequence[int]) -> None:
    """Raises UserError for NaN or infinity in images, which would be saved black.

    The sentence names the network that they come from.
    """
    good_latents = x.isfinite().flatten(1).all(1).tolist()
    good = pixels.isfinite().flatten(1).all(1).tolist()
    bad = [i for i, is_finite in enumerate(good) if not is_finite]
    if not bad:
        return
    name, part, cure = "vae", "the VAE's decoder", "give another --vae"
    if not good_latents[bad[0]]:
        name, part = family.denoiser, f"the denoiser ({family.denoiser})"
        cure = "use --precision bf16 or fp32, a lower strength of the LoRA, or another model"
    dtype = str(next(family.modules[name].parameters()).dtype).removeprefix("torch.")
    which = f"seed {seeds[bad[0]]} ({len(bad)} of {len(good)} images)"
    raise UserError(
        f"{part} gave NaN instead of an image for {which}: "
        f"its numbers overflow in {dtype}, or its weights are damaged; {cure}"
    )


def encode_guidance(
    family: Family,
    prompts: Sequence[str],
    settings: SamplerSettings,
    size: tuple[int, int],
    placeholders: Sequence[Placeholder],
    regions: Sequence[PromptRegion],
) -> tuple[Conditioning, Conditioning | None]:
    """The conditioning of the prompts, and that of the negative prompts if guidance needs one.

    `size` is the images' (height, width) in pixels.
    """
    sizes = Sizes.uncropped(*size, len(prompts))
    halves: list[Conditioning] = []
    sources = [(family.encode_prompts, prompts, [region.prompt for region in regions])]
    if guidance_scale(family, settings) != 1:
        negatives = [settings.negative] * len(prompts)
        inside = [region.negative or settings.negative for region in regions]
        sources.append((family.encode_negative, negatives, inside))
    bind = prompt_reader(family, placeholders, settings.emphasis)
    for encode, texts, region_texts in sources:
        bound = [bind(text) for text in texts]
        cond = encode_layer_prompts(encode, bound)
        encoded = []
        for region, text in zip(regions, region_texts):
            own = encode_layer_prompts(encode, [bind(text)]).prompt_embeds
            encoded.append(Region(region.box, own.expand(len(prompts), *own.shape[1:])))
        cond = replace(cond, regions=tuple(encoded))
        halves.append(family.add_size_embeddings(cond, sizes, settings.guidance))
    return halves[0], halves[1] if len(halves) > 1 else None


def prompt_reader(
    family: Family, placeholders: Sequence[Placeholder], emphasis: str
) -> Callable[[str], Prompt]:
    """What a text encoder reads of a prompt: with tokens in the place of placeholder words, and,
    with emphasis, as a WeightedPrompt.

    Raises UserError for emphasis on a model that cannot weight prompts.
    """
    if emphasis == "none":
        return lambda text: bind_layers(text, placeholders)
    if not getattr(family, "reads_weights", False):
        raise UserError(
            f"--emphasis {emphasis} scales the hidden states of CLIP, and the denoiser of this "
            f"model ({family.name}) reads others; leave it out, and weights like (word:1.2) too"
        )

    def read(text: str) -> Prompt:
        bound = bind_layers(text, placeholders)
        if isinstance(bound, str):
            return WeightedPrompt(bound)
        return tuple(WeightedPrompt(own) for own in bound)

    return read


def guidance_scale(family: Family, settings: SamplerSettings) -> float:
    """The scale of guidance between two forward passes; 1 where one pass is enough."""
    return 1.0 if family.distilled_guidance else settings.guidance


def _prompted_denoiser(
    family: Family,
    text: tuple[Conditioning, Conditioning | None],
    settings: SamplerSettings,
    inpaint: Tensor | None,
) -> sampling.Denoise:
    """A denoiser (x_t, level) -> x0 for encoded prompts, with the model's kind of guidance."""
    cond, uncond = text
    scale = guidance_scale(family, settings)

    def network(x: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        repeated = None
        if inpaint is not None:
            repeated = inpaint.repeat(len(x) // len(inpaint), 1, 1, 1)
        return family.denoise(x, level, cond, repeated)

    return sampling.guided_denoiser(network, family.prediction, cond, uncond, scale)


def _adapted_denoiser(
    denoise: sampling.Denoise, base: sampling.Denoise | None, adapters: _Adapters
) -> sampling.Denoise:
    """The denoiser with the LoRAs' strengths of each level, and with guidance W away from the base
    model: x0 = base + W (adapted - base).

    x0 is affine in the network's output, so that this is the same sum of outputs. The LoRAs are off
    in `base`, and in its text. At W = 1 and without ranges it is `denoise` itself; at W = 0 `base`
    alone is called.
    """
    prepare, scale = adapters.prepare, adapters.guidance
    follows_level = getattr(prepare, "follows_level", False)
    if base is None and not follows_level:
        return denoise

    def denoise_at(x: Tensor, level: NoiseLevel) -> Tensor:
        if base is not None and scale == 0:
            prepare(off=True)
            return base(x, level)
        prepare(level.share[0].item() if follows_level else None)
        adapted = denoise(x, level)
        if base is None:
            return adapted
        prepare(off=True)
        plain = base(x, level)
        return plain + scale * (adapted - plain)

    return denoise_at


def _check_inputs(family: Family, batch: ImageBatch, size: tuple[int, int]) -> None:
    init, mask, settings = batch.init, batch.mask, batch.settings
    if size[0] % family.multiple or size[1] % family.multiple:
        raise UserError(
            f"{size[1]} x {size[0]} pixels: the sides of this model's images must be multiples of "
            f"{family.multiple}"
        )
    if init is None and (settings.strength < 1 or family.inpainting or mask is not None):
        raise UserError(
            "strength below 1, masks and inpainting models need an image to start from "
            "(--init-image)"
        )
    if settings.adapter_guidance != 1 and not getattr(batch.prepare, "adapts", False):
        raise UserError(
            f"--adapter-guidance {settings.adapter_guidance:g} has no effect without a LoRA that "
            "changes a network; add --lora or leave it out"
        )
    if mask is None and family.inpainting:
        raise UserError("an inpainting model needs a mask of what it is to paint (--mask)")
    if settings.negative and family.distilled_guidance:
        raise UserError(
            "a negative prompt has no effect on a guidance-distilled model; leave it out"
        )


def encode_masked_image(family: Family, pixels: Tensor, mask: Tensor) -> Tensor:
    """[b, 1 + c, h, w] inputs of an inpainting denoiser in addition to x_t.

    They are the mask on the latent grid (nearest) and the latents of the image with a grey hole.
    """
    mask = mask.to(pixels)
    latents = family.encode_images(pixels * (mask < 0.5))[0]
    return torch.cat([latent_mask(mask, latents), latents], dim=1)


def latent_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """[b, 1, h, w] a mask of pixels on the grid of the latents (nearest, as diffusers)."""
    return F.interpolate(mask, latents.shape[-2:], mode="nearest").to(latents)


def random_hole_masks(keys: RandomKeys, height: int, width: int) -> Tensor:
    """[b, 1, h, w] random masks for training an inpainting model, 1 = hole.

    8 to 32 rectangles with sides of 1/32 to 1/4 of the image's, or (probability 1/4) everything.
    The distribution of cloneofsimo's lora_pti (16 to 128 of 512 pixels), keyed by example and
    visit.
    """
    uniform = keys.uniform("holes", (33, 4))
    masks = torch.zeros(len(uniform), 1, height, width)
    for mask, (first, *rectangles) in zip(masks, uniform.tolist()):
        if first[0] < 0.25:
            mask.fill_(1)
            continue
        count = 8 + int(first[1] * 25)
        for y, x, h, w in rectangles[:count]:
            rows, columns = _hole_side(height, h), _hole_side(width, w)
            top, left = int(y * (height - rows + 1)), int(x * (width - columns + 1))
            mask[:, top : top + rows, left : left + columns] = 1
    return masks


def _hole_side(side: int, fraction: float) -> int:
    """Pixels from 1/32 (fraction 0) to 1/4 (fraction 1) of an image's side."""
    return round(side * (1 / 32 + fraction * (1 / 4 - 1 / 32)))


def _step_noise(seeds: Sequence[int], shape: tuple[int, ...], device: Any) -> sampling.StepNoise:
    """Noise of each sampler step, per seed, from other generators than the start noise."""
    generators = [torch.Generator().manual_seed(seed + 2**31) for seed in seeds]

    def step_noise(_step: int) -> Tensor:
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(rows).to(device)

    return step_noise
