"""Inputs of a training step: latents, noise and its level, captions, image sizes. They are made on
the host, keyed by image and visit, and copied to the device before the step begins.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core import distributed
from lora_core.config import Config, Stage
from lora_core.data.caption_tags import compose_caption
from lora_core.data.dataset import Batch, Record, micro_batches
from lora_core.data.step_visits import StepOrder, Visit
from lora_core.diffusion import densities, noise
from lora_core.diffusion.masked_losses import MASK_SCALES
from lora_core.diffusion.noise import NoiseLevel, RandomKeys
from lora_core.diffusion.step_output import CaptionTokens, Readings
from lora_core.family import Conditioning, Sizes
from lora_core.memory.residency import DENOISER, TEXT_ENCODERS, VAE, to_device
from lora_core.tensor_trees import map_tensors, tree_tensors
from training.inputs.caption_cache import CaptionCache, CaptionRows, TokenIds, trains_text
from training.inputs.caption_tokens import CaptionReader
from training.inputs.latent_cache import LatentCache, pixels_repeat_after
from training.setup import Data, Model

__all__ = ["InputSource", "StepInputs", "TokenIds", "make_step_inputs", "to_device"]


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
    image_keys: tuple[str, ...] = ()  # [b] of the records, for error messages
    is_checked: bool = False  # in a stage's first step


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
        # forward passes of a step in this process
        self.passes = -(-config.passes_per_step // distributed.process_count())
        n = config.noise
        self.density = None  # uniform
        if n.density != "uniform":
            self.density = densities.bind_density(n.density, **n.density_args)
        a = config.adapter
        self.has_dropout = bool(a.dropout or a.rank_dropout or a.module_dropout)
        self.latents = LatentCache(config, data, model)
        self.records = self.latents.records  # by key
        self.captions = CaptionCache(config, model)
        self.stream: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self.stream = torch.cuda.Stream(model.device)

    def begin_stage(self, stage: Stage, steps: range) -> None:
        """Drop the encodings that were made with the parameters before this stage. Where networks
        leave the device, encode what its steps read, and have those there that its steps call.
        """
        self.captions.begin_stage()
        residency = self.model.residency
        if residency.moves:
            residency.end_steps()
            visits = list_visits(self.config, self.data, steps)
            self.encode_ahead(visits, trains_text(stage))
            held = [DENOISER]
            if trains_text(stage):
                held.append(TEXT_ENCODERS)
            if self.latents.steps_encode(visits):
                held.append(VAE)
            residency.begin_steps(held)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))

    def encode_ahead(self, visits: Sequence[Visit], tokenizes: bool = False) -> None:
        """Encode what steps read of these examples, one network after the other, each of which
        leaves the device then; the captions not where steps tokenize them. Prints what each did.
        """
        captions = [] if tokenizes else list_captions(self.config, self.data, visits)
        tasks: list[tuple[str, str, Callable[[], int]]] = [
            (TEXT_ENCODERS, "caption", functools.partial(self.captions.encode_ahead, captions)),
            (VAE, "image", functools.partial(self.latents.encode_ahead, visits)),
        ]
        for part, noun, encode in tasks:
            began = time.perf_counter()
            if count := encode():
                seconds = time.perf_counter() - began
                work = f"{count:,} {noun}{'s' * (count != 1)} encoded in {seconds:.0f} s"
                self.model.residency.send_away([part], work)


def list_visits(config: Config, data: Data, steps: range) -> list[Visit]:
    """This process's examples of steps, one for each image, size, and visit up to repetition of its
    pixels; each visit of an image whose tags change from one to the next.
    """
    order = StepOrder(
        data.training,
        data.class_images,
        batch=config.images_per_step,
        seed=config.seed,
        share=distributed.process_slice(),
    )
    period = pixels_repeat_after(data)
    found: dict[Visit, Visit] = {}
    for step in steps:
        for visit in order.visits(step):
            number = visit.visit % period if period else 0
            if _record_of(data, visit).tags.varies:
                number = visit.visit
            found.setdefault(visit._replace(visit=number), visit)
    return list(found.values())


def list_captions(config: Config, data: Data, visits: Sequence[Visit]) -> list[str]:
    """The captions that these examples may have, dropped ones among them."""
    captions = [""] if config.data.caption_dropout else []
    for visit in visits:
        record = _record_of(data, visit)
        if record.tags.varies and not visit.is_prior:
            captions.append(data.training.caption(visit.record, visit.visit))
        else:
            captions += [compose_caption(text, record.tags) for text in record.captions]
    return list(dict.fromkeys(captions))


def _record_of(data: Data, visit: Visit) -> Record:
    images = data.class_images if visit.is_prior else data.training
    assert images is not None
    return images.records[visit.record]


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
    mean, std = source.latents.posterior(batch, check=check)
    rows = CaptionRows(batch.captions, batch.dropped)
    normal = keys.normal("posterior", tuple(mean.shape[1:]))
    x0 = mean + std * to_device(normal, device, mean.dtype)
    eps, eps_in = noise.sample_noise(keys, tuple(x0.shape[1:]), config.noise, x0)
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
        inpaint = source.latents.inpainting_input(batch, keys)
    if source.has_dropout:
        dropout_keys = to_device(keys.hashes("dropout"), device)
    if config.prior.swap:
        swapped = source.captions.swapped_text(rows, stage)
    if config.prior.outside_mask:
        plain = source.captions.plain_text(rows)
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
        text=source.captions.make_text(rows, stage),
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
        image_keys=batch.image_keys,
        is_checked=check,
    )


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


def _shrink_mask(mask: Tensor, x0: Tensor) -> Tensor:
    """[b, 1, h, w] the area means of masks on the grid of the latents."""
    return to_device(F.interpolate(mask, x0.shape[-2:], mode="area"), x0.device, x0.dtype)
