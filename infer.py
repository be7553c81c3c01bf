"""Pictures from a base model and any number of LoRA files or run folders.

python infer.py --model toy/model --lora runs/demo:0.8 --prompt "a photo of TOK on a yellow background" --out toy.png --count 4
python infer.py --model toy/model --lora runs/demo --prompt "a photo of TOK" --grid strength=0:1.2:0.3 --grid seed=0:4 --out grid.png
python infer.py --from toy.png --seed 7 --out again.png                   # the recipe in a picture, with one thing changed
"""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import count, product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from PIL import Image
from safetensors import SafetensorError, safe_open

from lora_core import Patch, formats, patch, tokens
from lora_core.command_line import parse_command_line
from lora_core.data.images import (
    READ_ERRORS,
    decode_image,
    image_to_pixels,
    image_to_tensor,
    read_image,
    read_mask,
)
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.runs import destination
from lora_core.runs.pictures import ImageRow, draw_grid, save_png, to_images
from lora_core.runs.run_folder import temporary_name
from lora_core.text import parse_json, read_lines
from lora_core.toml import from_table, to_table
from models import DTYPES, Family, LoadOptions, choose_device, load_family

EXAMPLE = 'python infer.py --model toy/model --lora runs/demo:0.8 --prompt "a photo of TOK in the snow" --count 4 --out snow.png'
CHUNK = "lora_core"  # the PNG text chunk with the recipe
MOST_VALUES = 64  # of an axis of a grid


@dataclass(frozen=True)
class Infer:
    """Draw pictures with a text-to-image model and LoRA files."""

    model: str = ""
    """The base model: a folder or hub id in the diffusers layout, or a single file (.safetensors, .ckpt) of SD 1.x, 2.x or SDXL."""
    model_config: str = ""
    """Folder or hub id with the configs and tokenizers of a single-file model; empty: those it was published with."""
    vae: str = ""
    """Folder or hub id of another VAE."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file or run folder: PATH, PATH:0.8, or PATH:unet=0.6,text=0.9. Repeat the flag for several; tokens beside a LoRA come along."""
    prompt: str = ""
    """Text to draw; placeholder words of the LoRAs are understood."""
    prompts: str = ""
    """File with one prompt a line, instead of --prompt."""
    negative: str = ""
    """What guidance steers away from."""
    out: str = "out.png"
    """PNG to write; several pictures get _000, _001 ... before the ending."""
    seed: int = 0
    """Seed of the first picture; the next ones count up. Start noise is diffusers' for torch.Generator("cpu").manual_seed(seed)."""
    count: int = 1
    """Pictures for each prompt."""
    batch: int = 4
    """Pictures sampled together."""
    steps: int = 25
    """Sampling steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale, 1 turns it off; for a guidance-distilled model (Flux dev) the scale it is told, 3.5 as a rule."""
    sampler: str = "ddim"
    """ddim, euler, euler_ancestral or dpmpp_2m; flow models: ddim and flow_euler are the same method."""
    refiner: str = ""
    """Folder or hub id of a refiner, which runs the last steps as image to image."""
    refiner_start: float = 0.8
    """Share of the steps after which the refiner takes over, (0, 1)."""
    clip_skip: int = 0
    """Last layers of the CLIP text encoders that are left out; as in training when a LoRA says so."""
    max_sequence_length: int = 0
    """Tokens of a T5 prompt; 0: 512, or 256 for a model without guidance embedding."""
    width: int = 0
    """Pixels; 0: the model's own resolution."""
    height: int = 0
    """Pixels; 0: the model's own resolution."""
    init_image: str = ""
    """Picture to start from (with --strength), or to paint in (with --mask and an inpainting model)."""
    strength: float = 1.0
    """Image to image: how much of the sampling is run, (0, 1]; 1 keeps nothing of the picture."""
    mask: str = ""
    """Inpainting: picture that is white where it is to be painted."""
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One or two axes SETTING=START:STOP:STEP (stop included) or SETTING=A,B,C. Settings: seed (stop excluded), guidance, steps,
    strength, unet or text of all LoRAs, lora0.strength, lora1.unet ..."""
    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """PNG made by this program, whose recipe is repeated; flags win over it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: int = 0
    """CPU threads; 0: torch's choice."""


class LoraArgument(NamedTuple):
    path: str
    strength: float | dict[str, float]


class Axis(NamedTuple):
    setting: str
    values: list[float]


