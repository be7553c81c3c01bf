"""Join the token rows of several adapter files; tokens whose names clash are renamed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.token_files import find_token_file, list_words, trained_words

Rename = Callable[[int, int, str], str]  # (number of the file, row, name there) -> name


@dataclass(frozen=True)
class TakenNames:
    """What a model has already, and new tokens and words may not be called."""

    tokens: Collection[str] = ()  # the vocabularies of its tokenizers
    words: Collection[str] = ()  # its own placeholder words


def join_tokens(
    states: Sequence[AdapterState],
    paths: Sequence[str],
    rename: Rename | None = None,
    *,
    taken: TakenNames = TakenNames(),
) -> tuple[AdapterState, list[str]]:
    """(tokens and placeholder words of several files as one record, a note for each renamed one).

    A name that an earlier file has, or that is taken, becomes <s1-2>, TOK2; `rename` names tokens
    otherwise. The same file twice counts once. Raises UserError for files with rows of different
    encoders.
    """
    joined, seen = _JoinedTokens(taken), set[str]()
    for i, (state, path) in enumerate(zip(states, paths)):
        if state.tokens and path not in seen:
            seen.add(path)
            joined.check_rows(state.tokens, path)
            joined.add_file(state, path, i, rename)
    return joined.as_state(), joined.notes


def describe_whole_rows(
    states: Sequence[AdapterState], paths: Sequence[str], weights: Sequence[float]
) -> list[str]:
    """A sentence for each file whose weight in a sum does not act on its learned tokens.

    They are places in an embedding table, not differences, so that they are not scaled.
    """
    sentences = []
    for state, path, weight in zip(states, paths, weights):
        if not state.tokens or weight == 1:
            continue
        acts = f"the weight {weight:g} acts on its layers only"
        if not state.changed_components:
            acts = f"the weight {weight:g} changes nothing"
        sentences.append(f"the learned tokens of {path} are not scaled; {acts}")
    return sentences


def describe_missing_tokens(states: Sequence[AdapterState], paths: Sequence[str]) -> list[str]:
    """A sentence on the files that were trained with learned tokens which no file of a sum has;
    none where there are none.
    """
    given = {Path(path) for path in paths}
    missing: dict[str, list[str]] = {}
    for state, path in zip(states, paths):
        words = [] if state.tokens else trained_words(state.metadata)
        if words and Path(find_token_file(path)) not in given:
            missing[path] = words
    if not missing:
        return []
    words = list(dict.fromkeys(itertools.chain.from_iterable(missing.values())))
    were = "were" if len(missing) > 1 else "was"
    return [
        f"{list_words(list(missing))} {were} trained with learned tokens ({list_words(words)}), "
        "which the result does not have"
    ]


def free_name(name: str, taken: set[str]) -> str:
    """The name, or the first of <s1-2>, <s1-3> ..., TOK2, TOK3 ... that is not taken."""
    if name not in taken:
        return name
    for n in itertools.count(2):
        other = f"{name[:-1]}-{n}>" if name.endswith(">") else f"{name}{n}"
        if other not in taken:
            return other
    raise AssertionError("unreachable")


@dataclass
class _JoinedTokens:
    """The tokens of the files so far."""

    taken: TakenNames = TakenNames()
    rows: dict[str, list[Tensor]] = field(default_factory=dict)  # encoder -> [n, d] of each file
    names: list[str] = field(default_factory=list)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)  # placeholder -> tokens
    layers: dict[str, int] = field(default_factory=dict)  # placeholder -> layers, where it has any
    notes: list[str] = field(default_factory=list)

    def check_rows(self, tokens: Mapping[str, Tensor], path: str) -> None:
        """Raises UserError for rows that cannot be stacked onto those of earlier files."""
        if not self.rows:
            return
        if set(self.rows) != set(tokens):
            raise UserError(
                f"{path} has token rows for {', '.join(tokens)}, an earlier file for "
                f"{', '.join(self.rows)}; their tokens cannot share a file"
            )
        if any(self.rows[key][0].shape[1] != own.shape[1] for key, own in tokens.items()):
            raise UserError(
                f"the token rows of {path} have another width than those of an earlier file; "
                "merge files of one model"
            )

    def add_file(self, state: AdapterState, path: str, number: int, rename: Rename | None) -> None:
        own_words = embeddings.placeholder_words(state, path)
        used = {*self.names, *self.words}
        new_names = _free_names(state.token_names, used.union(self.taken.tokens))
        if rename:
            numbered = enumerate(state.token_names)
            new_names = {name: rename(number, row, name) for row, name in numbered}
        new_words = _free_names(tuple(own_words), used.union(self.taken.words))
        for old, new in [*new_names.items(), *new_words.items()]:
            if old != new:
                self.notes.append(f"{old} of {path} is called {new} in the result")
        for word, tokens in own_words.items():
            self.words[new_words[word]] = tuple(new_names[name] for name in tokens)
        for word, count in embeddings.word_layers(state, path).items():
            self.layers[new_words[word]] = count
        self.names += new_names.values()
        for key, own in state.tokens.items():
            self.rows.setdefault(key, []).append(own)

    def as_state(self) -> AdapterState:
        tokens = {key: torch.cat(parts) for key, parts in self.rows.items()}
        metadata = embeddings.placeholder_header(self.words, self.layers)
        if self.names:
            metadata[embeddings.TOKEN_NAMES] = json.dumps(self.names, ensure_ascii=False)
        return AdapterState(tokens=tokens, token_names=tuple(self.names), metadata=metadata)


def _free_names(names: Sequence[str], taken: set[str]) -> dict[str, str]:
    """Name -> itself, or one that is neither taken nor another's."""
    found: dict[str, str] = {}
    for name in names:
        others = {*names, *found.values()} if name in taken else set()
        found[name] = free_name(name, taken | others)
    return found
