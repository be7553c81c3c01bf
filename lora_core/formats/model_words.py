"""The placeholder words of a model folder, whose learned tokens are in its tokenizers.

They are in a file of their own, with the header entries of token files, {"placeholders": {"TOK":
["<s0>", "<s1>"]}}. Other programs do not read it: they draw with the tokens' names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.embeddings import (
    LAYERS,
    PLACEHOLDERS,
    placeholder_header,
    placeholder_words,
    word_layers,
)
from lora_core.json_files import read_object
from lora_core.placeholders import Placeholder

WORDS_FILE = "learned_words.json"


def write_model_words(folder: Path, words: Sequence[Placeholder]) -> None:
    """Adds words with their tokens to those of a model folder."""
    known = {own.word: own for own in (*model_placeholders(folder), *words)}
    if not known:
        return
    names = {word: own.names for word, own in known.items()}
    header = placeholder_header(names, {word: own.layers for word, own in known.items()})
    table = {entry: json.loads(text) for entry, text in header.items()}
    text = json.dumps(table, indent=1, ensure_ascii=False)
    (folder / WORDS_FILE).write_text(text + "\n", encoding="utf-8")


def model_placeholders(model: str | Path) -> tuple[Placeholder, ...]:
    """The words of a model folder, with their tokens; none of another model.

    Raises UserError for a file that is not what `write_model_words` writes.
    """
    file = Path(model) / WORDS_FILE
    if not file.is_file():
        return ()
    table = read_object(file, "write the model again, or remove the file")
    header = {name: json.dumps(table[name]) for name in (PLACEHOLDERS, LAYERS) if name in table}
    entry = table.get(PLACEHOLDERS)
    names: dict[str, None] = {"": None}  # the file has no list of tokens to compare with
    lists = entry.values() if isinstance(entry, dict) else ()
    for tokens in lists:
        names |= dict.fromkeys(map(str, tokens if isinstance(tokens, list) else ()))
    state = AdapterState(token_names=tuple(names), metadata=header)
    words, layers = placeholder_words(state, str(file)), word_layers(state, str(file))
    return tuple(
        Placeholder(word, tokens, layers=layers.get(word, 0)) for word, tokens in words.items()
    )
