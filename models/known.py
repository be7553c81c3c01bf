"""Which published model a file belongs to, told by its own keys and shapes: a single-file checkpoint, or an adapter of any format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from lora_core.errors import UserError
from lora_core.formats import cloneofsimo, embeddings, joined_layers, kohya
from lora_core.formats.container import is_pickle
from lora_core.formats.layout import COMPONENTS, Layout
from lora_core.formats.pickles import pickled_tensors, read_pickle
from lora_core.formats.weights import open_weights
from lora_core.formats.whole_models import SingleFileFacts
from models.published import PUBLISHED_MODELS, published_configs

Shape = tuple[int, ...]


@cache
def published_layout(kind: str) -> Layout:
    """The layout of a row of KINDS, from networks on the meta device (0.1 s)."""
    return PUBLISHED_MODELS[kind].outline(str(published_configs(kind)))


def published_layouts() -> dict[str, Layout]:
    """The layout of every kind."""
    return {kind: published_layout(kind) for kind in PUBLISHED_MODELS}


def recognize_checkpoint(facts: SingleFileFacts, source: str, *, v: bool = False) -> str:
    """The kind that a single-file checkpoint is of; `v` tells one of Stable Diffusion 2's that its keys do not. Raises UserError for another one."""
    unets = {
        kind: row.files["unet/config.json"]
        for kind, row in PUBLISHED_MODELS.items()
        if "unet/config.json" in row.files
    }
    for kind, unet in unets.items():
        told = (
            unet["in_channels"],
            unet["cross_attention_dim"],
            unet.get("projection_class_embeddings_input_dim"),
        )
        if told == (facts.channels, facts.context, facts.label):
            return "sd2-v" if v and kind == "sd2" else kind
    titles = ", ".join(PUBLISHED_MODELS[kind].title for kind in unets)
    raise UserError(
        f"{source} has {facts}, which is none of {titles}; give a folder with its configs as --model-config"
    )


# ---------------------------------------------------------------- whose adapter a file holds

LEAF = re.compile(  # name of a layer, then that of a tensor in it; the attention processors of old files stand between
    r"(?P<name>.+?)(?:[._]lora(?:_linear_layer)?\d?)?[._](?P<role>lora_(?:down|up|mid|A|B)|down|up|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?|diff)"
    r"(?:\.\w+)?(?:\.weight)?"
)
NUMBERED = re.compile(
    r"([^:.]+):\d+:(up|down)"
)  # cloneofsimo's: component, place in a walk through the network
HALVES = {"A": "down", "B": "up"}
COMFYUI_ENCODERS = {
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5": "t5xxl",
}  # ComfyUI's names of encoders
NAMELESS_HEADS = (
    "base_model_model",
    "lycoris",
    "",
)  # heads that tell no component: peft's, LyCORIS', none
HEADER_FIELDS = {
    "ss_base_model_version": "base_model_version",
    "modelspec.architecture": "architecture",
}  # entry -> field of a Layout


class LayerInFile(NamedTuple):
    """What a file tells of an adapted weight."""

    name: str  # dots as underscores
    out: int | None  # None where the file does not tell
    fan: int | None  # in, times the kernel's sides
    axes: int  # of the down factor; 0 where there is none

    def fits(self, shape: Shape) -> bool:
        return self.out in (None, shape[0]) and self.fan in (None, prod(shape[1:]))


def recognize_adapter(
    tensors: Mapping[str, Any], header: Mapping[str, str] | None = None, source: str = "the file"
) -> Layout:
    """The layout of the published model that an adapter file of any format was made for, from its keys and shapes.

    `tensors` holds tensors or shapes. Layers that several models have are told apart by what else the file says: its header, whether its projections
    are convolutions, the prefix of its text encoder's keys. Raises UserError when no model or more than one fits.
    """
    return published_layout(recognize_kind(tensors, header, source))


