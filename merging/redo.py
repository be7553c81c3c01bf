"""merge.py redo: repeat a merge from the recipe in its result."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from lora_core.errors import UserError
from lora_core.formats.model_folders import check_replaced_folder
from lora_core.runs.loras import parse_lora
from lora_core.shared_paths import is_in_hub_cache
from lora_core.text import shorten_value
from merging.commands import COMMANDS, Redo, flatten, run_merge_command, unflatten
from merging.expression import parse_files
from merging.opening import FILE_ENDINGS
from merging.recipe import LEFT_OUT, describe_recipe, read_merge_recipe, sha256_digest
from models.published import PUBLISHED_MODELS

INPUT_OPTIONS = ("base", "tuned", "file", "path_1", "path_2")  # that name what is read, with sum
MODEL_OPTIONS = ("model", "model_config")
LIST_OPTIONS = ("concepts", "prompts")  # of texts
# Globs of which a folder of a model or an adapter has a file.
FOLDER_MARKS = ("model_index.json", "*.safetensors", "adapter_config.json", "*/adapter_config.json")
# The largest folder that is hashed: twice the files of a large model take 3 minutes.
MOST_FILES, MOST_BYTES = 10_000, 64 << 30
REPEATABLE = ("mix", "fold", "fuse", "distill", "resize", "convert", "add")


def run_redo(options: Redo) -> None:
    """Makes a file again, in its place or at --out; identical files are not written.

    Raises UserError for inputs that are gone or have changed, and for an output that differs
    (without --overwrite).
    """
    path, out = options.file, options.out
    recipe = read_merge_recipe(path)
    print(describe_recipe(recipe))
    target = Path(os.path.abspath(out or path))
    if out and target.exists() and not options.overwrite and not options.dry_run:
        raise UserError(
            f"{out} is there already; pass --overwrite to replace it, or name another output"
        )
    if target.is_dir() and options.overwrite and not options.dry_run:
        check_replaced_folder(Path(out or path))
    _check_types(recipe, path)
    recipe = _expand_home(recipe)
    with contextlib.chdir(_input_folder(recipe, path)):
        _check_names(recipe, path)
        _check_inputs(recipe, path)
        workshop = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            workshop.mkdir(parents=True)
            with contextlib.redirect_stdout(io.StringIO()):  # it would name the temporary folder
                repeat_recipe(recipe, str(workshop / target.name))
            _move_results(workshop, target, Path(out or path), options)
        except OSError as error:
            raise UserError(
                f"{target} cannot be written ({error.strerror or error}); existing files are "
                "untouched"
            ) from None
        finally:
            shutil.rmtree(workshop, ignore_errors=True)


def repeat_recipe(recipe: dict[str, Any], out: str) -> None:
    """Carries out a recipe anew, with another output. Raises UserError for a broken one."""
    command, chosen = recipe["command"], recipe["options"]
    if command not in REPEATABLE:
        raise UserError(f"the recipe has the command {command!r}, which cannot be repeated")
    known = set(flatten(COMMANDS[command].options())) - LEFT_OUT
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(
            f"the recipe has the option {unknown[0]}, which {command} does not know; was it made "
            "by another version?"
        )
    try:
        run_merge_command(command, unflatten(COMMANDS[command].options, {**chosen, "out": out}))
    except (TypeError, AttributeError) as error:  # values that no command line can give
        raise UserError(f"the recipe is broken ({error}); make the file anew by hand") from None


def _check_types(recipe: dict[str, Any], path: str) -> None:
    """Raises UserError for something else than a text where a recipe names files, and for code."""
    if kind := recipe["options"].get("adapter_kind"):
        raise UserError(
            f"the recipe of {path} runs the code of {shorten_value(kind)}, and redo runs none; run "
            "the command above by hand"
        )
    for option in (*INPUT_OPTIONS, *MODEL_OPTIONS, "sum"):
        value = recipe["options"].get(option, "")
        if not isinstance(value, str):
            raise UserError(
                f"the recipe of {path} has {shorten_value(value)} as {option}, expected a name; "
                "make the file anew by hand"
            )
    for option in LIST_OPTIONS:
        value = recipe["options"].get(option, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(
                f"the recipe of {path} has {shorten_value(value)} as {option}, expected texts; "
                "make the file anew by hand"
            )


def _expand_home(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the home folder in place of a ~ at the start of names."""
    options = dict(recipe["options"])
    for option in (*INPUT_OPTIONS, *MODEL_OPTIONS):
        if isinstance(options.get(option), str):
            options[option] = os.path.expanduser(options[option])
    if "concepts" in options:
        options["concepts"] = [os.path.expanduser(text) for text in options["concepts"]]
    inputs = {os.path.expanduser(name): digest for name, digest in recipe["inputs"].items()}
    return recipe | {"options": options, "inputs": inputs}


