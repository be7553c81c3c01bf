"""Whole models in a single file with CompVis' names, written and read one tensor at a time.

A model is component -> `Weights` with the keys of the diffusers layout, as in `model_folders`. A
family's `NetworkLocation`s give the prefixes of its networks in the file. When a file is written,
the networks' shapes are those of their weights; when one is read, the caller gives them, from
networks built on the meta device with the family's configs.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.formats.compvis import NETWORK_NAMES, Shape, StoredTensor, spare_layers
from lora_core.formats.known_formats import PICKLED
from lora_core.formats.layout import nearest_name
from lora_core.formats.model_folders import (
    Model,
    explain_disk_errors,
    network_stem,
    refuse_existing,
    write_model_folder,
)
from lora_core.formats.pickles import write_pickle
from lora_core.formats.weights import (
    TensorInfo,
    Weights,
    cast_weights,
    open_network_weights,
    open_weights,
    write_weights,
)

Shapes = Mapping[str, Mapping[str, Shape]]  # component -> key in the diffusers layout -> shape

# Patterns of keys that real checkpoints have in addition to their networks -> their contents.
EXTRAS = {
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
    "*betas": "the noise schedule",
    "*alphas*_cumprod*": "the noise schedule",
    "posterior_*": "the noise schedule",
    "lvlb_weights": "the noise schedule",
    "logvar": "the noise schedule",
    "scale_factor": "the noise schedule",
    "denoiser.*": "the noise schedule",
}
# Empty tensors from which ComfyUI knows the prediction type.
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


@dataclass(frozen=True)
class NetworkLocation:
    """The prefix and the naming scheme of one network in a single file."""

    component: str  # its folder in the diffusers layout
    prefix: str  # of its keys, the last dot included
    grammar: Literal["unet", "vae", "clip", "open_clip"]
    # layers that readers build after the last one and never run (see compvis.spare_layers)
    spare: int = 0


@dataclass(frozen=True)
class SingleFileFacts:
    """The kind of model in a single file, as far as keys and shapes determine it.

    Without a marker they do not distinguish epsilon from v; that must come from a config.
    """

    channels: int | None  # of the UNet's input: 4; 9 for inpainting; 8 for editing; None: no UNet
    context: int | None  # width of the text it attends to: 768, 1024, 2048, 1280 ...
    label: int | None  # width of its added conditioning: 2816, 2560; None without
    linear: bool  # whether proj_in and proj_out are linear layers, not convolutions
    encoders: Mapping[str, tuple[str, int]]  # prefix -> ("clip" | "open_clip", width)
    vae: bool
    markers: tuple[str, ...]

    def __str__(self) -> str:
        unet = "no UNet"
        if self.channels:
            unet = f"a UNet of {self.channels} channels and context {self.context}"
            unet += f", label {self.label}" if self.label else ""
        encoders = [f"{kind} {width} at {at}" for at, (kind, width) in self.encoders.items()]
        listed = ", ".join(encoders) or "no text encoder"
        return f"{unet}, {'a' if self.vae else 'no'} VAE, {listed}"


def describe_single_file(
    shapes: Mapping[str, Shape],
    *,
    unet: str = "model.diffusion_model.",
    vae: str = "first_stage_model.",
) -> SingleFileFacts:
    """The kind of model in a single file, from which the caller determines the family.

    Never raises; a foreign file gives no channels and no encoders. `unet` and `vae` are the
    networks' prefixes.
    """

    def first(leaf: str) -> str:
        """The first key of the UNet that ends in `leaf`."""
        return next((key for key in shapes if key.startswith(unet) and key.endswith(leaf)), "")

    def axis(key: str, index: int) -> int | None:
        return shapes[key][index] if len(shapes.get(key, ())) > index else None

    encoders = {}
    for kind, leaf in (
        ("clip", "embeddings.position_embedding.weight"),
        ("open_clip", "positional_embedding"),
    ):
        for key in shapes:
            if key == leaf or key.endswith("." + leaf):
                prefix = key.removesuffix(leaf).removesuffix("text_model.")
                encoders[prefix] = (kind, shapes[key][-1] if shapes[key] else 0)
    return SingleFileFacts(
        channels=axis(f"{unet}input_blocks.0.0.weight", 1),
        context=axis(first(".attn2.to_k.weight"), 1),
        label=axis(f"{unet}label_emb.0.0.weight", 1),
        linear=len(shapes.get(first(".proj_in.weight"), ())) == 2,
        encoders=encoders,
        vae=any(key.startswith(vae) for key in shapes),
        markers=tuple(key for key in MARKERS if key in shapes),
    )


# ---------------------------------------------------------------- writing


def open_located_networks(
    folder: str | Path, locations: Iterable[NetworkLocation]
) -> dict[str, Weights]:
    """The networks of a folder that single files also hold.

    Raises UserError for a component without weights.
    """
    names = [location.component for location in locations]
    return {name: open_network_weights(Path(folder) / name, network_stem(name)) for name in names}


def write_checkpoint_file(
    model: Model,
    locations: Sequence[NetworkLocation],
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    header: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as one file, atomically.

    .safetensors is written with one tensor in memory at a time, .ckpt ({"state_dict": ...}) with
    all of them. Dtypes are kept unless `dtype` is given. A changed model is written by replacing
    `Weights.read`. Raises UserError for an existing output, an unknown suffix, a network without
    names in such files, numbers that overflow `dtype`, a full disk.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLED):
        suffix = path.suffix or "(none)"
        raise UserError(f"{path} has the suffix {suffix}; expected .safetensors or .ckpt")
    refuse_existing(path, overwrite)
    single = cast_weights(join_networks(model, locations), dtype)
    with explain_disk_errors(path):
        if path.suffix == ".safetensors":
            write_weights(path, single, {"format": "pt", **(header or {})})
        else:
            tensors = {key: single.read(key).contiguous().clone() for key in single.infos}
            write_pickle(path, {"state_dict": tensors})


def join_networks(model: Model, locations: Sequence[NetworkLocation]) -> Weights:
    """The tensors of a single file, each made when it is read.

    Raises UserError for a component that is missing or has no names there.
    """
    places: dict[str, tuple[Weights, StoredTensor]] = {}
    for location in locations:
        if location.component not in model:
            has = ", ".join(model) or "nothing"
            raise UserError(f"there is no {location.component} to write, only {has}")
        weights = model[location.component]
        for key, entry in _names_table(location, weights.shapes).items():
            places[location.prefix + key] = (weights, entry)
    infos = {}
    for key, (weights, entry) in places.items():
        infos[key] = TensorInfo(entry.shape, weights.infos[entry.keys[0]].dtype)

    def read(key: str) -> Tensor:
        weights, entry = places[key]
        return entry.join_parts([weights.read(part) for part in entry.keys])

    sources = dict.fromkeys(weights.source for weights in model.values())
    return Weights(" and ".join(sources), infos, read)


def _names_table(location: NetworkLocation, shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """Key without its prefix -> the tensor there."""
    entries = NETWORK_NAMES[location.grammar].name_tensors(shapes)
    return entries | spare_layers(entries, location.spare)


# ---------------------------------------------------------------- reading


def split_networks(
    single: Weights, locations: Sequence[NetworkLocation], shapes: Shapes
) -> dict[str, Weights]:
    """The networks in a single file under the keys of `shapes`, each tensor read when needed.

    Locations whose component is not in `shapes` are skipped with their keys. Tensors that no
    network uses are named in one printed line. Raises UserError for missing tensors, other shapes
    (a 1x1 convolution and a linear layer are one), dtypes that are no floating point, and unknown
    keys.
    """
    wanted = [location for location in locations if location.component in shapes]
    used: set[str] = set()
    spare: set[str] = set()
    networks = {}
    for location in wanted:
        own = shapes[location.component]
        table = _names_table(location, own)
        names = _find_names(location, table, single)
        used.update(names.values())
        spare.update(location.prefix + key for key, entry in table.items() if entry.spare)
        networks[location.component] = _network_weights(single, table, names, own)
    skipped = tuple(location.prefix for location in locations if location not in wanted)
    left = [key for key in single.infos if key not in used]
    if skipped:
        left = [key for key in left if not key.startswith(skipped)]
    _report_unused(left, spare, used, single)
    return networks


def write_folder_from_single_file(
    path: str | Path,
    locations: Sequence[NetworkLocation],
    shapes: Shapes,
    folder: str | Path,
    *,
    configs: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the model in a single file as a folder, as `write_model_folder` does.

    Everything but the networks' weights (configs, tokenizers, scheduler, other networks whole) is
    copied from the folder `configs`; weights go by the keys of `shapes`. Raises UserError like
    `split_networks`, and for an existing output and configs that lack a component.
    """
    refuse_existing(Path(folder), overwrite)
    for location in locations:
        name = location.component
        if name in shapes and not (Path(configs) / name / "config.json").is_file():
            raise UserError(
                f"{configs} has no {name}/config.json; "
                "give a folder in the diffusers layout for this kind of model"
            )
    networks = split_networks(open_weights(path), locations, shapes)
    model = {name: cast_weights(weights, dtype) for name, weights in networks.items()}
    write_model_folder(model, configs, folder, overwrite=overwrite)


