"""Recognize the published model that an adapter file belongs to, from its keys and shapes.

The names and shapes of the models' layers come from the table of published layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

from lora_core.errors import UserError
from lora_core.formats import read_key_shapes
from lora_core.formats.grammar import find_leaves, spell_heads, spell_paths
from lora_core.formats.known_formats import COMPONENTS, ENCODER_SPELLINGS, FORMATS, XLABS_LEAVES
from lora_core.formats.layout import Layout, Shape
from lora_core.formats.recognition import recognize_keys, refuse_other_kinds
from models.published import PUBLISHED_MODELS
from models.published_layouts import published_layout

# cloneofsimo's keys: component, number of the layer, factor.
NUMBERED = re.compile(r"([^:.]+):(\d+):(up|down)")
# Header entry -> field of a Layout.
HEADER_FIELDS = {
    "ss_base_model_version": "base_model_version",
    "modelspec.architecture": "architecture",
}

# Models that are not supported -> a pattern in a key of their adapters.
TOP = r"(?:^|\.|lora_unet_|lycoris_)"  # a module that is in no other
OTHER_FAMILIES = {
    "Qwen-Image": (  # the last of its 60 blocks, or what they have and other models lack
        r"(?<!single_)transformer_blocks[._]((3[89]|[45]\d)[._]|\d+[._](img|txt)_(mlp|mod)[._])"
    ),
    "Stable Cascade": r"lora_prior_",
    "Anima": TOP + r"blocks[._]\d+[._]((self|cross)_attn[._][qkv]_proj|adaln_modulation)",
    "Wan": TOP + r"blocks[._]\d+[._](self|cross)_attn[._][qkvo](_img)?\.",
    "Krea 2": TOP + r"blocks[._]\d+[._]attn[._](gate|w[qkvo])[._]",
    "Z-Image or Lumina": TOP + r"layers[._]\d+[._](attention|feed_forward)[._]",
    "HunyuanVideo": r"double_blocks\.\d+\.(img|txt)_attn_",
    "AnimateDiff": r"motion_modules[._]|temporal_transformer",
}
# Models with layers of an earlier one, which is meant where a file has nothing else: bigG's, and
# single double blocks of the same width.
EARLIER = {
    "sd3": "sdxl",
    "sd3.5-medium": "sdxl",
    "sd3.5-large": "sdxl",
    "flux2-klein-base-4b": "flux-dev",
}
BLOCK_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")  # the first in a layer's name is its block's
layout = published_layout  # its earlier name
Test = Callable[[str], bool]  # name of a published model -> whether the file may belong to it


class UndecidedModel(UserError):
    """An adapter file that fits no published model, or several of them."""


@dataclass
class LayerInFile:
    """An adapted weight, as far as the tensors of a file determine it."""

    name: str  # its key without the leaf
    out: int | None  # None where it is unknown
    fan: int | None  # fan-in: inputs times the kernel's height and width
    axes: int  # of the down factor; 0 without one


def published_layouts() -> dict[str, Layout]:
    """The layout of every published model."""
    return {kind: published_layout(kind) for kind in PUBLISHED_MODELS}


def recognize_path(path: str | Path) -> Layout:
    """`recognize_adapter` for a file, pickles included, or for a folder of a run or of peft's.

    Of .safetensors files only the keys and shapes are read.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = []
        for place in (path, *(path / name for name in COMPONENTS)):
            files += place.glob("[!.]*.safetensors")
    shapes: dict[str, Shape] = {}
    header: dict[str, str] = {}
    for file in sorted(files):
        found, own = read_key_shapes(file)
        shapes |= found
        header |= own
    if not shapes:
        raise UserError(
            f"{path} has no .safetensors file; give an adapter's file, or the folder of a run"
        )
    refuse_other_kinds(recognize_keys(shapes), str(path))
    _refuse_other_families(shapes, str(path))
    return recognize_adapter(shapes, header, str(path))


def recognize_adapter(
    tensors: Mapping[str, Any], header: Mapping[str, str] | None = None, source: str = "the file"
) -> Layout:
    """The layout of the published model that an adapter file of any format was made for.

    `tensors` holds tensors or shapes. Where several models have the layers, other features of the
    file decide: its header, whether its projections are convolutions, the prefix of its text
    encoder's keys. Raises UndecidedModel when no model or more than one fits.
    """
    return published_layout(recognize_kind(tensors, header, source))


def recognize_kind(
    tensors: Mapping[str, Any], header: Mapping[str, str] | None = None, source: str = "the file"
) -> str:
    """Like `recognize_adapter`, but returns the model's name in PUBLISHED_MODELS."""
    shapes = {key: tuple(getattr(value, "shape", value)) for key, value in tensors.items()}
    fitting, signs = _fitting_kinds(shapes)
    for test in [*_header_tests(header or {}), *signs]:  # each narrows the choice, or is ignored
        fitting = [kind for kind in fitting if test(kind)] or fitting
    originals = dict.fromkeys(PUBLISHED_MODELS[kind].like or kind for kind in fitting)
    meant = [kind for kind in originals if EARLIER.get(kind) not in originals]
    if len(meant) == 1:
        return next(kind for kind in fitting if (PUBLISHED_MODELS[kind].like or kind) in meant)
    titles = [PUBLISHED_MODELS[kind].title for kind in meant]
    raise UndecidedModel(_undecided_error(source, list(shapes), titles))