def infer(config: Infer) -> list[Path]:
    """Writes the pictures and returns their paths. Raises UserError before any file is written when something does not fit."""
    prompts, axes = read_prompts(config), [parse_axis(text) for text in config.grid]
    arguments = [parse_lora(text) for text in config.lora]
    _check(config, axes, prompts, len(arguments))
    for argument in arguments:
        _whole_model(config.model, Path(argument.path))
    if config.threads:
        torch.set_num_threads(config.threads)
    family = load_family(config.model, _loading(config, arguments))
    if config.negative and family.distilled_guidance:
        raise UserError("--negative has no effect on a guidance-distilled model; leave it out")
    refiner = (
        load_family(config.refiner, replace(_loading(config, []), clip_skip=0, config=""))
        if config.refiner
        else None
    )
    if refiner and (refiner.latent_channels, refiner.factor, refiner.prediction) != (
        family.latent_channels,
        family.factor,
        family.prediction,
    ):
        raise UserError(
            f"--refiner {config.refiner} works on other latents than {config.model}; give the refiner of that family"
        )
    with ExitStack() as stack:
        patches = apply_loras(family, arguments, stack)
        draw = _drawer(config, family, patches, refiner)
        if axes:
            return [_draw_grid(config, axes, prompts[0], patches, arguments, draw)]
        jobs = [(prompt, config.seed + i) for prompt in prompts for i in range(config.count)]
        images = [
            im
            for i in range(0, len(jobs), config.batch)
            for im in draw(jobs[i : i + config.batch], config)
        ]
    return [
        _save(image, path, replace(config, prompt=p, prompts="", seed=seed, count=1))
        for image, path, (p, seed) in zip(images, _paths(config, len(jobs)), jobs)
    ]


def apply_loras(family: Family, arguments: Sequence[LoraArgument], stack: ExitStack) -> list[Patch]:
    """Every LoRA on the model, in order, until the stack closes; then the tokens that lie beside LoRAs given as single files.

    Words and tokens that an earlier file has already taken are renamed and reported.
    """
    modules = {
        **family.modules,
        **{name.replace("text_encoder", "tokenizer"): t for name, t in family.tokenizers.items()},
    }
    modules.pop("vae")
    beside = [
        LoraArgument(rows, 1.0) for argument in arguments if (rows := tokens_beside(argument.path))
    ]
    patches: list[Patch] = []
    for argument in (*arguments, *beside):
        state = formats.load(argument.path, family.layout)
        taken = {name for p in patches for a in p.abstractions for name in (a.word, *a.names)}
        rename = {
            name: _free(name, taken)
            for name in (*embeddings.placeholder_words(state, argument.path), *state.token_names)
            if name in taken
        }
        strength = argument.strength
        if isinstance(strength, dict):
            strength = _by_component(strength, state.components, argument.path)
        patches.append(
            stack.enter_context(
                patch(modules, argument.path, strength, layout=family.layout, rename=rename)
            )
        )
        for sentence in (
            () if tokens_beside(argument.path) else patches[-1].report
        ):  # a LoRA file is right that it lacks its tokens; they come later
            print(f"note: {sentence}", file=sys.stderr)
    return patches


def tokens_beside(path: str) -> str:
    """The token file in the folder of a LoRA file that was trained with tokens; "" where there is none, or more than one."""
    found = sorted(Path(path).parent.glob(f"*{formats.EMBEDDINGS}"))
    trained = (
        Path(path).is_file()
        and path not in map(str, found)
        and embeddings.TOKEN_NAMES in _header(path)
    )
    return str(found[0]) if trained and len(found) == 1 else ""


def parse_lora(text: str) -> LoraArgument:
    """PATH, PATH:0.8 or PATH:unet=0.6,text=0.9. Raises UserError for a strength that is no number."""
    path, colon, tail = text.rpartition(":")
    if not colon or "/" in tail or "\\" in tail or Path(text).exists():
        return LoraArgument(text, 1.0)
    try:
        if "=" not in tail:
            return LoraArgument(path, float(tail))
        return LoraArgument(
            path,
            {name: float(value) for name, value in (pair.split("=") for pair in tail.split(","))},
        )
    except ValueError:
        raise UserError(
            f"--lora {text}: cannot read the strength {tail!r}; write PATH:0.8 or PATH:unet=0.6,text=0.9"
        ) from None


