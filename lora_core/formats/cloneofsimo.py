"""cloneofsimo's format: `unet:{i}:up`, `unet:{i}:down`, `text_encoder:{i}:...`, tokens inside under their own names; and its older `.pt` lists.

A number is the place of a layer in a walk through the modules of a few classes. The header lists the classes of each network as JSON, the rank of
each number, and `<embed>` for each token. The walk depends on the library's version at the time of writing, which the file does not tell: a
`Numbering` has the orders there are, and the shapes decide. Written is the older one, in which the published files are.
There is no alpha, a scale is multiplied into `up`. Every layer of the classes has a number: layers without an adapter are written as zeros of the
others' rank, and layers whose two factors are zero are left out on reading.
The lists of `.pt` files are [up 0, down 0, up 1, ...], one file a network: x.pt for the UNet, x.text_encoder.pt, and x.ti.pt with {token: row}.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.targets import matches_pattern
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.container import check_finite
from lora_core.formats.layout import Component, Layout, Numbering
from lora_core.formats.pickles import read_pickle
from lora_core.runs.run_folder import atomic_write

KEY = re.compile(r"([^:]+):(\d{1,9}):(up|down)")
RANK = re.compile(r"[^:]+:\d+:rank")
EMBED = "<embed>"  # the header's value for a token
FIRST, ENCODER = (
    "unet",
    "text_encoder",
)  # the network of x.pt, and the one whose tokens these files hold
Pair = tuple[Tensor, Tensor]  # up, down


def detect_cloneofsimo(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is a numbered factor."""
    return any(KEY.fullmatch(key) for key in tensors)


def read_cloneofsimo(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], layout: Layout | None, source: str
) -> AdapterState:
    """The file's state; tokens in the order of their names, or of the header's list of names. The ranks are the tensors', whatever the header says.

    Raises UserError without a layout, for a network without numbers, gaps in them, unknown keys and classes, and shapes that fit no order or several.
    """
    layout = _require_layout(layout, source)
    numbered: dict[str, dict[int, dict[str, Tensor]]] = {}
    tokens: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if found := KEY.fullmatch(key):
            component, number, role = found.groups()
            parts = numbered.setdefault(component, {}).setdefault(int(number), {})
            if role in parts:
                raise UserError(
                    f"{source} has {component}:{int(number)}:{role} twice, once as {key}; remove one"
                )
            parts[role] = tensor
        elif header.get(key) == EMBED:
            tokens[key] = tensor
        else:
            raise UserError(
                f"{source} has the key {key}, neither a numbered factor nor a token of its header; is it another format?"
            )
    components = {}
    for component, modules in sorted(numbered.items()):
        pairs = _to_pairs(modules, component, source)
        components[component] = _place_pairs(
            pairs, _listed_classes(header, component, source), layout, component, source
        )
    kept = {
        key: value
        for key, value in header.items()
        if key not in layout.components and value != EMBED and not RANK.fullmatch(key)
    }
    return _with_tokens(AdapterState(components, metadata=kept), tokens, layout, source)


