"""The nouns of a family: which modules a file may name, how their names are published, and what shape their weights have."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lora_core.errors import UserError

COMPONENTS = (
    "unet",
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)  # what pipelines call the networks that are adapted
# component -> key of its token rows, where a family says nothing else
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
PREFIXES: dict[
    str, tuple[str, ...]
] = {  # network, or key of an encoder's token rows -> prefixes in kohya files; the first is written, all are read
    "unet": ("lora_unet",),
    "transformer": ("lora_unet",),
    "clip_l": ("lora_te", "lora_te1"),
    "clip_g": ("lora_te2",),
    "t5": ("lora_te3",),
}
NUMBERED_PREFIXES = ("lora_te1", "lora_te")  # the first text encoder's, where there is a second one
MISSING_LEVELS = {
    "encoder.layers.": "text_model."
}  # how a text encoder's modules begin -> published level that transformers 5 dropped (CLIPTextModel)


@dataclass(frozen=True)
class Numbering:
    """How files number a network's layers where they do not name them: class by class, as a walk through its modules meets them."""

    classes: Mapping[
        str, tuple[str, ...]
    ]  # name of a class of modules -> globs of the layers in it
    targets: tuple[
        tuple[str, ...], ...
    ]  # sets of classes that files hold; each has all layers of the one before
    orders: tuple[
        tuple[str, ...], ...
    ]  # words of paths in the order they are met; the first is written, all are read


@dataclass(frozen=True)
class Component:
    """One network of a family."""

    prefixes: tuple[str, ...]  # kohya's; the first is written, all are read
    shapes: Mapping[
        str, tuple[int, ...]
    ]  # published path -> weight shape [out, in] or [out, in / groups, kh, kw]
    module_prefix: str = (
        ""  # the start of every published path that the installed module lacks, e.g. "text_model."
    )
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # published path -> the dotted name kohya files build on, where it differs
    fused: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # such a name -> published paths whose outputs it stacks, in row order
    swapped: frozenset[str] = (
        frozenset()
    )  # published paths whose halves of the output such files store the other way round
    numbering: Numbering | None = None  # none: no such file exists for this network
    blocks: Mapping[str, int] = field(
        default_factory=dict
    )  # published path -> its block, an index into the 26 of `blocks.BLOCKS`
    width: int = 0  # of an embedding table's rows; 0 where the network has none


@dataclass(frozen=True)
class Layout:
    """What a family tells the file formats."""

    family: str
    base_model_version: str  # kohya's ss_base_model_version
    components: Mapping[str, Component]
    encoders: Mapping[str, str]  # component -> "clip_l" | "clip_g" | "t5"
    presets: Mapping[str, Mapping[str, tuple[str, ...]]] = field(
        default_factory=dict
    )  # component -> preset -> target globs
    architecture: str = ""  # modelspec.architecture; no such header entry where empty
    network_module: str = "networks.lora"  # kohya's ss_network_module
    block_lists: tuple[
        int, ...
    ] = ()  # lengths of the lists of block weights that people use with the family; none: it has no such blocks

    def published(self, component: str, module_path: str) -> str:
        """The path that files use for a module of the installed network. Raises UserError for a module that is no Linear or Conv2d of it."""
        part = self.component(component)
        return _require_known(part.module_prefix + module_path, part.shapes, component)

    def module_path(self, component: str, published: str) -> str:
        """The path within the installed network of a module that files name `published`. Raises UserError for an unknown one."""
        part = self.component(component)
        return _require_known(published, part.shapes, component).removeprefix(part.module_prefix)

    def block_of(self, component: str, path: str) -> int | None:
        """The index into `blocks.BLOCKS` of a layer: 0, the base, in text encoders; None for a layer of no block."""
        return 0 if component in self.encoders else self.component(component).blocks.get(path)

    def component(self, name: str) -> Component:
        """Raises UserError for a component the family does not have."""
        if name not in self.components:
            raise UserError(
                f"there is no {name} here, only {', '.join(self.components) or 'nothing'}"
            )
        return self.components[name]


def layout_of(
    modules: Mapping[str, nn.Module],
    *,
    family: str = "unnamed",
    base_model_version: str = "",
    presets: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None,
    encoders: Mapping[str, str] | None = None,
    architecture: str = "",
) -> Layout:
    """The layout of live networks: all their Linear and Conv2d modules under published names. An adapted module counts as its base."""
    encoders = ENCODERS if encoders is None else encoders
    components = {}
    for name, module in modules.items():
        shapes = dict(weight_shapes(module))
        level = missing_level(name, shapes)
        prefixes = PREFIXES.get(encoders.get(name, name), (f"lora_{name}",))
        if name == "text_encoder" and "text_encoder_2" in modules:
            prefixes = NUMBERED_PREFIXES
        components[name] = Component(
            prefixes,
            {level + path: shape for path, shape in shapes.items()},
            level,
            width=_embedding_width(module),
        )
    own_encoders = {name: key for name, key in encoders.items() if name in modules}
    return Layout(family, base_model_version, components, own_encoders, presets or {}, architecture)


def weight_shapes(module: nn.Module, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dotted path, weight shape) of every Linear and Conv2d. Does not look inside a wrapper, that is a module whose `base` is one of these."""
    for name, child in module.named_children():
        base = getattr(child, "base", child)
        if isinstance(base, nn.Linear | nn.Conv2d):
            yield path + name, tuple(base.weight.shape)
        else:
            yield from weight_shapes(child, f"{path}{name}.")


def missing_level(component: str, paths: Collection[str]) -> str:
    """The published level that all `paths` of a text encoder lack, or ""."""
    starts = [start for start in MISSING_LEVELS if all(path.startswith(start) for path in paths)]
    return MISSING_LEVELS[starts[0]] if component in ENCODERS and starts and paths else ""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, for error sentences; "" when nothing is known."""
    return next(iter(difflib.get_close_matches(name, known, 1, 0.0)), "")


def _require_known(path: str, shapes: Mapping[str, tuple[int, ...]], component: str) -> str:
    if path not in shapes:
        raise UserError(
            f"{component} has no Linear or Conv2d named {path}; the nearest is {nearest_name(path, shapes) or 'nothing, it has none at all'}"
        )
    return path


def _embedding_width(module: nn.Module) -> int:
    """What one row of a network's embedding table holds; 0 without a table."""
    table = getattr(module, "get_input_embeddings", lambda: None)()
    return 0 if table is None else table.embedding_dim
