"""The config of a run as its published files hold it: LoRA headers, and config.toml on the hub."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from lora_core.config import Config, SegmenterWords
from lora_core.data.pairs import names_columns
from lora_core.shared_paths import shorten_path
from lora_core.text import hide_home
from training.mask_files import shorten_mask_source


def shared_config(config: Config, folder: Path | str) -> Config:
    """The config of a run in `folder` without what only its owner has.

    Left out are the folders of images and caches, whose names say who is on the images, and a
    dataset that is one. Other paths are those of `shorten_path`, or have ~ for the home folder.
    """
    c = config.recorded
    masks = SegmenterWords(shorten_mask_source(c.data.masks, folder))
    pairs = c.data.pairs if names_columns(c.data.pairs) else ""
    dataset = "" if Path(c.data.dataset).exists() else c.data.dataset
    bare = replace(
        c,
        model=shorten_path(c.model, folder),
        vae=shorten_path(c.vae, folder),
        model_config=shorten_path(c.model_config, folder),
        out=Path(c.out).name,
        data=replace(c.data, images="", pairs=pairs, cache="", dataset=dataset, masks=masks),
        prior=replace(c.prior, images=""),
        validation=replace(c.validation, images=""),
    )
    return _hide_homes(bare)


def _hide_homes(value: Any) -> Any:
    """The value with ~ for the home folder in every text: plugins are named by their file."""
    if isinstance(value, str):
        return hide_home(value)
    if isinstance(value, tuple):
        return tuple(map(_hide_homes, value))
    if isinstance(value, dict):
        return {key: _hide_homes(inner) for key, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _hide_homes(getattr(value, f.name)) for f in fields(value)}
        return type(value)(**changed)
    return value
