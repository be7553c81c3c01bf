"""What a file is: an adapter and its format, token rows, a whole model, or another kind of file.

Every command and the library ask here, so that no two of them answer differently. The names of the
tensors decide, with a few shapes; of a .safetensors file only the header is read. Which family an
adapter belongs to follows from the names and shapes that its format's reader knows: see
`models.known`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from lora_core.errors import UserError
from lora_core.formats.known_formats import (
    EMBEDDINGS,
    NATIVE,
    TOKEN_FORMATS,
    find_format,
    import_function,
)

Kind = Literal["adapter", "tokens", "model", "foreign", "unknown"]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # key -> shape

MODEL_PREFIXES = (  # of keys in models that are a single file
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "double_blocks.",
    "single_blocks.",
)
BUNDLED = "bundle_emb."  # beginning of the keys of token rows in an adapter's file
CONTROL = "a control LoRA, which has whole norms and takes a control image as further inputs"
WIDE = "a control LoRA, or one for another model: its first layer takes 128 inputs instead of 64"
# Description of a file that is no adapter of a model -> the pattern of a key that shows it.
FOREIGN_KEYS = {
    "a control LoRA of Stability's, which holds the parts of a ControlNet": re.compile(
        r"lora_controlnet"
    ),
    "a ControlNet-LLLite network, which reads a control image": re.compile(r"lllite_.*"),
    "an IP-Adapter, which reads an image as a prompt": re.compile(r"ip_adapter\..*|image_proj\..*"),
    "a T2I-Adapter, which reads a control image": re.compile(
        r"(adapter\.)?body\.\d+\.(block\d|in_conv|resnets)\..*"
    ),
    "a ControlNet, which reads a control image": re.compile(
        r"control_model\..*|(zero_convs|input_hint_block|controlnet_\w+)\..*"
    ),
    "an OFT adapter, which turns weights and has no update of its own": re.compile(
        r".*\.(oft_blocks|oft_diag|boft_.*|oft_[rR](\..*)?)"
    ),
    "a GLoRA or (IA)^3 adapter of LyCORIS": re.compile(r".*\.(a1|a2|b1|b2)\.weight|.*\.on_input"),
    "an adapter of peft's for another method than LoRA: (IA)^3, AdaLoRA, VeRA or FourierFT": (
        re.compile(r".*\.(ia3_l|lora_E|vera_(A|B|lambda_[bd])|fourierft_spectrum)(\..*)?")
    ),
}
# Keys that only control LoRAs have in addition to factors: whole norms, not changes of them.
CONTROL_KEY = re.compile(
    r".*norm\.(query|key)_norm\.(scale|lora_.*)|.*\.norm_(added_)?[qk]\.(weight|lora_.*)"
)
# The first layer of a transformer of packed latents: 64 inputs, with a control image 128.
FIRST_LAYER = re.compile(r".*\b(lora_unet_)?(img_in|x_embedder)\.(lora_A|lora_down|lora\.down).*")
CONTROL_INPUTS = 128
# Layers of models whose latents have 128 channels themselves: one modulation for all blocks, an MLP
# with a gate.
WIDE_LAYER = re.compile(r"stream_modulation|qkv_mlp_proj|[._]linear_(in|out)\b")


class RecognizedFile(NamedTuple):
    """What a file is, and the evidence."""

    kind: Kind
    format: str = ""  # of an adapter or token rows: a name in FORMATS
    what: str = ""  # of a foreign file: its description
    key: str = ""  # of a foreign file or a model: the key that shows it


def recognize_keys(shapes: Shapes) -> RecognizedFile:
    """What a file with these tensors is.

    A file with a single factor of an adapter is an adapter, whatever its other keys begin with:
    adapters have the names of the layers that they change, and whole models have no factors.
    """
    own = {key: shape for key, shape in shapes.items() if not key.startswith(BUNDLED)}
    if shapes and not own:
        return RecognizedFile("tokens", "embeddings")
    for what, pattern in FOREIGN_KEYS.items():
        if key := next(filter(pattern.fullmatch, own), None):
            return RecognizedFile("foreign", what=what, key=key)
    format = find_format(own)
    if format in TOKEN_FORMATS:
        return RecognizedFile("tokens", format or "")
    if format:
        return _recognize_control(own) or RecognizedFile("adapter", format)
    if key := next((key for key in own if key.startswith(MODEL_PREFIXES)), None):
        return RecognizedFile("model", key=key)
    return RecognizedFile("unknown")


def recognize_file(path: str | Path) -> RecognizedFile:
    """What a file is; of a folder of adapters, its first file. Nothing in a pickle is executed.

    Raises UserError for a file that is missing, empty or damaged.
    """
    file = os.fspath(path)
    if os.path.isdir(file):
        if os.path.isfile(os.path.join(file, "model_index.json")):
            return RecognizedFile("model", key="model_index.json")
        file = str(_first_file(Path(file)))
    return _recognize_content(file, *_file_stamp(file))


def read_key_shapes(file: str | Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """(key -> shape, header) of one adapter file; of a .safetensors file no tensor is read.

    Raises UserError for a damaged file.
    """
    if _is_pickle(Path(file)):
        return import_function("pickled_adapters", "read_pickled_shapes")(Path(file)), {}
    shapes, header = _read_header(os.fspath(file), *_file_stamp(file))
    return dict(shapes), dict(header)


def is_adapter_file(path: str | Path) -> bool:
    """Whether a file holds an adapter or token rows; False also for one that cannot be read."""
    try:
        return recognize_file(path).kind in ("adapter", "tokens")
    except (UserError, OSError):
        return False


def model_of_run(folder: str | Path) -> Path | None:
    """The whole model in the folder of a run that trained all weights; None in other folders."""
    model = Path(folder) / "model"
    return model if model.is_dir() else None


def describe_kind(found: RecognizedFile) -> str:
    """What a file is, in words that follow "is"."""
    if found.kind == "model":
        return f"a whole model (key {found.key})" if "." in found.key else "a whole model"
    if found.kind == "foreign":
        return f"{found.what} (key {found.key})"
    if found.kind == "unknown":
        return "neither an adapter nor a whole model"
    return "a file of token rows" if found.kind == "tokens" else f"an adapter ({found.format})"


def refuse_other_kinds(found: RecognizedFile, source: str) -> None:
    """Raises UserError for a file that is recognized as something else than an adapter."""
    if found.kind == "foreign":
        raise UserError(
            f"{source} is {describe_kind(found)}, which is not read; "
            "give a LoRA, a LyCORIS file or token rows"
        )
    if found.kind == "model":
        raise UserError(
            f"{source} is {describe_kind(found)} where an adapter is expected; "
            "merge.py distill makes an adapter of the difference of two models"
        )


def _recognize_control(shapes: Shapes) -> RecognizedFile | None:
    """The kind of an adapter for a control image; None for other adapters."""
    for key, shape in shapes.items():
        if "norm" in key and CONTROL_KEY.fullmatch(key):
            return RecognizedFile("foreign", what=CONTROL, key=key)
        is_wide = len(shape) > 1 and shape[1] == CONTROL_INPUTS and FIRST_LAYER.fullmatch(key)
        if is_wide and not any(map(WIDE_LAYER.search, shapes)):
            return RecognizedFile("foreign", what=WIDE, key=key)
    return None


def _is_pickle(file: Path) -> bool:
    return import_function("container", "is_pickle")(file)


def _file_stamp(file: str | Path) -> tuple[int, int]:
    """(time of the last change, size), which tell whether a file is still the same."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):  # its reader says what is wrong
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4096)  # a command asks several times about each of its files
def _recognize_content(file: str, changed: int, size: int) -> RecognizedFile:
    if _is_pickle(Path(file)):  # refuses a missing or empty file
        return import_function("pickled_adapters", "recognize_pickled")(Path(file))
    return recognize_keys(_read_header(file, changed, size)[0])


@lru_cache(maxsize=8)
def _read_header(file: str, changed: int, size: int) -> tuple[dict[str, Shape], dict[str, str]]:
    return import_function("container", "read_shapes")(Path(file))


def _first_file(folder: Path) -> Path:
    """The file that stands for a folder of adapters: diffusers' name before others, rows last."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    files.sort(key=lambda file: (file.name != NATIVE, file.name.endswith(EMBEDDINGS)))
    if not files:
        for network in sorted(folder.iterdir()):
            files += sorted(network.glob("adapter_model.safetensors"))
    return files[0] if files else folder / NATIVE
