"""Images from a base model and any number of LoRA files or run folders.

    python infer.py --model toy/model --lora runs/demo:0.8 --out toy.png --count 4 \
        --prompt "a photo of TOK on a yellow background"
    python infer.py --model toy/model --lora runs/demo --prompt "a photo of TOK" \
        --grid strength=0:1.2:0.3 --grid seed=0:4 --out sheet.png
    python infer.py --from toy_000.png --seed 7 --out again.png    # its recipe, with one change
    python infer.py --list samplers
"""

# ruff: noqa: E402 (the options come first, so that --help is answered without torch)

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, groupby, product
from typing import Annotated, Any, Literal

import tyro

from lora_core.command_line import answer_help, is_given, parse_command_line
from lora_core.config import ModelConfig
from lora_core.placeholders import Placeholder
from lora_core.plugin_lists import LIST_FLAG, answer_list, print_list
from lora_core.settings import AtLeast, SamplerSettings

EXAMPLE = (
    "python infer.py --model toy/model --lora runs/demo:0.8 --count 4 "
    '--prompt "a photo of TOK in the snow" --out snow.png'
)


@dataclass(frozen=True)
class ImageRequest:
    """The images that are asked for; these options are the first of the help."""

    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file or run folder and its strength: PATH (strength 1), PATH:0.8, or
    PATH:unet=0.6,text=0.9; PATH:0.8@0.2-1 acts at noise levels of 0.2 to 1 only. Repeat the flag
    for several; learned tokens next to a LoRA file are loaded with it."""
    prompt: str = ""
    """Text to draw; it may hold the placeholder words of the LoRAs, and A1111's tags for further
    ones: <lora:NAME:0.7> is NAME or NAME.safetensors in the current folder, or a run folder."""
    prompts: str = ""
    """Text file with one prompt a line, instead of --prompt; with --grid a sheet has a row for each
    prompt."""
    out: str = "out.png"
    """PNG to write; several images get _000, _001 ... before the ending."""
    overwrite: bool = False
    """Replace images that exist."""
    seed: int = 0
    """Seed of the first image; each further one adds 1. The noise at the start is that of diffusers
    with torch.Generator("cpu").manual_seed(seed)."""
    count: Annotated[int, AtLeast(1)] = 1
    """Images for each prompt."""


@dataclass(frozen=True)
class Infer(SamplerSettings, ModelConfig, ImageRequest):
    """Draw images with a text-to-image model and LoRA files."""

    clip_skip: Annotated[int, AtLeast(0)] = 0
    """Last layers of the CLIP text encoders that are left out; 0: as many as the run of the LoRA
    left out, else none."""
    max_token_length: Literal[0, 75, 150, 225] = 0
    """Tokens of a prompt that CLIP text encoders read, 75 at a time; 0: as in the run of the LoRA,
    else 75."""
    max_sequence_length: Annotated[int, AtLeast(0)] = 0
    """Tokens of a T5 prompt; 0: as in the run of the LoRA, else 512, or 256 for a model without
    guidance embedding."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks."""
    batch: Annotated[int, AtLeast(1)] = 4
    """Images sampled together; fewer need less memory."""
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One sheet of images over SETTING=START:STOP:STEP (stop included) or SETTING=A,B,C; repeat the
    flag for a second axis. Settings: seed (stop excluded), guidance, steps, strength, unet or text
    of all LoRAs, lora0.strength, lora1.unet ..."""
    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """PNG made by this program, whose image is repeated: its prompt, models on this disk, seed,
    sampler and size, which are printed. Flags win, and only they name files to write, start images,
    and models to fetch."""
    init_image: str = ""
    """Image to start from (with --strength), or to paint in (with --mask)."""
    mask: str = ""
    """Inpainting: image that is white where --init-image is to be painted. An inpainting model sees
    the rest of the image; of other models the latents of the rest are put back before each step."""
    region: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A box of the image with a prompt of its own, "x0,y0,x1,y1: PROMPT" or "x0,y0,x1,y1: PROMPT;
    negative: TEXT", in pixels (left, top, right, bottom). Repeat the flag for several; where boxes
    overlap, they are averaged (Mix-of-Show). Without a negative prompt it has --negative."""
    refiner: str = ""
    """Folder or hub id of a refiner model, which runs the last steps as image to image."""
    adapter_kind: str = ""
    """Class of the adapters of a --lora that a run with --adapter.kind FILE.py:Class wrote
    (NAME_adapter.safetensors). The code in FILE.py is run."""


