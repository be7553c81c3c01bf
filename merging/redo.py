"""A merge carried out again from the recipe that its result carries."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_core.errors import UserError
from merging.opening import sha256_digest
from merging.output import RECIPE, SIDECAR

POSITIONAL_OPTIONS = (
    "sum",
    "base",
    "tuned",
    "file",
    "path_1",
    "path_2",
    "alpha_1",
    "alpha_2",
)  # options that are typed without a flag


def read_recipe(path: str) -> dict[str, Any]:
    """The recipe in a file's header or a model's folder. Raises UserError where there is none."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path} is not there; give a file that merge.py made")
    try:
        if place.is_dir():
            text = (
                (place / SIDECAR).read_text(encoding="utf-8") if (place / SIDECAR).is_file() else ""
            )
        else:
            with safe_open(place, "np") as opened:
                text = (opened.metadata() or {}).get(RECIPE, "")
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the recipe of {path} cannot be read ({str(error).splitlines()[0]}); is the file damaged?"
        ) from None
    if not text:
        raise UserError(
            f"{path} carries no recipe; only .safetensors files and model folders that merge.py made have one"
        )
    return parse_recipe(text, path)


def parse_recipe(text: str, source: str) -> dict[str, Any]:
    """A recipe from its JSON. Raises UserError for anything else."""
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        recipe = None
    if (
        not isinstance(recipe, dict)
        or {"command", "options", "inputs"} - set(recipe)
        or not all(isinstance(recipe[name], dict) for name in ("options", "inputs"))
    ):
        raise UserError(f"the recipe of {source} is broken; expected a command, options and inputs")
    return recipe


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """The command of a recipe, as it may be typed again, and the beginnings of its inputs' digests."""
    words = [f"merge.py {recipe['command']}"]
    for name, value in recipe["options"].items():
        flag = [] if name in POSITIONAL_OPTIONS else [f"--{name.replace('_', '-')}"]
        words += flag + (
            []
            if value is True
            else shlex.join(map(str, value if isinstance(value, list) else [value])).split("\0")
        )
    inputs = ", ".join(f"{name} {str(known)[:8]}" for name, known in recipe["inputs"].items())
    return f"made by: {' '.join(words)}   (sha256 of {inputs} ...)"


def redo_merge(
    path: str,
    out: str,
    *,
    overwrite: bool,
    dry_run: bool,
    run: Callable[[dict[str, Any], str], None],
) -> None:
    """Makes a file again, in its place or at `out`, from the same inputs; what comes out the same is left alone.

    `run` carries out a recipe to a path. Raises UserError for inputs that are gone or have changed, and for an output that differs (without
    `overwrite`).
    """
    recipe = read_recipe(path)
    print(describe_recipe(recipe))
    target = Path(os.path.abspath(out or path))
    if out and target.exists() and not overwrite and not dry_run:
        raise UserError(
            f"{out} is there already; pass --overwrite to replace it, or name another output"
        )
    with contextlib.chdir(_input_folder(recipe, path)):
        for name, known in recipe["inputs"].items():
            if sha256_digest(name) != known:
                raise UserError(
                    f"{name} is not what it was when {path} was made (its sha256 differs); the same result cannot come out of it"
                )
        workshop = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            workshop.mkdir(parents=True)
            with contextlib.redirect_stdout(io.StringIO()):  # names of a place that is soon gone
                run(recipe, str(workshop / target.name))
            _move_results(workshop, target, Path(out or path), overwrite=overwrite, dry_run=dry_run)
        except OSError as error:
            raise UserError(
                f"{target} cannot be written ({error.strerror or error}); what was there is untouched"
            ) from None
        finally:
            shutil.rmtree(workshop, ignore_errors=True)


def _move_results(
    workshop: Path, target: Path, shown: Path, *, overwrite: bool, dry_run: bool
) -> None:
    """Moves what was made to its place, file by file, where it differs from what is there."""
    made = sorted(workshop.iterdir())
    same = [
        file
        for file in made
        if target.with_name(file.name).exists()
        and sha256_digest(str(file)) == sha256_digest(str(target.with_name(file.name)))
    ]
    changed = [file for file in made if file not in same]
    for file in same:
        print(f"the same as before: {shown.with_name(file.name)}")
    occupied = [file for file in changed if target.with_name(file.name).exists()]
    if occupied and not overwrite:
        raise UserError(
            f"{shown.with_name(occupied[0].name)} comes out differently; pass --overwrite to replace it, or --out to keep both"
        )
    for file in [] if dry_run else changed:
        place = target.with_name(file.name)
        if place.is_dir():
            shutil.rmtree(place)
        file.replace(place)
        print(f"written: {shown.with_name(file.name)}")


def _input_folder(recipe: dict[str, Any], path: str) -> Path:
    """The folder from which all inputs are found: the current one, or that of the file. Raises UserError for an input that is gone."""
    for place in (Path.cwd(), Path(path).resolve().parent):
        missing = [
            name
            for name in recipe["inputs"]
            if "/" not in name or name.startswith((".", "/")) or Path(name).suffix
        ]
        missing = [name for name in missing if not (place / name).exists()]
        if not missing:
            return place
    raise UserError(
        f"{missing[0]}, from which {path} was made, is neither below {Path.cwd()} nor beside it; run this where it is"
    )
