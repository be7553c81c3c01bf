"""Token rows: one tensor [n, d] per text encoder under `clip_l`, `clip_g`, `t5` (diffusers' pivotal scripts, A1111, ComfyUI, kohya).

Also read: a single tensor for one encoder, `emb_params` (kohya, A1111) or under its token (diffusers' learned_embeds), A1111's `.pt` dictionaries,
cog's `text_encoders_0/1`, and rows bundled in a LoRA file. Which encoder a single tensor is for is told by its width.
Readers elsewhere know the rows by the file's name or by tokens given by hand; ours finds the tokens' names and the placeholder words in the header.
Where a file has a word for its rows (its own name, in A1111), that is a placeholder word, "dog" for the tokens <dog>, <dog>_1 ...
"""

from __future__ import annotations

import io
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
from lora_core.formats.layout import Layout, nearest_name
from lora_core.formats.pickles import read_pickle
from lora_core.formats.unpickler import Inert
from lora_core.runs.run_folder import atomic_write

KEYS = {
    "clip_l": ("clip_l",),
    "clip_g": ("clip_g",),
    "t5": ("t5", "t5xxl"),
}  # encoder -> spellings, all of them written; ComfyUI looks for t5xxl
COG = {
    "text_encoders_0": "clip_l",
    "text_encoders_1": "clip_g",
}  # cog-sdxl's spellings, which are only read
SPELLINGS = {spelling: key for key, own in KEYS.items() for spelling in own} | COG
WIDTHS = {
    768: "clip_l",
    1024: "clip_l",
    1280: "clip_g",
    4096: "t5",
}  # of rows, where no layout tells; 1024 is the one encoder of its models
SINGLE = "emb_params"  # a file's only tensor, for its only encoder
PARAM = "string_to_param"  # A1111's dictionary of such tensors
BUNDLE = re.compile(
    rf"bundle_emb\.(.+?)\.({PARAM}\.[^.]*|[^.]+)"
)  # rows inside of a LoRA file: name, key
TOKEN = re.compile(r"<.+>|[^.:]+")  # a key that may be a token; keys of weights have dots
LAYERWISE = re.compile(r"(IN|OUT)\d\d|MID")  # kohya's XTI: rows by block of the network
TOKEN_NAMES = "token_names"  # header entry: JSON list of the tokens in row order
PLACEHOLDERS = "placeholders"  # header entry: JSON object, placeholder word -> its tokens
LAYERWISE_REFUSAL = "per-layer token rows (P+), one for each cross-attention layer, which are not read; train plain rows, one for all layers"


class WordRows(NamedTuple):
    """The rows of one word."""

    word: str
    rows: dict[str, Tensor]  # encoder -> [n, d]