def recognize_kind(
    tensors: Mapping[str, Any], header: Mapping[str, str] | None = None, source: str = "the file"
) -> str:
    """The row of KINDS behind `recognise`."""
    shapes = {key: tuple(getattr(value, "shape", value)) for key, value in tensors.items()}
    told = {
        field: header[entry] for entry, field in HEADER_FIELDS.items() if header and entry in header
    }
    tests: list[Callable[[str], bool]] = [
        partial(_header_agrees, field, value) for field, value in told.items()
    ]  # each narrows the choice, unless to nothing
    if layers := _layers_in_file(shapes):
        found = {kind: _shapes_by_layer(kind, layers) for kind in PUBLISHED_MODELS}
        named = [layer for layer in layers if any(layer.name in own for own in found.values())]
        fitting = [
            kind
            for kind, own in found.items()
            if named
            and all(any(layer.fits(shape) for shape in own.get(layer.name, ())) for layer in named)
        ]
        tests += [
            lambda kind: all(
                layer.axes in (0, *map(len, found[kind][layer.name])) for layer in named
            ),  # a projection, or a 1x1 convolution
            lambda kind: _has_written_prefixes(kind, named),
        ]
    elif numbered := _numbered_layers(shapes):
        fitting = [kind for kind in PUBLISHED_MODELS if _has_numbered_layers(kind, numbered)]
    else:
        rows = {key: shape[-1] for key, shape in shapes.items() if shape}
        fitting = [kind for kind in PUBLISHED_MODELS if _has_encoders(kind, rows)]
        encoders = len({embeddings.SPELLINGS.get(key) for key in rows})
        tests.append(lambda kind: len(published_layout(kind).encoders) == encoders)
    for test in tests:
        fitting = [kind for kind in fitting if test(kind)] or fitting
    originals = dict.fromkeys(PUBLISHED_MODELS[kind].like or kind for kind in fitting)
    if len(originals) == 1:
        return fitting[0]
    raise UserError(
        _undecided_error(source, list(shapes), [PUBLISHED_MODELS[kind].title for kind in originals])
    )


def _undecided_error(source: str, keys: list[str], titles: list[str]) -> str:
    shown = ", ".join(keys[:2])
    if titles:
        return f"{source} ({len(keys)} tensors: {shown} ...) fits {' and '.join(titles)} alike; name the model it was made for with --model"
    every = ", ".join(row.title for row in PUBLISHED_MODELS.values() if not row.like)
    return f"{source} ({len(keys)} tensors: {shown} ...) fits none of {every}; name the model it was made for with --model"


def _layers_in_file(shapes: Mapping[str, Shape]) -> list[LayerInFile]:
    parts: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        if (match := LEAF.fullmatch(key)) and shape:
            role = match["role"].removeprefix("lora_")
            parts.setdefault(
                match["name"]
                .removesuffix(".processor")
                .replace(".processor.", ".")
                .replace(".", "_"),
                {},
            )[HALVES.get(role, role)] = shape
    return [
        LayerInFile(name, *_weight_size(own), len(own.get("down", ())))
        for name, own in parts.items()
    ]