def _find_names(
    location: NetworkLocation, table: Mapping[str, StoredTensor], single: Weights
) -> dict[str, str]:
    """Key of the table -> the name under which the file has it.

    Raises UserError for missing tensors, other shapes and dtypes.
    """
    names = {}
    missing = []
    for key, entry in table.items():
        if entry.spare:
            continue
        spellings = [location.prefix + name for name in (key, *entry.also)]
        found = next((name for name in spellings if name in single.infos), None)
        if found is None:
            missing.append(spellings[0])
        else:
            names[key] = found
    if missing and not names:
        raise UserError(
            f"{single.source} has no {location.component} at {location.prefix or 'its top'}; "
            f"it has {describe_single_file(single.shapes)}: is it of another family?"
        )
    if missing:
        shown = _list_first(missing)
        raise UserError(
            f"{single.source} lacks {len(missing)} of {len(missing) + len(names)} tensors of "
            f"{location.component}: {shown}; is it for another config, or cut?"
        )
    for key, name in names.items():
        _check_tensor(name, table[key].shape, single)
    return names


def _check_tensor(key: str, expected: Shape, single: Weights) -> None:
    shape, dtype = single.infos[key]
    if not dtype.is_floating_point:
        raise UserError(
            f"{key} in {single.source} is {dtype}, expected floating point; "
            "quantized checkpoints are not read"
        )
    if _without_ones(shape) != _without_ones(expected):
        raise UserError(
            f"{key} in {single.source} is {list(shape)}, expected {list(expected)}; "
            "is it of another family or for another config?"
        )


