"""Probes of the options of images, captions, masks, class images and noise."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.config import Config, NoiseConfig, Stage
from lora_core.data.buckets import bucket_sizes
from lora_core.data.dataset import ImageDataset
from lora_core.data.images import covering_size
from lora_core.data.records import Record
from lora_core.diffusion import densities, generation, losses, noise
from lora_core.diffusion.masked_losses import MASK_SCALES
from lora_core.diffusion.noise import NoiseLevel, RandomKeys
from lora_core.settings import ImageSettings
from lora_core.shared_paths import lies_within
from lora_core.text import normalize_unicode
from training.inputs.subsets import has_class_subset
from training.probes.first_step import FirstStep, Probe

RARE = 1e-9  # probability at which chance explains nothing
MOST_DRAWS = 4096  # of a probe
VISITS = 32  # to images: an option that half of the visits show is missed in 2^-32

# ---------------------------------------------------------------- images and captions


def changes_pixels(option: str) -> Probe:
    """Whether visits to some image have other pixels than with the option's default."""

    def probe(first: FirstStep) -> bool | None:
        training = first.data.training
        usual = replace(training.settings, **{option: _default(ImageSettings, option)})
        draws = 0
        for record, size in zip(training.records[:VISITS], training.sizes):
            if not _can_show(option, training.settings, record, size):
                continue
            bare = replace(record, mask_path=None, use_alpha=False, loser=None)
            own, other = (
                ImageDataset([bare], settings, seed=training.seed)
                for settings in (training.settings, usual)
            )
            for visit in range(training.settings.variants or VISITS):
                pixels, without = own.example(0, visit).pixels, other.example(0, visit).pixels
                if not torch.equal(pixels, without):
                    return True
                draws += _can_show_pixels(option, without)
                if draws >= VISITS:
                    return False
                if not draws and visit:  # an image of one color, or the mirror image of itself
                    break
        return False if draws and option in ("interpolation", "jitter") else None

    return probe


def repeats_pixels(first: FirstStep) -> bool | None:
    """--data.variants: whether an image has the same pixels again after so many visits."""
    training = first.data.training
    record = replace(training.records[0], mask_path=None, use_alpha=False, loser=None)
    own = ImageDataset([record], training.settings, seed=training.seed)
    pixels = (own.example(0, visit).pixels for visit in (0, training.settings.variants))
    return torch.equal(*pixels)


def _can_show(option: str, settings: ImageSettings, record: Record, size: tuple[int, int]) -> bool:
    """Whether an image is resized or has a margin to crop, for the options that need that."""
    covering = covering_size(record.size, size)
    if option == "interpolation":
        return record.size != covering or settings.zoom > 1
    if option == "zoom":  # half of all visits are larger, by a whole pixel
        return any(round(side * (1 + settings.zoom) / 2) > side for side in size)
    return option != "crop" or settings.zoom > 1 or covering != size


def _can_show_pixels(option: str, pixels: Tensor) -> bool:
    """Whether an image [c, h, w] changes when it is mirrored, shifted, enlarged or recolored."""
    if option == "flip":
        return not torch.equal(pixels, pixels.flip(2))
    if option in ("crop", "zoom"):  # along both sides: its margin may be at any
        return all(bool((pixels != pixels.roll(1, axis)).any()) for axis in (1, 2))
    return bool((pixels.flatten(1).std(1) > 0).any())


def has_resolution(first: FirstStep) -> bool:
    """--data.resolution: whether the batch has images of that side, or in buckets of its area."""
    height, width = first.batch.pixels.shape[-2:]
    side = first.config.data.resolution
    if first.config.data.buckets and not first.config.data.bucket_upscale:
        return height * width <= side**2
    if first.config.data.buckets:
        return side / 2 <= math.sqrt(height * width) <= 2 * side
    return (height, width) == (side, side)


