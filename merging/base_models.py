"""Whole models, opened and not read: folders in the diffusers layout, single files, hub ids."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from torch import Tensor
from tqdm import tqdm

import models
from lora_core.adapters.patch import TOKENIZERS
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.formats.weights import Weights
from lora_core.formats.whole_models import Model, NetworkLocation, open_model_folder, weight_key
from merging.opening import is_whole_model, open_layout
from merging.options import ReadOptions
from models import single_file

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
WEIGHT_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".fp16.safetensors",
    ".fp16.bin",
)  # the first that a hub's folder has is taken


@dataclass(frozen=True)
class BaseModel:
    """A whole model, opened and not read."""

    path: str
    layout: Layout
    model: Model
    folder: Path | None  # None: a single file
    locations: tuple[NetworkLocation, ...] = ()  # of the networks in a single file


def open_base_model(path: str, reading: ReadOptions) -> BaseModel:
    """A whole model: folder in the diffusers layout, single file or hub id.

    Raises UserError for an adapter.
    """
    if not is_whole_model(path):
        raise UserError(
            f"{path} is no whole model; give a folder in the diffusers layout, a single-file "
            "checkpoint or a hub id"
        )
    if Path(path).is_file():
        model, locations = single_file.open_parts(path, reading.model_config)
        return BaseModel(path, open_layout(path, reading), model, None, locations)
    folder = Path(path) if Path(path).is_dir() else download_model(path)
    return BaseModel(path, models.read_layout(str(folder)), open_model_folder(folder), folder)


def network_locations(base: BaseModel) -> tuple[NetworkLocation, ...]:
    """The places of a model's networks in a single file.

    Raises UserError for a family without such files.
    """
    return base.locations or single_file.locate_networks(str(base.folder))


@contextlib.contextmanager
def model_configs(base: BaseModel, reading: ReadOptions) -> Iterator[Path]:
    """A folder with everything of a model but its weights.

    That is its own, the one of --model-config, or published configs with CLIP's tokenizers.
    """
    if base.folder:
        yield base.folder
    elif reading.model_config:
        yield single_file.find_configs(reading.model_config)
    else:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "configs"
            published = single_file.open_single_file(base.path).folder
            shutil.copytree(published, folder)
            tokenizers = single_file.load_tokenizers(published, base.locations, base.path)
            for name, tokenizer in tokenizers.items():
                tokenizer.save_pretrained(folder / TOKENIZERS[name])
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


def with_progress(model: Model, title: str) -> dict[str, Weights]:
    """The same model with a progress bar over the tensors that are read, on a terminal only."""
    count = sum(len(weights.infos) for weights in model.values())
    bar = tqdm(total=count, desc=title, unit="tensor", disable=None, leave=False)

    def count_reads(weights: Weights) -> Weights:
        def read(key: str) -> Tensor:
            bar.update()
            if bar.n == bar.total:
                bar.close()
            return weights.read(key)

        return Weights(weights.source, weights.infos, read)

    return {name: count_reads(weights) for name, weights in model.items()}


def download_model(name: str) -> Path:
    """The folder of a model on the hub: configs, tokenizers, and one form of weights a network.

    Raises UserError when the hub gives none.
    """
    try:
        files = HfApi().list_repo_files(name)
        wanted = [file for file in files if _is_config(file)]
        for folder in sorted({file.rpartition("/")[0] for file in files if file.count("/") == 1}):
            wanted += _weight_files(folder, files)
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen classes: no network, bad id ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no file or folder here, and the hub gave no model of that name: {reason}"
        ) from None


def _is_config(file: str) -> bool:
    is_part = "/" in file and file.endswith((".json", ".txt", ".model"))
    return is_part or file == "model_index.json"


def _weight_files(folder: str, files: Sequence[str]) -> list[str]:
    """The first of the usual forms of weights in a folder of a hub's repository."""
    for ending in WEIGHT_ENDINGS:
        for stem in STEMS:
            name = f"{folder}/{stem}{ending}"
            if name in files:
                shards = f"{folder}/{stem}-*-of-*.safetensors" if ending.endswith("json") else ""
                return [name, *(file for file in files if fnmatch(file, shards))]
    return []
