"""Download models from the Hugging Face hub: their configs, or configs and weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from lora_core.errors import UserError, first_line
from lora_core.shared_paths import nearest_path

CONFIG_FILES = (".json", ".txt", ".model")  # endings of configs and tokenizers
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # names of files of weights
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".fp16.safetensors", ".fp16.bin")


def download_configs(model: str) -> Path:
    """A model's folder, or a copy of its configs and tokenizers from the hub.

    Raises UserError when there is no such model.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=[f"*{end}" for end in CONFIG_FILES]))
    except Exception as error:  # the hub's client raises a dozen classes: no network, bad id ...
        raise missing_model(model, error) from None


def missing_model(
    model: str, error: Exception, *, file: str = "model of that name", kind: str = "folder"
) -> UserError:
    """The error for a model that is neither here nor on the hub, whose client raised `error` when
    it was asked for a `file`. A path here that resembles the name is said first.
    """
    start = f"{model} is not a local {kind}"
    if near := nearest_path(model):
        start = f"there is no {kind} {model}, the nearest is {near}"
    return UserError(f"{start}; the hub gave no {file}: {first_line(error)}")


def download_model(model: str) -> Path:
    """The folder of a model of the hub: configs, tokenizers, one form of each network's weights.

    Raises UserError when the hub gives none.
    """
    try:
        files = HfApi().list_repo_files(model)
        wanted = []
        for file in files:
            if file == "model_index.json" or ("/" in file and file.endswith(CONFIG_FILES)):
                wanted.append(file)
        for folder in sorted({file.rpartition("/")[0] for file in files if file.count("/") == 1}):
            wanted += _weights_of(folder, files)
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen classes: no network, bad id ...
        raise missing_model(model, error, kind="file or folder") from None


def _weights_of(folder: str, files: Sequence[str]) -> list[str]:
    """The first of the usual forms of weights that a folder of a hub's repository has."""
    for ending in WEIGHTS:
        for stem in STEMS:
            name = f"{folder}/{stem}{ending}"
            if name in files:
                shards = []
                if ending.endswith("json"):
                    pattern = f"{folder}/{stem}-*-of-*.safetensors"
                    shards = [file for file in files if fnmatch(file, pattern)]
                return [name, *shards]
    return []