if __name__ == "__main__":
    answer_list(sys.argv[1:])
    answer_help(Infer, sys.argv[1:], prog="infer.py", example=EXAMPLE)  # before torch is imported

from contextlib import ExitStack
from pathlib import Path

import torch
from PIL import Image

from lora_core.adapters.patch import Patch
from lora_core.atomic_files import temporary_name
from lora_core.diffusion.generation import ImageBatch, generate_batches
from lora_core.diffusion.regions import PromptRegion, parse_region
from lora_core.diffusion.sampling import find_sampler
from lora_core.diffusion.start_images import StartImages, read_start_images
from lora_core.distributed import check_alone
from lora_core.errors import UserError, exit_status
from lora_core.escaped_output import print_note
from lora_core.family import Family, LoadOptions
from lora_core.formats.model_words import model_placeholders
from lora_core.memory.placed_family import take_turns
from lora_core.memory.quantized_weights import check_installed
from lora_core.memory.residency import check_offload, leaves_device
from lora_core.prompt_tags import TAG as LORA_TAG
from lora_core.prompt_weights import check_prompt_weights
from lora_core.runs.destination import check_free_names, check_path_lengths
from lora_core.runs.image_grid import Axis, grid_cells, grid_rows, parse_axis
from lora_core.runs.image_recipe import apply_recipe, save_with_recipe
from lora_core.runs.lora_strengths import LoraStrengths
from lora_core.runs.loras import (
    TEXT_SETTINGS,
    LoraSource,
    apply_loras,
    lora_text,
    parse_lora,
    read_run_settings,
    refuse_other_files,
    warn_of_whole_model,
)
from lora_core.runs.pictures import ImageRow, draw_grid, save_png, to_images
from lora_core.runs.prompt_loras import (
    TaggedPrompt,
    combine_loras,
    loras_of_prompt,
    prompts_without_words,
    read_tagged_prompt,
)
from lora_core.settings import check_options
from lora_core.text import read_lines
from models import DTYPES, choose_device, load_family, use_device
from models.placement import loading_device, place_networks


@dataclass(frozen=True)
class Drawing:
    """The models, start images and LoRAs that draw all images of a call."""

    family: Family
    refiner: Family | None
    start: StartImages
    patches: Sequence[Patch]
    loras: Sequence[LoraSource]  # those of --lora, then those of the prompts' tags
    regions: Sequence[PromptRegion]
    words: Sequence[Placeholder] = ()  # the model's own

    @property
    def placeholders(self) -> list[Placeholder]:
        """The words and learned tokens of the model and of all files."""
        added = chain.from_iterable(patch.placeholders for patch in self.patches)
        return [*self.words, *added]

    def make_batch(
        self,
        prompts: Sequence[TaggedPrompt],
        seeds: Sequence[int],
        config: Infer,
        settings: Mapping[str, float],
    ) -> ImageBatch:
        """Images that are sampled together, one for each (prompt, seed). Their LoRAs are those of
        the first prompt, at strengths that `settings` (a grid's cell) change.
        """
        loras = loras_of_prompt(self.loras, len(config.lora), prompts[0])
        return ImageBatch(
            [prompt.text for prompt in prompts],
            seeds,
            config,
            self.start.pixels,
            self.start.mask,
            prepare=LoraStrengths(self.patches, loras, settings),
        )

    def draw_images(self, batches: Sequence[ImageBatch]) -> list[Image.Image]:
        """The images of all batches, in order."""
        drawn = generate_batches(
            self.family,
            batches,
            refiner=self.refiner,
            regions=self.regions,
            placeholders=self.placeholders,
        )
        return list(chain.from_iterable(map(to_images, drawn)))


