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
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, groupby, product
from typing import Any

from lora_core.flags.command_line import (
    is_given,
    parse_command_line,
    parser_of,
    show_help,
    top_flags,
)
from lora_core.flags.instant_answers import Script, answer_at_start, answer_instantly
from lora_core.flags.program_flags import DRAW_FLAGS
from lora_core.flags.script_pages import INFER_PAGE
from lora_core.image_options import Infer
from lora_core.placeholders import Placeholder
from lora_core.plugin_lists import LIST_FLAG, print_list

EXAMPLE = (
    "python infer.py --model toy/model --lora runs/demo:0.8 --count 4 "
    '--prompt "a photo of TOK in the snow" --out snow.png'
)
SCRIPT = Script(
    "lora-infer",
    INFER_PAGE,
    lambda words: show_help(Infer, prog="infer.py", example=EXAMPLE),
    DRAW_FLAGS,
    lambda words: top_flags(Infer),
    parser_of(Infer),
)
answer_at_start(__name__, sys.argv, SCRIPT)  # before torch is imported

from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from PIL import Image

from lora_core.adapters.patch import Patch
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
from lora_core.progress import phase
from lora_core.prompt_tags import TAG as LORA_TAG
from lora_core.prompt_weights import check_prompt_weights
from lora_core.runs.animations import ENDINGS, save_animation
from lora_core.runs.image_files import check_image_files, check_seeds, image_paths
from lora_core.runs.image_grid import (
    Axis,
    check_axes,
    grid_cells,
    grid_rows,
    label_axes,
    parse_axis,
)
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
    read_prompt_lines,
    read_tagged_prompt,
)
from lora_core.runs.run_checkpoints import find_checkpoints
from lora_core.settings import SamplerSettings, check_options
from models import DTYPES, choose_device, load_family, use_device
from models.flow import check_guidance
from models.placement import loading_device, place_networks
from models.skip_layers import SkipLayers, choose_skip_layers


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
        skip = choose_skip_layers(self.family, config)
        return ImageBatch(
            [prompt.text for prompt in prompts],
            seeds,
            config,
            self.start.pixels,
            self.start.mask,
            prepare=BatchSettings(self.patches, loras, settings, self.family, skip),
        )

    def draw_images(self, batches: Sequence[ImageBatch]) -> list[Image.Image]:
        """The images of all batches, in order."""
        drawn = generate_batches(
            self.family,
            batches,
            refiner=self.refiner,
            regions=self.regions,
            placeholders=self.placeholders,
            title="drawing",
        )
        return list(chain.from_iterable(map(to_images, drawn)))


@dataclass(frozen=True)
class BatchSettings(LoraStrengths):
    """What a batch sets before it is drawn: the strengths of its LoRAs, and skip-layer guidance."""

    family: Family
    skip: SkipLayers | None  # None: the family has no such guidance

    def __call__(self, share: float | None = None, *, off: bool = False) -> None:
        if self.skip is not None:
            self.family.set_skip_layers(self.skip)  # type: ignore[attr-defined]
        super().__call__(share, off=off)


def infer(config: Infer) -> list[Path]:
    """Writes the images and returns their paths.

    Raises UserError before any file is written when the options do not fit together.
    """
    texts = read_prompt_lines(config.prompt, config.prompts)
    prompts = list(map(read_tagged_prompt, texts))
    given = [parse_lora(text) for text in config.lora]
    axes = [find_checkpoints(parse_axis(text), given) for text in config.grid]
    loras = combine_loras(given, prompts)
    has_checkpoints = any(axis.loras for axis in axes)  # which stand between those of tags
    axes = label_axes(axes, [lora.path for lora in (given if has_checkpoints else loras)])
    taken = [*loras, *(parse_lora(axis.loras[0]) for axis in axes if axis.loras)]
    check_image_options(config, axes, len(prompts), len(taken))
    refuse_other_files(taken)
    if not config.adapter_kind:
        for lora in taken:
            warn_of_whole_model(config.model, Path(lora.path))
    texts = [prompt.text for prompt in prompts]
    if sentence := check_prompt_weights([*texts, config.negative, *config.region], config.emphasis):
        print_note(sentence)
    if config.threads:
        torch.set_num_threads(config.threads)
    if axes:
        return [write_grid(config, prompts, axes)]
    models = open_models(config, loras)
    config = with_own_steps(config, models[0])
    with open_drawing(config, prompts, models) as drawing:
        return write_images(drawing, config, prompts)


