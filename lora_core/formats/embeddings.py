"""Token rows, the learned embeddings of new tokens: a tensor [n, d] for each text encoder.

Its key is `clip_l`, `clip_g` or `t5`, as in diffusers' pivotal scripts, A1111, ComfyUI and kohya.
Also read: a single tensor for one encoder, `emb_params` (kohya, A1111) or under its token
(diffusers' learned_embeds), A1111's `.pt` dictionaries (embedding_pickles.py), kohya's rows for
each layer (xti.py), cog's `text_encoders_0/1`, and rows bundled in a LoRA file. The encoder of a
single tensor is known by its width.

Other readers name the tokens after the file or let the user name them; ours finds the tokens' names
and the placeholder words in the header. A file with one word for its rows (in A1111 the file's
name) makes that word a placeholder word: "dog" for the tokens <dog>, <dog>_1 ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.container import check_finite
from lora_core.formats.grammar import STRICT, DecodeOptions
from lora_core.formats.known_formats import (
    ENCODER_KEYS,
    ENCODER_SPELLINGS,
    SINGLE,
    TOKEN_NAMES,
    import_function,
)
from lora_core.formats.layout import Layout, nearest_name
from lora_core.text import parse_json, shorten_value

# Width of rows -> encoder, used without a layout; models with width 1024 have one encoder.
WIDTHS = {768: "clip_l", 1024: "clip_l", 1280: "clip_g", 4096: "t5"}
A1111_ROWS = "string_to_param"  # A1111's dictionary of such tensors
# Rows inside of a LoRA file: name, key.
BUNDLE = re.compile(rf"bundle_emb\.(.+?)\.({A1111_ROWS}\.[^.]*|[^.]+)")
PLACEHOLDERS = "placeholders"  # header entry: JSON object, placeholder word -> its tokens
# Header entry: JSON object, placeholder word -> number of cross-attention layers that its tokens
# are for; a word with the same tokens for all layers is not in it.
LAYERS = "placeholder_layers"


class WordRows(NamedTuple):
    """The rows of one word."""

    word: str
    rows: dict[str, Tensor]  # encoder -> [n, d]


def placeholder_header(
    words: Mapping[str, Sequence[str]], layers: Mapping[str, int] | None = None
) -> dict[str, str]:
    """The header entries for placeholder words and their tokens: {"TOK": ("<s0>", "<s1>")}.

    `layers`: word -> number of cross-attention layers, of words with tokens for each layer, listed
    layer by layer (P+, arXiv 2303.09522).
    """
    if not words:
        return {}
    listed = {word: list(names) for word, names in words.items()}
    header = {PLACEHOLDERS: json.dumps(listed, ensure_ascii=False)}
    own = {word: count for word, count in (layers or {}).items() if count}
    return header | ({LAYERS: json.dumps(own, ensure_ascii=False)} if own else {})


def placeholder_words(state: AdapterState, source: str = "the file") -> dict[str, tuple[str, ...]]:
    """Placeholder word -> tokens; none where the state has no rows.

    Raises UserError for a broken entry or one with unknown tokens.
    """
    if not state.token_names:
        return {}
    known = set(state.token_names)
    entry = _header_json(state.metadata, PLACEHOLDERS, {}, source)
    lists: Iterable[Any] = entry.values() if isinstance(entry, dict) else [None]
    if not all(_are_texts(own) and set(own) <= known for own in lists):
        raise UserError(
            f"the header entry {PLACEHOLDERS} of {source} is {shorten_value(entry)}, "
            f"expected words and their tokens out of {list(state.token_names)}"
        )
    return {word: tuple(names) for word, names in entry.items()}


def word_layers(state: AdapterState, source: str = "the file") -> dict[str, int]:
    """Placeholder word -> number of layers, of the words that have tokens for each layer.

    Raises UserError for a broken entry, and for numbers that do not divide a word's tokens.
    """
    words = placeholder_words(state, source)
    entry = _header_json(state.metadata, LAYERS, {}, source) if words else {}
    fits = isinstance(entry, dict) and all(
        type(count) is int and count > 0 and word in words and len(words[word]) % count == 0
        for word, count in entry.items()
    )
    if not fits:
        raise UserError(
            f"the header entry {LAYERS} of {source} is {shorten_value(entry)}, expected words of "
            f"{PLACEHOLDERS} and a number of layers that divides the number of their tokens"
        )
    return dict(entry)


def token_names(
    metadata: Mapping[str, str], default: Sequence[str], source: str
) -> tuple[str, ...]:
    """The tokens' names in row order, `default` where the header has none.

    Raises UserError for anything but different names.
    """
    entry = _header_json(metadata, TOKEN_NAMES, list(default), source)
    if not _are_texts(entry) or len(set(entry)) != len(entry):
        raise UserError(
            f"the header entry {TOKEN_NAMES} of {source} is {shorten_value(entry)}, "
            "expected a list of different names"
        )
    return tuple(entry)


# ---------------------------------------------------------------- reading


def read_embeddings(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions = STRICT,
) -> AdapterState:
    """Token rows and token names of a .safetensors file of any known kind. Raises UserError.

    Without names in the header, the tokens of a pair of encoders are named as in diffusers'
    scripts, <s0>, <s1> ...; those of a single tensor after its word, which is its key or the file's
    name. The layout decides which encoders exist; widths of a pair are checked where the rows are
    installed.
    """
    if any(key in ENCODER_SPELLINGS for key in tensors):
        rows = _rows_by_encoder(tensors, layout, source)
        count = next(iter(rows.values())).shape[0]
        names = token_names(metadata, [f"<s{i}>" for i in range(count)], source)
        return _token_state(rows, names, metadata, source)
    if SINGLE in tensors:
        for key in tensors:
            if key != SINGLE:
                raise UserError(
                    f"{source} is a textual-inversion embedding with the key {key} "
                    f"in addition to {SINGLE}, which means nothing here"
                )
        entry = rows_of_tensor(Path(source).stem, tensors[SINGLE], layout, source)
        return state_of_words([entry], metadata, source)
    if import_function("xti", "is_xti")(tensors):
        return import_function("xti", "read_xti")(tensors, layout, source)
    rows = check_token_rows(tensors, source)
    order = token_names(metadata, sorted(rows), source)
    if set(order) != set(rows):
        order = tuple(sorted(rows))
    entries = [rows_of_tensor(token, rows[token], layout, source) for token in order]
    return state_of_words(entries, metadata, source, named=True)


def check_token_rows(data: Any, source: str) -> dict[str, Tensor]:
    """`data` unchanged, checked to be {token: row [d] or rows [n, d]}.

    Raises UserError for other values and keys, NaN and Inf.
    """
    if not isinstance(data, Mapping) or not data:
        raise UserError(f"{source} holds no token rows; expected a dictionary {{token: row}}")
    for key, value in data.items():
        is_rows = isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (1, 2)
        if not isinstance(key, str) or not key or not is_rows:
            what = f"type {type(value).__name__}"
            if isinstance(value, Tensor):
                what = f"shape {list(value.shape)} and {value.dtype}"
            raise UserError(
                f"{shorten_value(key)} in {source} has {what}; "
                "expected an embedding, floating-point token rows [d] or [n, d]"
            )
    check_finite(data, source)
    return dict(data)


def split_bundled_tokens(
    tensors: Mapping[str, Tensor], layout: Layout | None, source: str
) -> tuple[dict[str, Tensor], AdapterState | None]:
    """(a LoRA file's tensors without the rows bundled with it, those rows or None).

    Keys are `bundle_emb.NAME.KEY`, as A1111 and ComfyUI read them: NAME is the placeholder word,
    KEY an encoder's key, emb_params or string_to_param.*. The rows' metadata has their tokens and
    words, which replace those of the file's header. Raises UserError.
    """
    rest: dict[str, Tensor] = {}
    bundles: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := BUNDLE.fullmatch(key):
            bundles.setdefault(found[1], {})[found[2]] = tensor
        else:
            rest[key] = tensor
    if not bundles:
        return rest, None
    entries = []
    for word, own in sorted(bundles.items()):
        where = f"the bundle {word} in {source}"
        if any(key in ENCODER_SPELLINGS for key in own):
            entries.append(WordRows(word, _rows_by_encoder(own, layout, where)))
        elif len(own) > 1:
            raise UserError(
                f"{where} has {len(own)} tensors ({', '.join(own)}), "
                "expected one, or one for each encoder"
            )
        else:
            entries.append(rows_of_tensor(word, next(iter(own.values())), layout, where))
    return rest, state_of_words(entries, {PLACEHOLDERS: "{}"}, source, named=True)


# ---------------------------------------------------------------- writing


def write_embeddings(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header entries.

    Raises UserError for an encoder without a key, ValueError for rows and names that differ in
    number.
    """
    tensors: dict[str, Tensor] = {}
    for key, rows in state.tokens.items():
        if key not in ENCODER_KEYS:
            raise UserError(
                f"token rows of {key} have no place in an embedding file; "
                f"the encoders are {', '.join(ENCODER_KEYS)}"
            )
        count = len(state.token_names)
        if rows.ndim != 2 or rows.shape[0] != count:
            raise ValueError(
                f"{key} has rows {list(rows.shape)} for the {count} tokens {state.token_names}; "
                "expected [n, d]"
            )
        tensors |= dict.fromkeys(ENCODER_KEYS[key], rows)
    return tensors, {}


def write_a1111(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensor `emb_params` [n, d] of A1111, ComfyUI and kohya; its word is the file's name.

    Raises UserError for several encoders or words.
    """
    return {SINGLE: only_word(state, title)[1]}, {}


def write_textual_inversion(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """diffusers' learned_embeds: one tensor [n, d] under its word, or [d] of a single token.

    InvokeAI takes the first size for the width, so that it reads [d] only. The word is the title
    where the state has several tokens and no word for them. Raises UserError for several encoders
    or words.
    """
    word, rows = only_word(state, title)
    return {word: rows[0] if len(rows) == 1 else rows}, {}


def only_word(state: AdapterState, title: str) -> tuple[str, Tensor]:
    """(word, rows [n, d]) for a file that holds one word for one encoder. Raises UserError."""
    if len(state.tokens) != 1:
        has = " and ".join(state.tokens) or "no encoder"
        raise UserError(
            f"{title} would hold rows of {has}, such a file has those of one; "
            "write the format embeddings"
        )
    words = placeholder_words(state)
    refuse_layer_words(state, f"{title}, an embedding of one word,")
    covered = set().union(*words.values())
    free = [name for name in state.token_names if name not in covered]
    if len(words) > 1 or (words and free):
        raise UserError(
            f"{title} would hold the words {', '.join([*words, *free])}, such a file has one; "
            "write one file each"
        )
    default = state.token_names[0] if len(state.token_names) == 1 else title
    return next(iter(words), default), next(iter(state.tokens.values()))


def refuse_layer_words(state: AdapterState, place: str) -> None:
    """Raises UserError for words with tokens for each layer, which `place` cannot hold."""
    for word, count in word_layers(state).items():
        raise UserError(
            f"{place} has no place for the word {word}, whose tokens are for {count} layers (P+); "
            "write the format embeddings, or mixofshow (.pth)"
        )


# ---------------------------------------------------------------- tensors, words and names


def _rows_by_encoder(
    tensors: Mapping[str, Tensor], layout: Layout | None, source: str
) -> dict[str, Tensor]:
    """Encoder -> rows [n, d]."""
    rows: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in ENCODER_SPELLINGS:
            raise UserError(
                f"{source} has the key {name} in addition to its token rows, "
                f"which means nothing here; nearest known: {nearest_name(name, ENCODER_SPELLINGS)}"
            )
        key = ENCODER_SPELLINGS[name]
        if tensor.ndim != 2 or not tensor.numel():
            shape = list(tensor.shape)
            raise UserError(f"{name} in {source} has shape {shape}, expected token rows [n, d]")
        if layout and key not in layout.encoders.values():
            known = ", ".join(layout.encoders.values()) or "none"
            raise UserError(f"{source} has token rows for {key}; this model's encoders are {known}")
        if not torch.equal(rows.setdefault(key, tensor), tensor):
            own = sorted(n for n in tensors if ENCODER_SPELLINGS.get(n) == key)
            raise UserError(
                f"{source} has different rows under {' and '.join(own)}, expected the same"
            )
    return rows


def rows_of_tensor(word: str, tensor: Tensor, layout: Layout | None, source: str) -> WordRows:
    """The rows of a tensor [d] or [n, d], for the encoder of that width."""
    if tensor.ndim not in (1, 2) or not tensor.numel():
        raise UserError(
            f"the embedding in {source} has shape {list(tensor.shape)}, "
            "expected token rows [d] or [n, d]"
        )
    width = tensor.shape[-1]
    if layout is None:
        found = [WIDTHS[width]] if width in WIDTHS else []
        known = ", ".join(map(str, WIDTHS))
    else:
        widths = {key: layout.component(name).width for name, key in layout.encoders.items()}
        found = [key for key, own in widths.items() if own in (width, 0)]
        known = ", ".join(f"{own} ({key})" for key, own in widths.items()) or "none"
    if len(found) != 1:
        what = f"fit no encoder, their widths are {known}"
        if found:
            what = f"may be for {' or '.join(found)}"
        raise UserError(
            f"the rows of the embedding in {source} have width {width} and {what}; "
            "name the encoder as clip_l, clip_g or t5 in the file"
        )
    return WordRows(word, {found[0]: tensor.reshape(-1, width)})


def state_of_words(
    entries: Iterable[WordRows], metadata: Mapping[str, str], source: str, *, named: bool = False
) -> AdapterState:
    """The state of several words: their rows stacked, with the token names of the header.

    Without names in the header, tokens are named after the words, which become placeholders. With
    `named` the words come from the file itself, and the names are written into the metadata.
    """
    entries = list(entries)
    encoders = {tuple(sorted((key, t.shape[1]) for key, t in own.rows.items())) for own in entries}
    if len(encoders) > 1:
        listed = [", ".join(key for key, _ in kind) for kind in sorted(encoders)]
        if len(set(listed)) < len(listed):  # of one name and several widths
            listed = [" and ".join(f"{key} [{n}]" for key, n in kind) for kind in sorted(encoders)]
        raise UserError(
            f"{source} has rows for {' and for '.join(listed)}; "
            "expected all its words for the same encoders"
        )
    made: list[str] = []
    words: dict[str, list[str]] = {}
    for word, rows in entries:
        own = _name_tokens(word, len(next(iter(rows.values()))))
        made += own
        if own != [word]:
            words[word] = own
    joined = {key: torch.cat([entry.rows[key] for entry in entries]) for key in entries[0].rows}
    found = token_names(metadata, made, source)
    if TOKEN_NAMES not in metadata:
        metadata = dict(metadata) | placeholder_header(words)
        if named:
            metadata[TOKEN_NAMES] = json.dumps(found, ensure_ascii=False)
    return _token_state(joined, found, metadata, source)


def _name_tokens(word: str, count: int) -> list[str]:
    """Tokens for a word: "<dog>", "<dog>_1" ... (diffusers' numbers).

    The brackets keep an English word's own token apart.
    """
    first = word if re.fullmatch(r"<.+>", word) else f"<{'-'.join(word.split())}>"
    return [first, *(f"{first}_{i}" for i in range(1, count))]


def _token_state(
    rows: Mapping[str, Tensor], tokens: tuple[str, ...], metadata: Mapping[str, str], source: str
) -> AdapterState:
    for key, tensor in rows.items():
        if tensor.shape[0] != len(tokens):
            raise UserError(
                f"{source} has {tensor.shape[0]} rows of {key} for {len(tokens)} tokens "
                f"({', '.join(tokens)}); expected one each"
            )
    return AdapterState(tokens=dict(rows), token_names=tokens, metadata=dict(metadata))


def _are_texts(value: Any) -> bool:
    """Whether it is a list of texts, none of them empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(n, str) and n for n in value)


def _header_json(metadata: Mapping[str, str], key: str, default: Any, source: str) -> Any:
    if key not in metadata:
        return default
    return parse_json(metadata[key], f"the header entry {key} of {source}", "fix or remove it")