def _without_ones(shape: Shape) -> Shape:
    """The shape without trailing ones: linear layers may be written as 1x1 convolutions."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _report_unused(left: list[str], spare: set[str], used: Iterable[str], single: Weights) -> None:
    """Prints which tensors no network uses, once; raises UserError for unknown keys."""
    passed: Counter[str] = Counter()
    odd = []
    for key in left:
        contents = [what for pattern, what in EXTRAS.items() if fnmatch.fnmatchcase(key, pattern)]
        if key in spare:
            passed["layers that are never run"] += 1
        elif key in MARKERS:
            passed["markers of the prediction"] += 1
        elif contents:
            passed[contents[0]] += 1
        else:
            odd.append(key)
    if odd:
        raise UserError(
            f"{single.source} has {len(odd)} unknown key(s): {_list_first(odd)}; "
            f"nearest known: {nearest_name(odd[0], sorted(used))}; is it of another family?"
        )
    if passed:
        listed = ", ".join(f"{what} ({count})" for what, count in passed.items())
        print(
            f"{single.source}: passed over {passed.total()} tensors that no network uses: {listed}",
            flush=True,
        )


def _list_first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _network_weights(
    single: Weights,
    table: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    shapes: Mapping[str, Shape],
) -> Weights:
    """One network of a single file."""
    places: dict[str, tuple[str, StoredTensor]] = {}
    for key, name in names.items():
        places |= dict.fromkeys(table[key].keys, (name, table[key]))
    infos = {}
    for key, (name, _) in places.items():
        infos[key] = TensorInfo(tuple(shapes[key]), single.infos[name].dtype)

    def read(key: str) -> Tensor:
        name, entry = places[key]
        tensor = single.read(name).reshape(entry.shape)
        return entry.split_parts(tensor, shapes)[entry.keys.index(key)]

    return Weights(single.source, infos, read)
