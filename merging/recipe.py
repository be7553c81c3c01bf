"""The recipe in a result's header: the command, its options, and the sha256 of its inputs."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_core.errors import UserError
from lora_core.escaped_output import is_quick, one_line
from lora_core.formats.known_formats import PICKLED
from lora_core.text import hide_home, read_text
from merging.commands import flatten

RECIPE = "lora_core.merge"  # header entry with the recipe as JSON
SIDECAR = "lora_core_merge.json"  # the same as a file in a model's folder
TYPED_WITHOUT_FLAG = (
    "sum", "base", "tuned", "file", "path_1", "path_2", "alpha_1", "alpha_2", "concepts",
)  # fmt: skip
TYPED_WITH_FLAG = {"fuse": ("base",)}  # of these, where a command has it as a flag
SHOWN_INPUTS = 10  # of a recipe, on the screen
CHUNK = 1 << 22  # bytes hashed at a time
LEFT_OUT = {
    "out",
    "overwrite",
    "dry_run",
    "residual",
    "sidecar",
    "words",
}  # do not change the result


def make_recipe(command: str, options: Any, inputs: Sequence[str]) -> dict[str, Any]:
    """The recipe of a command: options that are not the defaults, and a digest of every input.

    Paths below the home folder begin with ~, because people publish what they merge.
    """
    default = flatten(type(options)())
    changed = {}
    for name, value in flatten(options).items():
        if name not in LEFT_OUT and value != default[name]:
            changed[name] = _hide_homes(value)
    digests = {hide_home(path): digest for path, digest in digest_inputs(inputs).items()}
    return {"command": command, "options": changed, "inputs": digests}


def recipe_header(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The header entry of a recipe; none without one."""
    return {RECIPE: json.dumps(recipe, sort_keys=True, ensure_ascii=False)} if recipe else {}


def write_sidecar(recipe: Mapping[str, Any], folder: Path) -> None:
    """Puts a recipe into a model's folder."""
    text = json.dumps(recipe, sort_keys=True, indent=1, ensure_ascii=False)
    (folder / SIDECAR).write_text(text + "\n", encoding="utf-8")


def read_merge_recipe(path: str) -> dict[str, Any]:
    """The recipe in a file's header or a model's folder. Raises UserError where there is none."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path} does not exist; give a file that merge.py made")
    try:
        text = _recipe_text(place)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the recipe of {path} cannot be read ({reason}); is the file damaged?"
        ) from None
    if not text:
        raise UserError(
            f"{path} has no recipe; only .safetensors files and model folders that merge.py "
            "made have one"
        )
    return parse_recipe(text, path)


def parse_recipe(text: str, source: str) -> dict[str, Any]:
    """A recipe from its JSON. Raises UserError for anything else."""
    from lora_core.json_files import parse_object  # most commands only write recipes

    broken = f"the recipe of {source} is broken; expected a command, options and inputs"
    try:
        recipe = parse_object(text, "it", "")
    except UserError as error:
        raise UserError(broken) from error
    if not _is_recipe(recipe):
        raise UserError(broken)
    return recipe


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """The command line of a recipe, and the first digits of its inputs' digests."""
    words = [f"merge.py {recipe['command']}"]
    for name, value in recipe["options"].items():
        if name not in TYPED_WITHOUT_FLAG or name in TYPED_WITH_FLAG.get(recipe["command"], ()):
            words.append(f"--{name.strip('_').replace('_', '-')}")
        if value is not True:
            words.append(shlex.join(map(str, value if isinstance(value, list) else [value])))
    digests = [f"{name} {str(known)[:8]}" for name, known in recipe["inputs"].items()]
    inputs = ", ".join(digests[:SHOWN_INPUTS])
    if len(digests) > SHOWN_INPUTS:
        inputs += f" and {len(digests) - SHOWN_INPUTS:,} more"
    return one_line(f"made by: {' '.join(words)}   (sha256 of {inputs} ...)")


def digest_inputs(inputs: Sequence[str]) -> dict[str, str]:
    """Path -> `sha256_digest`, with a bar over the bytes that are read, if these are many."""
    total = sum(map(_hashed_bytes, inputs))
    if is_quick(total):
        return {path: sha256_digest(path) for path in inputs}
    from merging.byte_progress import ByteBar

    bar = ByteBar(total, "hashing")
    return {path: sha256_digest(path, bar.add) for path in inputs}


def sha256_digest(path: str, add: Callable[[int], None] | None = None) -> str:
    """sha256 of a file; of a folder, over the names and digests of its files that are not hidden.

    A hub id gives the digest of the folder that it is downloaded to. `add` is called with the
    number of bytes that have been read since its last call.
    """
    place = Path(path)
    if place.is_file():
        found = hashlib.sha256()
        with place.open("rb") as opened:
            while part := opened.read(CHUNK):
                found.update(part)
                if add:
                    add(len(part))
        return found.hexdigest()
    if not place.is_dir():
        from models import hub_models  # imports the hub's client

        place = hub_models.download_model(path)
    lines = []
    for file in _hashed_files(place):
        name = file.relative_to(place)
        lines.append(f"{name.as_posix()} {sha256_digest(str(file), add)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hashed_files(folder: Path) -> list[Path]:
    """The files below a folder of which neither the name nor a folder begins with a dot."""
    found = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            found.append(file)
    return found


def _hashed_bytes(path: str) -> int:
    """The bytes that are read for a digest; 0 for a hub id."""
    place = Path(path)
    files = [place] if place.is_file() else _hashed_files(place)
    return sum(file.stat().st_size for file in files)


def _hide_homes(value: Any) -> Any:
    """An option's value, with ~ for the home folder in texts and lists of texts."""
    if isinstance(value, tuple):
        return [hide_home(text) for text in value]
    return hide_home(value) if isinstance(value, str) else value


def _recipe_text(place: Path) -> str:
    if place.is_dir():
        file = place / SIDECAR
        return read_text(file) if file.is_file() else ""
    if place.suffix in PICKLED:
        return ""
    with safe_open(place, "np") as opened:
        return (opened.metadata() or {}).get(RECIPE, "")


def _is_recipe(value: Mapping[str, Any]) -> bool:
    options, inputs = value.get("options"), value.get("inputs")
    if not isinstance(options, dict) or not isinstance(inputs, dict):
        return False
    return all(isinstance(text, str) for text in (value.get("command"), *inputs.values()))
