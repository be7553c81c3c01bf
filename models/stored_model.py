"""Whole models on the disk or the hub, opened for arithmetic: layouts known, no weight read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_core.formats.layout import Layout
from lora_core.formats.whole_models import Model, NetworkLocation, open_model_folder
from models import read_layout
from models.hub_models import download_model
from models.single_file import config_folder, locate_networks, open_parts, open_single_file


@dataclass(frozen=True)
class StoredModel:
    """A whole model, opened and not read."""

    path: str
    layout: Layout
    networks: Model
    folder: Path | None  # None: a single file
    locations: tuple[NetworkLocation, ...] = ()  # of the networks in a single file


def open_stored_model(path: str, config: str = "") -> StoredModel:
    """A model in a folder, a single file, or on the hub.

    `config` is the folder or hub id with the configs of a single file. Raises UserError.
    """
    if Path(path).is_file():
        networks, locations = open_parts(path, config)
        return StoredModel(path, read_layout(path, config), networks, None, locations)
    folder = Path(path) if Path(path).is_dir() else download_model(path)
    return StoredModel(path, read_layout(str(folder)), open_model_folder(folder), folder)


def locations_of(model: StoredModel) -> tuple[NetworkLocation, ...]:
    """Where the networks of a model lie in a single file.

    Raises UserError for a family without such files.
    """
    return model.locations or locate_networks(str(model.folder))


@contextlib.contextmanager
def configs_of(model: StoredModel, config: str = "") -> Iterator[Path]:
    """A folder with all of a model that is no weight: its own, or `config_folder` of its file."""
    if model.folder:
        yield model.folder
    else:
        with config_folder(open_single_file(model.path, config), model.path) as folder:
            yield folder
