"""Mix-of-Show's ED-LoRA files of torch.save (arXiv 2305.18292).

They hold {"params": {"new_concept_embedding", "text_encoder", "unet"}}. Factors are under module
paths; the scale is not in the file (an alpha that is not divided by the rank, 1 by default there
and here). A concept is a placeholder word with one token for each of the sixteen cross-attention
layers (P+, arXiv 2303.09522): <new0> ... <new15>, then the next concept's, as Mix-of-Show numbers
them. A file of plain LoRA has one token for all layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.container import check_finite
from lora_core.formats.embeddings import TOKEN_NAMES, placeholder_header
from lora_core.formats.layout import Layout, Shape, nearest_name
from lora_core.text import shorten_value

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
