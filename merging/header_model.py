"""The model that the headers of adapter files name, where it is a folder on this disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lora_core.errors import UserError
from lora_core.formats import read_key_shapes
from lora_core.formats.training_metadata import TRAINED_BY
from lora_core.shared_paths import find_shared_path
from lora_core.toml import parse_toml
from merging.recipe import RECIPE, parse_recipe
from models.components import read_json
from models.families import FAMILIES

MODEL_NAME = "ss_sd_model_name"  # that of sd-scripts: a folder, a file or an id of the hub
MODEL_OPTIONS = ("model", "base")  # of a recipe, which name the model of the result


def find_header_model(paths: Sequence[str]) -> tuple[str, str]:
    """(folder of the model that a header names, file with that header); ("", "") without one.

    A name is looked for from the current folder, then from that of the file; never on the hub or
    another machine. A folder with a model of no built-in family is passed over.
    """
    for path in paths:
        for header in _read_headers(Path(path)):
            for name in _named_models(header, path):
                folder = find_shared_path(name, os.path.dirname(path))
                if folder and _has_known_model(folder):
                    return folder, path
    return "", ""


def _has_known_model(folder: str) -> bool:
    """Whether a folder has a model of a built-in family, in the diffusers layout."""
    with contextlib.suppress(UserError):
        return str(read_json(folder, "model_index.json").get("_class_name")) in FAMILIES
    return False


def _read_headers(path: Path) -> Iterator[dict[str, str]]:
    """The headers of a file, or of the files of a folder; none of those that cannot be read."""
    for file in sorted(path.glob("[!.]*.safetensors")) if path.is_dir() else [path]:
        with contextlib.suppress(UserError, OSError):
            yield read_key_shapes(file)[1]


def _named_models(header: Mapping[str, str], path: str) -> Iterator[str]:
    """What the entries of a header call the model, the most exact first."""
    with contextlib.suppress(UserError):
        yield str(
            parse_toml(header.get(TRAINED_BY, ""), f"{TRAINED_BY} of {path}").get("model", "")
        )
    if RECIPE in header:
        with contextlib.suppress(UserError):
            options = parse_recipe(header[RECIPE], path)["options"]
            yield from (str(options[name]) for name in MODEL_OPTIONS if name in options)
    yield header.get(MODEL_NAME, "")