def with_own_steps(config: Infer, family: Family) -> Infer:
    """The options with the model's own number of steps, where they leave it to the model."""
    own = getattr(family, "own_steps", 0) or SamplerSettings().steps
    return replace(config, steps=config.steps or own)


@contextmanager
def open_drawing(
    config: Infer, prompts: Sequence[TaggedPrompt], models: tuple[Family, Family | None]
) -> Iterator[Drawing]:
    """The LoRAs of the config and of the prompts on the models, until the block ends."""
    family, refiner = models
    loras = combine_loras([parse_lora(text) for text in config.lora], prompts)
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
        texts = [prompt.text for prompt in prompts]
        if sentence := prompts_without_words(texts, drawing.placeholders, others):
            print_note(sentence)
        yield drawing


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
    with phase("loading the model"), _settings_named(text):
        family = load_family(config.model, options)
    check_guidance(family, "--guidance", config.guidance, Infer().guidance)
    if config.negative and family.distilled_guidance:
        raise UserError("--negative has no effect on a guidance-distilled model; leave it out")
    if not config.refiner:
        return family, None
    length = config.max_sequence_length
    plain = replace(options, scheduler={}, clip_skip=0, max_sequence_length=length)
    plain = replace(plain, config="", family="")  # the refiner is of a built-in family
    with phase("loading the refiner"):
        refiner = load_family(config.refiner, plain)
    if _latent_space(refiner) != _latent_space(family):
        raise UserError(
            f"--refiner {config.refiner} works on other latents than {config.model}; "
            "give the refiner of that family"
        )
    return family, refiner


@contextmanager
def _settings_named(text: Mapping[str, int]) -> Iterator[None]:
    """Says in an error about a text setting that the LoRA's run has it, and not the command."""
    try:
        yield
    except UserError as error:
        if not any(str(error).startswith(f"--{name.replace('_', '-')} ") for name in text):
            raise
        reason = str(error).removesuffix("; leave it out")
        raise UserError(
            f"{reason}; the LoRA's run has this setting, so it was trained on another kind of model"
        ) from None


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


def write_grid(config: Infer, prompts: Sequence[TaggedPrompt], axes: Sequence[Axis]) -> Path:
    """Draws one sheet over the axes, with a row for each of several prompts, or an animation over
    one axis, and writes it.

    The sheet of one prompt has its recipe.
    """
    cells = grid_cells(axes)
    images, config = draw_cells(config, prompts, axes, cells)
    path = Path(config.out)
    if path.suffix.lower() in ENDINGS:
        print_note(save_animation(images, axes[0].captions, path))
        return path
    rows: list[ImageRow] = []
    for number, prompt in enumerate(prompts):
        some = images[number * len(cells) : (number + 1) * len(cells)]
        rows += grid_rows(axes, some, prompt.text if len(prompts) > 1 else "")
    title = prompts[0].text if len(prompts) == 1 else f"the prompts of {Path(config.prompts).name}"
    sheet = draw_grid(rows, title=title)
    if len(prompts) == 1:
        save_with_recipe(sheet, path, _without_tags(config, prompts[0]))
    else:
        save_png(sheet, path)
    return path


