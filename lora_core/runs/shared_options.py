"""Options of a run as its published files hold them: without what only the owner of the run has."""

from __future__ import annotations

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
    `shorten_path`.
    """
    kind, _, words = masks.partition(":")
    if not kind.startswith("clipseg@"):
        return masks
    weights = kind.removeprefix("clipseg@")
    return f"clipseg@{shorten_path(weights, folder)}:{words.strip()}"


def share_options(table: dict[str, Any], folder: Path | str) -> dict[str, Any]:
    """The options of a run in `folder` (the table of its config.toml) without what only its owner
    has. Options that the table lacks stay away.

    Left out are PRIVATE_OPTIONS, the folders of subsets, a dataset in files of this computer, and
    pairs that are a folder.
    Other paths are those of `shorten_path`, or have ~ for the home folder.
    """
    shared: dict[str, Any] = {}
    for name, value in table.items():
        shared[name] = dict(value) if isinstance(value, dict) else value
    for name in MODEL_PATHS:
        if isinstance(shared.get(name), str):
            shared[name] = shorten_path(shared[name], folder)
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
        if isinstance(data.get("subsets"), list):
            tables = [own for own in data["subsets"] if isinstance(own, dict)]
            data["subsets"] = [own | {"images": ""} for own in tables]
        if isinstance(data.get("masks"), str):
            data["masks"] = shorten_mask_source(data["masks"], folder)
    return {name: _hide_homes(value) for name, value in shared.items()}


def _hide_homes(value: Any) -> Any:
    """The value with ~ for the home folder in every text: plugins are named by their file."""
    if isinstance(value, str):
        return hide_home(value)
    if isinstance(value, list):
        return [_hide_homes(item) for item in value]
    if isinstance(value, dict):
        return {key: _hide_homes(inner) for key, inner in value.items()}
    return value
