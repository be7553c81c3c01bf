"""Inputs of a training step: latents, noise and its level, captions, image sizes. They are made on
the host, keyed by image and visit, and copied to the device before the step begins.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core import distributed
from lora_core.adapters import injection
from lora_core.config import Config, Stage
from lora_core.data.cache import TensorCache
from lora_core.data.dataset import Batch, Record, every_image, micro_batches
from lora_core.diffusion import densities, generation, noise
from lora_core.diffusion.masked_losses import MASK_SCALES
from lora_core.diffusion.noise import NoiseLevel, RandomKeys
from lora_core.diffusion.step_output import CaptionTokens, Readings
from lora_core.errors import UserError
from lora_core.family import Conditioning, Sizes
from lora_core.layer_prompts import encode_layer_prompts, split_prompts
from lora_core.placeholders import Placeholder, Prompt, bind_layers
from lora_core.runs.run_folder import nonfinite_names
from lora_core.tokens import ordinary_words
from training import model_checks
from training.caption_tokens import CaptionReader
from training.cuda_graph import map_tensors, tree_tensors
from training.setup import Data, Model

# image (Batch.image_keys), visit up to repetition, (h, w)
PixelKey = tuple[str, int, torch.Size]


@dataclass(frozen=True)
class TokenIds:
    """Token ids of captions, encoded in each step where a text encoder or tokens train."""

    ids: dict[str, Tensor]  # tokenizer's output -> [texts, ...], as family.encode takes it
    kept: Tensor | None  # [b] 0 in the rows of dropped captions that zeros replace, else 1
    # [b, layers] number of the text that a cross-attention layer reads; None: text i for image i
    layers: Tensor | None = None


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one micro-batch, all tensors on the device."""

    x0: Tensor  # [b, c, h, w] sampled from the VAE's posterior
    eps: Tensor  # [b, c, h, w] the noise in the target
    eps_in: Tensor  # [b, c, h, w] the noise in x_t (with input perturbation other than eps)
    level: NoiseLevel  # [b] each
    mask: Tensor | None  # [b, 1, h, w] in [0, 1], the loss weights of --mask-scale
    inpaint: Tensor | None  # [b, 1 + c, h, w] mask and masked latents, for an inpainting model
    text: Conditioning | TokenIds  # encoded, unless a text encoder or tokens train
    sizes: Sizes  # with `values` on the device where the denoiser embeds them
    is_prior: Tensor  # [b] bool, class images of prior preservation
    dropout_keys: Tensor | None  # [b] int64, keys of the adapters' dropout
    step: Tensor  # [] int64, for the adapters' dropout
    number: int  # of the step, from 0; in a replayed step that of the capture
    caption_tokens: CaptionTokens
    # With --prior.swap: the captions with classes in place of the placeholder words, and the
    # conditioning of the base model for them.
    swapped: tuple[Conditioning | TokenIds, Conditioning] | None
    # With --prior.outside-mask: the base model's conditioning for the captions in ordinary words.
    plain: Conditioning | None = None
    # [b, 1, h, w] the masks that `mask` was made of, where it is not the same
    unweighted_mask: Tensor | None = None
    readings: Readings = field(default_factory=dict)  # what the loss logs in this step
    # [b] bool of pairs, whose rows are winner, loser, winner, loser ...
    is_loser: Tensor | None = None


