"""Whole models: a folder in the diffusers layout <-> one file with CompVis' names (`.safetensors`, `.ckpt`), tensor by tensor.

A family says what lies where in its single files: `SingleFile` rows. What the networks look like comes from shapes: of the folder's own weights when
a single file is written, of the caller's networks (built on the meta device from their configs) when one is read.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.formats.compvis import NETWORK_NAMES, Shape, StoredTensor, spare_layers
from lora_core.formats.layout import nearest_name
from lora_core.formats.weights import (
    PICKLED,
    TensorInfo,
    Weights,
    cast_weights,
    open_network_weights,
    open_weights,
    write_weights,
)
from lora_core.runs.run_folder import atomic_write

Shapes = Mapping[str, Mapping[str, Shape]]  # component -> key in the diffusers layout -> shape

EXTRAS = {  # patterns of keys that real checkpoints have beside their networks -> what they are
    "model_ema.*": "an average of the weights",
    "*position_ids": "position numbers",
    "*logit_scale": "CLIP's temperature",
    "*.text_projection*": "a projection that the text encoder lacks",
    "*.visual_projection*": "CLIP's image tower",
    "*.vision_model.*": "CLIP's image tower",
    "*.visual.*": "CLIP's image tower",
    "*.attn_mask": "a causal mask",
    "*loss.*": "the VAE's discriminator",
    "embedding_manager.*": "a textual inversion in training",
    **dict.fromkeys(
        (
            "*betas",
            "*alphas*_cumprod*",
            "posterior_*",
            "lvlb_weights",
            "logvar",
            "scale_factor",
            "denoiser.*",
        ),
        "the noise schedule",
    ),
}
MARKERS = (
    "v_pred",
    "ztsnr",
    "edm_mean",
    "edm_std",
    "edm_vpred.sigma_max",
    "edm_vpred.sigma_min",
)  # empty tensors that tell ComfyUI the prediction
COPIED_NEVER = (
    "*.safetensors",
    "*.bin",
    "*.ckpt",
    "*.pt",
    "*.pth",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.index.json",
)  # weights of a network


@dataclass(frozen=True)
class NetworkLocation:
    """Where one network lies in a single file."""

    component: str  # its folder in the diffusers layout
    prefix: str  # of its keys, the last dot included
    grammar: Literal["unet", "vae", "clip", "open_clip"]
    spare: int = (
        0  # layers that readers build after the last one and never run (see compvis.spare_layers)
    )


@dataclass(frozen=True)
class SingleFileFacts:
    """What the keys and shapes of a single file tell. Epsilon or v they do not tell, unless a marker does: it must come from a config."""

    channels: (
        int | None
    )  # that the UNet reads: 4; 9 for inpainting; 8 for editing; None without a UNet
    context: int | None  # width of what it attends to: 768, 1024, 2048, 1280 ...
    label: int | None  # width of its further conditioning: 2816, 2560; None without
    linear: bool  # whether proj_in and proj_out are linear layers, not convolutions
    encoders: Mapping[str, tuple[str, int]]  # prefix -> ("clip" | "open_clip", width)
    vae: bool
    markers: tuple[str, ...]

    def __str__(self) -> str:
        unet = f"a UNet of {self.channels} channels and context {self.context}" + (
            f", label {self.label}" if self.label else ""
        )
        encoders = ", ".join(
            f"{kind} {width} at {prefix}" for prefix, (kind, width) in self.encoders.items()
        )
        return f"{unet if self.channels else 'no UNet'}, {'a' if self.vae else 'no'} VAE, {encoders or 'no text encoder'}"


def describe_single_file(
    shapes: Mapping[str, Shape],
    *,
    unet: str = "model.diffusion_model.",
    vae: str = "first_stage_model.",
) -> SingleFileFacts:
    """What kind of model a single file holds, for the caller to name the family. Never raises; a foreign file has no channels and no encoders."""

    def axis(key: str | None, index: int) -> int | None:
        return shapes[key][index] if key and len(shapes.get(key, ())) > index else None

    attends = next(
        (key for key in shapes if key.startswith(unet) and key.endswith(".attn2.to_k.weight")), None
    )
    projects = next(
        (key for key in shapes if key.startswith(unet) and key.endswith(".proj_in.weight")), None
    )
    encoders = {}
    for kind, leaf in (
        ("clip", "embeddings.position_embedding.weight"),
        ("open_clip", "positional_embedding"),
    ):
        for key in shapes:
            if key == leaf or key.endswith("." + leaf):
                encoders[key.removesuffix(leaf).removesuffix("text_model.")] = (
                    kind,
                    shapes[key][-1] if shapes[key] else 0,
                )
    return SingleFileFacts(
        channels=axis(f"{unet}input_blocks.0.0.weight", 1), context=axis(attends, 1), label=axis(f"{unet}label_emb.0.0.weight", 1),
        linear=projects is not None and len(shapes[projects]) == 2, encoders=encoders,
        vae=any(key.startswith(vae) for key in shapes), markers=tuple(key for key in MARKERS if key in shapes),
    )  # fmt: skip


# ---------------------------------------------------------------- one file from a folder


def open_located_networks(
    folder: str | Path, rows: Iterable[NetworkLocation]
) -> dict[str, Weights]:
    """The weights of a folder in the diffusers layout, for `to_single`. Raises UserError for a component without weights."""
    return {
        row.component: open_network_weights(
            Path(folder) / row.component, NETWORK_NAMES[row.grammar].weights
        )
        for row in rows
    }


def write_checkpoint_file(
    model: Mapping[str, Weights],
    rows: Sequence[NetworkLocation],
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    header: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as one file, atomically: .safetensors with one tensor in memory at a time, .ckpt ({"state_dict": ...}) with all of them.

    Dtypes are kept unless `dtype` is given. A changed model is written by replacing `Weights.read`. Raises UserError for an existing output, an
    unknown suffix, a network without names in such files, numbers that overflow `dtype`, a full disk.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLED):
        raise UserError(
            f"{path} has the suffix {path.suffix or '(none)'}; expected .safetensors or .ckpt"
        )
    _check_output(path, overwrite)
    single = cast_weights(join_networks(model, rows), dtype)
    with _disk_errors(path):
        if path.suffix == ".safetensors":
            write_weights(path, single, {"format": "pt", **(header or {})})
        else:
            with atomic_write(path) as temporary:
                torch.save(
                    {
                        "state_dict": {
                            key: single.read(key).contiguous().clone() for key in single.infos
                        }
                    },
                    temporary,
                )


def join_networks(model: Mapping[str, Weights], rows: Sequence[NetworkLocation]) -> Weights:
    """The tensors of a single file, each made when it is read. Raises UserError for a component that is missing or has no names there."""
    places: dict[str, tuple[Weights, StoredTensor]] = {}
    for row in rows:
        if row.component not in model:
            raise UserError(
                f"there is no {row.component} to write, only {', '.join(model) or 'nothing'}"
            )
        weights = model[row.component]
        places |= {
            row.prefix + key: (weights, entry)
            for key, entry in _names_table(row, weights.shapes).items()
        }
    infos = {
        key: TensorInfo(entry.shape, weights.infos[entry.keys[0]].dtype)
        for key, (weights, entry) in places.items()
    }

    def read(key: str) -> Tensor:
        weights, entry = places[key]
        return entry.encode([weights.read(part) for part in entry.keys])

    return Weights(
        " and ".join(dict.fromkeys(weights.source for weights in model.values())), infos, read
    )


# ---------------------------------------------------------------- a folder from one file


def split_networks(
    single: Weights, rows: Sequence[NetworkLocation], shapes: Shapes
) -> dict[str, Weights]:
    """The networks in a single file under the keys of `shapes`, each tensor read when it is asked for.

    Rows whose component is not in `shapes` are passed over with their keys. Tensors that no network uses are named in one printed line.
    Raises UserError for missing tensors, other shapes (a 1x1 convolution and a linear layer are one), dtypes that are no floating point, and
    keys that mean nothing.
    """
    wanted = [row for row in rows if row.component in shapes]
    tables = {row: _names_table(row, shapes[row.component]) for row in wanted}
    names = {
        row: {
            key: _name_in_file(row, key, entry, single)
            for key, entry in table.items()
            if not entry.spare
        }
        for row, table in tables.items()
    }
    for row, found in names.items():
        _check_complete(row, found, single)
        for key, name in found.items():
            _check_tensor(name or key, tables[row][key].shape, single)
    used = {name for found in names.values() for name in found.values()}
    spare = {
        row.prefix + key
        for row, table in tables.items()
        for key, entry in table.items()
        if entry.spare
    }
    elsewhere = tuple(row.prefix for row in rows if row not in wanted)
    _report_unused(
        [
            key
            for key in single.infos
            if key not in used and not (elsewhere and key.startswith(elsewhere))
        ],
        spare,
        used,
        single,
    )
    return {
        row.component: _network_weights(single, tables[row], names[row], shapes[row.component])
        for row in wanted
    }


def write_folder_from_single_file(
    path: str | Path,
    rows: Sequence[NetworkLocation],
    shapes: Shapes,
    folder: str | Path,
    *,
    configs: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the model in a single file as a folder in the diffusers layout, whole or not at all, with one tensor in memory at a time.

    Everything but the networks' weights (configs, tokenizers, scheduler, other networks whole) is copied from the folder `configs`; weights go by the
    keys of `shapes`. Raises UserError like `split`, and for an existing output and configs that lack a component.
    """
    folder, configs = Path(os.path.abspath(folder)), Path(configs)
    _check_output(folder, overwrite)
    for row in rows:
        if row.component in shapes and not (configs / row.component / "config.json").is_file():
            raise UserError(
                f"{configs} has no {row.component}/config.json; give a folder in the diffusers layout for this kind of model"
            )
    model = split_networks(open_weights(path), rows, shapes)
    stems = {row.component: NETWORK_NAMES[row.grammar].weights for row in rows}
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(
                configs,
                temporary,
                ignore=lambda place, names: _files_left_behind(Path(place), names, configs, model),
            )
            for name, weights in model.items():
                write_weights(
                    temporary / name / f"{stems[name]}.safetensors",
                    cast_weights(weights, dtype),
                    {"format": "pt"},
                )
            _swap_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------- helpers


