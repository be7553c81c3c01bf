"""Images that a run generates: samples during training, before_after.png at the end, class images
of prior preservation before the first step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from lora_core import distributed, tokens
from lora_core.config import NEW_PROMPTS, Config
from lora_core.data.captions import TYPED
from lora_core.data.dataset import Record
from lora_core.data.images import read_image
from lora_core.data.shards.stored_files import FileSource
from lora_core.diffusion import generation
from lora_core.diffusion.generation import ImageBatch
from lora_core.errors import UserError
from lora_core.placeholders import Placeholder, bind_placeholders
from lora_core.runs import over_steps, pictures
from lora_core.runs.pictures import ImageRow
from lora_core.runs.run_folder import Run
from lora_core.runs.sheet_layout import choose_columns
from lora_core.settings import SamplerSettings
from training.setup import Data, Model, Optimization

MOST_CAPTIONS = 5  # of the training images, that are prompts where the config has none
SEEDS = {1: 4, 2: 2}  # number of prompts -> images of each, where the config does not say it
SUBJECT = "{}"  # in --samples.new-prompts


class SampleImages:
    """Generates images with the model of a run, with the sampler and prompts of its config, in the
    size of its training images.
    """

    def __init__(
        self, config: Config, data: Data, model: Model, optimization: Optimization
    ) -> None:
        self.config, self.data = config, data
        self.model, self.optimization = model, optimization
        self._base_images: list[Image.Image] = []
        texts = config.samples.new_prompts
        if texts != NEW_PROMPTS and SUBJECT in "".join(texts) and not self.subject:
            raise UserError(
                "--samples.new-prompts has {} in it, which stands for the only prompt or the first "
                "placeholder word, and this run has neither; write the words themselves"
            )
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
            title = "base model" if base else "samples" if strength else "tokens alone"
            drawn = self._generate(batches, f"drawing {title}")
        return list(itertools.chain(*distributed.gather_shares(drawn)[: len(firsts)]))

    def draw_class_images(self, seeds: Sequence[int]) -> list[Image.Image]:
        """Class images of prior preservation, by the model before its first step."""
        with self.model.evaluating():
            batches = [self.batch_of([self.config.prior.prompt], [seed]) for seed in seeds]
            return list(itertools.chain(*self._generate(batches, "drawing class images")))

    def batch_of(self, prompts: Sequence[str], seeds: Sequence[int]) -> ImageBatch:
        """Images to draw; an inpainting model repaints the middle of a validation image."""
        init, mask = self._hole(seeds[0]) if self.model.family.inpainting else (None, None)
        return ImageBatch(prompts, seeds, self.settings, init, mask)

    def _generate(self, batches: Sequence[ImageBatch], title: str) -> list[list[Image.Image]]:
        drawn = generation.generate_batches(
            self.model.family, batches, placeholders=self.model.placeholders, title=title
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
    def seeds(self) -> int:
        """Images of each prompt."""
        return self.config.samples.seeds or SEEDS.get(len(self._prompts()), 1)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the config, else the captions of the first training images, each as often
        as there are images of it.
        """
        return _repeat(self._prompts(), self.seeds)

    @property
    def shown_prompts(self) -> list[str]:
        """The prompts as sheets of images show them: captions of files have a number instead,
        without --samples.show-data.
        """
        shown = []
        for number, (prompt, is_private) in enumerate(self._prompts().items(), start=1):
            shown.append(f"training caption {number}" if is_private else prompt)
        return _repeat(shown, self.seeds)

    @property
    def new_prompts(self) -> list[str]:
        """The prompts of --samples.new-prompts; those with {} only where there is a subject."""
        texts = self.config.samples.new_prompts
        subject = self.subject
        if not subject:
            texts = tuple(text for text in texts if SUBJECT not in text)
        return [text.replace(SUBJECT, subject) for text in texts]

    @property
    def subject(self) -> str:
        """What {} in --samples.new-prompts stands for: the only prompt, if people may see it, else
        "a photo of" the first placeholder word; "" without any.
        """
        prompts = self._prompts()
        if list(prompts.values()) == [False]:
            return next(iter(prompts))
        return next((f"a photo of {p.word}" for p in self.model.placeholders), "")

    def base_images(self) -> list[Image.Image]:
        """The images of all prompts by the base model, which are drawn once."""
        if not self._base_images:
            self._base_images = self.draw(self.prompts, base=True)
        return self._base_images

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
        return dict(list(found.items())[:MOST_CAPTIONS])

    def ordinary_prompt(self, prompt: str) -> str:
        """The prompt for the base model: each placeholder replaced by --samples.base-word, else by
        the words that its tokens were initialized from.
        """
        for word, ordinary in self.ordinary_words.items():
            prompt = bind_placeholders(prompt, [Placeholder(word, (ordinary,), "zero")])
        return " ".join(prompt.split())

    @property
    def ordinary_words(self) -> dict[str, str]:
        """Placeholder word -> what the base model draws in its place."""
        initial = tokens.ordinary_words(self.model.placeholders)
        return {word: self.config.samples.base_word or initial[word] for word in initial}


def _repeat(prompts: Iterable[str], count: int) -> list[str]:
    """Each prompt `count` times in a row."""
    return list(itertools.chain.from_iterable([prompt] * count for prompt in prompts))