def _fitting_kinds(shapes: Mapping[str, Shape]) -> tuple[list[str], list[Test]]:
    """(models that have a file's layers or token rows, further tests to choose between them)."""
    format = recognize_keys(shapes).format
    if layers := _layers_in_file(shapes, format):
        found = {kind: _shapes_by_layer(kind, format, layers) for kind in PUBLISHED_MODELS}
        known = set().union(*found.values())
        named = [layer for layer in layers if layer.name in known]
        fitting = [kind for kind, own in found.items() if named and _all_fit(named, own)]
        signs: list[Test] = [
            lambda kind: _have_same_axes(named, found[kind]),
            lambda kind: _have_all_blocks(kind, format, named),
        ]
        if format == "kohya":
            signs.append(lambda kind: _has_written_prefixes(kind, named))
        return fitting, signs
    if numbered := _numbered_layers(shapes):
        return [kind for kind in PUBLISHED_MODELS if _has_numbered_layers(kind, numbered)], []
    rows = {key: shape[-1] for key, shape in shapes.items() if shape}
    count = len({ENCODER_SPELLINGS.get(key) for key in rows})
    fitting = [kind for kind in PUBLISHED_MODELS if _has_encoders(kind, rows)]
    return fitting, [lambda kind: len(published_layout(kind).encoders) == count]


def _refuse_other_families(keys: Iterable[str], source: str) -> None:
    """Raises UserError for an adapter of a model that is known by name only."""
    for title, pattern in OTHER_FAMILIES.items():
        key = next(filter(re.compile(pattern).search, keys), None)
        if key is not None:
            originals = [row.title for row in PUBLISHED_MODELS.values() if not row.like]
            raise UserError(
                f"{source} is an adapter for {title} (key {key}), which is not supported; "
                f"the models are {', '.join(originals)}"
            )


def _header_tests(header: Mapping[str, str]) -> list[Test]:
    tests: list[Test] = []
    for entry, name in HEADER_FIELDS.items():
        if entry in header:
            tests.append(partial(_header_agrees, name, header[entry]))
    return tests


def _header_agrees(name: str, value: str, kind: str) -> bool:
    return getattr(published_layout(kind), name) == value


def _undecided_error(source: str, keys: list[str], titles: list[str]) -> str:
    if not titles:
        return f"{source} is of no published model; add --model FOLDER"
    return (
        f"{source} ({len(keys)} tensors: {', '.join(keys[:2])} ...) fits "
        f"{' and '.join(titles)} alike; name the model it was made for with --model"
    )


# ---------------------------------------------------------------- layers with names


def _layers_in_file(shapes: Mapping[str, Shape], format: str) -> list[LayerInFile]:
    if format not in FORMATS or not FORMATS[format].reading_names:
        return []
    leaves = XLABS_LEAVES if format == "xlabs" else find_leaves(shapes, "the file")
    longest_first = sorted(leaves, key=len, reverse=True)
    ends = tuple(longest_first)
    parts: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        if not shape or not key.endswith(ends):
            continue
        for leaf in longest_first:
            if key.endswith(leaf):
                parts.setdefault(key.removesuffix(leaf), {})[leaves[leaf]] = shape
                break
    layers = []
    for name, own in parts.items():
        out, fan = _weight_size(own)
        layers.append(LayerInFile(name, out, fan, len(own.get("down", ()))))
    return layers