def parse_axis(text: str) -> Axis:
    """SETTING=START:STOP:STEP or SETTING=A,B,C. Raises UserError for anything else."""
    name, _, tail = text.partition("=")
    if not re.fullmatch(r"seed|guidance|steps|(lora\d+\.)?(strength|unet|text)", name):
        raise UserError(
            f"--grid {text}: unknown setting {name!r}; choose seed, strength, unet, text, lora0.strength ..., guidance or steps"
        )
    try:
        start, *rest = (float(value) for value in tail.split(":" if ":" in tail else ","))
        values, count = [start, *rest], 1 + len(rest)
        if ":" in tail:
            stop, step = rest if len(rest) > 1 else (*rest, 1.0)
            count = int((stop - start) / step + 1e-9) + (
                name != "seed" or (stop - start) % step != 0
            )
            values = [round(start + i * step, 9) for i in range(min(count, MOST_VALUES))]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(
            f"--grid {text}: expected SETTING=START:STOP:STEP or SETTING=A,B,C, e.g. strength=0:1.2:0.3"
        ) from None
    if not 0 < count <= MOST_VALUES:
        raise UserError(f"--grid {text} gives {count} values; expected 1 to {MOST_VALUES}")
    is_whole = name in ("seed", "steps")
    if bad := [
        value
        for value in values
        if not math.isfinite(value) or (is_whole and not value.is_integer())
    ]:
        raise UserError(
            f"--grid {text}: {bad[0]:g} is no {'whole ' * is_whole}number, which {name} has to be"
        )
    return Axis(name, values)


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


def _check(config: Infer, axes: list[Axis], prompts: list[str], loras: int) -> None:
    if len(axes) > 2 or (axes and (len(prompts) > 1 or config.count > 1)):
        raise UserError(
            "a grid has one or two axes and one prompt; use --grid seed=0:4 for several pictures"
        )
    _check_numbers(config, axes)
    if config.count < 1 or config.batch < 1:
        raise UserError(
            f"--count and --batch must be at least 1, got {config.count} and {config.batch}"
        )
    if not 0 < config.refiner_start < 1:
        raise UserError(
            f"--refiner-start is {config.refiner_start:g}; expected a share of the steps in (0, 1)"
        )
    if config.refiner_start != Infer().refiner_start and not config.refiner:
        raise UserError("--refiner-start has no effect without --refiner")
    if (
        config.negative
        and config.guidance == 1
        and not any(axis.setting == "guidance" for axis in axes)
    ):
        raise UserError("--negative has no effect at guidance 1; leave it out or raise --guidance")
    if Path(config.out).suffix.lower() != ".png":
        raise UserError(
            f"--out {config.out} must end in .png; the recipe is kept in the PNG's text"
        )
    if file := next(
        (parent for parent in Path(config.out).parents if parent.exists() and not parent.is_dir()),
        None,
    ):
        raise UserError(f"--out {config.out} lies below {file}, which is a file; name a folder")
    pictures = _paths(config, 1 if axes else len(prompts) * config.count)
    destination.check_path_lengths("--out", map(temporary_name, pictures))
    for axis in axes:
        number = re.match(r"lora(\d+)", axis.setting)
        if (
            re.search(r"strength|unet|text", axis.setting)
            and (int(number[1]) if number else 0) >= loras
        ):
            raise UserError(
                f"--grid {axis.setting} needs {'such a' if number else 'a'} --lora; {loras} given, counted from lora0"
            )


def _check_numbers(config: Infer, axes: list[Axis]) -> None:
    """Raises UserError for sizes and seeds that torch does not take, and for NaN and infinity."""
    for option, value in (
        ("width", config.width),
        ("height", config.height),
        ("threads", config.threads),
        ("clip-skip", config.clip_skip),
    ):
        if value < 0:
            raise UserError(f"--{option} is {value}; expected 0 or more")
    seeds = [
        config.seed,
        config.seed + config.count - 1,
        *(value for axis in axes for value in axis.values if axis.setting == "seed"),
    ]
    if not -(2**63) <= min(seeds) <= max(seeds) < 2**64:
        raise UserError(
            f"--seed {max(seeds, key=abs):g} is out of range; torch takes -2^63 to 2^64 - 1"
        )
    for option, number in (("guidance", config.guidance), ("strength", config.strength)):
        if not math.isfinite(number):
            raise UserError(f"--{option} is {number}; expected a number")