def infer(config: Infer) -> list[Path]:
    """Writes the images and returns their paths.

    Raises UserError before any file is written when the options do not fit together.
    """
    prompts = [read_tagged_prompt(text) for text in read_prompts(config)]
    given = [parse_lora(text) for text in config.lora]
    loras = combine_loras(given, prompts)
    axes = [parse_axis(text) for text in config.grid]
    check_image_options(config, axes, len(prompts), len(loras))
    refuse_other_files(loras)
    if not config.adapter_kind:
        for lora in loras:
            warn_of_whole_model(config.model, Path(lora.path))
    texts = [prompt.text for prompt in prompts]
    if sentence := check_prompt_weights([*texts, config.negative, *config.region], config.emphasis):
        print_note(sentence)
    if config.threads:
        torch.set_num_threads(config.threads)
    family, refiner = open_models(config, loras)
    height, width = config.height or family.resolution, config.width or family.resolution
    start = read_start_images(config.init_image, config.mask, height, width)
    regions = [parse_region(text, width, height) for text in config.region]
    with ExitStack() as stack:
        words = model_placeholders(config.model)
        patches = apply_loras(family, loras, stack, words, kind=config.adapter_kind)
        family, refiner = place_models(config, family, refiner, patches)
        drawing = Drawing(family, refiner, start, patches, loras, regions, words)
        others = [config.negative]
        for region in regions:
            others += [region.prompt, region.negative]
        if sentence := prompts_without_words(texts, drawing.placeholders, others):
            print_note(sentence)
        if axes:
            return [write_grid(drawing, config, prompts, axes)]
        return write_images(drawing, config, prompts)


def open_models(config: Infer, loras: Sequence[LoraSource]) -> tuple[Family, Family | None]:
    """The base model and the refiner, opened as the flags say, else as the LoRAs' runs did.

    Prints the settings that come from those runs, because they change the images.
    """
    run = read_run_settings([lora.path for lora in loras])
    text = {name: value for name, value in run.text.items() if not getattr(config, name)}
    if run.scheduler or text:
        print_note(f"sampling with {run.scheduler | text}, as the LoRA was trained")
    options = LoadOptions(
        DTYPES[config.precision],
        first_device(config),
        config.vae,
        scheduler=run.scheduler,
        **{name: text.get(name, getattr(config, name)) for name in TEXT_SETTINGS},
        config=config.model_config,
        family=config.family,
    )
    family = load_family(config.model, options)
    if config.negative and family.distilled_guidance:
        raise UserError("--negative has no effect on a guidance-distilled model; leave it out")
    if not config.refiner:
        return family, None
    length = config.max_sequence_length
    plain = replace(options, scheduler={}, clip_skip=0, max_sequence_length=length)
    plain = replace(plain, config="", family="")  # the refiner is of a built-in family
    refiner = load_family(config.refiner, plain)
    if _latent_space(refiner) != _latent_space(family):
        raise UserError(
            f"--refiner {config.refiner} works on other latents than {config.model}; "
            "give the refiner of that family"
        )
    return family, refiner


def first_device(config: Infer) -> torch.device:
    """Where the weights are loaded. Raises UserError for --no-offload where nothing could leave."""
    device = use_device(config.device)
    check_offload(device, offload=config.offload, family=config.family, say=print_note)
    turns = leaves_device(device, offload=config.offload, family=config.family)
    return loading_device(device, config.quantize, stream=config.stream, comes_later=turns)


