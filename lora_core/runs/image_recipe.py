"""The recipe of an image in its PNG text: the options that repeat it.

An image may come from a stranger. Its recipe sets what an image is, and nothing of what a command
does on this computer: it writes no file, reads no text or image file, and fetches nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from lora_core.data.images import READ_ERRORS, decode_image
from lora_core.errors import UserError
from lora_core.escaped_output import one_line
from lora_core.prompt_tags import parse_lora_tags
from lora_core.runs.image_grid import MOST_VALUES, parse_axis
from lora_core.runs.loras import parse_lora
from lora_core.runs.pictures import save_png
from lora_core.shared_paths import find_shared_path, is_in_hub_cache, shorten_path
from lora_core.text import parse_json
from lora_core.toml import from_table, to_table

CHUNK = "lora_core"  # the PNG text chunk with the recipe
C = TypeVar("C")

# Every option of infer.py, and who may set it.
IMAGE_OPTIONS = (  # what an image is: a recipe, or the flag, which wins
    "prompt", "negative", "seed", "sampler", "sampler_args", "steps", "guidance", "width",
    "height", "clip_skip", "max_token_length", "max_sequence_length", "precision", "grid",
    "model", "lora", "model_config", "vae", "refiner", "refiner_start", "region", "quantize",
    "emphasis", "adapter_guidance", "skip_layers", "skip_layer_scale", "skip_layer_start",
    "skip_layer_stop",
)  # fmt: skip
START_OPTIONS = ("init_image", "mask", "strength")  # images of this disk: recorded, set by flags
CALL_OPTIONS = (  # what a command does: flags only, and not recorded
    "out", "overwrite", "prompts", "count", "batch", "device", "threads", "source", "adapter_kind",
    "family", "stream", "offload",
)  # fmt: skip
# Of the options above, those that name a file, a folder, or a model of the hub.
MODEL_OPTIONS = ("model", "model_config", "vae", "refiner")

# The most that a recipe may ask for; the sliders of A1111 end at 150 steps and 2048 x 2048 pixels.
MOST_STEPS = 150
MOST_STEPS_OF_A_GRID = 20 * MOST_STEPS  # of all its images together
MOST_PIXELS = 2048 * 2048
MOST_LORAS = 16
MOST_REGIONS = 16
LONGEST_SIDE = 4096  # pixels, where the other side is the model's own
LONGEST_RECIPE_PROMPT = 10_000  # characters; CLIP reads 77 tokens, T5 512
LONGEST_T5_PROMPT = 512  # tokens; Flux was trained with as many


def save_with_recipe(image: Image.Image, path: Path, config: Any) -> None:
    """Writes a PNG with its options in text chunks.

    They are there as JSON, for --from, and as the `parameters` text that other programs show. Paths
    are those of `shorten_path`, and of start images only the names: people share their images.
    """
    c = _shorten_paths(config, path.parent)
    shown = (
        f"{c.prompt}\nSteps: {c.steps}, Sampler: {c.sampler}, CFG scale: {c.guidance:g}, "
        f"Seed: {c.seed}, Model: {c.model}"
    )
    if c.lora:
        shown += f", Lora: {', '.join(c.lora)}"
    recorded = (*IMAGE_OPTIONS, *START_OPTIONS)
    table = {name: value for name, value in to_table(c).items() if name in recorded}
    save_png(image, path, {CHUNK: json.dumps(table), "parameters": shown})


def apply_recipe(config: Any, path: str, given: Collection[str]) -> Any:
    """The config with the options in the text chunk of the image `path`; those `given` stay.

    Prints what was taken and what was not. Raises UserError for an image without a recipe, a recipe
    of another kind, one that asks for more than the limits above, and a model or LoRA that is not
    on this disk: only a flag names what is fetched from the hub.
    """
    table = _read_table(path)
    found = _parse_table(table, path, type(config))
    taken: dict[str, Any] = {}
    left_out: dict[str, Any] = {}
    for name in table:
        value = getattr(found, name)
        if name in given or value == getattr(type(config)(), name):
            continue
        is_taken = name in IMAGE_OPTIONS or (name == "strength" and "init_image" in given)
        (taken if is_taken else left_out)[name] = value
    _refuse_code(taken, path)
    _check_limits(replace(config, **taken), taken, path)
    taken |= _find_paths(taken, path)
    _print_options(f"note: taken from {path}:", taken)
    _print_options(
        f"note: left out of {path}, because only a flag may set what a command reads, writes and "
        "costs:",
        left_out,
    )
    return replace(config, **taken)


def _refuse_code(taken: Mapping[str, Any], path: str) -> None:
    """Raises UserError for a sampler in a file that only the recipe names: no such code is run."""
    sampler = taken.get("sampler", "")
    if ":" in sampler:
        raise UserError(
            f"--from {path}: its recipe samples with {sampler}, and no code that only a recipe "
            "names is run; give --sampler yourself, that file or another sampler"
        )


def _print_options(start: str, options: Mapping[str, Any]) -> None:
    """One line with options as they would be typed; nothing without any."""
    words = []
    for name, value in options.items():
        for item in value if isinstance(value, tuple) else (value,):
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(item))}")
    if words:
        print(start, one_line(" ".join(words)), file=sys.stderr)


# ---------------------------------------------------------------- reading


def _read_table(path: str) -> dict[str, Any]:
    """The table in an image's text chunk."""
    try:
        text = decode_image(Path(path)).info.get(CHUNK)
    except READ_ERRORS as error:
        raise UserError(f"--from {path}: {error}") from None
    if not text:
        raise UserError(
            f"--from {path}: the image has no recipe; was it made by infer.py and not saved again?"
        )
    advice = "take an image that infer.py made"
    table = parse_json(str(text), f"--from {path}: its recipe", advice)
    if not isinstance(table, dict):
        raise UserError(
            f"--from {path}: its recipe is {table!r}, expected a table of options; {advice}"
        )
    return table


