"""cloneofsimo's format: `unet:{i}:up`, `unet:{i}:down`, and token rows under the tokens' names.

Layers have numbers (see layer_numbering.py). The header has, for each network, the classes of its
adapted modules as JSON, for each number the rank, and for each token the word `<embed>`. There is
no alpha: the scale is multiplied into `up`. The older `.pt` lists are in factor_lists.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.grammar import STRICT, DecodeOptions
from lora_core.formats.layer_numbering import Pair, list_pairs, numbered_components, place_pairs
from lora_core.formats.layout import Layout

KEY = re.compile(r"([^:]+):(\d{1,9}):(up|down)")
RANK = re.compile(r"[^:]+:\d+:rank")
EMBED = "<embed>"  # value of the header entry that marks a token
ENCODER = "text_encoder"  # the only encoder whose token rows these files hold


def read_cloneofsimo(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions = STRICT,
) -> AdapterState:
    """The file's state; tokens in the order of their names, or of the header's list of names.

    Ranks are those of the tensors; the header's are ignored. Raises UserError without a layout, for
    a network whose layers have no numbering, gaps in the numbers, unknown keys (even with
    allow_extra) and classes, and shapes that fit no order or several.
    """
    layout = require_layout(layout, source)
    numbered: dict[str, dict[int, dict[str, Tensor]]] = {}
    tokens: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if found := KEY.fullmatch(key):
            component, number, role = found.groups()
            parts = numbered.setdefault(component, {}).setdefault(int(number), {})
            if role in parts:
                name = f"{component}:{int(number)}:{role}"
                raise UserError(f"{source} has {name} twice, once as {key}; remove one")
            parts[role] = tensor
        elif header.get(key) == EMBED:
            tokens[key] = tensor
        else:
            raise UserError(
                f"{source} has the key {key}, neither a numbered factor nor a token of its header; "
                "is it another format?"
            )
    components = {}
    for component, modules in sorted(numbered.items()):
        pairs = _to_pairs(modules, component, source)
        classes = _listed_classes(header, component, source)
        components[component] = place_pairs(pairs, classes, layout, component, source)
    kept = {}
    for key, value in header.items():
        if key not in layout.components and value != EMBED and not RANK.fullmatch(key):
            kept[key] = value
    return with_tokens(AdapterState(components, metadata=kept), tokens, layout, source)


def write_cloneofsimo(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and cloneofsimo's header entries.

    Raises UserError without a layout, and for a layer, DoRA, rank or token that the format cannot
    hold.
    """
    layout = require_layout(layout, title)
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for component, modules in numbered_components(state):
        classes, pairs = list_pairs(modules, layout, component)
        header[component] = json.dumps(classes)
        for i, (up, down) in enumerate(pairs):
            tensors[f"{component}:{i}:up"] = up
            tensors[f"{component}:{i}:down"] = down
            header[f"{component}:{i}:rank"] = str(len(down))
    rows = token_tensors(state, layout)
    return tensors | rows, header | dict.fromkeys(rows, EMBED)


def require_layout(layout: Layout | None, source: str) -> Layout:
    if layout is None:
        raise UserError(
            f"{source} is in cloneofsimo's index-keyed format, "
            "whose numbers mean layers of a model's layout; name the model"
        )
    return layout


def _listed_classes(
    header: Mapping[str, str], component: str, source: str
) -> tuple[str, ...] | None:
    """The classes that the header lists for a network; None where it has no entry."""
    if component not in header:
        return None
    try:
        names = json.loads(header[component])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"the header entry {component} of {source} is {header[component]!r:.80}, "
            "expected a JSON list of classes of modules"
        )
    return tuple(names)


def _to_pairs(
    modules: Mapping[int, Mapping[str, Tensor]], component: str, source: str
) -> list[Pair]:
    """(up, down) by number. Raises UserError for a gap or half a pair."""
    pairs = []
    for i in range(len(modules)):
        parts = modules.get(i, {})
        for role in ("up", "down"):
            if role not in parts:
                raise UserError(
                    f"{source} has {len(modules)} numbers for {component} "
                    f"but no {component}:{i}:{role}; the file is incomplete"
                )
        pairs.append((parts["up"], parts["down"]))
    return pairs


# ---------------------------------------------------------------- tokens


def with_tokens(
    state: AdapterState, tokens: Mapping[str, Tensor], layout: Layout, source: str
) -> AdapterState:
    """The state with the given token rows added, one row [d] for each token.

    Raises UserError for another shape or width than the text encoder's.
    """
    if not tokens:
        return state
    for token, row in tokens.items():
        if row.ndim != 1 or not row.numel():
            shape = list(row.shape)
            raise UserError(
                f"the token {token} in {source} has shape {shape}, expected one row [d]"
            )
    names = embeddings.token_names(state.metadata, sorted(tokens), source)
    if set(names) != set(tokens):
        raise UserError(
            f"{source} has the tokens {', '.join(sorted(tokens))}, its header names "
            f"{', '.join(names)}; fix or remove that entry"
        )
    widths = {len(row) for row in tokens.values()}
    known = ENCODER in layout.encoders
    expected = layout.component(ENCODER).width if known else "no such encoder"
    if not known or len(widths) > 1 or expected not in (0, *widths):
        raise UserError(
            f"the tokens of {source} have width {' and '.join(map(str, sorted(widths)))}, "
            f"the model's {ENCODER} {expected}; use its own"
        )
    rows = {layout.encoders[ENCODER]: torch.stack([tokens[name] for name in names])}
    listed = {embeddings.TOKEN_NAMES: json.dumps(names, ensure_ascii=False)}
    return replace(state, tokens=rows, token_names=names, metadata=state.metadata | listed)


def token_tensors(state: AdapterState, layout: Layout) -> dict[str, Tensor]:
    """Token -> its row [d], as the format stores it.

    Raises UserError for rows of another encoder, words with tokens for each layer, and a token
    whose name looks like a factor's key.
    """
    own = layout.encoders.get(ENCODER)
    for key in state.tokens:
        if key != own:
            raise UserError(
                f"token rows of {key} have no place in cloneofsimo's format, "
                f"it holds those of {own or 'no encoder of this model'}"
            )
    if own not in state.tokens:
        return {}
    embeddings.refuse_layer_words(state, "cloneofsimo's format")
    for name in state.token_names:
        if ":" in name or name.startswith(tuple(layout.components)):
            raise UserError(
                f"the token {name} reads like a factor in cloneofsimo's format; "
                f"rename it to something like <{name.replace(':', '-')}>"
            )
    return dict(zip(state.token_names, state.tokens[own], strict=True))