class InputSource:
    """Source of the inputs of a run's steps, with caches: latents of images whose pixels repeat,
    and captions that were encoded or tokenized before.
    """

    def __init__(
        self, config: Config, data: Data, model: Model, *, reads_attention: bool = False
    ) -> None:
        self.config, self.data, self.model = config, data, model
        self.caption_reader = None
        if reads_attention:
            self.caption_reader = CaptionReader(data, model, keeps_text=not config.cuda_graph)
        self.records: dict[str, Record] = {}
        for folder in filter(None, (data.training, data.class_images)):
            self.records |= {record.key: record for record in every_image(folder.records)}
        # forward passes of a step in this process
        self.passes = -(-config.passes_per_step // distributed.process_count())
        n = config.noise
        self.density = None  # uniform
        if n.density != "uniform":
            self.density = densities.bind_density(n.density, **n.density_args)
        settings = data.training.settings
        # Visits after which an image has the same pixels again; 0: never.
        self.visits_until_repeat = settings.variants if settings.is_random else 1
        a = config.adapter
        self.has_dropout = bool(a.dropout or a.rank_dropout or a.module_dropout)
        cache = config.data.cache
        made_by = vae_fingerprint(model.family.modules["vae"]) if cache else {}
        self.zeroes_dropped = model_checks.drops_to_zeros(config, model.family)
        self.latents = TensorCache(made_by, cache or None)  # row of a PixelKey: mean and std
        # row of a PixelKey with a mask of its own as the hole: an inpainting model's input
        self.holes = TensorCache({**made_by, "hole": "mask"}, cache or None)
        self.encoded: dict[str, Conditioning] = {}  # caption -> encoding in this stage
        self.base_encoded: dict[str, Conditioning] = {}  # caption -> encoding without adapters
        self.tokenized: dict[Prompt, dict[str, Tensor]] = {}  # bound text -> token ids [1, ...]
        self.bound: dict[str, Prompt] = {}  # caption -> its text, or one for each layer
        self.has_layer_tokens = any(p.layers for p in model.placeholders)
        self.stream: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self.stream = torch.cuda.Stream(model.device)

    def begin_stage(self) -> None:
        """Drop the encodings that were made with the parameters before this stage."""
        self.encoded.clear()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))


def make_step_inputs(
    source: InputSource, batch: Batch, stage: Stage, number: int, *, check: bool
) -> list[StepInputs]:
    """The inputs of each micro-batch of step `number`. On a GPU they are made on a stream of their
    own, while earlier steps are still computed. With `check`, which waits for the device, new
    latents must be finite.
    """
    with on_side_stream(source.stream, source.model.device) as made:
        parts = [batch]
        if source.passes > 1:
            parts = list(micro_batches(batch, source.passes))
        for micro in parts:
            made.append(_make_inputs(source, micro, stage, number, check=check))
    return made


@contextmanager
def on_side_stream(
    stream: torch.cuda.Stream | None, device: torch.device
) -> Iterator[list[StepInputs]]:
    """A list to fill inside the block, on `stream`; the current stream waits for it afterwards."""
    made: list[StepInputs] = []
    if stream is None:
        yield made
        return
    main = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        yield made
    main.wait_stream(stream)
    for tensor in tree_tensors(made):
        tensor.record_stream(main)


