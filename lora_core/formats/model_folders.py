"""Whole models as folders in the diffusers layout, opened and written one tensor at a time.

A model is component -> `Weights` with the keys of that layout, each tensor read when it is needed.
Models in a single file are in `model_files`.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lora_core.errors import UserError
from lora_core.formats.layout import ENCODERS, Layout, nearest_name
from lora_core.formats.weights import Weights, open_network_weights, write_weights

Model = Mapping[str, Weights]  # component -> its tensors, keys of the diffusers layout
MODEL_INDEX = "model_index.json"  # marks a folder as a model in the diffusers layout

# Files with a network's weights, not copied when the network is written anew.
WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.ckpt",
    "*.pt",
    "*.pth",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.index.json",
)


def open_model_folder(folder: str | Path) -> dict[str, Weights]:
    """The networks of a folder in the diffusers layout that have weights, opened but not read.

    They are the denoiser, text encoders and the VAE. Raises UserError for a folder without
    model_index.json or a network without weights.
    """
    folder = Path(folder)
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{folder} has no {MODEL_INDEX}; give a model in the diffusers layout")
    names = ("unet", "transformer", *ENCODERS, "vae")
    present = [name for name in names if (folder / name / "config.json").is_file()]
    return {name: open_network_weights(folder / name, network_stem(name)) for name in present}


def write_model_folder(
    model: Model,
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model in the diffusers layout, whole or not at all, one tensor at a time.

    The networks of `model` are written, everything else is copied from the folder `source`.
    `finish` may change the new folder before it gets its name. Raises UserError for a full disk
    and for an output that exists, unless `overwrite` and it is a model or empty.
    """
    source = Path(source)
    out = Path(os.path.abspath(out))
    refuse_existing(out, overwrite)
    mark = secrets.token_hex(4)
    temporary = out.with_name(f".{out.name}.{mark}.tmp")
    old = out.with_name(f".{out.name}.{mark}.old")

    def left_behind(place: str, names: list[str]) -> set[str]:
        return _left_behind(Path(place), names, source, model)

    try:
        with explain_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, temporary, ignore=left_behind)
            for name, weights in model.items():
                file = temporary / name / f"{network_stem(name)}.safetensors"
                write_weights(file, weights, {"format": "pt"})
            if finish:
                finish(temporary)
            if out.exists():
                out.rename(old)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def weight_key(weights: Weights, layout: Layout, component: str, path: str) -> str:
    """The key of a layer's weight in a network's weights.

    It is with or without a level that one library version publishes and another drops. Raises
    UserError for a layer that does not exist.
    """
    for name in (path, layout.module_path(component, path)):
        if f"{name}.weight" in weights.infos:
            return f"{name}.weight"
    near = nearest_name(f"{path}.weight", weights.infos)
    raise UserError(f"{weights.source} has no {component} layer {path}; nearest: {near}")


def parameter_key(weights: Weights, layout: Layout, component: str, path: str) -> str:
    """The key of a norm's weight or of a bias in a network's weights.

    It is with or without a level that one library version drops. Raises UserError for a parameter
    that does not exist.
    """
    for name in (path, path.removeprefix(layout.component(component).module_prefix)):
        if name in weights.infos:
            return name
    near = nearest_name(path, weights.infos)
    raise UserError(f"{weights.source} has no {component} parameter {path}; nearest: {near}")


def network_stem(component: str) -> str:
    """The name of a network's file of weights in its folder, without its ending."""
    return "model" if component in ENCODERS else "diffusion_pytorch_model"


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises UserError for an output that exists, unless `overwrite` and it may be replaced."""
    if path.exists() and not overwrite:
        raise UserError(
            f"{path} is there already; pass --overwrite to replace it, or name another output"
        )
    if path.is_dir():
        check_replaced_folder(path)


def check_replaced_folder(folder: Path) -> None:
    """Raises UserError where --overwrite would delete another folder than that of a model.

    An empty folder may be replaced too.
    """
    held = sorted(path.name for path in folder.iterdir())
    if held and MODEL_INDEX not in held:
        shown = ", ".join(held[:3]) + (" ..." if len(held) > 3 else "")
        raise UserError(
            f"{folder} is a folder without a model, and --overwrite would delete what it holds "
            f"({shown}); name another output"
        )
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"--overwrite would delete {folder}, in which this command runs; "
            "start it from another folder, or name another output"
        )


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of writing into a UserError of one sentence."""
    try:
        yield
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full"
        raise UserError(
            f"{path} cannot be written ({reason}); "
            "existing files are untouched; free some space or choose another place"
        ) from error


def _left_behind(place: Path, names: list[str], source: Path, model: Model) -> set[str]:
    """Files of a folder that are not copied.

    They are hidden files, weights of networks that are written anew, and single files next to the
    networks' folders.
    """
    left = {name for name in names if name.startswith(".")}
    if place == source or place.relative_to(source).parts[0] in model:
        for pattern in WEIGHT_PATTERNS:
            left.update(fnmatch.filter(names, pattern))
    return left