def _check_names(recipe: dict[str, Any], path: str) -> None:
    """Raises UserError, before a file is opened, for names that a recipe may not have read.

    It may be a stranger's: it reads the adapters and models that are its inputs, no other file or
    folder of this disk, and fetches nothing.
    """
    options, inputs = recipe["options"], recipe["inputs"]
    read = [options[option] for option in INPUT_OPTIONS if options.get(option)]
    if "sum" in options:
        read += [file.path for file in parse_files(str(options["sum"]))]
    read += [parse_lora(text).path for text in options.get("concepts", ())]
    read += [text for text in options.get("prompts", ()) if os.path.isfile(text)]
    if others := [name for name in read if name not in inputs]:
        raise UserError(
            f"the recipe of {path} reads {others[0]}, which is not among its inputs; "
            "run the command above by hand"
        )
    models = [options[option] for option in MODEL_OPTIONS if options.get(option)]
    for name in (*inputs, *models):
        if name in PUBLISHED_MODELS and not Path(name).exists():
            continue
        if reason := _why_not_read(str(name)):
            raise UserError(
                f"the recipe of {path} names {name}, {reason}; "
                "to have it read, run the command above by hand"
            )


def _why_not_read(name: str) -> str:
    """Why a recipe may not have a name read: no adapter or model of this disk; "" where it may."""
    place = Path(name)
    if place.is_dir():
        if not any(map(any, (place.glob(mark) for mark in FOLDER_MARKS))):
            return "a folder without a model or an adapter, and redo reads no other"
        return _why_too_large(place)
    if place.is_file():
        is_weights = place.suffix in FILE_ENDINGS
        return "" if is_weights else f"and redo reads files in {', '.join(FILE_ENDINGS)} only"
    is_known = is_in_hub_cache(name)
    return "" if is_known else "which is not on this disk, and redo fetches nothing"


def _why_too_large(folder: Path) -> str:
    """Why a folder is not hashed; "" for one of a usual size."""
    size = 0
    for count, file in enumerate(folder.rglob("*"), start=1):
        size += file.stat().st_size if file.is_file() else 0
        if count > MOST_FILES or size > MOST_BYTES:
            return (
                f"a folder of more than {MOST_FILES:,} files or {MOST_BYTES >> 30} GB, "
                "which redo does not hash"
            )
    return ""


def _check_inputs(recipe: dict[str, Any], path: str) -> None:
    for name, known in recipe["inputs"].items():
        if sha256_digest(name) != known:
            raise UserError(
                f"{name} has changed since {path} was made (its sha256 differs), so the result "
                "cannot be the same"
            )


def _move_results(workshop: Path, target: Path, shown: Path, options: Redo) -> None:
    """Moves the new files to their place, except those that are identical to existing ones."""
    changed = []
    for file in sorted(workshop.iterdir()):
        place = target.with_name(file.name)
        if place.exists() and sha256_digest(str(file)) == sha256_digest(str(place)):
            print(f"the same as before: {shown.with_name(file.name)}")
        else:
            changed.append(file)
    occupied = [file for file in changed if target.with_name(file.name).exists()]
    if occupied and not options.overwrite:
        raise UserError(
            f"{shown.with_name(occupied[0].name)} comes out differently; pass --overwrite to "
            "replace it, or --out to keep both"
        )
    if options.dry_run:
        return
    for file in changed:
        place = target.with_name(file.name)
        if place.is_dir():
            shutil.rmtree(place)
        file.replace(place)
        print(f"written: {shown.with_name(file.name)}")


def _input_folder(recipe: dict[str, Any], path: str) -> Path:
    """The folder from which all inputs are found: the current one, or that of the file.

    Raises UserError for an input that is gone.
    """
    names = [name for name in recipe["inputs"] if _is_path(name)]
    missing: list[str] = []
    for place in (Path.cwd(), Path(path).resolve().parent):
        missing = [name for name in names if not (place / name).exists()]
        if not missing:
            return place
    raise UserError(
        f"{missing[0]}, from which {path} was made, is neither below {Path.cwd()} nor next to it; "
        "run this where it is"
    )


def _is_path(name: str) -> bool:
    """Whether an input is certainly a path; NAME/NAME may be a hub id."""
    return "/" not in name or name.startswith((".", "/")) or bool(Path(name).suffix)