def _parse_table(table: dict[str, Any], path: str, cls: type[C]) -> C:
    try:
        return from_table(table, cls)
    except UserError as error:
        raise UserError(
            f"--from {path}: its recipe is of another program or version: {error}"
        ) from None


def _check_limits(config: Any, taken: Collection[str], path: str) -> None:
    """Raises UserError for an option of the recipe that costs more than a recipe may."""

    def check(options: Sequence[str], size: int, most: int, what: str) -> None:
        if size > most and not set(options).isdisjoint(taken):
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in options)
            raise UserError(
                f"--from {path}: its recipe asks for {size} {what}, and a recipe may ask for "
                f"{most}; give {flags} yourself"
            )

    check(("steps",), config.steps, MOST_STEPS, "steps")
    check(("width", "height"), config.width * config.height, MOST_PIXELS, "pixels")
    for side in ("width", "height"):
        check((side,), getattr(config, side), LONGEST_SIDE, f"pixels of {side}")
    for name in ("prompt", "negative"):
        check((name,), len(getattr(config, name)), LONGEST_RECIPE_PROMPT, "characters")
    loras = {"lora": len(config.lora), "prompt": len(parse_lora_tags(config.prompt)[1])}
    asked = [name for name in loras if name in taken and loras[name]]
    check(asked, sum(loras[name] for name in asked), MOST_LORAS, "LoRA files")
    check(("region",), len(config.region), MOST_REGIONS, "regions")
    check(("region",), sum(map(len, config.region)), LONGEST_RECIPE_PROMPT, "characters")
    length = config.max_sequence_length
    check(("max_sequence_length",), length, LONGEST_T5_PROMPT, "tokens of a prompt")
    if "grid" in taken:
        check(("grid",), len(config.grid), 2, "axes")
        axes = [parse_axis(text) for text in config.grid]
        most = [max(axis.values) for axis in axes if axis.setting == "steps"]
        steps = int(max(most, default=config.steps))
        counts = [MOST_VALUES if axis.run else len(axis.values) for axis in axes]
        total = steps * prod(counts)
        check(("grid",), total, MOST_STEPS_OF_A_GRID, "steps in all images of a grid")


def _find_paths(taken: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The recipe's models and LoRAs as paths on this disk."""
    folder = Path(path).parent
    found: dict[str, Any] = {}
    for option in MODEL_OPTIONS:
        if name := taken.get(option):
            found[option] = _find_path(name, folder, f"--{option.replace('_', '-')} {name}", path)
    for text in taken.get("lora", ()):
        name = parse_lora(text).path
        place = _find_path(name, folder, f"--lora {text}", path)
        found["lora"] = (*found.get("lora", ()), place + text.removeprefix(name))
    for text in taken.get("grid", ()):
        if name := _run_of_axis(text):
            place = _find_path(name, folder, f"--grid {text}", path)
            text = text.replace(name, place, 1)
        found["grid"] = (*found.get("grid", ()), text)
    return found


def _run_of_axis(text: str) -> str:
    """The run folder of an axis checkpoint=RUN or checkpoint=RUN:0.8; "" for other axes."""
    run = parse_axis(text).run
    return parse_lora(run, "--grid checkpoint=").path if run else ""


def _find_path(name: str, folder: Path, flag: str, path: str) -> str:
    place = find_shared_path(name, folder)
    if place is None and is_in_hub_cache(name):
        return name
    if place is None:
        raise UserError(
            f"--from {path}: its recipe names {name}, which is not on this disk, and nothing that "
            f"a recipe names is fetched; give {flag} yourself, or what you have in its place"
        )
    return place


# ---------------------------------------------------------------- writing


def _shorten_paths(config: Any, folder: Path) -> Any:
    """The config with the paths that the recipe of an image in `folder` may show."""
    changed: dict[str, Any] = {}
    for option in MODEL_OPTIONS:
        changed[option] = shorten_path(getattr(config, option), folder)
    for option in ("init_image", "mask"):
        changed[option] = Path(getattr(config, option)).name
    file, colon, function = config.sampler.rpartition(":")
    if colon:
        changed["sampler"] = f"{shorten_path(file, folder)}:{function}"
    loras = []
    for text in config.lora:
        name = parse_lora(text).path
        loras.append(shorten_path(name, folder) + text.removeprefix(name))
    axes = []
    for text in config.grid:
        run = _run_of_axis(text)
        axes.append(text.replace(run, shorten_path(run, folder), 1) if run else text)
    return replace(config, **changed, lora=tuple(loras), grid=tuple(axes))
