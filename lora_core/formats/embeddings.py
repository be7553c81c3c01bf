"""Token rows: one tensor [n, d] per text encoder under `clip_l`, `clip_g`, `t5` (diffusers' pivotal scripts, A1111, ComfyUI, kohya).

Readers elsewhere know the rows by the file's name or by tokens given by hand; ours finds the tokens' names and the placeholder words in the header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.algebra import AdapterState
from lora_core.errors import UserError
from lora_core.formats.layout import Layout, nearest

KEYS = {"clip_l": ("clip_l",), "clip_g": ("clip_g",), "t5": ("t5", "t5xxl")}  # encoder -> spellings, all of them written; ComfyUI looks for t5xxl
NAMES = "token_names"  # header entry: JSON list of the tokens in row order
WORDS = "placeholders"  # header entry: JSON object, placeholder word -> its tokens


def header(words: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The header entry that tells which tokens stand for a word in prompts: {"TOK": ("<s0>", "<s1>")}."""
    return {WORDS: json.dumps({word: list(names) for word, names in words.items()}, ensure_ascii=False)} if words else {}


def words(state: AdapterState, source: str = "the file") -> dict[str, tuple[str, ...]]:
    """Placeholder word -> tokens; none where the state has no rows. Raises UserError for a broken entry or one with unknown tokens."""
    if not state.token_names:
        return {}
    entry = _json(state.metadata, WORDS, {}, source)
    if not isinstance(entry, dict) or not all(isinstance(n, list) and n and set(map(str, n)) <= set(state.token_names) for n in entry.values()):
        raise UserError(f"the header entry {WORDS} of {source} is {entry}, expected words and their tokens out of {list(state.token_names)}")
    return {word: tuple(names) for word, names in entry.items()}


def names(metadata: Mapping[str, str], default: Sequence[str], source: str) -> tuple[str, ...]:
    """The tokens' names in row order, `default` where the header has none. Raises UserError for anything but different names."""
    entry = _json(metadata, NAMES, list(default), source)
    if not isinstance(entry, list) or not entry or not all(isinstance(n, str) and n for n in entry) or len(set(entry)) != len(entry):
        raise UserError(f"the header entry {NAMES} of {source} is {entry}, expected a list of different names")
    return tuple(entry)


def detect(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is an encoder's."""
    return any(key in spellings for spellings in KEYS.values() for key in tensors)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layout: Layout | None, source: str) -> AdapterState:
    """Token rows and names. A file without names has those of diffusers' scripts, <s0>, <s1> ... Raises UserError.

    A layout says which encoders exist; widths are checked where the rows are installed.
    """
    known = {spelling: key for key, spellings in KEYS.items() for spelling in spellings}
    rows: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in known:
            raise UserError(f"{source} has the key {name} beside its token rows, which means nothing here; nearest known: {nearest(name, known)}")
        key = known[name]
        if tensor.ndim != 2 or not tensor.numel():
            raise UserError(f"{name} in {source} has shape {list(tensor.shape)}, expected token rows [n, d]")
        if layout and key not in layout.encoders.values():
            raise UserError(f"{source} has token rows for {key}; this model's encoders are {', '.join(layout.encoders.values()) or 'none'}")
        if not torch.equal(rows.setdefault(key, tensor), tensor):
            raise UserError(f"{source} has different rows under {' and '.join(KEYS[key])}, expected the same")
    count = next(iter(rows.values())).shape[0]
    tokens = names(metadata, tuple(f"<s{i}>" for i in range(count)), source)
    for key, tensor in rows.items():
        if tensor.shape[0] != len(tokens):
            raise UserError(f"{source} has {tensor.shape[0]} rows of {key} for {len(tokens)} tokens ({', '.join(tokens)}); expected one each")
    return AdapterState(tokens=rows, token_names=tokens, metadata=dict(metadata))


def write(state: AdapterState, layout: Layout | None, title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header entries. Raises UserError for an encoder without a key, ValueError for rows and names that differ in number."""
    tensors: dict[str, Tensor] = {}
    for key, rows in state.tokens.items():
        if key not in KEYS:
            raise UserError(f"token rows of {key} have no place in an embedding file; the encoders are {', '.join(KEYS)}")
        if rows.ndim != 2 or rows.shape[0] != len(state.token_names):
            raise ValueError(f"{key} has rows {list(rows.shape)} for the {len(state.token_names)} tokens {state.token_names}; expected [n, d]")
        tensors |= dict.fromkeys(KEYS[key], rows)
    return tensors, {}


def _json(metadata: Mapping[str, str], key: str, default: Any, source: str) -> Any:
    try:
        return json.loads(metadata[key]) if key in metadata else default
    except json.JSONDecodeError as error:
        raise UserError(f"the header entry {key} of {source} is not JSON ({error}); mend or remove it") from None
