"""What a path on the command line is, adapter or model, and opening it with the layout it belongs to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from lora_core import formats
from lora_core.adapters.patch import TOKENIZERS
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.weights import Weights
from lora_core.formats.whole_models import NetworkLocation
from merging.folding import ModelWeights, open_model_folder, weight_key
from models import Layout, known, read_layout, single_file
from models.hub_models import download_configs
from models.published import PUBLISHED_MODELS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODEL_KEY_PREFIXES = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "double_blocks.",
    "single_blocks.",
)  # keys of single files
SPELLED_OUT = ("diffusers", "peft", "embeddings")  # formats that can be read without a layout
WRITABLE_FORMATS = {
    "comfyui": "kohya",
    "xlabs": "diffusers",
    "peft": "diffusers",
}  # format that is only read -> the one its readers know
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
CHUNK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class OpenOptions:
    """How files are opened."""

    model: str = ""  # folder, single file, hub id or published name of the model that adapters belong to; empty: told by their keys
    model_config: str = ""  # folder or hub id with the configs of single files
    allow_extra: bool = False  # keys that mean nothing are named in a line, not refused
    dora_axis: str = ""  # rows or columns, of DoRA magnitudes that do not tell


@dataclass(frozen=True)
class BaseModel:
    """A whole model, opened and not read."""

    path: str
    layout: Layout
    model: ModelWeights
    folder: Path | None  # None: a single file
    rows: tuple[NetworkLocation, ...] = ()  # where a single file has its networks


def is_whole_model(path: str) -> bool:
    """Whether a path is a whole model, not an adapter; the keys of a file decide. Raises UserError for a path that is not there.

    What does not exist and looks like NAME/NAME without a file's ending is an id of the hub, and so a model.
    """
    place = Path(path)
    if place.is_dir():
        return (place / "model_index.json").is_file()
    if not place.is_file():
        if HUB_ID.fullmatch(path) and place.suffix not in (
            ".safetensors",
            ".ckpt",
            ".pt",
            ".bin",
            ".pth",
        ):
            return True
        raise UserError(f"{path} is not there; give a file, a folder, or a model's id on the hub")
    if place.suffix == ".ckpt":
        return True
    try:
        with safe_open(place, "np") as opened:
            return any(
                key.startswith(MODEL_KEY_PREFIXES) and ".lora" not in key for key in opened.keys()
            )  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, RuntimeError):
        return False  # a pickled adapter, or a damaged file that its reader refuses with its reason


def find_layout(paths: Sequence[str], reading: OpenOptions) -> Layout | None:
    """The layout that adapters belong to: of --model, else of the published model that their keys and shapes tell.

    None where they tell none, which files that spell their layers out can do without. Raises UserError for others.
    """
    if reading.model:
        return open_layout(reading.model, reading)
    reasons = []
    for path in paths:
        try:
            return known.recognize_path(path)
        except UserError as error:
            reasons += [error] if formats.detect_format(path) not in SPELLED_OUT else []
    if reasons:
        raise reasons[0]
    return None


def open_layout(path: str, reading: OpenOptions) -> Layout:
    """What can be adapted in a model, from its configs or the keys of a single file; no weight is read. Published models have names, such as sdxl."""
    if path in PUBLISHED_MODELS and not Path(path).exists():
        return known.published_layout(path)
    return read_layout(path, reading.model_config if single_file.is_single_file(path) else "")


def open_adapter(
    path: str, layout: Layout | None, reading: OpenOptions, *, merging: bool = False
) -> AdapterState:
    """What an adapter's file or a run's folder holds. Raises UserError for a whole model, and as `formats.load` does.

    `merging` also reads updates that are no two factors; they stand among the components as `Dense`.
    """
    if is_whole_model(path):
        raise UserError(
            f"{path} is a whole model where an adapter is expected; distill makes an adapter of the difference of two models"
        )
    state = formats.load(
        path, layout, allow_extra=reading.allow_extra, dora_axis=reading.dora_axis, merging=merging
    )
    for component, rows in state.dense.items():
        state.components.setdefault(component, {}).update(rows)  # type: ignore[arg-type]
    state.dense = {}
    return state


def open_base_model(path: str, reading: OpenOptions) -> BaseModel:
    """A whole model: folder in the diffusers layout, single file or hub id. Raises UserError for an adapter."""
    if not is_whole_model(path):
        raise UserError(
            f"{path} is no whole model; give a folder in the diffusers layout, a single-file checkpoint or a hub id"
        )
    if Path(path).is_file():
        model, rows = single_file.open_parts(path, reading.model_config)
        return BaseModel(path, open_layout(path, reading), model, None, rows)
    folder = Path(path) if Path(path).is_dir() else download_model(path)
    return BaseModel(path, read_layout(str(folder)), open_model_folder(folder), folder)


def single_file_parts(base: BaseModel) -> tuple[NetworkLocation, ...]:
    """Where the networks of a model lie in a single file. Raises UserError for a family without such files."""
    return base.rows or single_file.locate_networks(str(base.folder))


@contextlib.contextmanager
def model_configs(base: BaseModel, reading: OpenOptions) -> Iterator[Path]:
    """A folder with everything of a model that is no weight: its own, that of --model-config, or published configs with CLIP's tokenizers."""
    if base.folder:
        yield base.folder
    elif reading.model_config:
        yield download_configs(reading.model_config)
    else:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "configs"
            published = single_file.open_single_file(base.path).folder
            shutil.copytree(published, folder)
            for name, tokenizer in single_file.load_tokenizers(
                published, base.rows, base.path
            ).items():
                tokenizer.save_pretrained(folder / TOKENIZERS[name])
            yield folder