def _drawer(
    config: Infer, family: Family, patches: Sequence[Patch], refiner: Family | None
) -> Callable[[Sequence[tuple[str, int]], Infer], list[Image.Image]]:
    """A function from (prompt, seed) pairs and a config to pictures; start image and mask are read once."""
    height, width = config.height or family.resolution, config.width or family.resolution
    init = (
        image_to_pixels(_fit(config.init_image, height, width))[None] if config.init_image else None
    )
    hole = (
        image_to_tensor(_fit(config.mask, height, width, is_mask=True))[None] > 127
        if config.mask
        else None
    )
    if hole is not None and not hole.any():
        raise UserError(
            f"--mask {config.mask} has nothing white where the picture is, {width} x {height} pixels; paint what is to be drawn white"
        )
    abstractions = [a for p in patches for a in p.abstractions]

    def draw(jobs: Sequence[tuple[str, int]], c: Infer) -> list[Image.Image]:
        recipe = SamplerSettings(
            c.sampler,
            c.steps,
            c.guidance,
            tokens.bind_placeholders(c.negative, abstractions),
            width,
            height,
            c.strength,
            c.refiner_start,
        )
        bound, seeds = (
            [tokens.bind_placeholders(prompt, abstractions) for prompt, _ in jobs],
            [seed for _, seed in jobs],
        )
        return to_images(
            generate_images(
                family,
                bound,
                seeds,
                recipe,
                init=init,
                mask=None if hole is None else hole.float(),
                refiner=refiner,
            )
        )

    return draw


def _draw_grid(
    config: Infer,
    axes: list[Axis],
    prompt: str,
    patches: Sequence[Patch],
    arguments: Sequence[LoraArgument],
    draw: Callable[..., list[Image.Image]],
) -> Path:
    """One sheet: the last axis runs over the columns, the first of two over the rows."""
    rows = []
    *vertical, across = axes
    for down in product(*(axis.values for axis in vertical)):
        cells = []
        for value in across.values:
            settings = dict(zip((a.setting for a in vertical), down)) | {across.setting: value}
            changed = {
                name: int(v) if name != "guidance" else v
                for name, v in settings.items()
                if name in ("seed", "steps", "guidance")
            }
            _set_strengths(patches, arguments, settings)
            cell = replace(config, **changed)  # type: ignore[arg-type]
            cells += draw([(prompt, cell.seed)], cell)
        label = ", ".join(f"{axis.setting} {value:g}" for axis, value in zip(vertical, down))
        rows.append(
            ImageRow(label, cells, [f"{across.setting} {value:g}" for value in across.values])
        )
    return _save(draw_grid(rows, title=prompt), Path(config.out), config)


def _set_strengths(
    patches: Sequence[Patch], arguments: Sequence[LoraArgument], settings: dict[str, float]
) -> None:
    for i, (p, argument) in enumerate(zip(patches, arguments)):
        given = argument.strength
        strengths = (
            dict.fromkeys(p.adapted, given)
            if isinstance(given, float)
            else _by_component(given, p.adapted, argument.path)
        )
        for name, value in settings.items():
            which, _, part = name.rpartition(".")
            if which in ("", f"lora{i}") and part in ("strength", "unet", "text"):
                strengths |= (
                    dict.fromkeys(p.adapted, value)
                    if part == "strength"
                    else _by_component({part: value}, p.adapted, argument.path, whole=False)
                )
        if p.adapted:
            p.set_strength(strengths)


def _by_component(
    given: dict[str, float], components: Any, source: str, *, whole: bool = True
) -> dict[str, float]:
    """unet=..., text=... spelled out for the components of a file; a component that is not named keeps strength 1."""
    out: dict[str, float] = dict.fromkeys(components, 1.0) if whole else {}
    for name, value in given.items():
        found = [
            c
            for c in components
            if c == name
            or (name == "unet" and c == "transformer")
            or (name == "text" and c.startswith("text_encoder"))
        ]
        if not found:
            raise UserError(
                f"{source} adapts {', '.join(components) or 'no network'}, so the strength {name}={value:g} would have no effect"
            )
        out |= dict.fromkeys(found, value)
    return out


def _whole_model(given: str, run: Path) -> None:
    """Says where a run that trained its networks whole has them, if another model is given: its folder adds the tokens alone."""
    own = run / "model"
    if own.is_dir() and Path(given).resolve() != own.resolve():
        print(
            f"warning: {run} trained the whole model, which is {own}; --model {given} lacks that, give --model {own}",
            file=sys.stderr,
        )


