"""Mix-of-Show's ED-LoRA files of torch.save (arXiv 2305.18292).

They hold {"params": {"new_concept_embedding", "text_encoder", "unet"}}. Factors are under module
paths; the scale is not in the file (an alpha that is not divided by the rank, 1 by default there
and here). A concept is a placeholder word with one token for each of the sixteen cross-attention
layers (P+, arXiv 2303.09522): <new0> ... <new15>, then the next concept's, as Mix-of-Show numbers
them. A file of plain LoRA has one token for all layers.

Files are written as its trainer writes them, for the code that loads them there
(convert_edlora_to_diffusers.py, gradient_fusion.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.container import check_finite
from lora_core.formats.embeddings import (
    TOKEN_NAMES,
    placeholder_header,
    placeholder_words,
    word_layers,
)
from lora_core.formats.grammar import fold_scale
from lora_core.formats.layout import Layout, Shape, nearest_name
from lora_core.formats.pickles import own_storage, write_pickle
from lora_core.text import shorten_value

CONCEPT_LAYERS = 16  # cross-attention layers of the models that Mix-of-Show works with
ENCODER = "clip_l"  # the only text encoder
# Component -> ends of the paths whose factors its loader finds; it passes over all others.
LOADED = {
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "unet": (
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    ),
}  # fmt: skip
DOWN, UP = ".lora_down.weight", ".lora_up.weight"


def is_mixofshow(data: Any) -> bool:
    """Whether the result of `read_pickle` is an ED-LoRA file."""
    params = data.get("params") if isinstance(data, dict) else None
    return isinstance(params, dict) and "new_concept_embedding" in params


def mixofshow_shapes(data: Mapping[str, Any]) -> dict[str, Shape]:
    """Key in diffusers' names, or the encoder of a concept's rows -> shape."""
    shapes: dict[str, Shape] = {}
    for name in ("text_encoder", "unet"):
        for key, tensor in (data["params"].get(name) or {}).items():
            shapes[f"{name}.{key}"] = tuple(getattr(tensor, "shape", ()))
    for rows in (data["params"]["new_concept_embedding"] or {}).values():
        shapes["clip_l"] = tuple(getattr(rows, "shape", ()))
    return shapes


def read_mixofshow(data: Mapping[str, Any], layout: Layout | None, source: str) -> AdapterState:
    """The file's state; shapes are checked against the layout where there is one.

    Raises UserError.
    """
    params = data["params"]
    components = {}
    for name in ("text_encoder", "unet"):
        entries = _check_table(params.get(name), name, source)
        if modules := _read_factors(entries, layout, name, source):
            components[name] = modules
    concepts = _check_table(params["new_concept_embedding"], "new_concept_embedding", source)
    for concept, rows in concepts.items():
        if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
            raise UserError(
                f"the concept {shorten_value(concept)} in {source} has no rows [layers, d]; "
                "is the file damaged?"
            )
    check_finite(concepts, source)
    state = AdapterState(components)
    if concepts:
        names: list[str] = []
        tokens = {}
        for concept, rows in concepts.items():
            first = len(names)
            tokens[concept] = [f"<new{first + i}>" for i in range(len(rows))]
            names += tokens[concept]
        state.tokens = {"clip_l": torch.cat(list(concepts.values()))}
        state.token_names = tuple(names)
        layers = {concept: len(own) for concept, own in tokens.items() if len(own) > 1}
        state.metadata = {TOKEN_NAMES: json.dumps(names), **placeholder_header(tokens, layers)}
    return state


def _check_table(value: Any, name: str, source: str) -> dict[str, Any]:
    """The value, a table of texts to anything; {} for none. Raises UserError for others."""
    table = value or {}
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise UserError(
            f"{name} of {source} is {shorten_value(value)}, expected a table of tensors; "
            "is the file damaged?"
        )
    return table


def _read_factors(
    entries: Mapping[str, Any], layout: Layout | None, component: str, source: str
) -> dict[str, LowRank]:
    """Path -> factors.

    Raises UserError for keys that mean nothing, incomplete pairs and other shapes.
    """
    known = layout.component(component).shapes if layout and entries else None
    found = {}
    for key, down in entries.items():
        path = key.removesuffix(DOWN)
        up = entries.get(path + UP)
        if key.endswith(UP) and key.removesuffix(UP) + DOWN in entries:
            continue
        if not key.endswith(DOWN) or not isinstance(up, Tensor) or not isinstance(down, Tensor):
            raise UserError(
                f"{component}.{key} in {source} is not a factor of a pair {DOWN[1:]}, {UP[1:]}; "
                "is the file damaged?"
            )
        if known is not None and path not in known:
            raise UserError(
                f"{source} adapts {component}.{path}, which this model lacks; "
                f"nearest known: {nearest_name(path, known)}"
            )
        shape = (*up.shape[:1], *down.shape[1:]) if known is None else known[path]
        found[path] = _fit_factors(down, up, shape, f"{component}.{path} in {source}")
        check_finite({path + DOWN: down, path + UP: up}, source)
    return found


def _fit_factors(down: Tensor, up: Tensor, shape: Shape, where: str) -> LowRank:
    """The factors, checked and reshaped for a base weight of `shape`. Raises UserError."""
    out, *inner = shape or (0,)
    rank = down.shape[0] if down.ndim else 0
    if down.numel() != rank * torch.Size(inner).numel() or up.numel() != out * rank or not rank:
        raise UserError(
            f"{where} has down {list(down.shape)} and up {list(up.shape)}, "
            f"expected [r, {', '.join(map(str, inner))}] and [{out}, r]"
        )
    ones = [1] * (len(inner) - 1)
    return LowRank(down.reshape(rank, *inner), up.reshape(out, rank, *ones), 1.0)


# ---------------------------------------------------------------- writing


def write_mixofshow(state: AdapterState, path: Path, layout: Layout | None = None) -> None:
    """Writes the file with torch.save, atomically, scales multiplied into `up`.

    Raises UserError for anything that its loaders would pass over or misread: other networks and
    text encoders, layers that they do not know, DoRAs, no concept, or tokens for another number of
    layers.
    """
    refused = f"{path} cannot be written in the format mixofshow:"
    if path.suffix != ".pth":
        raise UserError(f"{refused} such files end in .pth")
    if layout and layout.cross_attention and len(layout.cross_attention) != CONCEPT_LAYERS:
        raise UserError(
            f"{refused} the model has {len(layout.cross_attention)} cross-attention layers, "
            f"Mix-of-Show works with models of {CONCEPT_LAYERS}"
        )
    content: dict[str, Any] = {"new_concept_embedding": _concept_rows(state, refused)}
    for component in state.components:
        if component not in LOADED and state.components[component]:
            raise UserError(f"{refused} it holds a unet and one text_encoder, not a {component}")
    for component, ends in LOADED.items():
        content[component] = {}
        for name, lr in state.components.get(component, {}).items():
            _check_layer(lr, name, ends, f"{refused} {component}.{name}")
            down, up = _stored_factors(fold_scale(lr))
            content[component] |= {name + DOWN: down, name + UP: up}
    for name, tensors in content.items():
        check_finite(tensors, f"{name} of what should become {path}")
    write_pickle(path, {"params": content})


def concept_names(state: AdapterState) -> dict[str, tuple[str, ...]]:
    """Placeholder word, or token without one -> the concepts that stand for it in a file.

    A concept has one token in each layer, so that a word of several tokens is several concepts:
    TOK of two tokens is <TOK1> <TOK2>. Names are in < >, which gradient_fusion.py requires, and
    which keeps a concept's name from being a part of another's: names are replaced in prompts
    wherever they stand.
    """
    layers = word_layers(state)
    found = {}
    for word, names in _words(state).items():
        stem = "-".join(word.strip("<>").split())
        count = len(names) // layers.get(word, 1)
        numbers = [str(i + 1) for i in range(count)] if count > 1 else [""]
        found[word] = tuple(f"<{stem}{number}>" for number in numbers)
    return found


def _words(state: AdapterState) -> dict[str, tuple[str, ...]]:
    """The placeholder words, and the tokens that belong to none, with their tokens."""
    words = placeholder_words(state)
    used = set().union(*words.values())
    return words | {name: (name,) for name in state.token_names if name not in used}


def _concept_rows(state: AdapterState, refused: str) -> dict[str, Tensor]:
    """Concept -> its rows [16, d], or [1, d] of one token for all layers, which loads there too."""
    if not state.tokens:
        raise UserError(
            f"{refused} its loader needs a concept, and there are no learned tokens; give the "
            "run's folder, where they are in a file of their own, or write the format diffusers"
        )
    if list(state.tokens) != [ENCODER]:
        raise UserError(
            f"{refused} it holds token rows of {ENCODER} alone, these are of "
            f"{' and '.join(state.tokens)}"
        )
    table = dict(zip(state.token_names, state.tokens[ENCODER], strict=True))
    layers, words = word_layers(state), _words(state)
    rows: dict[str, Tensor] = {}
    for word, concepts in concept_names(state).items():
        own = layers.get(word, 1)
        if own not in (1, CONCEPT_LAYERS):
            raise UserError(
                f"{refused} its concepts have tokens for {CONCEPT_LAYERS} layers, {word} has them "
                f"for {own}"
            )
        stacked = torch.stack([table[name] for name in words[word]]).unflatten(0, (own, -1))
        for number, concept in enumerate(concepts):
            if concept in rows:
                raise UserError(f"{refused} two words would be the concept {concept}; rename one")
            rows[concept] = own_storage(stacked[:, number])
    return rows


def _check_layer(lr: LowRank, path: str, ends: tuple[str, ...], what: str) -> None:
    """Raises UserError for a layer that the loader would pass over or misread."""
    if lr.magnitude is not None:
        raise UserError(
            f"{what} is a DoRA; merge.py convert --as lora --model BASE makes a plain LoRA of it"
        )
    if not any(path == end or path.endswith(f".{end}") for end in ends):
        raise UserError(
            f"{what} is a layer that Mix-of-Show's loader passes over; it knows {', '.join(ends)}"
        )
    if lr.down[0, 0].numel() > 1:
        raise UserError(f"{what} is a convolution larger than 1 x 1, which its loader misreads")


def _stored_factors(lr: LowRank) -> tuple[Tensor, Tensor]:
    """(down, up) as its trainer has them.

    A 1 x 1 convolution of rank 1 gets a second rank of zeros: the loader removes all axes of size 1
    before it multiplies.
    """
    down, up = lr.down, lr.up
    if down.ndim == 4 and lr.rank == 1:
        down = torch.cat([down, torch.zeros_like(down)])
        up = torch.cat([up, torch.zeros_like(up)], dim=1)
    return own_storage(down), own_storage(up)