def _weight_size(parts: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """(out, fan-in) of the weight that a layer's tensors update; None where it is unknown.

    The tensors are those of a LoRA with or without a core, a LoHa, a LoKr, or a full difference, or
    the vector that is added to a norm or a bias.
    """
    if "up" in parts or "down" in parts:
        out = next(iter(parts.get("up", ())), None)
        fan = None
        if "down" in parts:
            fan = prod(parts["down"][1:]) * prod(parts.get("mid", ())[2:])
        return out, fan
    if any(role.startswith("lokr") for role in parts):
        (a, b), (c, d) = _product_size(parts, "lokr_w1"), _product_size(parts, "lokr_w2")
        return (a * c if a and c else None), (b * d if b and d else None)
    if any(role.startswith("hada") for role in parts):
        return _product_size(parts, "hada_w1")
    if "diff" in parts:
        return _product_size(parts, "diff")
    for role in ("w_norm", "b_norm", "diff_b"):
        if role in parts:
            return parts[role][0], None
    return None, None


def _product_size(parts: Mapping[str, Shape], name: str) -> tuple[int | None, int | None]:
    """(out, fan-in) of a Kronecker or Hadamard factor, stored whole or as a product."""
    if whole := parts.get(name):
        return whole[0], prod(whole[1:])
    a, b = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    core = parts.get(name.replace("w", "t"), ())
    out = None
    if a:  # next to a core, factors are [r, out] and [r, in]
        out = a[1 if core else 0]
    return out, (b[1] * prod(core[2:]) if b else None)


def _shapes_by_layer(
    kind: str, format: str, layers: Iterable[LayerInFile]
) -> dict[str, list[Shape]]:
    """Name of a layer or norm in the file -> shapes of the model's modules of that name."""
    found: dict[str, list[Shape]] = {}
    for heads, names in _names_by_component(kind, format):
        for head in heads:
            for layer in layers:
                if layer.name.startswith(head):
                    shape = names.get(layer.name[len(head) :])
                    if shape:
                        found.setdefault(layer.name, []).append(shape)
    return found


def _all_fit(layers: Iterable[LayerInFile], found: Mapping[str, list[Shape]]) -> bool:
    """Whether every layer has the size of a module of its name."""
    for layer in layers:
        for shape in found.get(layer.name, ()):
            if layer.out in (None, shape[0]) and layer.fan in (None, prod(shape[1:])):
                break
        else:
            return False
    return True


def _have_same_axes(layers: Iterable[LayerInFile], found: Mapping[str, list[Shape]]) -> bool:
    """Whether linear layers and 1x1 convolutions in the file are the same in the model."""
    for layer in layers:
        if layer.axes and layer.axes not in map(len, found[layer.name]):
            return False
    return True


def _have_all_blocks(kind: str, format: str, layers: Iterable[LayerInFile]) -> bool:
    """Whether the file's layers of one block are adapted in all blocks of the model that have them.

    So are a trainer's. FLUX.2 klein 4B has 5 of the blocks that Flux has 19 of, of the same width.
    """
    names = {layer.name for layer in layers}
    patterns = {BLOCK_NUMBER.sub("#", name, count=1) for name in names}
    for heads, own in _names_by_component(kind, format):
        for head in heads:
            for name in own:
                whole = head + name
                if whole not in names and BLOCK_NUMBER.sub("#", whole, count=1) in patterns:
                    return False
    return True


def _has_written_prefixes(kind: str, layers: Iterable[LayerInFile]) -> bool:
    """Whether the text encoders' prefixes are those that kohya's scripts write for this model.

    Other prefixes are only read.
    """
    written = tuple(heads[0] for heads, _ in _names_by_component(kind, "kohya"))
    encoders = [layer.name for layer in layers if layer.name.startswith("lora_te")]
    return all(name.startswith(written) for name in encoders)


@cache
def _names_by_component(kind: str, format: str) -> list[tuple[list[str], dict[str, Shape]]]:
    """(beginnings of keys, layer name -> shape) of each network of a model.

    A layer is listed under every name that the format's reader knows for it.
    """
    grammar, stored = FORMATS[format].reading_names(published_layout(kind))  # type: ignore[misc]
    tables = []
    for name, component in stored.components.items():
        names: dict[str, Shape] = {}
        for path, spellings in spell_paths(grammar, component, component.modules).items():
            shape = component.shapes.get(path) or component.parameters[f"{path}.weight"]
            names |= dict.fromkeys(spellings, shape)
        tables.append((spell_heads(grammar, name, component), names))
    return tables


# ---------------------------------------------------------------- layers with numbers, token rows


def _numbered_layers(shapes: Mapping[str, Shape]) -> dict[str, dict[Shape, int]]:
    """Component -> (out, fan-in) -> number of such layers in a file with numbered layers."""
    parts: dict[tuple[str, str], dict[str, Shape]] = {}
    for key, shape in shapes.items():
        if match := NUMBERED.fullmatch(key):
            component, number, role = match.groups()
            parts.setdefault((component, number), {})[role] = shape
    found: dict[str, dict[Shape, int]] = {}
    for (component, _), own in parts.items():
        out, fan = _weight_size(own)
        sizes = found.setdefault(component, {})
        size = (out or 0, fan or 0)
        sizes[size] = sizes.get(size, 0) + 1
    return found


def _has_numbered_layers(kind: str, numbered: Mapping[str, Mapping[Shape, int]]) -> bool:
    """Whether a model has that many layers of these sizes, and a numbering for them."""
    parts = published_layout(kind).components
    for name, sizes in numbered.items():
        if name not in parts or not parts[name].numbering:
            return False
        own: dict[Shape, int] = {}
        for shape in parts[name].shapes.values():
            size = (shape[0], prod(shape[1:]))
            own[size] = own.get(size, 0) + 1
        if any(own.get(size, 0) < count for size, count in sizes.items()):
            return False
    return True


def _has_encoders(kind: str, rows: Mapping[str, int]) -> bool:
    """Whether a model has the text encoders of token rows, given as key -> width.

    Compared by name where the key names the encoder, else by width.
    """
    layout = published_layout(kind)
    widths = {key: layout.components[name].width for name, key in layout.encoders.items()}
    for key, width in rows.items():
        own = {widths.get(ENCODER_SPELLINGS[key])} if key in ENCODER_SPELLINGS else widths.values()
        if width not in own:
            return False
    return bool(rows)
