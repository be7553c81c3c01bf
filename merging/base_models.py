"""Open whole models without reading weights: diffusers folders, single files, hub ids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import models
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.formats.model_files import NetworkLocation
from lora_core.formats.model_folders import Model, open_model_folder, weight_key
from lora_core.formats.weights import TensorInfo, Weights
from merging.allocator import return_large_blocks
from merging.byte_progress import ByteBar
from merging.commands import FileReadOptions
from merging.opening import describe_path, is_whole_model, open_layout
from models import hub_models, single_file


@dataclass(frozen=True)
class BaseModel:
    """A whole model that is opened; weights are read when they are needed."""

    path: str
    layout: Layout
    model: Model
    folder: Path | None  # None: a single file
    locations: tuple[NetworkLocation, ...] = ()  # of the networks in a single file

    def layer_bytes(self, key: tuple[str, str]) -> int:
        """The bytes of the weight of (component, published path); 0 without the component."""
        if key[0] not in self.model:
            return 0
        weights = self.model[key[0]]
        return count_bytes([weights.infos[weight_key(weights, self.layout, *key)]])


def open_base_model(path: str, reading: FileReadOptions) -> BaseModel:
    """Opens a whole model: a folder in the diffusers layout, a single file or a hub id.

    Raises UserError for an adapter.
    """
    if not is_whole_model(path):
        raise UserError(
            f"{path} is not a whole model, it is {describe_path(path)}; give a folder in the "
            "diffusers layout, a single-file checkpoint or a hub id"
        )
    return_large_blocks()
    if Path(path).is_file():
        model, locations = single_file.open_parts(path, reading.model_config)
        return BaseModel(path, open_layout(path, reading), model, None, locations)
    folder = Path(path) if Path(path).is_dir() else hub_models.download_model(path)
    return BaseModel(path, models.read_layout(str(folder)), open_model_folder(folder), folder)


def network_locations(base: BaseModel) -> tuple[NetworkLocation, ...]:
    """The locations of a model's networks in a single file.

    Raises UserError for a family without such files.
    """
    return base.locations or single_file.locate_networks(str(base.folder))


@contextlib.contextmanager
def model_configs(base: BaseModel, reading: FileReadOptions) -> Iterator[Path]:
    """A folder with the configs and tokenizers of a model.

    That is the model's own, the one of --model-config, or published configs with CLIP's tokenizers.
    """
    if base.folder:
        yield base.folder
        return
    opened = single_file.open_single_file(base.path, reading.model_config)
    with single_file.config_folder(opened, base.path) as folder:
        yield folder


def base_weight_reader(base: BaseModel) -> Callable[[str, str], Tensor]:
    """A reader of the weight of (component, published path)."""

    def read(component: str, path: str) -> Tensor:
        if component not in base.model:
            raise UserError(f"{base.path} has no {component}; it has {', '.join(base.model)}")
        weights = base.model[component]
        return weights.read(weight_key(weights, base.layout, component, path))

    return read


def layer_keys(base: BaseModel) -> list[tuple[str, str]]:
    """(component, published path) of every layer that can be adapted."""
    keys: list[tuple[str, str]] = []
    for component, part in base.layout.components.items():
        keys += [(component, path) for path in part.shapes]
    return keys


def count_bytes(infos: Iterable[TensorInfo]) -> int:
    """The bytes of tensors that are not read yet."""
    return sum(torch.Size(info.shape).numel() * info.dtype.itemsize for info in infos)


def with_progress(model: Model, title: str) -> dict[str, Weights]:
    """The model with a bar over the bytes of its tensors as they are read, on a terminal only."""
    total = sum(count_bytes(weights.infos.values()) for weights in model.values())
    bar = ByteBar(total, title)

    def count_reads(weights: Weights) -> Weights:
        def read(key: str) -> Tensor:
            tensor = weights.read(key)
            bar.add(tensor.nbytes)
            return tensor

        return Weights(weights.source, weights.infos, read)

    return {name: count_reads(weights) for name, weights in model.items()}
