"""Token rows (see embeddings.py) in files of torch.save: A1111's `.pt`, and `.bin` and `.pti`.

Nothing in the files is executed, and files are written with plain dictionaries and tensors, which
torch.load(weights_only=True) and A1111's own check of pickles accept.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.formats.container import check_finite
from lora_core.formats.embeddings import (
    A1111_ROWS,
    PLACEHOLDERS,
    TOKEN_NAMES,
    check_token_rows,
    only_word,
    placeholder_words,
    read_embeddings,
    rows_of_tensor,
    state_of_words,
)
from lora_core.formats.known_formats import SINGLE
from lora_core.formats.layout import Layout
from lora_core.formats.pickles import own_storage, read_pickle
from lora_core.formats.unpickler import Inert
from lora_core.formats.xti import is_xti, read_xti
from lora_core.text import shorten_value


def is_pickled_embedding(data: Any) -> bool:
    """Whether the result of `read_pickle` is a dictionary of token rows."""
    if not isinstance(data, dict) or not data:
        return False
    if A1111_ROWS in data:
        return True
    values = all(isinstance(t, Tensor) and t.ndim < 3 for t in data.values())
    return values and not any("." in key for key in data if isinstance(key, str))


def read_pickled_embeddings(path: str | Path, layout: Layout | None = None) -> AdapterState:
    """The token rows of a file: A1111's dictionary, {token: row or rows}, or {encoder: rows}.

    Raises UserError for anything else.
    """
    data = read_pickle(path)
    source = str(path)
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise UserError(
            f"{source} holds a {kind}, no embedding; expected a dictionary of token rows"
        )
    if is_xti(data):
        return read_xti(data, layout, source)
    metadata = {}
    for key in (TOKEN_NAMES, PLACEHOLDERS):
        if isinstance(data.get(key), list | dict):
            metadata[key] = json.dumps(_check_names(data[key], key, source), ensure_ascii=False)
    if A1111_ROWS in data:
        name = data.get("name")
        own = name.strip() if isinstance(name, str) else ""
        word = own or Path(source).stem.strip()
        entry = rows_of_tensor(word, _a1111_parameter(data[A1111_ROWS], source), layout, source)
        check_finite(entry.rows, source)
        return state_of_words([entry], metadata, source)
    rest = {key: value for key, value in data.items() if key not in metadata}
    return read_embeddings(check_token_rows(rest, source), metadata, layout, source)


def write_pickled_embedding(
    state: AdapterState, path: str | Path, layout: Layout | None = None
) -> None:
    """Writes A1111's older dictionary with torch.save, with the tokens' names; atomic.

    Raises UserError as `write_a1111`.
    """
    path = Path(path)
    rows = _own_rows(only_word(state, path.stem)[1], path)
    content = {
        "string_to_token": {"*": 265},
        A1111_ROWS: {"*": rows},
        "name": path.stem,
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        TOKEN_NAMES: list(state.token_names),
        PLACEHOLDERS: {word: list(own) for word, own in placeholder_words(state).items()},
    }
    _save_pickle(content, path)


def write_learned_embeds(state: AdapterState, path: str | Path) -> None:
    """Writes diffusers' learned_embeds.bin, {word: [n, d], or [d] of one token}; atomic.

    A1111 takes it as an embedding too. Raises UserError as `write_textual_inversion`.
    """
    path = Path(path)
    word, rows = only_word(state, path.stem)
    own = _own_rows(rows, path)
    _save_pickle({word: own[0].clone() if len(own) == 1 else own}, path)


def _own_rows(rows: Tensor, path: Path) -> Tensor:
    """A copy on the CPU with a storage of its own. Raises UserError for NaN and Inf."""
    own = own_storage(rows)
    check_finite({SINGLE: own}, f"what should become {path}")
    return own


def _save_pickle(content: Any, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _check_names(value: Any, key: str, source: str) -> Any:
    """`value`, a list of texts or a dictionary of such lists.

    Raises UserError for anything else: lists of a pickle may hold one another.
    """
    lists = list(value.values()) if isinstance(value, dict) else [value]
    for names in lists:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{key} of {source} is {shorten_value(value)}, expected names")
    return value


def _a1111_parameter(value: Any, source: str) -> Tensor:
    """The one tensor in A1111's dictionary, which may have been a torch ParameterDict."""
    if isinstance(value, Inert):
        value = value.state.get("_parameters") if isinstance(value.state, dict) else None
    tensors = list(value.values()) if isinstance(value, dict) else []
    is_single = len(tensors) == 1 and isinstance(tensors[0], Tensor)
    if not is_single or not tensors[0].is_floating_point():
        raise UserError(
            f"{A1111_ROWS} of {source} holds {len(tensors)} entries, "
            "expected one with floating-point token rows; is it damaged?"
        )
    return tensors[0]