def placeholder_header(words: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The header entry that tells which tokens stand for a word in prompts: {"TOK": ("<s0>", "<s1>")}."""
    return (
        {
            PLACEHOLDERS: json.dumps(
                {word: list(names) for word, names in words.items()}, ensure_ascii=False
            )
        }
        if words
        else {}
    )


def placeholder_words(state: AdapterState, source: str = "the file") -> dict[str, tuple[str, ...]]:
    """Placeholder word -> tokens; none where the state has no rows. Raises UserError for a broken entry or one with unknown tokens."""
    if not state.token_names:
        return {}
    entry = _header_json(state.metadata, PLACEHOLDERS, {}, source)
    if not isinstance(entry, dict) or not all(
        isinstance(n, list) and n and set(map(str, n)) <= set(state.token_names)
        for n in entry.values()
    ):
        raise UserError(
            f"the header entry {PLACEHOLDERS} of {source} is {entry}, expected words and their tokens out of {list(state.token_names)}"
        )
    return {word: tuple(names) for word, names in entry.items()}


def token_names(
    metadata: Mapping[str, str], default: Sequence[str], source: str
) -> tuple[str, ...]:
    """The tokens' names in row order, `default` where the header has none. Raises UserError for anything but different names."""
    entry = _header_json(metadata, TOKEN_NAMES, list(default), source)
    if (
        not isinstance(entry, list)
        or not entry
        or not all(isinstance(n, str) and n for n in entry)
        or len(set(entry)) != len(entry)
    ):
        raise UserError(
            f"the header entry {TOKEN_NAMES} of {source} is {entry}, expected a list of different names"
        )
    return tuple(entry)


# ---------------------------------------------------------------- reading


def detect_embeddings(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is an encoder's, or all may be tokens: ask other formats first."""
    return any(key in SPELLINGS or key == SINGLE for key in tensors) or all(
        TOKEN.fullmatch(key) and tensor.ndim in (1, 2) and tensor.numel() > 1
        for key, tensor in tensors.items()
    )


def read_embeddings(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layout: Layout | None, source: str
) -> AdapterState:
    """Token rows and names, for every kind of .safetensors there is. Raises UserError.

    A pair of encoders without names in the header has those of diffusers' scripts, <s0>, <s1> ...; a single tensor those of its word, which is the
    token it stands under, or the file's name. A layout says which encoders exist; widths of a pair are checked where the rows are installed.
    """
    if any(key in SPELLINGS for key in tensors):
        rows = _rows_by_encoder(tensors, layout, source)
        count = next(iter(rows.values())).shape[0]
        return _token_state(
            rows,
            token_names(metadata, tuple(f"<s{i}>" for i in range(count)), source),
            metadata,
            source,
        )
    if SINGLE in tensors:
        for key in tensors:
            if key != SINGLE:
                raise UserError(
                    f"{source} is a textual-inversion embedding with the key {key} beside {SINGLE}, which means nothing here"
                )
        return _state_of_words(
            [_rows_of_tensor(Path(source).stem, tensors[SINGLE], layout, source)], metadata, source
        )
    rows = check_token_rows(tensors, source)
    order = token_names(metadata, sorted(rows), source)
    order = order if set(order) == set(rows) else tuple(sorted(rows))
    return _state_of_words(
        [_rows_of_tensor(token, rows[token], layout, source) for token in order],
        metadata,
        source,
        named=True,
    )


def read_pickled_embeddings(path: str | Path, layout: Layout | None = None) -> AdapterState:
    """The rows in a .pt, .bin or .pti file of torch.save: A1111's dictionary, {token: row or rows}, or encoders' keys. Nothing in it is executed.

    Raises UserError for anything else.
    """
    data, source = read_pickle(path), str(path)
    if not isinstance(data, dict):
        raise UserError(
            f"{source} holds a {type(data).__name__}, no embedding; expected a dictionary of token rows"
        )
    _refuse_layerwise(data, source)
    metadata = {
        key: json.dumps(data[key], ensure_ascii=False)
        for key in (TOKEN_NAMES, PLACEHOLDERS)
        if isinstance(data.get(key), list | dict)
    }
    if PARAM in data:
        name = data.get("name")
        word = name if isinstance(name, str) and name.strip() else Path(source).stem
        entry = _rows_of_tensor(word.strip(), _a1111_parameter(data[PARAM], source), layout, source)
        check_finite(entry.rows, source)
        return _state_of_words([entry], metadata, source)
    tensors = check_token_rows(
        {key: value for key, value in data.items() if key not in metadata}, source
    )
    return read_embeddings(tensors, metadata, layout, source)


def is_pickled_embedding(data: Any) -> bool:
    """Whether what `read_pickle` found is a dictionary of token rows."""
    if not isinstance(data, dict) or not data:
        return False
    return PARAM in data or all(
        isinstance(t, Tensor) and t.ndim < 3 and "." not in str(k) for k, t in data.items()
    )


def check_token_rows(data: Any, source: str) -> dict[str, Tensor]:
    """{token: row or rows} as it is, once it is sure to be that. Raises UserError for other values and keys, NaN, Inf, and rows per layer."""
    if not isinstance(data, Mapping) or not data:
        raise UserError(f"{source} holds no token rows; expected a dictionary {{token: row}}")
    _refuse_layerwise(data, source)
    for key, value in data.items():
        if (
            not isinstance(key, str)
            or not key
            or not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.ndim not in (1, 2)
        ):
            what = (
                f"shape {list(value.shape)} and {value.dtype}"
                if isinstance(value, Tensor)
                else f"type {type(value).__name__}"
            )
            raise UserError(
                f"{key!r:.80} in {source} has {what}; expected an embedding, floating-point token rows [d] or [n, d]"
            )
    check_finite(data, source)
    return dict(data)


def split_bundled_tokens(
    tensors: Mapping[str, Tensor], layout: Layout | None, source: str
) -> tuple[dict[str, Tensor], AdapterState | None]:
    """(a LoRA file's tensors without the rows that are bundled with it, those rows); None where there are none. Words are the bundles' names.

    Keys are `bundle_emb.NAME.KEY`, as A1111 and ComfyUI read them: KEY is an encoder's, emb_params or string_to_param.*. The rows' metadata has
    their names and words, which replace those of the file's header. Raises UserError.
    """
    rest, bundles = {}, dict[str, dict[str, Tensor]]()
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
        if any(key in SPELLINGS for key in own):
            entries.append(WordRows(word, _rows_by_encoder(own, layout, where)))
        elif len(own) > 1:
            raise UserError(
                f"{where} has {len(own)} tensors ({', '.join(own)}), expected one, or one for each encoder"
            )
        else:
            entries.append(_rows_of_tensor(word, next(iter(own.values())), layout, where))
    return rest, _state_of_words(entries, {PLACEHOLDERS: "{}"}, source, named=True)


# ---------------------------------------------------------------- writing


def write_embeddings(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header entries. Raises UserError for an encoder without a key, ValueError for rows and names that differ in number."""
    tensors: dict[str, Tensor] = {}
    for key, rows in state.tokens.items():
        if key not in KEYS:
            raise UserError(
                f"token rows of {key} have no place in an embedding file; the encoders are {', '.join(KEYS)}"
            )
        if rows.ndim != 2 or rows.shape[0] != len(state.token_names):
            raise ValueError(
                f"{key} has rows {list(rows.shape)} for the {len(state.token_names)} tokens {state.token_names}; expected [n, d]"
            )
        tensors |= dict.fromkeys(KEYS[key], rows)
    return tensors, {}


def write_a1111(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One tensor `emb_params` [n, d], whose word is the file's name: A1111, ComfyUI, kohya. Raises UserError for several encoders or words."""
    return {SINGLE: _only_word(state, title)[1]}, {}


def write_textual_inversion(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """diffusers' learned_embeds: one tensor [n, d] under its word, which is the title where the state has several tokens and no word for them.

    Raises UserError for several encoders or words.
    """
    word, rows = _only_word(state, title)
    return {word: rows}, {}


def write_pickled_embedding(
    state: AdapterState, path: str | Path, layout: Layout | None = None
) -> None:
    """A1111's older dictionary, as torch.save writes it, with the tokens' names beside its own keys; atomic. Raises UserError as `write_a1111`."""
    path = Path(path)
    rows = _only_word(state, path.stem)[1].detach().cpu().contiguous().clone()
    check_finite({SINGLE: rows}, f"what should become {path}")
    content = {
        "string_to_token": {"*": 265},
        PARAM: {"*": rows},
        "name": path.stem,
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    buffer = io.BytesIO()
    torch.save(
        content
        | {TOKEN_NAMES: list(state.token_names)}
        | {PLACEHOLDERS: {word: list(own) for word, own in placeholder_words(state).items()}},
        buffer,
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _only_word(state: AdapterState, title: str) -> tuple[str, Tensor]:
    """(word, rows [n, d]) of a state that can go into a file of one word for one encoder."""
    if len(state.tokens) != 1:
        has = " and ".join(state.tokens) or "no encoder"
        raise UserError(
            f"{title} would hold rows of {has}, such a file has those of one; write the format embeddings"
        )
    spoken = placeholder_words(state)
    free = [name for name in state.token_names if not any(name in own for own in spoken.values())]
    if len(spoken) > 1 or (spoken and free):
        raise UserError(
            f"{title} would hold the words {', '.join([*spoken, *free])}, such a file has one; write one file each"
        )
    word = next(iter(spoken), state.token_names[0] if len(state.token_names) == 1 else title)
    return word, next(iter(state.tokens.values()))


# ---------------------------------------------------------------- what the pieces mean


def _rows_by_encoder(
    tensors: Mapping[str, Tensor], layout: Layout | None, source: str
) -> dict[str, Tensor]:
    """Encoder -> rows [n, d]."""
    rows: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in SPELLINGS:
            raise UserError(
                f"{source} has the key {name} beside its token rows, which means nothing here; nearest known: {nearest_name(name, SPELLINGS)}"
            )
        key = SPELLINGS[name]
        if tensor.ndim != 2 or not tensor.numel():
            raise UserError(
                f"{name} in {source} has shape {list(tensor.shape)}, expected token rows [n, d]"
            )
        if layout and key not in layout.encoders.values():
            raise UserError(
                f"{source} has token rows for {key}; this model's encoders are {', '.join(layout.encoders.values()) or 'none'}"
            )
        if not torch.equal(rows.setdefault(key, tensor), tensor):
            raise UserError(
                f"{source} has different rows under {' and '.join(sorted(n for n in tensors if SPELLINGS.get(n) == key))}, expected the same"
            )
    return rows


def _rows_of_tensor(word: str, tensor: Tensor, layout: Layout | None, source: str) -> WordRows:
    """The rows of a tensor [d] or [n, d] for the encoder of that width."""
    if tensor.ndim not in (1, 2) or not tensor.numel():
        raise UserError(
            f"the embedding in {source} has shape {list(tensor.shape)}, expected token rows [d] or [n, d]"
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
        what = (
            f"may be for {' or '.join(found)}"
            if found
            else f"fit no encoder, their widths are {known}"
        )
        raise UserError(
            f"the rows of the embedding in {source} have width {width} and {what}; name the encoder as clip_l, clip_g or t5 in the file"
        )
    return WordRows(word, {found[0]: tensor.reshape(-1, width)})


def _state_of_words(
    entries: Iterable[WordRows], metadata: Mapping[str, str], source: str, *, named: bool = False
) -> AdapterState:
    """The rows one after the other, with the header's names, or with names made of the words and the words as placeholders.

    With `named` the file itself says the words, and the names go into the metadata as if its header had them.
    """
    entries = list(entries)
    kinds = {
        tuple(sorted((key, rows.shape[1]) for key, rows in entry.rows.items())) for entry in entries
    }
    if len(kinds) > 1:
        listed = " and for ".join(", ".join(key for key, _ in kind) for kind in sorted(kinds))
        raise UserError(
            f"{source} has rows for {listed}; expected all its words for the same encoders"
        )
    made, spoken = [], {}
    for word, rows in entries:
        own = _name_tokens(word, len(next(iter(rows.values()))))
        made += own
        if own != [word]:
            spoken[word] = own
    rows = {key: torch.cat([entry.rows[key] for entry in entries]) for key in entries[0].rows}
    found = token_names(metadata, made, source)
    if TOKEN_NAMES not in metadata:
        metadata = (
            dict(metadata)
            | placeholder_header(spoken)
            | ({TOKEN_NAMES: json.dumps(found, ensure_ascii=False)} if named else {})
        )
    return _token_state(rows, found, metadata, source)


def _name_tokens(word: str, count: int) -> list[str]:
    """Tokens for a word: "<dog>", "<dog>_1" ... (diffusers' numbers). The brackets keep an English word's own token apart."""
    first = word if re.fullmatch(r"<.+>", word) else f"<{'-'.join(word.split())}>"
    return [first, *(f"{first}_{i}" for i in range(1, count))]


def _token_state(
    rows: Mapping[str, Tensor], tokens: tuple[str, ...], metadata: Mapping[str, str], source: str
) -> AdapterState:
    for key, tensor in rows.items():
        if tensor.shape[0] != len(tokens):
            raise UserError(
                f"{source} has {tensor.shape[0]} rows of {key} for {len(tokens)} tokens ({', '.join(tokens)}); expected one each"
            )
    return AdapterState(tokens=dict(rows), token_names=tokens, metadata=dict(metadata))


def _a1111_parameter(value: Any, source: str) -> Tensor:
    """The one tensor in A1111's dictionary, which may have been a torch ParameterDict."""
    if isinstance(value, Inert):
        value = value.state.get("_parameters") if isinstance(value.state, dict) else None
    tensors = list(value.values()) if isinstance(value, dict) else []
    if (
        len(tensors) != 1
        or not isinstance(tensors[0], Tensor)
        or not tensors[0].is_floating_point()
    ):
        raise UserError(
            f"{PARAM} of {source} holds {len(tensors)} entries, expected one with floating-point token rows; is it damaged?"
        )
    return tensors[0]


def _refuse_layerwise(data: Mapping[Any, Any], source: str) -> None:
    if data and all(isinstance(key, str) and LAYERWISE.fullmatch(key) for key in data):
        raise UserError(f"{source} has {LAYERWISE_REFUSAL}")


def _header_json(metadata: Mapping[str, str], key: str, default: Any, source: str) -> Any:
    try:
        return json.loads(metadata[key]) if key in metadata else default
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the header entry {key} of {source} is not JSON ({error}); mend or remove it"
        ) from None
