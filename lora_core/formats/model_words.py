"""The placeholder words of a model folder, whose learned tokens are in its tokenizers.

They are in a file of their own, {"placeholders": {"TOK": ["<s0>", "<s1>"]}}, which other programs
do not read: they draw with the tokens' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.embeddings import PLACEHOLDERS, placeholder_words
from lora_core.json_files import read_object
from lora_core.placeholders import Placeholder

WORDS_FILE = "learned_words.json"


def write_model_words(folder: Path, words: Mapping[str, Sequence[str]]) -> None:
    """Adds words, each with its tokens, to those of a model folder."""
    own = {placeholder.word: placeholder.names for placeholder in model_placeholders(folder)}
    table = {word: list(names) for word, names in (own | dict(words)).items()}
    if table:
        text = json.dumps({PLACEHOLDERS: table}, indent=1, ensure_ascii=False)
        (folder / WORDS_FILE).write_text(text + "\n", encoding="utf-8")


def model_placeholders(model: str | Path) -> tuple[Placeholder, ...]:
    """The words of a model folder, with their tokens; none of another model.

    Raises UserError for a file that is not what `write_model_words` writes.
    """
    file = Path(model) / WORDS_FILE
    if not file.is_file():
        return ()
    entry = read_object(file, "write the model again, or remove the file").get(PLACEHOLDERS, {})
    names: dict[str, None] = {}
    for tokens in entry.values() if isinstance(entry, dict) else ():
        names |= dict.fromkeys(map(str, tokens if isinstance(tokens, list) else ()))
    state = AdapterState(token_names=tuple(names), metadata={PLACEHOLDERS: json.dumps(entry)})
    words = placeholder_words(state, str(file)) if names else {}
    return tuple(Placeholder(word, tokens) for word, tokens in words.items())