def has_buckets(first: FirstStep) -> bool | None:
    """--data.buckets: whether some size is no square, unless all images are."""
    training = first.data.training
    if any(h != w for h, w in training.sizes):
        return True
    s = training.settings
    step, side = s.bucket_step, s.resolution
    listed = bucket_sizes(side, step, s.bucket_min, s.bucket_max)
    if not s.bucket_upscale or all(h == w for h, w in listed):
        return None
    for record in training.records:
        root = math.sqrt(record.size[0] / record.size[1])
        if abs(root - 1 / root) * side >= 2 * step:  # its own bucket is no square
            return False
    return None


def has_bucket_step(first: FirstStep) -> bool:
    """--data.bucket-step: whether the sides are its multiples."""
    step = first.config.data.bucket_step
    return all(h % step == 0 and w % step == 0 for h, w in first.data.training.sizes)


def has_shortest_side(first: FirstStep) -> bool:
    """--data.bucket-min: whether no side is shorter."""
    step = first.config.data.bucket_step
    shortest = first.config.data.bucket_min // step * step
    return all(min(size) >= shortest for size in first.data.training.sizes)


def has_longest_side(first: FirstStep) -> bool:
    """--data.bucket-max: whether no side is longer."""
    step = first.config.data.bucket_step
    longest = -(-first.config.data.bucket_max // step) * step
    return all(max(size) <= longest for size in first.data.training.sizes)


def keeps_sizes(first: FirstStep) -> bool:
    """--data.no-bucket-upscale: whether no image is cut to more than it has."""
    training = first.data.training
    pairs = zip(training.records, training.sizes, strict=True)
    return all(r.size[0] >= size[0] and r.size[1] >= size[1] for r, size in pairs)


def has_repeats(first: FirstStep) -> bool:
    """--data.repeats: whether an epoch has each image that often; class images in a subset are as
    many as the others, and other subsets may have repeats of their own.
    """
    counts = Counter(r.path for r in first.data.training.records if not r.is_prior)
    if any(subset.repeats is not None for subset in first.config.data.subsets):
        return max(counts.values()) >= first.config.data.repeats
    return min(counts.values()) >= first.config.data.repeats


def has_losers(first: FirstStep) -> bool:
    """--data.pairs: whether half of the batch are losers."""
    losers = first.batch.is_loser
    return losers is not None and 2 * int(losers.sum()) == len(losers)


def uses_caption(first: FirstStep) -> bool:
    """--data.caption: whether some image has it, by itself or in a template."""
    text = normalize_unicode(first.config.data.caption)
    captions = chain.from_iterable(record.captions for record in first.data.training.records)
    return any(text in caption for caption in captions)


def reads_shards(first: FirstStep) -> bool:
    """--data.streaming: whether the images are read where the dataset has them: in its shards, or
    as files of its folder.
    """
    source = Path(first.config.data.dataset)
    records = first.data.training.records
    return all(r.stored is not None or lies_within(r.path, source) for r in records)


def drops_captions(first: FirstStep) -> bool | None:
    """--data.caption-dropout: whether some visit of enough drops its caption."""
    training = first.data.training
    draws = enough_draws(first.config.data.caption_dropout)
    for i in range(draws or 0):
        visit, index = divmod(i, len(training))
        if training.drops_caption(index, training.visit(index, visit)):
            return True
    return False if draws else None


def drops_as_asked(first: FirstStep) -> bool:
    """--data.dropped: whether dropped captions are zeros or not."""
    return first.source.captions.zeroes_dropped == (first.config.data.dropped == "zeros")


def enough_draws(p: float) -> int | None:
    """Draws after which an event of probability p has happened, but for RARE; None: too many."""
    draws = math.ceil(math.log(RARE) / math.log1p(-p))
    return draws if draws <= MOST_DRAWS else None


def fills_cache(first: FirstStep) -> bool:
    """--data.cache: whether latents are kept in the folder, and rows of tensors are there."""
    folder = Path(first.config.data.cache)
    is_used = first.source.latents.posteriors.folder == folder
    return is_used and any(folder.rglob("*.safetensors"))


# ---------------------------------------------------------------- masks and class images


def weights_by_mask(first: FirstStep) -> bool | None:
    """--data.masks: whether the weights of the loss are uneven where the masks are, and the loss
    follows them.
    """
    drawn = first.batch.mask
    if first.config.data.mask_use == "hole":
        return first.inputs[0].inpaint is not None
    if drawn is None:
        return False
    if not _is_uneven(drawn):
        return None
    parts = [x for x in first.inputs if x.mask is not None and _is_uneven(x.mask)]
    if not parts:
        return False
    if not first.can_compare:
        return True
    x = first.inputs[-1]
    whole = replace(x, mask=None, unweighted_mask=None)
    other = first.losses(losses.mse, inputs=whole)
    return True if x is not parts[-1] else not torch.equal(first.mse, other)


def uses_mask_as_hole(first: FirstStep) -> bool | None:
    """--data.mask-use: whether an image's mask is the hole that the model paints, and weights the
    loss in addition only with "both".
    """
    x, drawn = first.inputs[0], first.micro_batch.mask
    if drawn is None:
        return None
    if x.inpaint is None or (x.mask is None) == (first.config.data.mask_use == "both"):
        return False
    has_edge = drawn.flatten(1).amin(1) == 0  # an image without a mask has a random hole
    holes = generation.latent_mask(drawn, x.x0).cpu()
    return torch.equal(x.inpaint[:, :1].cpu()[has_edge], holes[has_edge])


def scales_masked_loss(first: FirstStep) -> bool | None:
    """--mask-scale: whether weights or factor differ from those of "mean"."""
    x = first.inputs[-1]
    drawn = x.mask if x.unweighted_mask is None else x.unweighted_mask
    if drawn is None or x.mask is None or not _is_uneven(drawn):
        return None
    usual = MASK_SCALES["mean"].weights(drawn, first.stage.mask_temperature)
    if not torch.equal(x.mask, usual):
        return True
    factor = MASK_SCALES[first.config.mask_scale].factor(x.mask, x.x0.shape[1])
    return not bool((factor == 1).all())


def sharpens_mask(first: FirstStep) -> bool | None:
    """--stages.I.mask-temperature: whether the weights differ from those at 1."""
    x = first.inputs[-1]
    drawn = x.mask if x.unweighted_mask is None else x.unweighted_mask
    if drawn is None or x.mask is None or not _is_uneven(drawn):
        return None
    if bool(((drawn == 0) | (drawn == 1)).all()):  # no power changes it
        return None
    usual = MASK_SCALES[first.config.mask_scale].weights(drawn, 1.0)
    return not torch.equal(x.mask, usual)


def _is_uneven(mask: Tensor) -> bool:
    """Whether some image's mask has values between 0 and 1 or of both kinds."""
    flat = mask.flatten(1)
    return bool(((flat.amax(1) - flat.amin(1)) > 0).any())


def has_class_images(first: FirstStep) -> bool:
    """--prior.prompt: whether half of the batch are class images."""
    return 2 * int(first.batch.is_prior.sum()) == len(first.batch.is_prior)


def has_enough_class_images(first: FirstStep) -> bool:
    """--prior.count: whether there are so many."""
    images = first.data.class_images
    return images is not None and len(images) >= first.config.prior.count


def reads_class_folder(first: FirstStep) -> bool:
    """--prior.images: whether the class images are in that folder."""
    images, folder = first.data.class_images, Path(first.config.prior.images).resolve()
    return images is not None and all(
        record.path.resolve().is_relative_to(folder) for record in images.records
    )


def weights_class_images(first: FirstStep) -> bool | None:
    """--prior.weight: whether the sum of losses differs from that of weight 1. None for a batch
    without any of the class images of a subset.
    """
    is_prior = first.batch.is_prior
    if has_class_subset(first.config) and not bool(is_prior.any()):
        return None
    ones = torch.ones(len(is_prior), dtype=torch.float64)
    weight = first.config.prior.weight
    own, usual = (
        losses.sum_losses(ones, is_prior, prior_weight=w, instances=1) for w in (weight, 1.0)
    )
    return bool(own != usual)


# ---------------------------------------------------------------- noise and its levels


def changes_noise(option: str) -> Probe:
    """Whether the step's noise is another than with the option's default."""

    def probe(first: FirstStep) -> bool:
        usual = replace(first.config.noise, **{option: _default(NoiseConfig, option)})
        return not _is_noise_of(first, first.keys, usual)

    return probe


def draws_from_seed(first: FirstStep) -> bool:
    """--seed: whether the step's noise is that of the seed, and not that of the default."""
    n, usual = first.config.noise, replace(first.keys, seed=Config().seed)
    return _is_noise_of(first, first.keys, n) and not _is_noise_of(first, usual, n)


def _is_noise_of(first: FirstStep, keys: RandomKeys, settings: NoiseConfig) -> bool:
    """Whether the noise of the first micro-batch is that of these keys and settings."""
    x = first.inputs[0]
    other = noise.sample_noise(keys, tuple(x.x0.shape[1:]), settings, x.x0)
    own = x.eps.cpu(), x.eps_in.cpu()
    return all(torch.equal(a, b.to(a.dtype)) for a, b in zip(own, other))


def changes_levels(option: str) -> Probe:
    """Whether the noise levels are others than with the option's default: those of the step, and,
    where both would be the same there, those of many draws. A stage with a bound of its own cannot
    show that of all stages, and its own may be the same one.
    """

    def probe(first: FirstStep) -> bool | None:
        n, stage = first.config.noise, first.stage
        bound = option.removeprefix("stages.")
        if bound in ("low", "high"):
            own_bound, common = getattr(stage, bound), getattr(n, bound)
            if own_bound is not None and (own_bound == common or option == bound):
                return None
        usual, usual_stage = n, stage
        if option.startswith("stages."):
            usual_stage = replace(stage, low=None if option == "stages.low" else stage.low)
            usual_stage = replace(usual_stage, high=None if option == "stages.high" else stage.high)
        else:
            usual = replace(n, **{option: _default(NoiseConfig, option)})
            if option == "density":
                usual = replace(usual, density_args={})
        keys = first.keys
        own, other = _levels(first, keys, n, stage), _levels(first, keys, usual, usual_stage)
        if not torch.equal(own.sigma, other.sigma):
            return not torch.equal(first.inputs[0].level.sigma.cpu(), other.sigma.cpu())
        many = RandomKeys(first.config.seed, ("",) * 256, tuple(range(256)))
        own, other = _levels(first, many, n, stage), _levels(first, many, usual, usual_stage)
        return not torch.equal(own.sigma, other.sigma)

    return probe


def changes_density(first: FirstStep) -> bool | None:
    """--noise.density-args: whether they change the noise levels, unless they are the defaults."""
    n = first.config.noise
    function = densities.DENSITIES.get(n.density)
    if function is None or not differing_arguments(function, n.density_args):
        return None
    return changes_levels("density_args")(first)


def _levels(first: FirstStep, keys: RandomKeys, n: NoiseConfig, stage: Stage) -> NoiseLevel:
    """The levels that a step with these options draws."""
    family, x0 = first.model.family, first.inputs[0].x0
    schedule = family.schedule
    if n.dynamic_shift:
        schedule = family.schedule_at(x0.shape[-2], x0.shape[-1])
    density = None
    if n.density != "uniform":
        density = densities.bind_density(n.density, **n.density_args)
    return noise.sample_levels(
        schedule,
        keys,
        low=n.low if stage.low is None else stage.low,
        high=n.high if stage.high is None else stage.high,
        density=density,
        shift=n.shift,
    )


def ends_in_noise(first: FirstStep) -> bool:
    """--noise.zero-terminal-snr: whether the last level is noise alone."""
    return float(first.model.family.schedule.alphas[-1]) == 0


# ---------------------------------------------------------------- defaults


def differing_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not at the function's defaults."""
    parameters = inspect.signature(function).parameters
    return {
        name: value
        for name, value in given.items()
        if name not in parameters or parameters[name].default != value
    }


def _default(settings: type, option: str) -> Any:
    own = next(f for f in fields(settings) if f.name == option)
    return own.default_factory() if callable(own.default_factory) else own.default