def place_models(
    config: Infer, family: Family, refiner: Family | None, patches: Sequence[Patch]
) -> tuple[Family, Family | None]:
    """The base model and the refiner, with the LoRAs in them, quantized or streamed on the device;
    or with networks that come there to work, one part of both models at a time (--offload).
    """
    device = choose_device(config.device)
    turns = leaves_device(device, offload=config.offload, family=config.family)
    for model in (family, refiner):
        if model is not None and (config.quantize != "none" or config.stream):
            resident = () if turns else None
            lines = place_networks(
                model, device, config.quantize, stream=config.stream, resident=resident
            )
            for line in lines:
                print_note(line)
    if not turns:
        return family, refiner
    adapted = set(chain.from_iterable(patch.adapted for patch in patches))
    texts_change = not adapted.isdisjoint(family.tokenizers)
    return take_turns(family, refiner, device, texts_change=texts_change, say=print_note)


def _latent_space(family: Family) -> tuple[int, int, str]:
    return family.latent_channels, family.factor, family.prediction


def write_images(drawing: Drawing, config: Infer, prompts: Sequence[TaggedPrompt]) -> list[Path]:
    """Draws --count images of each prompt, --batch at a time, and writes each with its recipe."""
    jobs = list(product(prompts, range(config.count)))
    batches: list[ImageBatch] = []
    for _, group in groupby(jobs, key=lambda job: job[0].loras):
        alike = list(group)
        for first in range(0, len(alike), config.batch):
            some = alike[first : first + config.batch]
            seeds = [config.seed + i for _, i in some]
            batches.append(drawing.make_batch([prompt for prompt, _ in some], seeds, config, {}))
    paths = image_paths(config.out, len(jobs))
    for image, path, (prompt, i) in zip(drawing.draw_images(batches), paths, jobs):
        alone = replace(config, seed=config.seed + i, count=1)
        save_with_recipe(image, path, _without_tags(alone, prompt))
    return paths


def write_grid(
    drawing: Drawing, config: Infer, prompts: Sequence[TaggedPrompt], axes: Sequence[Axis]
) -> Path:
    """Draws one sheet over the axes, with a row for each of several prompts, and writes it.

    The sheet of one prompt has its recipe.
    """
    cells = grid_cells(axes)
    batches: list[ImageBatch] = []
    for prompt, settings in product(prompts, cells):
        changed: dict[str, Any] = {"guidance": settings.get("guidance", config.guidance)}
        for name in ("seed", "steps"):
            changed[name] = int(settings.get(name, getattr(config, name)))
        own = replace(config, **changed)
        batches.append(drawing.make_batch([prompt], [own.seed], own, settings))
    images = drawing.draw_images(batches)
    rows: list[ImageRow] = []
    for number, prompt in enumerate(prompts):
        some = images[number * len(cells) : (number + 1) * len(cells)]
        rows += grid_rows(axes, some, prompt.text if len(prompts) > 1 else "")
    path = Path(config.out)
    title = prompts[0].text if len(prompts) == 1 else f"the prompts of {Path(config.prompts).name}"
    sheet = draw_grid(rows, title=title)
    if len(prompts) == 1:
        save_with_recipe(sheet, path, _without_tags(config, prompts[0]))
    else:
        save_png(sheet, path)
    return path


def _without_tags(config: Infer, prompt: TaggedPrompt) -> Infer:
    """The options that draw a prompt by itself, with the LoRAs of its tags in --lora."""
    loras = (*config.lora, *map(lora_text, prompt.loras))
    return replace(config, prompt=prompt.text, prompts="", lora=loras)


# ---------------------------------------------------------------- the command line


def read_prompts(config: Infer) -> list[str]:
    """The prompt, or the lines of the prompt file."""
    if bool(config.prompt) == bool(config.prompts):
        raise UserError("give either --prompt TEXT or --prompts FILE")
    if config.prompt:
        return [config.prompt]
    try:
        lines = read_lines(Path(config.prompts))
    except OSError as error:
        raise UserError(f"cannot read the prompt file {config.prompts}: {error}") from None
    if not lines:
        raise UserError(f"the prompt file {config.prompts} has no prompt")
    return lines