def _loading(config: Infer, arguments: Sequence[LoraArgument]) -> LoadOptions:
    """How the model is opened: by the flags, else as the runs that made the LoRAs did; said, because it changes the pictures."""
    scheduler: dict[str, Any] = {}
    text = {"clip_skip": config.clip_skip, "max_sequence_length": config.max_sequence_length}
    changes: dict[str, Any] = {}
    for argument in arguments:
        trained = tomllib.loads(_header(argument.path).get("lora_core.config", ""))
        noise = trained.get("noise", {})
        if noise.get("prediction", "model") != "model":
            scheduler["prediction_type"] = noise["prediction"]
        if noise.get("zero_terminal_snr"):
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        changes |= {
            name: trained[name] for name, given in text.items() if not given and trained.get(name)
        }
    if scheduler or changes:
        print(
            f"note: sampling with {scheduler | changes}, as the LoRA was trained", file=sys.stderr
        )
    return LoadOptions(
        DTYPES[config.precision],
        choose_device(config.device),
        config.vae,
        scheduler=scheduler,
        config=config.model_config,
        **(text | changes),
    )


def _header(path: str) -> dict[str, str]:
    """The header entries of a LoRA file, or of all files of a run folder; nothing for a file that is none, which is refused later with its reason."""
    found: dict[str, str] = {}
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]:
        try:
            with safe_open(file, "pt") as opened:
                found |= opened.metadata() or {}
        except (OSError, SafetensorError):
            continue
    return found


def _free(name: str, taken: set[str]) -> str:
    """The first of TOK2, TOK3 ..., or <s0-2>, <s0-3> ..., that is not taken."""
    numbered = (f"{name[:-1]}-{n}>" if name.endswith(">") else f"{name}{n}" for n in count(2))
    return next(other for other in numbered if other not in taken)


def _fit(path: str, height: int, width: int, *, is_mask: bool = False) -> Image.Image:
    """The picture, or the mask's greys, scaled to cover (height, width) and centre-cropped to it."""
    if not Path(path).is_file():
        raise UserError(f"there is no picture {path}")
    image = read_mask(Path(path)) if is_mask else read_image(Path(path)).image
    scale = max(width / image.width, height / image.height)
    image = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _paths(config: Infer, count: int) -> list[Path]:
    out = Path(config.out)
    return (
        [out]
        if count == 1
        else [out.with_name(f"{out.stem}_{i:03d}{out.suffix}") for i in range(count)]
    )


def _save(image: Image.Image, path: Path, config: Infer) -> Path:
    """Writes the PNG with its recipe, as JSON to repeat it and as the `parameters` text that other programs show."""
    c, loras = config, ", ".join(config.lora)
    shown = f"{c.prompt}\nSteps: {c.steps}, Sampler: {c.sampler}, CFG scale: {c.guidance:g}, Seed: {c.seed}, Model: {c.model}"
    table = {
        name: value
        for name, value in to_table(config).items()
        if name not in ("source", "out", "batch", "device", "threads")
    }
    save_png(
        image,
        path,
        {CHUNK: json.dumps(table), "parameters": shown + (f", Lora: {loras}" if loras else "")},
    )
    return path


def read_recipe(path: str) -> Infer:
    """The config in a picture's text chunk. Raises UserError when it has none."""
    try:
        text = decode_image(Path(path)).info.get(CHUNK)
    except READ_ERRORS as error:
        raise UserError(f"--from {path}: {error}") from None
    if not text:
        raise UserError(
            f"--from {path}: the picture has no recipe; was it made by infer.py and not saved again?"
        )
    advice = "take a picture that infer.py made"
    table = parse_json(str(text), f"--from {path}: its recipe", advice)
    if not isinstance(table, dict):
        raise UserError(
            f"--from {path}: its recipe is {table!r}, expected a table of options; {advice}"
        )
    try:
        return from_table(table, Infer)
    except UserError as error:
        raise UserError(
            f"--from {path}: its recipe is of another program or version: {error}"
        ) from None


def parse_arguments(argv: Sequence[str]) -> Infer:
    """The config of a command line; with --from, what the picture says where no flag says otherwise."""
    config = parse_command_line(Infer, argv, prog="infer.py", example=EXAMPLE)
    if not config.source:
        return config
    default = Infer()
    given = {
        f.name: getattr(config, f.name)
        for f in fields(Infer)
        if getattr(config, f.name) != getattr(default, f.name)
    }
    return replace(read_recipe(config.source), **given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 a mistake that the printed sentence explains."""
    try:
        for path in infer(parse_arguments(list(sys.argv[1:] if argv is None else argv))):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