def _names_table(row: NetworkLocation, shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """Key without its prefix -> what lies there."""
    entries = NETWORK_NAMES[row.grammar].entries(shapes)
    return entries | spare_layers(entries, row.spare)


def _name_in_file(
    row: NetworkLocation, key: str, entry: StoredTensor, single: Weights
) -> str | None:
    """The name under which the file has an entry."""
    return next(
        (row.prefix + name for name in (key, *entry.also) if row.prefix + name in single.infos),
        None,
    )


def _check_complete(row: NetworkLocation, found: Mapping[str, str | None], single: Weights) -> None:
    missing = [row.prefix + key for key, name in found.items() if name is None]
    if len(missing) == len(found):
        raise UserError(
            f"{single.source} has no {row.component} at {row.prefix or 'its top'}; it has {describe_single_file(single.shapes)}: is it of another family?"
        )
    if missing:
        shown = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        raise UserError(
            f"{single.source} lacks {len(missing)} of {len(found)} tensors of {row.component}: {shown}; is it for another config, or cut?"
        )


def _check_tensor(key: str, expected: Shape, single: Weights) -> None:
    shape, dtype = single.infos[key]
    if not dtype.is_floating_point:
        raise UserError(
            f"{key} in {single.source} is {dtype}, expected floating point; quantised checkpoints are not read"
        )
    if _padded(shape) != _padded(expected):
        raise UserError(
            f"{key} in {single.source} is {list(shape)}, expected {list(expected)}; is it of another family or for another config?"
        )


def _padded(shape: Shape) -> Shape:
    """The shape with trailing ones up to four axes: a 1x1 convolution and a linear layer are written either way."""
    return shape + (1,) * (4 - len(shape))


def _report_unused(
    left: list[str], spare: set[str], used: Iterable[str | None], single: Weights
) -> None:
    """Prints what is passed over, once; raises UserError for keys that mean nothing."""
    passed: Counter[str] = Counter()
    odd = []
    for key in left:
        what = (
            "layers that are never run"
            if key in spare
            else "markers of the prediction"
            if key in MARKERS
            else ""
        )
        what = what or next(
            (what for pattern, what in EXTRAS.items() if fnmatch.fnmatchcase(key, pattern)), ""
        )
        if what:
            passed[what] += 1
        else:
            odd.append(key)
    if odd:
        shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        near = nearest_name(odd[0], [key for key in used if key])
        raise UserError(
            f"{single.source} has {len(odd)} key(s) that mean nothing here: {shown}; nearest known: {near}; is it of another family?"
        )
    if passed:
        listed = ", ".join(f"{what} ({count})" for what, count in passed.items())
        print(
            f"{single.source}: passed over {passed.total()} tensors that no network uses: {listed}",
            flush=True,
        )


def _network_weights(
    single: Weights,
    table: Mapping[str, StoredTensor],
    names: Mapping[str, str | None],
    shapes: Mapping[str, Shape],
) -> Weights:
    """One network of a single file."""
    places = {
        part: (names[key] or key, entry)
        for key, entry in table.items()
        if not entry.spare
        for part in entry.keys
    }
    infos = {
        key: TensorInfo(tuple(shapes[key]), single.infos[name].dtype)
        for key, (name, _) in places.items()
    }

    def read(key: str) -> Tensor:
        name, entry = places[key]
        return entry.decode(single.read(name).reshape(entry.shape), shapes)[entry.keys.index(key)]

    return Weights(single.source, infos, read)


def _files_left_behind(
    place: Path, names: list[str], configs: Path, model: Mapping[str, Weights]
) -> set[str]:
    """What of a folder is not copied: the weights of networks that are written anew, hidden files."""
    hidden = {name for name in names if name.startswith(".")}
    if place == configs:  # single files that lie beside the folders
        return hidden | {
            name
            for name in names
            if any(fnmatch.fnmatch(name, pattern) for pattern in COPIED_NEVER)
        }
    if place.relative_to(configs).parts[0] not in model:
        return hidden
    return hidden | {
        name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in COPIED_NEVER)
    }


def _check_output(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(
            f"{path} is there already; pass --overwrite to replace it, or name another output"
        )


def _swap_folder(temporary: Path, folder: Path) -> None:
    """Puts the new folder in the place of an old one."""
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns an error of the disk into one sentence."""
    try:
        yield
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise UserError(
            f"{path} cannot be written ({reason}); what was there is untouched, free some space or choose another place"
        ) from error