def write_cloneofsimo(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and cloneofsimo's header entries. Raises UserError without a layout, and for a layer, DoRA, rank or token that has no place there."""
    layout = _require_layout(layout, title)
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for component, modules in _adapted_components(state):
        classes, pairs = _list_pairs(modules, layout, component)
        header[component] = json.dumps(classes)
        for i, (up, down) in enumerate(pairs):
            tensors |= {f"{component}:{i}:up": up, f"{component}:{i}:down": down}
            header[f"{component}:{i}:rank"] = str(len(down))
    rows = _token_tensors(state, layout)
    return tensors | rows, header | dict.fromkeys(rows, EMBED)


# ---------------------------------------------------------------- .pt


def is_factor_list(data: Any) -> bool:
    """Whether what `read_pickle` found is a list of factors."""
    return isinstance(data, list)


def read_factor_lists(path: str | Path, layout: Layout | None = None) -> AdapterState:
    """A LoRA's file and, beside an x.pt, x.text_encoder.pt and x.ti.pt where they are there. Nothing in them is executed.

    Raises UserError as `read` does, and for anything but lists of tensors; the classes are found by the number of layers.
    """
    path = Path(path)
    layout = _require_layout(layout, str(path))
    own = next((name for name in layout.components if path.name.endswith(f".{name}.pt")), FIRST)
    files = {own: path}
    if own == FIRST:
        files |= {
            name: file
            for name in layout.components
            if name != FIRST and (file := path.with_suffix(f".{name}.pt")).is_file()
        }
    components = {}
    for component, file in files.items():
        data = read_pickle(file)
        if (
            not isinstance(data, list)
            or not data
            or len(data) % 2
            or not all(isinstance(t, Tensor) and t.is_floating_point() for t in data)
        ):
            raise UserError(
                f"{file} holds no list of up and down factors, two for each layer, which such a file is expected to be"
            )
        check_finite({f"factor {i}": tensor for i, tensor in enumerate(data)}, str(file))
        components[component] = _place_pairs(
            list(zip(data[::2], data[1::2])), None, layout, component, str(file)
        )
    rows = path.with_suffix(".ti.pt")
    state = AdapterState(components)
    if own != FIRST or not rows.is_file():
        return state
    return _with_tokens(
        state, embeddings.check_token_rows(read_pickle(rows), str(rows)), layout, str(rows)
    )


def write_factor_lists(
    state: AdapterState, path: str | Path, layout: Layout | None = None
) -> list[Path]:
    """The files written: x.pt, x.text_encoder.pt, x.ti.pt, those that the state has content for. Each is whole or as it was.

    Raises UserError as `write` does, before any file is written, and for a name that does not end in .pt.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise UserError(
            f"{path} should be a list of factors, whose name ends in .pt; give x.pt, or write a .safetensors"
        )
    layout = _require_layout(layout, str(path))
    contents: dict[Path, Any] = {}
    for component, modules in _adapted_components(state):
        _, pairs = _list_pairs(modules, layout, component)
        contents[path if component == FIRST else path.with_suffix(f".{component}.pt")] = [
            _own_storage(t) for pair in pairs for t in pair
        ]
    if rows := _token_tensors(state, layout):
        contents[path.with_suffix(".ti.pt")] = {
            token: _own_storage(row) for token, row in rows.items()
        }
    for file, content in contents.items():
        named = {str(i): t for i, t in enumerate(content)} if isinstance(content, list) else content
        check_finite(named, f"what should become {file}")
    for file, content in contents.items():
        with atomic_write(file) as temporary, temporary.open("wb") as opened:
            torch.save(content, opened)
    return list(contents)


# ---------------------------------------------------------------- numbers and paths


def _require_layout(layout: Layout | None, source: str) -> Layout:
    if layout is None:
        raise UserError(
            f"{source} is in cloneofsimo's index-keyed format, whose numbers mean layers of a model's layout; name the model"
        )
    return layout


def _numbering(layout: Layout, component: str, source: str) -> Numbering:
    numbering = layout.component(component).numbering if component in layout.components else None
    if numbering is None:
        known = [name for name, part in layout.components.items() if part.numbering]
        has = f"numbers the layers of {' and '.join(known) or 'no network'} of this model, not of {component}"
        raise UserError(
            f"{source} does not fit: cloneofsimo's index-keyed format {has}; is it for another model?"
        )
    return numbering


def _walk_layers(component: Component, classes: Collection[str], order: Sequence[str]) -> list[str]:
    """The published paths of all layers of these classes, in the order they are met."""
    numbering = component.numbering
    assert numbering is not None
    globs = {glob for name in classes for glob in numbering.classes[name]}
    rank = {word: i for i, word in enumerate(order)}

    def place(path: str) -> list[tuple[int, int, str]]:
        words = path.split(".")
        return [
            (0, int(w), "") if w.isdecimal() else (1, rank[w], "") if w in rank else (2, 0, w)
            for w in words
        ]

    return sorted(
        (path for path in component.shapes if any(matches_pattern(path, glob) for glob in globs)),
        key=place,
    )


def _listed_classes(
    header: Mapping[str, str], component: str, source: str
) -> tuple[str, ...] | None:
    """The classes that the header lists for a network; None where it says nothing."""
    if component not in header:
        return None
    try:
        names = json.loads(header[component])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"the header entry {component} of {source} is {header[component]!r:.80}, expected a JSON list of classes of modules"
        )
    return tuple(names)


def _to_pairs(
    modules: Mapping[int, Mapping[str, Tensor]], component: str, source: str
) -> list[Pair]:
    """(up, down) by number. Raises UserError for a gap or half a pair."""
    for i in range(len(modules)):
        missing = [role for role in ("up", "down") if role not in modules.get(i, {})]
        if missing:
            raise UserError(
                f"{source} has {len(modules)} numbers for {component} but no {component}:{i}:{missing[0]}; the file is incomplete"
            )
    return [(modules[i]["up"], modules[i]["down"]) for i in range(len(modules))]


def _place_pairs(
    pairs: Sequence[Pair],
    classes: tuple[str, ...] | None,
    layout: Layout,
    component: str,
    source: str,
) -> dict[str, LowRank]:
    """Published path -> factors: the one way to number the network's layers that all shapes fit. Raises UserError for none, or several."""
    walks = _possible_walks(layout, component, classes, source)
    shapes = layout.component(component).shapes
    right = [walk for walk in walks if len(walk) == len(pairs)]
    if not right:
        counts = " or ".join(sorted({str(len(walk)) for walk in walks}))
        raise UserError(
            f"{source} has {len(pairs)} layers for {component}, expected {counts}; is it for another model?"
        )
    misfits = [
        next(
            (i for i, pair in enumerate(pairs) if not _pair_fits(pair, shapes[walk[i]])), len(pairs)
        )
        for walk in right
    ]
    fitting = [walk for walk, misfit in zip(right, misfits) if misfit == len(pairs)]
    if not fitting:
        i = max(misfits)
        path = right[misfits.index(i)][i]
        up, down = pairs[i]
        got = f"{component}:{i} of {source} has up {list(up.shape)} and down {list(down.shape)}"
        raise UserError(
            f"{got}, which fits no order of the layers, {path} {list(shapes[path])} would be the nearest; is it for another model?"
        )
    if len(fitting) > 1:
        i = next(i for i, paths in enumerate(zip(*fitting)) if len(set(paths)) > 1)
        raise UserError(
            f"{source} may mean {fitting[0][i]} or {fitting[1][i]} by {component}:{i}, both fit its shapes; use another format"
        )
    return {
        path: LowRank(down, up, 1.0)
        for path, (up, down) in zip(fitting[0], pairs)
        if up.any() or down.any()
    }


def _possible_walks(
    layout: Layout, component: str, classes: tuple[str, ...] | None, source: str
) -> list[list[str]]:
    """All different ways to number the layers: by classes where they are not known, by order, and with linear layers only, as older files have it."""
    numbering = _numbering(layout, component, source)
    part = layout.component(component)
    for name in classes or ():
        if name not in numbering.classes:
            known = ", ".join(numbering.classes)
            raise UserError(
                f"{source} has layers of the class {name} in {component}, whose order is not known here; known are {known}"
            )
    walks = [
        _walk_layers(part, names, order)
        for names in ([classes] if classes else numbering.targets)
        for order in numbering.orders
    ]
    walks += [[path for path in walk if len(part.shapes[path]) == 2] for walk in walks]
    return [list(walk) for walk in dict.fromkeys(map(tuple, walks))]


def _pair_fits(pair: Pair, shape: tuple[int, ...]) -> bool:
    up, down = pair
    rank = len(down) if down.ndim else 0
    return (
        rank > 0
        and tuple(down.shape) == (rank, *shape[1:])
        and tuple(up.shape) == (shape[0], rank, *[1] * (len(shape) - 2))
    )


def _adapted_components(state: AdapterState) -> list[tuple[str, dict[str, LowRank]]]:
    for component, updates in state.dense.items():
        for path, update in updates.items():
            raise UserError(
                f"{component}.{path} is a {update.kind} update, for which cloneofsimo's format has no place; distill it to factors first"
            )
    return [(component, modules) for component, modules in state.components.items() if modules]


def _list_pairs(
    modules: Mapping[str, LowRank], layout: Layout, component: str
) -> tuple[tuple[str, ...], list[Pair]]:
    """The smallest set of classes that holds the layers, and (up, down) of all layers in it. Raises UserError for what has no place."""
    numbering, part = _numbering(layout, component, "the adapter"), layout.component(component)
    for path, lr in modules.items():
        layout.module_path(component, path)  # refuses a path that is not there
        shape = part.shapes[path]
        if lr.magnitude is not None:
            raise UserError(
                f"{component}.{path} is a DoRA, for which cloneofsimo's format has no place; write diffusers' or kohya's"
            )
        if lr.rank > min(shape[:2]):
            raise UserError(
                f"{component}.{path} has rank {lr.rank}, cloneofsimo's reader takes {min(shape[:2])} at most; resize it first"
            )
    walks = {
        classes: _walk_layers(part, classes, numbering.orders[0]) for classes in numbering.targets
    }
    classes = next((names for names, walk in walks.items() if modules.keys() <= set(walk)), None)
    if classes is None:
        path = next(path for path in modules if path not in walks[numbering.targets[-1]])
        raise UserError(
            f"{component}.{path} has no number in cloneofsimo's format, which holds layers of {', '.join(numbering.targets[-1])} only"
        )
    zeros = (
        Counter(lr.rank for lr in modules.values()).most_common(1)[0][0],
        next(iter(modules.values())).down.dtype,
    )
    return classes, [
        _pair(modules[path]) if path in modules else _zero_pair(part.shapes[path], *zeros)
        for path in walks[classes]
    ]


def _pair(lr: LowRank) -> Pair:
    if lr.scale == 1:
        return lr.up, lr.down
    return (lr.up.to(torch.promote_types(lr.up.dtype, torch.float32)) * lr.scale).to(
        lr.up.dtype
    ), lr.down


def _zero_pair(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> Pair:
    rank = min(rank, *shape[:2])
    return torch.zeros(shape[0], rank, *[1] * (len(shape) - 2), dtype=dtype), torch.zeros(
        rank, *shape[1:], dtype=dtype
    )


def _own_storage(tensor: Tensor) -> Tensor:
    """A copy on the CPU with a storage of its own, which is what torch.save writes."""
    return tensor.detach().cpu().contiguous().clone()


# ---------------------------------------------------------------- tokens


def _with_tokens(
    state: AdapterState, tokens: Mapping[str, Tensor], layout: Layout, source: str
) -> AdapterState:
    """The state with one row a token. Raises UserError for anything but rows [d] of the text encoder's width."""
    if not tokens:
        return state
    for token, row in tokens.items():
        if row.ndim != 1 or not row.numel():
            raise UserError(
                f"the token {token} in {source} has shape {list(row.shape)}, expected one row [d]"
            )
    names = embeddings.token_names(state.metadata, sorted(tokens), source)
    if set(names) != set(tokens):
        raise UserError(
            f"{source} has the tokens {', '.join(sorted(tokens))}, its header names {', '.join(names)}; mend or remove that entry"
        )
    widths = {len(row) for row in tokens.values()}
    if (
        ENCODER not in layout.encoders
        or len(widths) > 1
        or layout.component(ENCODER).width not in (0, *widths)
    ):
        expected = (
            layout.component(ENCODER).width if ENCODER in layout.encoders else "no such encoder"
        )
        raise UserError(
            f"the tokens of {source} have width {' and '.join(map(str, sorted(widths)))}, the model's {ENCODER} {expected}; use its own"
        )
    rows = {layout.encoders[ENCODER]: torch.stack([tokens[name] for name in names])}
    return replace(
        state,
        tokens=rows,
        token_names=names,
        metadata=state.metadata | {embeddings.TOKEN_NAMES: json.dumps(names, ensure_ascii=False)},
    )


def _token_tensors(state: AdapterState, layout: Layout) -> dict[str, Tensor]:
    """Token -> row. Raises UserError for rows of another encoder, and for a name that its readers take for a factor's."""
    own = layout.encoders.get(ENCODER)
    for key in state.tokens:
        if key != own:
            raise UserError(
                f"token rows of {key} have no place in cloneofsimo's format, it holds those of {own or 'no encoder of this model'}"
            )
    for name in state.token_names if state.tokens else ():
        if ":" in name or name.startswith(tuple(layout.components)):
            raise UserError(
                f"the token {name} reads like a factor in cloneofsimo's format; rename it to something like <{name.replace(':', '-')}>"
            )
    return (
        dict(zip(state.token_names, state.tokens[own], strict=True)) if own in state.tokens else {}
    )