def choose_output_format(paths: Sequence[str]) -> str:
    """The format for a result: that of the first file with factors, or the nearest one for a format that is only read."""
    for path in paths:
        found = formats.detect_format(path)
        if found != "embeddings":
            return (
                found if formats.FORMATS[found].write else WRITABLE_FORMATS.get(found, "diffusers")
            )
    return "diffusers"


def base_weight_reader(base: BaseModel) -> Callable[[str, str], Tensor]:
    """A reader of the weight of (component, published path)."""

    def read(component: str, path: str) -> Tensor:
        if component not in base.model:
            raise UserError(f"{base.path} has no {component}; it has {', '.join(base.model)}")
        weights = base.model[component]
        return weights.read(weight_key(weights, base.layout, component, path))

    return read


def download_model(name: str) -> Path:
    """The folder with a model of the hub: configs, tokenizers, and one file of weights a network. Raises UserError when the hub gives none."""
    try:
        files = HfApi().list_repo_files(name)
        wanted = [
            file
            for file in files
            if file == "model_index.json"
            or ("/" in file and file.endswith((".json", ".txt", ".model")))
        ]
        for folder in sorted({file.rpartition("/")[0] for file in files if file.count("/") == 1}):
            wanted += _weights_of(folder, files)
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen classes: no network, no such repository, no such file, bad id
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no file or folder here, and the hub gave no model of that name: {reason}"
        ) from None


def sha256_digest(path: str) -> str:
    """sha256 of a file; of a folder, over the names and digests of the files in it that are not hidden."""
    place = Path(path)
    if place.is_file():
        found = hashlib.sha256()
        with place.open("rb") as file:
            while part := file.read(CHUNK):
                found.update(part)
        return found.hexdigest()
    if not place.is_dir():
        place = download_model(path)
    files = sorted(
        file
        for file in place.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
    )
    lines = [f"{file.relative_to(place).as_posix()} {sha256_digest(str(file))}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def with_progress(model: ModelWeights, title: str) -> dict[str, Weights]:
    """The same model with a progress bar over the tensors that are read, on a terminal only."""
    bar = tqdm(
        total=sum(len(weights.infos) for weights in model.values()),
        desc=title,
        unit="tensor",
        disable=None,
        leave=False,
    )

    def watch(weights: Weights) -> Weights:
        def read(key: str) -> Tensor:
            bar.update()
            if bar.n == bar.total:
                bar.close()
            return weights.read(key)

        return Weights(weights.source, weights.infos, read)

    return {name: watch(weights) for name, weights in model.items()}


def _weights_of(folder: str, files: Sequence[str]) -> list[str]:
    """The first of the usual forms of weights that a folder of a hub's repository has."""
    for ending in (
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".fp16.safetensors",
        ".fp16.bin",
    ):
        for stem in STEMS:
            if f"{folder}/{stem}{ending}" in files:
                shards = (
                    [file for file in files if fnmatch(file, f"{folder}/{stem}-*-of-*.safetensors")]
                    if ending.endswith("json")
                    else []
                )
                return [f"{folder}/{stem}{ending}", *shards]
    return []


def widest_dtype(states: Sequence[AdapterState]) -> torch.dtype | None:
    """The widest dtype of the factors in some adapters or, without any, of their token rows."""
    factors = [
        lr
        for state in states
        for rows in state.components.values()
        for lr in rows.values()
        if isinstance(lr, LowRank)
    ]
    found = [lr.down.dtype for lr in factors] or [
        rows.dtype for state in states for rows in state.tokens.values()
    ]
    return functools.reduce(torch.promote_types, found) if found else None