def draw_cells(
    config: Infer,
    prompts: Sequence[TaggedPrompt],
    axes: Sequence[Axis],
    cells: Sequence[Mapping[str, float]],
) -> tuple[list[Image.Image], Infer]:
    """(the image of every prompt in every cell of a grid, prompt by prompt; the options with the
    number of steps).

    The LoRAs of one checkpoint at a time are on the models, which are read anew for each where
    they do not lie whole on one device.
    """
    loras = list(chain.from_iterable(axis.loras for axis in axes))
    turns = leaves_device(
        choose_device(config.device), offload=config.offload, family=config.family
    )
    keeps_models = config.quantize == "none" and not config.stream and not turns
    jobs = list(product(prompts, cells))
    images: dict[int, Image.Image] = {}
    models = None
    for checkpoint in range(max(1, len(loras))):
        own = replace(config, lora=(*config.lora, *loras[checkpoint : checkpoint + 1]))
        if models is None or not keeps_models:
            models = None  # before others take its place
            models = open_models(own, combine_loras(list(map(parse_lora, own.lora)), prompts))
        for value in {cell["guidance"] for cell in cells if "guidance" in cell}:
            check_guidance(models[0], "--grid guidance", value, 1)
        own = with_own_steps(own, models[0])
        places = [i for i, (_, cell) in enumerate(jobs) if cell.get("checkpoint", 0) == checkpoint]
        with open_drawing(own, prompts, models) as drawing:
            batches = [_cell_batch(drawing, own, *jobs[i]) for i in places]
            images |= zip(places, drawing.draw_images(batches))
    return [images[i] for i in range(len(jobs))], replace(config, steps=own.steps)


def _cell_batch(
    drawing: Drawing, config: Infer, prompt: TaggedPrompt, settings: Mapping[str, float]
) -> ImageBatch:
    """The image of a prompt with the settings of a cell."""
    changed: dict[str, Any] = {}
    for name in ("guidance", "adapter_guidance"):
        changed[name] = settings.get(name, getattr(config, name))
    for name in ("seed", "steps"):
        changed[name] = int(settings.get(name, getattr(config, name)))
    own = replace(config, **changed)
    return drawing.make_batch([prompt], [own.seed], own, settings)


def _without_tags(config: Infer, prompt: TaggedPrompt) -> Infer:
    """The options that draw a prompt by itself, with the LoRAs of its tags in --lora."""
    loras = (*config.lora, *map(lora_text, prompt.loras))
    return replace(config, prompt=prompt.text, prompts="", lora=loras)


# ---------------------------------------------------------------- the command line


def check_image_options(config: Infer, axes: Sequence[Axis], prompts: int, loras: int) -> None:
    """Raises UserError for options that do not fit together.

    `prompts` and `loras` are the numbers of prompts and of LoRAs, those of tags included.
    """
    check_options(config, "--")
    check_installed(config.quantize)
    check_axes(axes, prompts=prompts, count=config.count, loras=loras)
    check_seeds(config.seed, config.count, axes)
    find_sampler(config.sampler, config.sampler_args)
    default = Infer()
    if config.refiner_start != default.refiner_start and not config.refiner:
        raise UserError("--refiner-start has no effect without --refiner")
    for name in ("skip_layer_scale", "skip_layer_start", "skip_layer_stop"):
        if getattr(config, name) != getattr(default, name) and not config.skip_layers:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --skip-layers")
    varies_guidance = any(axis.setting == "guidance" for axis in axes)
    if config.negative and config.guidance == 1 and not varies_guidance:
        raise UserError("--negative has no effect at guidance 1; leave it out or raise --guidance")
    if LORA_TAG.search(config.negative):
        raise UserError("--negative has a <lora: ...> tag, which acts in --prompt only; move it")
    paths = image_paths(config.out, 1 if axes else prompts * config.count)
    check_image_files(config.out, paths, overwrite=config.overwrite)
    if Path(config.out).suffix.lower() in ENDINGS and (len(axes) != 1 or prompts > 1):
        raise UserError(
            f"--out {config.out} is an animation, over one --grid axis and of one prompt; give "
            "these, or a name that ends in .png"
        )


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
    if (status := answer_instantly(SCRIPT, words)) is not None:
        return status

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
