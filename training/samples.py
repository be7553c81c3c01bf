"""Images that a run generates: samples during training, before_after.png at the end, class images
of prior preservation before the first step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from lora_core import distributed, tokens
from lora_core.config import Config
from lora_core.data.captions import TYPED
from lora_core.data.dataset import Record
from lora_core.data.images import read_image
from lora_core.data.shards.stored_files import FileSource
from lora_core.diffusion import generation
from lora_core.diffusion.generation import ImageBatch
from lora_core.placeholders import Placeholder, bind_placeholders
from lora_core.runs import pictures
from lora_core.runs.pictures import ImageRow
from lora_core.runs.run_folder import Run
from lora_core.settings import SamplerSettings
from training.setup import Data, Model, Optimization

COLUMNS = 5  # images in a row


class SampleImages:
    """Generates images with the model of a run, with the sampler and prompts of its config, in the
    size of its training images.
    """

    def __init__(
        self, config: Config, data: Data, model: Model, optimization: Optimization
    ) -> None:
        self.config, self.data = config, data
        self.model, self.optimization = model, optimization
        look, side = config.samples, config.data.resolution
        self.settings = SamplerSettings(
            look.sampler,
            look.steps,
            look.guidance,
            look.negative,
            look.sampler_args,
            width=side,
            height=side,
        )

    def draw(
        self, prompts: Sequence[str], *, base: bool = False, strength: float = 1.0
    ) -> list[Image.Image]:
        """One image for each prompt, seeds 0, 1, 2 ...: by the base model, or with the learned
        tokens and the adapters at a strength, 0 for the tokens alone. An inpainting model repaints
        the middle of the validation images. The processes of a run share the work, and all of them
        have all images.
        """
        model = self.model
        if base:
            prompts = [self.ordinary_prompt(prompt) for prompt in prompts]
        # a batch that fits in memory in training fits here
        size = 1 if model.family.inpainting else self.config.batch_size
        with ExitStack() as stack:
            stack.enter_context(model.evaluating())
            stack.enter_context(self.optimization.averaged())
            if base or not strength:
                stack.enter_context(model.without_adapters())
            elif strength != 1:
                stack.enter_context(model.at_strength(strength))
            firsts = range(0, len(prompts), size)
            batches = []
            for i in distributed.take_share(firsts, even=self.config.shard):
                part = prompts[i : i + size]
                batches.append(self.batch_of(part, range(i, i + len(part))))
            drawn = self._generate(batches)
        return list(itertools.chain(*distributed.gather_shares(drawn)[: len(firsts)]))

    def draw_class_images(self, seeds: Sequence[int]) -> list[Image.Image]:
        """Class images of prior preservation, by the model before its first step."""
        with self.model.evaluating():
            batches = [self.batch_of([self.config.prior.prompt], [seed]) for seed in seeds]
            return list(itertools.chain(*self._generate(batches)))

    def batch_of(self, prompts: Sequence[str], seeds: Sequence[int]) -> ImageBatch:
        """Images to draw; an inpainting model repaints the middle of a validation image."""
        init, mask = self._hole(seeds[0]) if self.model.family.inpainting else (None, None)
        return ImageBatch(prompts, seeds, self.settings, init, mask)

    def _generate(self, batches: Sequence[ImageBatch]) -> list[list[Image.Image]]:
        drawn = generation.generate_batches(
            self.model.family, batches, placeholders=self.model.placeholders
        )
        return list(map(pictures.to_images, drawn))

    def _hole(self, i: int) -> tuple[Tensor, Tensor]:
        """A validation image [1, 3, h, w] and a mask [1, 1, h, w] of its middle, which an
        inpainting model is to draw.
        """
        images = self.data.validation
        pixels = images.example(i % len(images), 0).pixels[None].to(self.model.device)
        mask = torch.zeros_like(pixels[:, :1])
        side = self.settings.width
        middle = slice(side // 4, side - side // 4)
        mask[..., middle, middle] = 1
        return pixels, mask

    @property
    def prompts(self) -> list[str]:
        """The prompts of the config, else the captions of the first training images."""
        return list(self._prompts())

    @property
    def shown_prompts(self) -> list[str]:
        """The prompts as sheets of images show them: captions of files have a number instead,
        without --samples.show-data.
        """
        shown = []
        for number, (prompt, is_private) in enumerate(self._prompts().items(), start=1):
            shown.append(f"training caption {number}" if is_private else prompt)
        return shown

    @property
    def public_prompts(self) -> list[str]:
        """The prompts that README.md shows: those that are options of the run, else one with the
        first placeholder.
        """
        public = [prompt for prompt, is_private in self._prompts().items() if not is_private]
        words = [placeholder.word for placeholder in self.model.placeholders]
        return public or [f"a photo of {word}" for word in words[:1]]

    @property
    def are_public(self) -> bool:
        """Whether people may see the images: those of an inpainting model have the surroundings of
        the validation images, which may be private.
        """
        return self.config.samples.show_data or not self.model.family.inpainting

    def _prompts(self) -> dict[str, bool]:
        """Prompt -> whether it is private: a caption from a file, without --samples.show-data."""
        if self.config.samples.prompts:
            return dict.fromkeys(self.config.samples.prompts, False)
        found: dict[str, bool] = {}
        for record in self.data.training.records:
            is_private = record.source not in TYPED and not self.config.samples.show_data
            found.setdefault(record.plain_caption, is_private)
        return dict(list(found.items())[:COLUMNS])

    def ordinary_prompt(self, prompt: str) -> str:
        """The prompt for the base model: each placeholder replaced by --samples.base-word, else by
        the words that its tokens were initialized from.
        """
        base_word = self.config.samples.base_word
        for word, ordinary in tokens.ordinary_words(self.model.placeholders).items():
            plain = Placeholder(word, (base_word or ordinary,), "zero")
            prompt = bind_placeholders(prompt, [plain])
        return " ".join(prompt.split())


def save_sample_grid(
    samples: SampleImages, run: Run, done: int, drawn: Sequence[Image.Image] = ()
) -> None:
    """Write OUT/samples/step_NNNNNN.png, with rows for each of --samples.strengths; `drawn` are the
    images at strength 1, where they exist already.
    """
    prompts, shown = samples.prompts, samples.shown_prompts
    strengths = samples.config.samples.strengths
    sheet: list[ImageRow] = []
    for strength in strengths:
        images = drawn if drawn and strength == 1 else samples.draw(prompts, strength=strength)
        label = f"strength {strength:g}" if len(strengths) > 1 else ""
        sheet += wrap_row(ImageRow(label, images, shown, "sample", strength))
    if not run.writes:
        return
    grid = pictures.draw_grid(sheet, title=f"after {done} steps")
    path = run.folder / "samples" / f"step_{done:06d}.png"
    pictures.save_sheet(grid, path, step=done, is_private=not samples.are_public)


def before_after_grid(
    samples: SampleImages, drawn: Sequence[Image.Image], title: str
) -> Image.Image:
    """A grid with one row each for: training images (with --samples.show-data), base model, tokens
    alone, everything trained (`drawn`), and everything trained on further prompts.

    More than COLUMNS prompts continue in further rows below, before and after of one prompt one
    above the other.
    """
    model, config, prompts = samples.model, samples.config, samples.prompts
    shown = samples.shown_prompts
    ordinary = [samples.ordinary_prompt(prompt) for prompt in shown]
    drawn_before = samples.draw(prompts, base=True)
    rows = [ImageRow("before: the base model", drawn_before, ordinary, "base")]
    learned = []
    if model.placeholders:
        learned.append("tokens")
    if model.adapted:
        learned.append(config.adapter.kind.split(":")[-1])
    if len(learned) == 2:
        alone = samples.draw(prompts, strength=0)
        rows.append(ImageRow("learned tokens alone", alone, shown, "tokens"))
    rows.append(ImageRow(f"after: {' + '.join(learned)}", drawn, shown, "after"))
    sheet = []
    if config.samples.show_data:
        images = _reference_images(samples.data.training.records)
        sheet.append(ImageRow("what it learned from", images, role="training"))
    for together in zip(*[wrap_row(row) for row in rows], strict=True):
        sheet += together
    new = list(config.samples.new_prompts)
    if new:
        sheet += wrap_row(ImageRow("after: new places", samples.draw(new), new, "new"))
    return pictures.draw_grid(sheet, title=title)


def wrap_row(row: ImageRow) -> Iterator[ImageRow]:
    """The row split into rows of at most COLUMNS images, with their captions and the same label."""
    for i in range(0, len(row.images), COLUMNS):
        images, captions = row.images[i : i + COLUMNS], row.captions[i : i + COLUMNS]
        yield replace(row, images=images, captions=captions)


def _reference_images(records: Sequence[Record]) -> list[Image.Image]:
    """The first training images, center-cropped."""
    files = {record.file: record.use_alpha for record in records}
    return [_center_crop(file, use_alpha=alpha) for file, alpha in list(files.items())[:COLUMNS]]


def _center_crop(file: FileSource, *, use_alpha: bool) -> Image.Image:
    """A training image as training reads it, cropped to a square."""
    image = read_image(file, use_alpha=use_alpha).image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