def save_sample_grid(
    samples: SampleImages, run: Run, done: int, drawn: Sequence[Image.Image] = ()
) -> list[ImageRow]:
    """Write OUT/samples/step_NNNNNN.png, with rows for each of --samples.strengths, and the sheet
    over all steps so far; `drawn` are the images at strength 1, where they exist already. Returns
    the rows.
    """
    prompts, shown = samples.prompts, samples.shown_prompts
    strengths = samples.config.samples.strengths
    groups: list[list[ImageRow]] = []
    for strength in strengths:
        images = drawn if drawn and strength == 1 else samples.draw(prompts, strength=strength)
        label = f"strength {strength:g}" if len(strengths) > 1 else ""
        groups.append([prompt_row(label, images, shown, "sample", strength)])
    before = samples.base_images()
    if not run.writes:
        return []
    title = _with_prompt(f"{run.folder.name}: after {done} steps", shown)
    path = run.folder / "samples" / f"step_{done:06d}.png"
    is_private = not samples.are_public
    pictures.save_sheet(draw_groups(groups, title), path, step=done, is_private=is_private)
    captions = image_captions(shown)
    words = samples.ordinary_words
    over_steps.save_over_steps(run.folder, captions, before, words, is_private=is_private)
    return [] if is_private else list(itertools.chain.from_iterable(groups))


def before_after_grid(
    samples: SampleImages, drawn: Sequence[Image.Image], title: str
) -> Image.Image:
    """A grid with rows for: training images (with --samples.show-data), base model, tokens alone,
    everything trained (`drawn`), and everything trained on further prompts.

    The images of many prompts go on in further rows below, before and after of one prompt one above
    the other.
    """
    model, config, prompts = samples.model, samples.config, samples.prompts
    shown = samples.shown_prompts
    ordinary = [samples.ordinary_prompt(prompt) for prompt in shown]
    label = _with_prompt("before: the base model", ordinary)
    rows = [prompt_row(label, samples.base_images(), ordinary, "base")]
    learned = []
    if model.placeholders:
        learned.append("tokens")
    if model.adapted:
        learned.append(config.adapter.kind.split(":")[-1])
    if len(learned) == 2:
        alone = samples.draw(prompts, strength=0)
        label = _with_prompt("learned tokens alone", shown)
        rows.append(prompt_row(label, alone, shown, "tokens"))
    label = _with_prompt(f"after: {' + '.join(learned)}", shown)
    rows.append(prompt_row(label, drawn, shown, "after"))
    groups = [rows]
    if new := samples.new_prompts:
        groups.append([ImageRow("after: new places", samples.draw(new), new, "new")])
    if config.samples.show_data:
        images = _reference_images(samples.data.training.records)
        if len(images) == MOST_CAPTIONS:  # there may be more: as many as there is room for
            sizes = [(len(group), len(group[0].images)) for group in groups]
            images = images[: choose_columns([(1, len(images)), *sizes])]
        groups.insert(0, [ImageRow("what it learned from", images, role="training")])
    return draw_groups(groups, title)


def prompt_row(
    label: str, images: Sequence[Image.Image], shown: Sequence[str], role: str, strength: float = 1
) -> ImageRow:
    """A row with an image of each prompt; of a single prompt with several seeds, the sheet shows
    the seeds alone.
    """
    is_alone = len(shown) > 1 and len(set(shown)) == 1
    notes = [f"seed {seed}" for seed in range(len(shown))] if is_alone else None
    captions = image_captions(shown)
    return ImageRow(label, images, captions, role, strength if role == "sample" else None, notes)


def image_captions(shown: Sequence[str]) -> list[str]:
    """The prompt of each image, and its seed where a prompt has several."""
    if len(set(shown)) == len(shown):
        return list(shown)
    return [f"{prompt}, seed {seed}" for seed, prompt in enumerate(shown)]


def _with_prompt(words: str, shown: Sequence[str]) -> str:
    """The words, and the prompt where a single one has several images."""
    if len(shown) == 1 or len(set(shown)) > 1:
        return words
    return f"{words}, {pictures.in_quotes(shown[0])}"


def draw_groups(groups: Sequence[Sequence[ImageRow]], title: str) -> Image.Image:
    """A sheet of groups of rows that belong together and have as many images as each other. Rows
    are wrapped, all of a group alike, to as many columns as leave little of the sheet empty.
    """
    columns = choose_columns([(len(group), len(group[0].images)) for group in groups])
    sheet: list[ImageRow] = []
    for group in groups:
        wrapped = [wrap_row(row, columns) for row in group]
        sheet += itertools.chain.from_iterable(zip(*wrapped, strict=True))
    return pictures.draw_grid(sheet, title=title, columns=columns)


def wrap_row(row: ImageRow, columns: int) -> Iterator[ImageRow]:
    """The row split into rows of at most `columns` images, with their captions and the same
    label.
    """
    for i in range(0, len(row.images), columns):
        part = slice(i, i + columns)
        notes = None if row.notes is None else row.notes[part]
        yield replace(row, images=row.images[part], captions=row.captions[part], notes=notes)


def _reference_images(records: Sequence[Record]) -> list[Image.Image]:
    """The first training images, center-cropped."""
    files = {record.file: record.use_alpha for record in records}
    first = list(files.items())[:MOST_CAPTIONS]
    return [_center_crop(file, use_alpha=alpha) for file, alpha in first]


def _center_crop(file: FileSource, *, use_alpha: bool) -> Image.Image:
    """A training image as training reads it, cropped to a square."""
    image = read_image(file, use_alpha=use_alpha).image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
