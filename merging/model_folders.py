"""Models as folders in the diffusers layout, opened and written."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from lora_core.errors import UserError
from lora_core.formats.layout import ENCODERS, Layout, nearest_name
from lora_core.formats.weights import Weights, open_network_weights, write_weights

ModelWeights = Mapping[str, Weights]
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
)  # files that a rewritten network leaves behind


def open_model_folder(folder: str | Path) -> dict[str, Weights]:
    """The networks of a folder in the diffusers layout that have weights, opened but not read:
    denoiser, text encoders, VAE.

    Raises UserError for a folder without model_index.json or a network without weights.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} has no model_index.json; give a model in the diffusers layout")
    names = [
        name
        for name in ("unet", "transformer", *ENCODERS, "vae")
        if (folder / name / "config.json").is_file()
    ]
    return {name: open_network_weights(folder / name, network_stem(name)) for name in names}


def network_stem(component: str) -> str:
    """The name of a network's file of weights in its folder, without its ending."""
    return "model" if component in ENCODERS else "diffusion_pytorch_model"


def weight_key(weights: Weights, layout: Layout, component: str, path: str) -> str:
    """The key of a layer's weight, with or without a level that one library version publishes and
    another drops. Raises UserError for none."""
    for name in (path, layout.module_path(component, path)):
        if f"{name}.weight" in weights.infos:
            return f"{name}.weight"
    raise UserError(
        f"{weights.source} has no {component} layer {path}; nearest: "
        f"{nearest_name(f'{path}.weight', weights.infos)}"
    )


def write_model_folder(
    model: ModelWeights,
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model in the diffusers layout, whole or not at all: networks from `model`,
    everything else copied from the folder `source`.

    `finish` may change the new folder before it gets its name. Raises UserError for an output that
    exists (unless `overwrite`) and a full disk.
    """
    source, out = Path(source), Path(os.path.abspath(out))
    if out.exists() and not overwrite:
        raise UserError(
            f"{out} is there already; pass --overwrite to replace it, or name another output"
        )
    temporary, old = (
        out.with_name(f".{out.name}.{secrets.token_hex(4)}.{end}") for end in ("tmp", "old")
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            source,
            temporary,
            ignore=lambda place, names: _ignored_files(Path(place), names, source, model),
        )
        for name, weights in model.items():
            write_weights(
                temporary / name / f"{network_stem(name)}.safetensors", weights, {"format": "pt"}
            )
        if finish:
            finish(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise UserError(
            f"{out} cannot be written ({reason}); what was there is untouched, free some space or "
            "choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def _ignored_files(
    place: Path, names: Sequence[str], source: Path, model: ModelWeights
) -> set[str]:
    """What of a folder is not copied: hidden files, weights of networks that are written anew,
    single files beside the networks' folders."""
    hidden = {name for name in names if name.startswith(".")}
    if place == source or place.relative_to(source).parts[0] in model:
        hidden |= {
            name for name in names if any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)
        }
    return hidden
