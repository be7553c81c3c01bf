"""Validation of a run: losses on its images at fixed timesteps and noise, and a table of the losses
before and after training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from lora_core import distributed
from lora_core.config import Config
from lora_core.data.dataset import Example, collate
from lora_core.diffusion import generation, validation
from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.validation import Score
from lora_core.family import Conditioning, Sizes
from lora_core.layer_prompts import encode_layer_prompts
from lora_core.placeholders import bind_layers
from lora_core.progress import ProgressBar
from training import step
from training.setup import Data, Model, Optimization

IMAGES_AT_ONCE = 64  # encoded together, where the text encoders leave the device after that
LEAST_CHANGE = 1e-3  # of the mean loss, of a run that learned something
BatchScores = Callable[[range], list[Score]]  # indices of images -> the scores of them all


class Scorer:
    """Scores the validation images, in batches of the training's size."""

    def __init__(
        self, config: Config, data: Data, model: Model, optimization: Optimization
    ) -> None:
        self.config, self.images = config, data.validation
        self.model, self.optimization = model, optimization
        self.latents: dict[int, Example] = {}  # image index -> its example, latents as pixels
        self.texts: dict[range, Conditioning] = {}  # batch -> its captions, of one validation
        self.blank: dict[int, Tensor] = {}  # images in a batch -> `repaint_all`

    def score(self, score_batch: BatchScores | None = None) -> list[Score]:
        """One score for each image, timestep and noise draw, with the moving average if there is
        one; sorted by draw and timestep, the images in order within each. The processes of a run
        share the batches.

        By the squared error of the network's output, or what `score_batch` measures.
        """
        batches: list[list[Score]] = []
        count = len(self.images)
        size = min(self.config.batch_size, count)
        firsts, at_once = range(0, count, size), max(1, IMAGES_AT_ONCE // size)
        with self.model.evaluating(), self.optimization.averaged(), ExitStack() as stack:
            own = distributed.take_share(firsts, even=self.config.shard)
            # The last batch is as large as the others: a GEMM's bits depend on its row count.
            ranges = [range(start, start + size) for start in (min(i, count - size) for i in own)]
            shown = stack.enter_context(ProgressBar("validation", len(ranges) * size, "image"))
            for number, (first, images) in enumerate(zip(own, ranges)):
                if number % at_once == 0 and self.model.residency.moves:
                    ahead = ranges[number : number + at_once]
                    self._encode_ahead(ahead, with_texts=score_batch is None)
                scores = (score_batch or self.score_images)(images)
                start = images.start
                kept = [score for i, score in enumerate(scores) if start + i % size >= first]
                batches.append(kept)
                shown.advance(size)
        self.texts.clear()
        every = distributed.gather_shares(batches)[: len(firsts)]
        found = list(itertools.chain(*every))
        return sorted(found, key=lambda score: (score.draw, score.bin))

    def score_images(self, images: range) -> list[Score]:
        """The scores of a batch of images, by index, with the weights as they are."""
        model, family = self.model, self.model.family
        batch = collate([self.encode_image(i) for i in images])
        side = self.images.settings.resolution
        sizes = Sizes(batch.original_sizes, batch.crops, (side, side))
        text = self.texts.get(images) or self._encode_captions(images)
        cond = family.add_size_embeddings(text, sizes, self.config.noise.guidance)
        inpaint = self.repaint_all(len(images))

        def denoise(x_t: Tensor, level: NoiseLevel, _rows: Tensor) -> Tensor:
            return step.denoise(model, x_t, level, cond, inpaint)

        v = self.config.validation
        return validation.score_latents(
            denoise,
            batch.pixels.to(model.device),
            batch.keys,
            family.schedule,
            family.prediction,
            bins=v.bins,
            draws=v.draws,
            seed=v.seed,
        )

    def repaint_all(self, count: int) -> Tensor | None:
        """[count, 1 + c, h, w] input of an inpainting model that sees nothing of the images; None
        of other models.
        """
        if not self.model.family.inpainting:
            return None
        if count not in self.blank:
            side = self.images.settings.resolution
            gray = torch.zeros(count, 3, side, side, device=self.model.device)
            hole = torch.ones_like(gray[:, :1])
            self.blank[count] = generation.encode_masked_image(self.model.family, gray, hole)
        return self.blank[count]

    def _encode_ahead(self, batches: Sequence[range], *, with_texts: bool) -> None:
        """Encode the images and captions of batches, before the denoiser comes to the device."""
        for images in batches:
            self.repaint_all(len(images))
            for i in images:
                self.encode_image(i)
        if with_texts:
            self.texts = {images: self._encode_captions(images) for images in batches}

    def _encode_captions(self, images: range) -> Conditioning:
        """The captions of a batch, encoded."""
        family, words = self.model.family, self.model.placeholders
        captions = [self.encode_image(i).caption for i in images]
        prompts = [bind_layers(caption, words) for caption in captions]
        return encode_layer_prompts(family.encode_prompts, prompts)

    def encode_image(self, i: int) -> Example:
        """Image i with the mean of its latents [c, h, w], on the CPU, in place of its pixels;
        decoded and encoded once a run.
        """
        if i not in self.latents:
            example = self.images.example(i, 0)
            mean, _ = self.model.family.encode_images(example.pixels[None])
            self.latents[i] = replace(example, pixels=mean[0].cpu())
        return self.latents[i]


def on_common_images(
    first: Sequence[Score], last: Sequence[Score]
) -> tuple[list[Score], list[Score]]:
    """The scores of two validations on the images that both have: a run may be resumed with other
    images.
    """
    both = {score.key for score in first} & {score.key for score in last}
    before = [score for score in first if score.key in both]
    after = [score for score in last if score.key in both]
    return before, after


def comparable_scores(
    scores: dict[int, list[Score]], done: int
) -> tuple[tuple[list[Score], list[Score]] | None, str]:
    """((scores before, scores after), a remark) on the images that both validations have.

    No scores without a validation before the first step or after the last one, and where the two
    have no image in common.
    """
    if not scores.keys() >= {0, done}:
        return None, ""
    first, last = scores[0], scores[done]
    before, after = on_common_images(first, last)
    if not before:
        why = f"the validation after {done} steps has none of the images of the first one"
        return None, f"no loss before and after: {why}"
    if {score.t for score in before} != {score.t for score in after}:
        return None, "no loss before and after: the two validations are at different timesteps"
    if len(before) == len(first) and len(after) == len(last):
        return (first, last), ""
    both = len({score.key for score in before})
    images = f"the {both} image{'s' * (both != 1)} that both validations have"
    return (before, after), f"before and after are those of {images}"


def relative_change(before: float, after: float) -> float:
    """after / before - 1; nan for a loss that was 0."""
    return after / before - 1 if before else math.nan


def hardly_changed(first: Sequence[Score], last: Sequence[Score]) -> bool:
    """Whether the mean loss changed by less than LEAST_CHANGE."""
    change = relative_change(validation.mean_loss(first), validation.mean_loss(last))
    return abs(change) < LEAST_CHANGE


def losses_by_timestep(
    first: Sequence[Score], last: Sequence[Score]
) -> list[tuple[str, float, float]]:
    """(timestep, loss before, loss after), and the means of all."""
    before, after = validation.mean_by_timestep(first), validation.mean_by_timestep(last)
    rows = []
    for (t, loss), later in zip(before.items(), after.values(), strict=True):
        rows.append((validation.format_timestep(t), loss, later))
    return [*rows, ("all", validation.mean_loss(first), validation.mean_loss(last))]


def loss_table(first: Sequence[Score], last: Sequence[Score], words: str) -> str:
    """The losses before and after a run; `words`, the line above, names the images they are on."""
    head = f"{'timestep':>9} {'before':>9} {'after':>9} {'change':>8}"
    lines = [f"{words} at fixed timesteps and noise:", head]
    for name, before, after in losses_by_timestep(first, last):
        lines.append(f"{name:>9} {before:9.5f} {after:9.5f} {relative_change(before, after):+8.1%}")
    return "\n".join(lines)