def _make_inputs(
    source: InputSource, batch: Batch, stage: Stage, number: int, *, check: bool
) -> StepInputs:
    """Inputs of one micro-batch. Randomness is keyed by image and visit, so that an example does
    not depend on the others in its batch.
    """
    config, device = source.config, source.model.device
    keys = RandomKeys(config.seed, batch.keys, batch.visits)
    mean, std = _posterior(source, batch, check=check)
    normal = keys.normal("posterior", tuple(mean.shape[1:]))
    x0 = mean + std * to_device(normal, device, mean.dtype)
    eps, eps_in = noise.sample_noise(keys, tuple(x0.shape[1:]), config.noise)
    eps_on_device = to_device(eps, device, x0.dtype)
    level = _sample_levels(source, keys, stage, x0)
    height, width = batch.pixels.shape[-2:]
    sizes = Sizes(batch.original_sizes, batch.crops, (height, width))
    if source.model.family.embeds_sizes:
        sizes = sizes._replace(values=to_device(sizes.to_tensor("cpu"), device))
    mask = drawn = inpaint = dropout_keys = swapped = plain = None
    if batch.mask is not None and config.data.mask_use != "hole":
        drawn = _shrink_mask(batch.mask, x0)
        mask = MASK_SCALES[config.mask_scale].weights(drawn, stage.mask_temperature)
    if source.model.family.inpainting:
        inpaint = _inpainting_input(source, batch, keys)
    if source.has_dropout:
        dropout_keys = to_device(keys.hashes("dropout"), device)
    if config.prior.swap:
        swapped = _swapped_text(source, batch, stage)
    if config.prior.outside_mask:
        plain = _plain_text(source, batch)
    caption_tokens = CaptionTokens(() if config.cuda_graph else tuple(batch.captions))
    if source.caption_reader is not None:
        read = source.caption_reader.read(batch.captions)
        caption_tokens = map_tensors(read, functools.partial(to_device, device=device))
    return StepInputs(
        x0=x0,
        eps=eps_on_device,
        eps_in=eps_on_device if eps_in is eps else to_device(eps_in, device, x0.dtype),
        level=NoiseLevel(
            t=to_device(level.t, device),
            alpha=to_device(level.alpha, device),
            sigma=to_device(level.sigma, device),
        ),
        mask=mask,
        inpaint=inpaint,
        text=_make_text(source, batch, stage),
        sizes=sizes,
        is_prior=to_device(batch.is_prior, device),
        dropout_keys=dropout_keys,
        step=torch.full((), number, dtype=torch.int64, device=device),
        number=number,
        swapped=swapped,
        caption_tokens=caption_tokens,
        plain=plain,
        unweighted_mask=None if mask is drawn else drawn,
        is_loser=None if batch.is_loser is None else to_device(batch.is_loser, device),
    )


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device; from pinned memory to a GPU, so that the host need not wait."""
    x = x if dtype is None else x.to(dtype)
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _sample_levels(source: InputSource, keys: RandomKeys, stage: Stage, x0: Tensor) -> NoiseLevel:
    """[b] noise levels on the CPU, in the range and with the density of the stage."""
    n, family = source.config.noise, source.model.family
    schedule = family.schedule
    if n.dynamic_shift:
        schedule = family.schedule_at(x0.shape[-2], x0.shape[-1])
    return noise.sample_levels(
        schedule,
        keys,
        low=n.low if stage.low is None else stage.low,
        high=n.high if stage.high is None else stage.high,
        density=source.density,
        shift=n.shift,
    )


# ---------------------------------------------------------------- latents


@torch.no_grad()
def _posterior(source: InputSource, batch: Batch, *, check: bool) -> tuple[Tensor, Tensor]:
    """Mean and std [b, c, h, w] of the latents; from the cache for pixels that repeat."""
    period, device = source.visits_until_repeat, source.model.device
    if not period:
        return _encode_images(source, batch, check=check or source.config.vae_precision == "fp16")
    rows = source.latents.rows
    means, stds = [], []
    for i, (image, visit) in enumerate(zip(batch.image_keys, batch.visits)):
        key = image, visit % period, batch.pixels.shape[-2:]
        if key not in rows:
            _cache_posterior(source, batch, i, key)
        means.append(rows[key]["mean"])
        stds.append(rows[key]["std"])
    return to_device(torch.stack(means), device), to_device(torch.stack(stds), device)


def _cache_posterior(source: InputSource, batch: Batch, i: int, key: PixelKey) -> None:
    """Put the mean and std [c, h, w] of image i of the batch, from the disk or by the VAE, into the
    cache.
    """
    family = source.model.family
    height, width = batch.pixels.shape[-2:]
    record, visit = source.records[key[0]], batch.visits[i]
    name = source.data.training.cache_key(record, visit, (height, width))
    shape = (family.latent_channels, height // family.factor, width // family.factor)

    def encode() -> dict[str, Tensor]:
        mean, std = _encode_images(source, batch.rows(slice(i, i + 1)), check=True)
        return {"mean": mean[0], "std": std[0]}

    source.latents.row(key, encode, {"mean": shape, "std": shape}, disk_key=name)


def _encode_images(source: InputSource, batch: Batch, *, check: bool) -> tuple[Tensor, Tensor]:
    """Mean and std of the latents by the VAE. Raises UserError for NaN and infinity."""
    mean, std = source.model.family.encode_images(batch.pixels)
    if not check:
        return mean, std
    finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1).tolist()
    if all(finite):
        return mean, std
    precision = source.config.vae_precision
    if precision == "fp16":
        raise UserError(
            "the VAE overflows in fp16 on these images; leave --vae-precision at fp32, "
            "or give a VAE made for fp16 with --vae"
        )
    path = source.records[batch.image_keys[finite.index(False)]].path
    raise UserError(
        f"the VAE gives NaN or infinity for {path} in {precision}: its weights are damaged; "
        "give another --vae"
    )


def _shrink_mask(mask: Tensor, x0: Tensor) -> Tensor:
    """[b, 1, h, w] the area means of masks on the grid of the latents."""
    return to_device(F.interpolate(mask, x0.shape[-2:], mode="area"), x0.device, x0.dtype)


@torch.no_grad()
def _inpainting_input(source: InputSource, batch: Batch, keys: RandomKeys) -> Tensor:
    """[b, 1 + c, h, w] inpainting masks and the masked latents.

    The masks are random rectangles or, with --data.mask-use hole or both, those of the images;
    class images and other images without a mask get random ones then, too.
    """
    given = [False] * len(batch.keys)
    if source.config.data.mask_use != "loss":
        given = [source.records[key].has_mask for key in batch.keys]
    holes = generation.random_hole_masks(keys, *batch.pixels.shape[-2:])
    if batch.mask is not None:
        holes = torch.where(torch.tensor(given).view(-1, 1, 1, 1), batch.mask, holes)
    period = source.visits_until_repeat
    if not period or not any(given):
        return _encode_hole(source, batch.pixels, holes)
    parts = []
    for i, (image, visit) in enumerate(zip(batch.keys, batch.visits)):
        pixels, hole = batch.pixels[i : i + 1], holes[i : i + 1]
        if not given[i]:
            parts.append(_encode_hole(source, pixels, hole))
            continue
        key = image, visit % period, batch.pixels.shape[-2:]
        if key not in source.holes.rows:
            _cache_hole(source, key, visit, pixels, hole)
        parts.append(to_device(source.holes.rows[key]["input"], source.model.device)[None])
    return torch.cat(parts)


def _encode_hole(source: InputSource, pixels: Tensor, hole: Tensor) -> Tensor:
    """[b, 1 + c, h, w] the masks on the grid of the latents, and the latents around them."""
    family, device = source.model.family, source.model.device
    pixels, hole = to_device(pixels, device), to_device(hole, device)
    return generation.encode_masked_image(family, pixels, hole)


def _cache_hole(
    source: InputSource, key: PixelKey, visit: int, pixels: Tensor, hole: Tensor
) -> None:
    """Put the input [1 + c, h, w] of an image with its own hole into the cache."""
    family = source.model.family
    image, _, (height, width) = key
    name = source.data.training.cache_key(source.records[image], visit, (height, width))
    shape = (1 + family.latent_channels, height // family.factor, width // family.factor)
    source.holes.row(
        key,
        lambda: {"input": _encode_hole(source, pixels, hole)[0]},
        {"input": shape},
        disk_key=name,
    )


# ---------------------------------------------------------------- captions


def _make_text(source: InputSource, batch: Batch, stage: Stage) -> Conditioning | TokenIds:
    """The captions with their placeholders replaced by tokens: encoded, or as token ids where a
    text encoder or tokens train in this stage.
    """
    kept = _kept_captions(source, batch) if source.zeroes_dropped else None
    if "text_encoder" not in stage.groups and "tokens" not in stage.groups:
        cond = _encode(source, batch.captions, source.encoded, source.model.placeholders)
        return cond if kept is None else cond.zeroed(source.model.family.zeros, kept)
    prompts: list[Prompt] = []
    for caption in batch.captions:
        if caption not in source.bound:
            source.bound[caption] = bind_layers(caption, source.model.placeholders)
        prompts.append(source.bound[caption])
    texts: Sequence[Prompt] = prompts
    layers = None
    if source.has_layer_tokens:  # a CUDA graph needs the same number of texts in each step
        texts, layers = split_prompts(prompts, distinct=not source.config.cuda_graph)
    ids: dict[str, list[Tensor]] = {}  # tokenizer's output -> a row for each text
    for text in texts:
        if text not in source.tokenized:
            assert isinstance(text, str)
            source.tokenized[text] = source.model.family.tokenize([text])
        for name, row in source.tokenized[text].items():
            ids.setdefault(name, []).append(row)
    rows = dict(zip(ids, map(torch.cat, ids.values())))
    if layers is None:
        return TokenIds(rows, kept)
    return TokenIds(rows, kept, to_device(torch.tensor(layers), source.model.device))


def _swapped_text(
    source: InputSource, batch: Batch, stage: Stage
) -> tuple[Conditioning | TokenIds, Conditioning]:
    """The captions with classes in place of the placeholder words: as `_make_text` for the model
    with adapters, and encoded by the base model.
    """
    swap = source.config.prior.swap
    captions = [model_checks.swap_words(caption, swap) for caption in batch.captions]
    swapped = replace(batch, captions=captions)
    return _make_text(source, swapped, stage), _encode_without_adapters(source, swapped)


def _plain_text(source: InputSource, batch: Batch) -> Conditioning:
    """The captions in ordinary words as the base model encodes them."""
    words = ordinary_words(source.model.placeholders) | source.config.prior.swap
    captions = []
    for caption in batch.captions:
        captions.append(" ".join(model_checks.swap_words(caption, words).split()))
    return _encode_without_adapters(source, replace(batch, captions=captions))


def _encode_without_adapters(source: InputSource, batch: Batch) -> Conditioning:
    """The captions as the base model encodes them."""
    model = source.model
    with ExitStack() as stack:
        for encoder in model.encoders.values():
            stack.enter_context(injection.disable_adapters(encoder))
        cond = _encode(source, batch.captions, source.base_encoded, ())
    if source.zeroes_dropped:
        cond = cond.zeroed(model.family.zeros, _kept_captions(source, batch))
    return cond


def _kept_captions(source: InputSource, batch: Batch) -> Tensor:
    """[b] 0 for examples whose caption was dropped, else 1."""
    kept = torch.tensor([float(not dropped) for dropped in batch.dropped])
    return to_device(kept, source.model.device)


def _encode(
    source: InputSource,
    captions: Sequence[str],
    known: dict[str, Conditioning],
    placeholders: Sequence[Placeholder],
) -> Conditioning:
    """The encodings of the captions, cached in `known`. Raises UserError for NaN."""
    model = source.model
    for caption in captions:
        if caption not in known:
            prompt = bind_layers(caption, placeholders)
            with model.evaluating():
                cond = encode_layer_prompts(model.family.encode_prompts, [prompt])
            if nonfinite_names({"prompt": cond.prompt_embeds, **cond.extra}):
                raise UserError(
                    f"the text encoder gives NaN or infinity for the prompt {caption!r} in "
                    f"{source.config.precision}: its weights are damaged or its numbers overflow; "
                    "use --precision bf16 or fp32, or fetch the model again"
                )
            known[caption] = cond
    return Conditioning.cat([known[caption] for caption in captions])


def vae_fingerprint(vae: nn.Module) -> Mapping[str, str]:
    """Settings of a latent cache on the disk: a hash of the encoding weights, so that a
    retrained VAE at the same path does not get old latents.
    """
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in vae.state_dict().items():
        numbers = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        content.update(name.encode() + str(tensor.dtype).encode() + numbers)
    return {"vae": content.hexdigest()}
