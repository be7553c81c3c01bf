"""Options of a run as its published files hold them: without what only the owner of the run has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_core.data.pairs import names_columns
from lora_core.shared_paths import shorten_path
from lora_core.text import hide_home

# Folders of images, whose names say who is on the images.
PRIVATE_OPTIONS = (("data", "images"), ("data", "cache"), ("prior", "images"),
                   ("validation", "images"))  # fmt: skip
MODEL_PATHS = ("model", "vae", "model_config")
NAMES_ONLY = ("out", "from_lora")  # of these paths the last part is shared


def shorten_mask_source(masks: str, folder: Path | str) -> str:
    """--data.masks as files show it that people share: the path in clipseg@PATH:WORDS as in
    `share_path`.
    """
    kind, _, words = masks.partition(":")
    if not kind.startswith("clipseg@"):
        return masks
    weights = kind.removeprefix("clipseg@")
    return f"clipseg@{share_path(weights, folder)}:{words.strip()}"


def share_path(path: str, folder: Path | str) -> str:
    """The path as in `shorten_path`; of one that is absolute even so, its last part."""
    shortened = shorten_path(path, folder)
    return Path(shortened).name if os.path.isabs(shortened) else shortened


def share_options(table: dict[str, Any], folder: Path | str) -> dict[str, Any]:
    """The options of a run in `folder` (the table of its config.toml) without what only its owner
    has. Options that the table lacks stay away.

    Left out are PRIVATE_OPTIONS, the folders of subsets, a dataset in files of this computer, and
    pairs that are a folder. Other paths are those of `share_path`, or have ~ for the home folder.
    """
    shared: dict[str, Any] = {}
    for name, value in table.items():
        shared[name] = dict(value) if isinstance(value, dict) else value
    for name in MODEL_PATHS:
        if isinstance(shared.get(name), str):
            shared[name] = share_path(shared[name], folder)
    for name in NAMES_ONLY:
        if name in shared:
            shared[name] = Path(str(shared[name])).name
    for section, name in PRIVATE_OPTIONS:
        own = shared.get(section)
        if isinstance(own, dict) and name in own:
            own[name] = ""
    data = shared.get("data")
    if isinstance(data, dict):
        is_local = bool(data.get("streaming")) or Path(str(data.get("dataset"))).exists()
        if "dataset" in data and is_local:
            data["dataset"] = ""
        if "pairs" in data and not names_columns(str(data["pairs"])):
            data["pairs"] = ""
        if isinstance(data.get("subsets"), list | tuple):
            tables = [own for own in data["subsets"] if isinstance(own, dict)]
            data["subsets"] = [own | {"images": ""} for own in tables]
        if isinstance(data.get("masks"), str):
            data["masks"] = shorten_mask_source(data["masks"], folder)
    return {name: _hide_folders(value) for name, value in shared.items()}


def find_folders(table: dict[str, Any], folder: Path | str) -> list[str]:
    """The folders of this disk that a text about the run in `folder` may name, those inside others
    first: of all absolute paths among its options (`table`), its own, the current one, home.
    """
    paths = [os.path.abspath(folder), os.path.join(Path.cwd(), ""), os.path.join(Path.home(), "")]
    tables: list[Any] = [table]
    while tables:
        own = tables.pop()
        if isinstance(own, dict):
            tables += own.values()
        elif isinstance(own, list | tuple):
            tables += own
        elif isinstance(own, str) and os.path.isabs(own):
            paths.append(own)
    folders = {os.path.dirname(path) for path in paths}
    return sorted((own for own in folders if len(Path(own).parts) > 1), key=len, reverse=True)


def hide_folders(text: str, folders: Sequence[str]) -> str:
    """A text with paths in these folders, absolute ones, cut to what is below them."""
    for own in folders:
        text = text.replace(f"{own}/", "").replace(own, ".")
    return text


def _hide_folders(value: Any) -> Any:
    """The value with ~ for the home folder in every text, and the last part alone of other absolute
    paths to what is there: plugins are named by their file, FILE.py:NAME.
    """
    if isinstance(value, str):
        text = hide_home(value)
        places = (text, text.rpartition(":")[0])
        is_path = os.path.isabs(text) and any(map(os.path.exists, places))
        return Path(text).name if is_path else text
    if isinstance(value, list):
        return [_hide_folders(item) for item in value]
    if isinstance(value, dict):
        return {key: _hide_folders(inner) for key, inner in value.items()}
    return value
