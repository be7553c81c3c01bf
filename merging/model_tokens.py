"""Add tokens to a whole model: rows of its embedding tables, entries of its tokenizers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_core.adapters.patch import TOKENIZERS
from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.escaped_output import print_note
from lora_core.formats import embeddings
from lora_core.formats.layout import Layout
from lora_core.formats.model_folders import Model
from lora_core.formats.model_words import write_model_words
from lora_core.formats.weights import Weights
from lora_core.json_files import read_object
from lora_core.placeholders import Placeholder
from merging.folding import with_embedding_rows
from merging.token_names import free_name
from models.components import load_part

EMBEDDING_TABLES = ("embeddings.token_embedding.weight", "shared.weight")  # CLIP's and T5's keys


@dataclass
class AddedTokens:
    """The new tokens of a model."""

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by text encoder
    words: list[Placeholder] = field(default_factory=list)


def known_tokens(folder: Path, layout: Layout) -> set[str]:
    """The vocabularies of the tokenizers in a model's folder."""
    known: set[str] = set()
    for component in layout.encoders:
        known.update(_open_tokenizer(folder, component).get_vocab())
    return known


def add_token_rows(
    model: Model, folder: Path, tokens: AdapterState, layout: Layout
) -> tuple[dict[str, Weights], AddedTokens]:
    """(the model with rows for new tokens, these tokens).

    `folder` has the tokenizers. Tokens that they have already are renamed, in one printed line.
    Raises UserError for rows that do not fit.
    """
    grown, added = dict(model), AddedTokens()
    names = tokens.token_names
    for component, key in layout.encoders.items():
        if key not in tokens.tokens:
            continue
        tokenizer = _open_tokenizer(folder, component)
        if not added.names:
            names = _rename_known(names, tokenizer)
        tokenizer.add_tokens(list(names))
        ids = tokenizer.convert_tokens_to_ids(list(names))
        rows = dict(zip(ids, tokens.tokens[key]))
        table = _fitting_table(model[component], component, key, tokens.tokens[key].shape[1])
        grown[component] = with_embedding_rows(model[component], table, rows)
        added.names[component] = names
    if added.names:
        print(f"tokens {' '.join(names)} are in the tokenizer and the text encoder of the result")
        renamed = dict(zip(tokens.token_names, names))
        layers = embeddings.word_layers(tokens)
        for word, own in embeddings.placeholder_words(tokens).items():
            here = tuple(renamed[name] for name in own)
            added.words.append(Placeholder(word, here, layers=layers.get(word, 0)))
        if layers:
            print_note(
                f"{', '.join(layers)}: tokens for each layer (P+), which infer.py draws; other "
                "programs that load the model do not know which layer reads which token"
            )
    return grown, added


def write_tokenizers(added: AddedTokens, model: Model, source: Path, folder: Path) -> None:
    """Writes the tokenizers of the folder `source`, with new tokens, into a model's folder.

    The model's configs get the new sizes of the vocabularies; the new words are written too.
    """
    write_model_words(folder, added.words)
    for component, names in added.names.items():
        tokenizer = _open_tokenizer(source, component)
        tokenizer.add_tokens(list(names))
        tokenizer.save_pretrained(folder / TOKENIZERS[component])
        infos = model[component].infos
        size = infos[_embedding_table(model[component])].shape[0]
        edit_json(folder / component / "config.json", vocab_size=size)


def edit_json(path: Path, **changes: object) -> None:
    """Changes entries of a JSON file."""
    table = read_object(path, "fetch the model again") | changes
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _open_tokenizer(folder: Path, component: str) -> Any:
    return load_part(AutoTokenizer.from_pretrained, str(folder), TOKENIZERS[component])


def _rename_known(names: tuple[str, ...], tokenizer: Any) -> tuple[str, ...]:
    """The names, with new ones for those that the tokenizer already has."""
    known = set(tokenizer.get_vocab())
    renamed = list(names)
    for i, name in enumerate(names):
        if name in known:
            renamed[i] = free_name(name, known | set(renamed))
            print_note(
                f"the model has a token {name} already; that of the adapter is called {renamed[i]}"
            )
    return tuple(renamed)


def _embedding_table(weights: Weights) -> str:
    """The key of a text encoder's embedding table; empty where there is none."""
    return next((key for key in weights.infos if key.endswith(EMBEDDING_TABLES)), "")


def _fitting_table(weights: Weights, component: str, key: str, width: int) -> str:
    """The key of the embedding table. Raises UserError where its rows have another width."""
    table = _embedding_table(weights)
    own = weights.infos[table].shape[1] if table else "no table"
    if own != width:
        raise UserError(
            f"the token rows of {key} have width {width}, this {component} takes {own}; are they "
            "for another model?"
        )
    return table
