"""Numbers of layers in cloneofsimo's files, which have no names for them.

A number is the position of a layer in a walk through the modules of a few classes. The order of the
walk depends on the library's version at the time of writing, which the file does not record: a
`Numbering` lists the known orders, and the shapes decide. A state whose layers are in one of the
orders, as those of a file are, is written in it; others in the older one, because published files
have it. Every layer of the classes has a number: layers without an adapter are
written as zeros of the others' rank, and layers whose two factors are zero are left out on reading.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.grammar import fold_scale
from lora_core.formats.layout import Component, Layout, Numbering, Shape

Pair = tuple[Tensor, Tensor]  # up, down

ATTENTION_LAYERS = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")
RESNET_LAYERS = (
    "*.resnets.*.conv1",
    "*.resnets.*.conv2",
    "*.resnets.*.time_emb_proj",
    "*.conv_shortcut",
)
# Class of a module, under its old and new name in diffusers and transformers -> its layers.
CLASSES = {
    "CrossAttention": ATTENTION_LAYERS,
    "Attention": ATTENTION_LAYERS,
    "GEGLU": ("*.ff.net.0.proj",),
    "ResnetBlock2D": RESNET_LAYERS,
    "CLIPAttention": ("*.self_attn.*_proj",),
}
# Order of registration: the middle block last, attentions before residual blocks.
AROUND = ("down_blocks", "up_blocks", "mid_block", "attentions", "resnets")
WITHIN = ("to_q", "to_k", "to_v", "to_out", "conv1", "time_emb_proj", "conv2", "conv_shortcut")
# Component -> the order of its layers in cloneofsimo's files. When they were made, diffusers
# registered feed-forward layers between the attentions; now it registers them last.
NUMBERINGS = {
    "unet": Numbering(
        CLASSES,
        targets=(
            ("CrossAttention", "Attention", "GEGLU"),
            ("CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"),
        ),
        orders=(
            (*AROUND, "attn1", "ff", "attn2", *WITHIN),
            (*AROUND, "attn1", "attn2", "ff", *WITHIN),
        ),
    ),
    "text_encoder": Numbering(
        CLASSES, targets=(("CLIPAttention",),), orders=(("k_proj", "v_proj", "q_proj", "out_proj"),)
    ),
}


# ---------------------------------------------------------------- reading


def place_pairs(
    pairs: Sequence[Pair],
    classes: tuple[str, ...] | None,
    layout: Layout,
    component: str,
    source: str,
) -> dict[str, LowRank]:
    """Published path -> factors, by the only numbering of the layers that fits all shapes.

    `classes` are those of the file; None where it does not list them. Raises UserError when no
    numbering fits, or several do.
    """
    walks = _possible_walks(layout, component, classes, source)
    shapes = layout.component(component).shapes
    right = [walk for walk in walks if len(walk) == len(pairs)]
    if not right:
        counts = " or ".join(sorted({str(len(walk)) for walk in walks}))
        raise UserError(
            f"{source} has {len(pairs)} layers for {component}, expected {counts}; "
            "is it for another model?"
        )
    misfits = [_first_misfit(pairs, walk, shapes) for walk in right]
    fitting = [walk for walk, misfit in zip(right, misfits) if misfit == len(pairs)]
    if not fitting:
        i = max(misfits)
        path = right[misfits.index(i)][i]
        up, down = pairs[i]
        raise UserError(
            f"{component}:{i} of {source} has up {list(up.shape)} and down {list(down.shape)}, "
            f"which fits no order of the layers, {path} {list(shapes[path])} would be the nearest; "
            "is it for another model?"
        )
    if len(fitting) > 1:
        i = next(i for i, paths in enumerate(zip(*fitting)) if len(set(paths)) > 1)
        raise UserError(
            f"{source} may mean {fitting[0][i]} or {fitting[1][i]} by {component}:{i}, "
            "both fit its shapes; use another format"
        )
    placed = {}
    for path, (up, down) in zip(fitting[0], pairs):
        if up.any() or down.any():
            placed[path] = LowRank(down, up, 1.0)
    return placed


def _first_misfit(pairs: Sequence[Pair], walk: Sequence[str], shapes: Mapping[str, Shape]) -> int:
    """The number of the first pair that does not fit its layer; len(pairs) if all fit."""
    for i, (up, down) in enumerate(pairs):
        out, *inner = shapes[walk[i]]
        rank = down.shape[0] if down.ndim else 0
        ones = (1,) * (len(inner) - 1)
        if not rank or down.shape != (rank, *inner) or up.shape != (out, rank, *ones):
            return i
    return len(pairs)


def _possible_walks(
    layout: Layout, component: str, classes: tuple[str, ...] | None, source: str
) -> list[list[str]]:
    """All distinct numberings of the layers, each as a list of paths.

    They differ in the classes where the file does not list them, in the order, and in whether only
    linear layers are counted, as in older files.
    """
    numbering = _numbering(layout, component, source)
    part = layout.component(component)
    for name in classes or ():
        if name not in numbering.classes:
            raise UserError(
                f"{source} has layers of the class {name} in {component}, "
                f"whose order is not known here; known are {', '.join(numbering.classes)}"
            )
    walks: list[list[str]] = []
    for names in [classes] if classes else numbering.targets:
        paths = _layers_of(part, numbering, names)
        for order in numbering.orders:
            walks.append(sort_layers(paths, order))
    for walk in list(walks):
        walks.append([path for path in walk if len(part.shapes[path]) == 2])
    return [list(walk) for walk in dict.fromkeys(map(tuple, walks))]


# ---------------------------------------------------------------- writing


def list_pairs(
    modules: Mapping[str, LowRank], layout: Layout, component: str
) -> tuple[tuple[str, ...], list[Pair]]:
    """The smallest set of classes that holds the layers, and (up, down) of all layers in it.

    Raises UserError for a layer that no set of classes contains.
    """
    numbering = _numbering(layout, component, "the adapter")
    part = layout.component(component)
    for path, lr in modules.items():
        layout.module_path(component, path)  # raises for a path that does not exist
        _check_writable(lr, part.shapes[path], f"{component}.{path}")
    order = find_order(modules, numbering) or numbering.orders[0]
    for classes in numbering.targets:
        walk = sort_layers(_layers_of(part, numbering, classes), order)
        if modules.keys() <= set(walk):
            break
    else:
        path = next(path for path in modules if path not in walk)
        raise UserError(
            f"{component}.{path} has no number in cloneofsimo's format, "
            f"which holds layers of {', '.join(classes)} only"
        )
    rank = Counter(lr.rank for lr in modules.values()).most_common(1)[0][0]
    dtype = next(iter(modules.values())).down.dtype
    pairs = []
    for path in walk:
        if path in modules:
            pairs.append(_to_pair(modules[path]))
        else:
            pairs.append(_zero_pair(part.shapes[path], rank, dtype))
    return classes, pairs


def find_order(paths: Iterable[str], numbering: Numbering) -> tuple[str, ...] | None:
    """The only order of a numbering that the layers are in; None for none, and for several."""
    layers = list(paths)
    found = [order for order in numbering.orders if sort_layers(layers, order) == layers]
    return found[0] if len(found) == 1 else None


def sort_layers(paths: Iterable[str], order: Sequence[str]) -> list[str]:
    """The paths in the order in which a walk meets them; `order` ranks the words of paths."""
    rank = {word: i for i, word in enumerate(order)}

    def place(path: str) -> list[tuple[int, int, str]]:
        places = []
        for word in path.split("."):
            if word.isdecimal():
                places.append((0, int(word), ""))
            elif word in rank:
                places.append((1, rank[word], ""))
            else:
                places.append((2, 0, word))
        return places

    return sorted(paths, key=place)


def numbered_components(state: AdapterState) -> list[tuple[str, dict[str, LowRank]]]:
    """(component, its factors) of a state. Raises UserError for updates of another form."""
    for component, updates in state.dense.items():
        for path, update in updates.items():
            raise UserError(
                f"{component}.{path} is a {update.kind} update, "
                "which cloneofsimo's format cannot hold; distill it to factors first"
            )
    return [(component, modules) for component, modules in state.components.items() if modules]


def _check_writable(lr: LowRank, shape: Shape, name: str) -> None:
    if lr.magnitude is not None:
        raise UserError(
            f"{name} is a DoRA, which cloneofsimo's format cannot hold; write diffusers' or kohya's"
        )
    if lr.rank > min(shape[:2]):
        raise UserError(
            f"{name} has rank {lr.rank}, cloneofsimo's reader takes {min(shape[:2])} at most; "
            "resize it first"
        )


def _to_pair(lr: LowRank) -> Pair:
    own = fold_scale(lr)
    return own.up, own.down


def _zero_pair(shape: Shape, rank: int, dtype: torch.dtype) -> Pair:
    rank = min(rank, *shape[:2])
    ones = [1] * (len(shape) - 2)
    up = torch.zeros(shape[0], rank, *ones, dtype=dtype)
    return up, torch.zeros(rank, *shape[1:], dtype=dtype)


# ---------------------------------------------------------------- the walk


def _numbering(layout: Layout, component: str, source: str) -> Numbering:
    part = layout.components.get(component)
    if part is None or part.numbering is None:
        known = [name for name, own in layout.components.items() if own.numbering]
        raise UserError(
            f"{source} does not fit: cloneofsimo's index-keyed format numbers the layers of "
            f"{' and '.join(known) or 'no network'} of this model, not of {component}; "
            "is it for another model?"
        )
    return part.numbering


def _layers_of(component: Component, numbering: Numbering, classes: Iterable[str]) -> list[str]:
    """The published paths of all layers of these classes."""
    globs: dict[str, None] = {}
    for name in classes:
        for glob in numbering.classes[name]:  # matches a whole path, or its end after a dot
            own = (glob,) if glob.startswith("*.") else (glob, f"*.{glob}")
            globs |= dict.fromkeys(own)
    pattern = "|".join(map(fnmatch.translate, globs))
    return list(filter(re.compile(pattern).match, component.shapes))