def _weight_size(parts: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """(out, in times the kernel's sides) of the weight that factors make: LoRA with or without a middle, LoHa, LoKr, a whole difference."""

    def product(name: str) -> tuple[int | None, int | None]:
        if whole := parts.get(name):
            return whole[0], prod(whole[1:])
        a, b, core = (
            parts.get(f"{name}_a"),
            parts.get(f"{name}_b"),
            parts.get(name.replace("w", "t"), ()),
        )
        return (a[1 if core else 0] if a else None), (
            b[1] * prod(core[2:]) if b else None
        )  # beside a core, factors are [r, out] and [r, in]

    if any(role.startswith("lokr") for role in parts):
        (a, b), (c, d) = product("lokr_w1"), product("lokr_w2")
        return (a * c if a and c else None), (b * d if b and d else None)
    if any(role.startswith("hada") for role in parts):
        return product("hada_w1")
    if "diff" in parts:
        return product("diff")
    up, down = parts.get("up"), parts.get("down")
    return (up[0] if up else None), (
        prod(down[1:]) * prod(parts.get("mid", ())[2:]) if down else None
    )


@cache
def _names_by_component(kind: str) -> list[tuple[tuple[str, ...], dict[str, Shape]]]:
    """A row a component: how its keys may begin, and its layers under every name that files have for them."""
    rows = []
    for name, component in joined_layers.join_layout(published_layout(kind)).components.items():
        encoder = published_layout(kind).encoders.get(name)
        heads = (
            *component.prefixes,
            name,
            f"lora_{name}",
            f"text_encoders_{COMFYUI_ENCODERS[encoder]}_transformer"
            if encoder
            else "diffusion_model",
            *NAMELESS_HEADS,
        )
        originals, names = kohya.original_names(component), dict[str, Shape]()
        for path, shape in component.shapes.items():
            for spelling in (
                path,
                path.removeprefix(component.module_prefix),
                originals.get(path, path),
            ):
                plain = spelling.replace(".", "_")
                names |= {
                    plain: shape,
                    plain.removesuffix("_0") if plain.endswith("to_out_0") else plain: shape,
                }
        for (
            theirs,
            (q, k, v, *_),
        ) in (
            component.fused.items()
        ):  # XLabs' processors: one of these layers a block, without the way into an MLP
            out = sum(component.shapes[path][0] for path in (q, k, v))
            names["_".join(theirs.split(".")[:2]) + "_qkv"] = (out, *component.shapes[q][1:])
        rows.append((heads, names))
    return rows


def _shapes_by_layer(kind: str, layers: Iterable[LayerInFile]) -> dict[str, list[Shape]]:
    """The layers that a kind knows by name -> the shapes of its modules of that name."""
    found: dict[str, list[Shape]] = {}
    for layer in layers:
        for heads, names in _names_by_component(kind):
            for head in heads:
                start = f"{head}_" if head else ""
                if layer.name.startswith(start) and (shape := names.get(layer.name[len(start) :])):
                    found.setdefault(layer.name, []).append(shape)
    return found


def _has_written_prefixes(kind: str, layers: Iterable[LayerInFile]) -> bool:
    """Whether kohya's prefixes of text encoders are those that are written for this kind, not some that are only read."""
    written = tuple(f"{heads[0]}_" for heads, _ in _names_by_component(kind))
    return all(
        layer.name.startswith(written) for layer in layers if layer.name.startswith("lora_te")
    )


def _header_agrees(field: str, value: str, kind: str) -> bool:
    return getattr(published_layout(kind), field) == value


def _numbered_layers(shapes: Mapping[str, Shape]) -> dict[str, list[Shape]]:
    """Component -> (out, in times the kernel's sides) of each layer of a file without names."""
    parts: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        if match := NUMBERED.fullmatch(key):
            parts.setdefault(match[1], {})[match[2]] = shape
    found: dict[str, list[Shape]] = {}
    for name, own in parts.items():
        out, fan = _weight_size(own)
        found.setdefault(name.partition(":")[0], []).append((out or 0, fan or 0))
    return found


def _has_numbered_layers(kind: str, numbered: Mapping[str, list[Shape]]) -> bool:
    """Whether the networks of a kind have so many layers of these shapes, and such files exist for them."""
    parts = published_layout(kind).components
    return all(
        name in parts
        and parts[name].numbering
        and Counter(sizes)
        <= Counter((shape[0], prod(shape[1:])) for shape in parts[name].shapes.values())
        for name, sizes in numbered.items()
    )


def _has_encoders(kind: str, rows: Mapping[str, int]) -> bool:
    """Whether a kind has the encoders that token rows are for, by name where they are named, else by their width."""
    found = published_layout(kind)
    widths = {key: found.components[name].width for name, key in found.encoders.items()}
    return bool(rows) and all(
        widths.get(embeddings.SPELLINGS[key]) == width
        if key in embeddings.SPELLINGS
        else width in widths.values()
        for key, width in rows.items()
    )


# ---------------------------------------------------------------- files


def recognize_path(path: str | Path) -> Layout:
    """`recognise` for a file, pickles included, or for a folder of a run or of peft's. Of .safetensors files only the keys and shapes are read."""
    path = Path(path)
    files = sorted(
        file
        for place in (path, *(path / name for name in COMPONENTS))
        for file in place.glob("[!.]*.safetensors")
    )
    files = files if path.is_dir() else [path]
    shapes: dict[str, Shape] = {}
    header: dict[str, str] = {}
    for file in files:
        found, own = _read_shapes(file)
        shapes, header = shapes | found, header | own
    if not shapes:
        raise UserError(
            f"{path} has no .safetensors file; give an adapter's file, or the folder of a run"
        )
    return recognize_adapter(shapes, header, str(path))


def _read_shapes(file: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """(shapes, header) of one file."""
    if file.is_file() and not is_pickle(file):
        shapes = open_weights(file).shapes
        with safe_open(file, "np") as opened:
            return shapes, dict(opened.metadata() or {})
    data = read_pickle(file)
    if cloneofsimo.is_factor_list(data):
        name = "text_encoder" if file.name.endswith(".text_encoder.pt") else "unet"
        factors = (tuple(getattr(factor, "shape", ())) for factor in data)
        return {
            f"{name}:{i // 2}:{('up', 'down')[i % 2]}": shape for i, shape in enumerate(factors)
        }, {}
    tensors = (
        embeddings.read_pickled_embeddings(file).tokens
        if embeddings.is_pickled_embedding(data)
        else pickled_tensors(data, str(file))
    )
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}, {}
