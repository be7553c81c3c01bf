"""The names and weight shapes of a family's networks, as adapter files use them.

A `Layout` lists, for each network of a family, which modules a file may name, how their names are
published, and what shape their weights have. Formats are written and read against it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from lora_core.errors import UserError
from lora_core.text import nearest_names

# Component -> key of its token rows, unless a family has others.
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
# Network, or key of an encoder's token rows -> prefixes in kohya files; the first is written.
PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet",),
    "clip_l": ("lora_te", "lora_te1"),
    "clip_g": ("lora_te2",),
    "t5": ("lora_te3",),
}
# Prefixes of the first text encoder in a model with two.
NUMBERED_PREFIXES = ("lora_te1", "lora_te")
# Start of a text encoder's module paths -> published level before it, which transformers 5 dropped.
MISSING_LEVELS = {"encoder.layers.": "text_model."}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Numbering:
    """The order in which files number a network's layers where they do not name them.

    Layers are counted class by class, in the order in which a walk through the modules meets them.
    """

    # name of a class of modules -> globs of the layers in it
    classes: Mapping[str, tuple[str, ...]]
    # sets of classes that files hold; each has all layers of the one before
    targets: tuple[tuple[str, ...], ...]
    # words of paths in the order they are met; the first order is written, all are read
    orders: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Component:
    """One network of a family. Paths are published ones, unless noted otherwise."""

    prefixes: tuple[str, ...]  # kohya's; the first is written, all are read
    # path -> weight shape, [out, in] or [out, in / groups, kh, kw]
    shapes: Mapping[str, Shape]
    # the start of every path that the installed module lacks, e.g. "text_model."
    module_prefix: str = ""
    # path of a norm's weight, or of the bias of a norm or a layer -> its shape
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    # path -> the dotted name that kohya's files have instead
    names: Mapping[str, str] = field(default_factory=dict)
    # such a name -> the paths whose outputs it stacks, in row order
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # paths whose output halves such files store in the opposite order
    swapped: frozenset[str] = frozenset()
    numbering: Numbering | None = None  # None: no numbered file exists for this network
    # path -> its block, an index into the 26 of `block_weights.BLOCKS`
    blocks: Mapping[str, int] = field(default_factory=dict)
    width: int = 0  # of an embedding table's rows; 0 for a network without one

    @cached_property
    def norms(self) -> list[str]:
        """The paths of the norms."""
        return norm_paths(self.shapes, self.parameters)

    @cached_property
    def modules(self) -> list[str]:
        """The paths of all layers and norms."""
        return [*self.shapes, *self.norms]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a family's networks, as the file formats need them."""

    family: str
    base_model_version: str  # kohya's ss_base_model_version
    components: Mapping[str, Component]
    encoders: Mapping[str, str]  # component -> "clip_l" | "clip_g" | "t5"
    # component -> preset -> target globs
    presets: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    architecture: str = ""  # modelspec.architecture; no such header entry where empty
    # modelspec.implementation: the code whose names the files' tensors have
    implementation: str = "diffusers"
    network_module: str = "networks.lora"  # kohya's ss_network_module
    # lengths of the lists of block weights in use with the family; none: it has no such blocks
    block_lists: tuple[int, ...] = ()
    # paths of the denoiser's cross-attention modules in the order in which files of per-layer
    # tokens count them; none: the text is not read by layers of its own
    cross_attention: tuple[str, ...] = ()

    def published(self, component: str, module_path: str) -> str:
        """The path that files use for a module of the installed network.

        Raises UserError for a module that is not one of its Linear or Conv2d layers.
        """
        part = self.component(component)
        return _require_known(part.module_prefix + module_path, part.shapes, component)

    def module_path(self, component: str, published: str) -> str:
        """The path within the installed network of a module that files call `published`.

        Raises UserError for an unknown one.
        """
        part = self.component(component)
        return _require_known(published, part.shapes, component).removeprefix(part.module_prefix)

    def block_of(self, component: str, path: str) -> int | None:
        """The index into `block_weights.BLOCKS` of a layer; None for a layer of no block.

        Text encoders are block 0, the base.
        """
        return 0 if component in self.encoders else self.component(component).blocks.get(path)

    def component(self, name: str) -> Component:
        """The component of that name. Raises UserError when the family does not have it."""
        if name not in self.components:
            known = ", ".join(self.components) or "nothing"
            raise UserError(f"there is no {name} here, only {known}")
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
    """The layout of networks in memory: all their Linear and Conv2d modules, published names.

    An adapted module is listed as its base layer.
    """
    encoders = ENCODERS if encoders is None else encoders
    components = {}
    for name, module in modules.items():
        shapes = dict(weight_shapes(module))
        level = missing_level(name, shapes)
        prefixes = PREFIXES.get(encoders.get(name, name), (f"lora_{name}",))
        if name == "text_encoder" and "text_encoder_2" in modules:
            prefixes = NUMBERED_PREFIXES
        published = {level + path: shape for path, shape in shapes.items()}
        width = _embedding_width(module)
        parameters = {level + path: shape for path, shape in vector_shapes(module)}
        components[name] = Component(prefixes, published, level, parameters, width=width)
    own_encoders = {name: key for name, key in encoders.items() if name in modules}
    return Layout(family, base_model_version, components, own_encoders, presets or {}, architecture)


def weight_shapes(module: nn.Module, path: str = "") -> Iterator[tuple[str, Shape]]:
    """(dotted path, weight shape) of every Linear and Conv2d.

    Does not look inside a wrapper, that is a module whose `base` is one of these.
    """
    for name, child in module.named_children():
        base = getattr(child, "base", child)
        if isinstance(base, nn.Linear | nn.Conv2d):
            yield path + name, tuple(base.weight.shape)
        else:
            yield from weight_shapes(child, f"{path}{name}.")


def vector_shapes(module: nn.Module, path: str = "") -> Iterator[tuple[str, Shape]]:
    """(dotted path, shape) of every bias, and of the weights of norms; wrappers are looked through.

    These are the parameters that LyCORIS' files change directly, without factors.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 1 and name in ("weight", "bias"):
            yield path + name, tuple(parameter.shape)
    for name, child in module.named_children():
        base = getattr(child, "base", child)
        inner = base if isinstance(base, nn.Linear | nn.Conv2d) else child
        yield from vector_shapes(inner, f"{path}{name}.")


def norm_paths(layers: Collection[str], parameters: Iterable[str]) -> list[str]:
    """The modules of `parameters` that are no layers."""
    modules: dict[str, None] = {}
    for name in parameters:
        path = name.rpartition(".")[0]
        if path not in layers:
            modules[path] = None
    return list(modules)


def missing_level(component: str, paths: Collection[str]) -> str:
    """The published level that all `paths` of a text encoder lack, or ""."""
    if component in ENCODERS and paths:
        for start, level in MISSING_LEVELS.items():
            if all(path.startswith(start) for path in paths):
                return level
    return ""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name most similar to `name`, for error messages; "" when `known` is empty."""
    return next(iter(nearest_names(name, known, cutoff=0)), "")


def _require_known(path: str, shapes: Mapping[str, Shape], component: str) -> str:
    if path not in shapes:
        near = nearest_name(path, shapes) or "nothing, it has none at all"
        raise UserError(f"{component} has no Linear or Conv2d named {path}; the nearest is {near}")
    return path


def _embedding_width(module: nn.Module) -> int:
    """The size of one row of a network's embedding table; 0 without a table."""
    table = getattr(module, "get_input_embeddings", lambda: None)()
    return 0 if table is None else table.embedding_dim