def image_paths(out: str, count: int) -> list[Path]:
    """OUT, or for several images OUT with _000, _001 ... before the ending."""
    path = Path(out)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{i:03d}{path.suffix}") for i in range(count)]


def check_image_options(config: Infer, axes: Sequence[Axis], prompts: int, loras: int) -> None:
    """Raises UserError for options that do not fit together.

    `prompts` and `loras` are the numbers of prompts and of LoRAs, those of tags included.
    """
    check_options(config, "--")
    check_installed(config.quantize)
    if len(axes) > 2 or (len(axes) == 2 and prompts > 1) or (axes and config.count > 1):
        raise UserError(
            "a grid has one or two axes and one prompt, or one axis and several prompts; use "
            "--grid seed=0:4 for several images"
        )
    _check_seeds(config, axes)
    find_sampler(config.sampler, config.sampler_args)
    if config.refiner_start != Infer().refiner_start and not config.refiner:
        raise UserError("--refiner-start has no effect without --refiner")
    varies_guidance = any(axis.setting == "guidance" for axis in axes)
    if config.negative and config.guidance == 1 and not varies_guidance:
        raise UserError("--negative has no effect at guidance 1; leave it out or raise --guidance")
    if LORA_TAG.search(config.negative):
        raise UserError("--negative has a <lora: ...> tag, which acts in --prompt only; move it")
    _check_out(config, 1 if axes else prompts * config.count)
    for axis in axes:
        number = re.match(r"lora(\d+)", axis.setting)
        is_strength = re.search(r"strength|unet|text", axis.setting)
        if is_strength and (int(number[1]) if number else 0) >= loras:
            raise UserError(
                f"--grid {axis.setting} needs {'such a' if number else 'a'} --lora; "
                f"{loras} given, counted from lora0"
            )


def _check_seeds(config: Infer, axes: Sequence[Axis]) -> None:
    """Raises UserError for seeds that torch does not take."""
    seeds: list[float] = [config.seed, config.seed + config.count - 1]
    for axis in axes:
        seeds += axis.values if axis.setting == "seed" else []
    if not -(2**63) <= min(seeds) <= max(seeds) < 2**64:
        worst = max(seeds, key=abs)
        raise UserError(f"--seed {worst:g} is out of range; torch takes -2^63 to 2^64 - 1")


def _check_out(config: Infer, count: int) -> None:
    """Raises UserError where the images cannot be written to OUT, or would replace others."""
    out = config.out
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"--out {out} must end in .png; the recipe is kept in the PNG's text")
    for parent in Path(out).parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--out {out} lies below {parent}, which is a file; name a folder")
    paths = image_paths(out, count)
    check_path_lengths("--out", map(temporary_name, paths))
    check_free_names("--out", paths, overwrite=config.overwrite)


def parse_arguments(words: Sequence[str]) -> Infer:
    """The options of a command line; with --from, the others are those of the image's recipe."""
    config = parse_command_line(Infer, words, prog="infer.py", example=EXAMPLE)
    if not config.source:
        return config
    given = set()
    default = Infer()
    for option in fields(Infer):
        is_changed = getattr(config, option.name) != getattr(default, option.name)
        if is_changed or is_given(option.name, words):
            given.add(option.name)
    return apply_recipe(config, config.source, given)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    0: done; 2: a mistake, explained in one printed sentence; 130: interrupted.
    """

    words = sys.argv[1:] if argv is None else list(argv)

    def run() -> None:
        if words[:1] == [LIST_FLAG]:
            print_list(words[1:])
            return
        check_alone(os.environ, "infer.py")
        for path in infer(parse_arguments(words)):
            print(path)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
