"""The concepts of a fusion: adapter files with their strengths, learned tokens and prompts."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lora_core.adapters.weight_updates import (
    AdapterState,
    DenseUpdate,
    LowRank,
    delta_weight,
    factor_blocks,
)
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.layout import Layout
from lora_core.formats.token_files import find_token_file
from lora_core.placeholders import Placeholder, Prompt, bind_layers, has_placeholder
from lora_core.runs.loras import WHOLE_RANGE, LoraSource, parse_lora, strengths_by_component
from lora_core.text import check_prompt_length, read_lines
from merging.adapter_sums import Term
from merging.commands import FileReadOptions
from merging.least_squares import Factors
from merging.opening import is_whole_model, open_adapter, open_each
from merging.stored_layers import LayerKey
from merging.token_names import TakenNames, join_tokens

GAP = "{}"  # in a prompt: the words of a concept
TEMPLATES = ("photo of a {}", "{}")  # Mix-of-Show's prompts of a concept


@dataclass(frozen=True)
class Concept:
    """An adapter file, its strength for each network, its words, and prompts of it."""

    path: str
    state: AdapterState
    strengths: Mapping[str, float]  # component -> strength
    # Its words as its file has them, and the tokens' names in the result.
    placeholders: tuple[Placeholder, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def term(self) -> Term:
        """The file as a term of a sum."""
        return Term(self.state, 1.0, lambda component, path: self.strengths[component])

    @property
    def words(self) -> str:
        """All its words, with spaces between."""
        return " ".join(placeholder.word for placeholder in self.placeholders)

    def bound_prompts(self) -> list[Prompt]:
        """The prompts with learned tokens in place of words, those of each layer in its text."""
        return [bind_layers(prompt, self.placeholders) for prompt in self.prompts]

    def layer_factors(self, key: LayerKey, weight: Tensor) -> Factors:
        """The update of a layer at the concept's strength, 0 where it has none.

        `weight` is that of the base model. Raises ValueError for an update of another shape, and
        for a convolution with groups.
        """
        component, path = key
        update: LowRank | DenseUpdate | None = self.state.components.get(component, {}).get(path)
        strength = self.strengths.get(component, 0.0)
        if update is None or not strength:
            return Factors(weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight[0].numel()))
        if isinstance(update, DenseUpdate) or update.magnitude is not None:
            return Factors(None, strength * delta_weight(update, weight.cpu()).flatten(1))
        up, down = factor_blocks(update)
        shape = (up.shape[1], *update.down.shape[1:])
        if len(up) != 1 or shape != weight.shape:
            raise ValueError(f"an update of {list(shape)} for the weight {list(weight.shape)}")
        return Factors(strength * update.scale * up[0], down[0])


def read_concepts(texts: Sequence[str], layout: Layout, reading: FileReadOptions) -> list[Concept]:
    """The concepts of words such as FILE:0.8, without prompts.

    Raises UserError for fewer than two, one that is given twice, files that are no adapters or of
    different models, and strengths that are not finite or have no effect.
    """
    sources = [parse_lora(text, "the concept") for text in texts]
    for text, source in zip(texts, sources):
        if source.shares != WHOLE_RANGE:
            raise UserError(
                f"the concept {text} has a range of noise levels, which a merged model cannot "
                "keep; leave out what follows @"
            )
    paths = [source.path for source in sources]
    if len(paths) < 2:
        raise UserError("a fusion takes two or more concepts; fold puts one LoRA into a model")
    for number, path in enumerate(paths):
        _refuse_same_file(path, paths[:number])
        if is_whole_model(path):
            raise UserError(f"{path} is a whole model where the LoRA of a concept is expected")
    states = open_each(paths, layout, reading, merging=True)
    concepts = []
    for source, state in zip(sources, states):
        strengths = _finite_strengths(source, state)
        concepts.append(
            Concept(source.path, _with_rows(state, source.path, layout, reading), strengths)
        )
    return concepts


def join_concepts(
    concepts: Sequence[Concept], taken: TakenNames
) -> tuple[list[Concept], AdapterState, list[str]]:
    """(the concepts with placeholders, the tokens of all, a note for each renamed one)."""
    states, paths = [own.state for own in concepts], [own.path for own in concepts]
    joined, notes = join_tokens(states, paths, taken=taken)
    placed = []
    start = 0
    for concept in concepts:
        own = concept.state.token_names if concept.state.tokens else ()
        names = dict(zip(own, joined.token_names[start : start + len(own)]))
        start += len(own)
        placed.append(replace(concept, placeholders=_rename_words(concept, names)))
    return placed, joined, notes


def add_prompts(concepts: Sequence[Concept], given: Sequence[str]) -> list[Concept]:
    """The concepts with their prompts.

    `given` has a text, or a file with a prompt a line, for each concept; or texts with {} for the
    words of every concept; nothing is Mix-of-Show's "photo of a {}" and "{}". Raises UserError for
    another number of texts, a concept without words or with none of them in its prompts, and two
    concepts with the same prompts.
    """
    groups = [_read_prompts(text) for text in given] or [list(TEMPLATES)]
    every = list(itertools.chain.from_iterable(groups))
    if any(GAP in prompt for prompt in every):
        groups = [_fill_templates(every, concept) for concept in concepts]
    if len(groups) != len(concepts):
        raise UserError(
            f"--prompts has {len(groups)} texts or files for {len(concepts)} concepts; give one "
            "for each, in their order, or texts with {} for the words of every concept"
        )
    found: list[Concept] = []
    for concept, prompts in zip(concepts, groups):
        _check_words(concept, prompts)
        concept = replace(concept, prompts=tuple(dict.fromkeys(prompts)))
        _refuse_equal_prompts(concept, found)
        found.append(concept)
    return found


def prompt_texts(given: Sequence[str]) -> tuple[str, ...]:
    """The values of --prompts with the lines of files in place of their names."""
    return tuple("\n".join(_read_prompts(text)) for text in given)


def _refuse_same_file(path: str, others: Sequence[str]) -> None:
    """Raises UserError where another path leads to the same file, or to the run folder of it."""
    own = Path(path).resolve()
    for other in others:
        place = Path(other).resolve()
        if own == place or own.parent == place or place.parent == own:
            same = "" if path == other else f" ({other} and {path} are the same)"
            raise UserError(
                f"the concept {other} is given twice{same}; give it once, with one strength"
            )


def _finite_strengths(source: LoraSource, state: AdapterState) -> dict[str, float]:
    strengths = strengths_by_component(source, state.changed_components)
    for name, value in strengths.items():
        if not math.isfinite(value):
            raise UserError(
                f"the strength of {source.path} for {name} is {value}, expected a finite number"
            )
    if source.strength != 1.0 and not strengths:
        raise UserError(
            f"{source.path} holds learned tokens only, which have no strength; "
            f"leave {source.strength} out"
        )
    return strengths


def _with_rows(
    state: AdapterState, path: str, layout: Layout, reading: FileReadOptions
) -> AdapterState:
    """The state, with the token rows in the folder of a LoRA file that was trained with tokens."""
    file = "" if state.tokens else find_token_file(path)
    if not file:
        return state
    rows = open_adapter(file, layout, reading, merging=True)
    metadata = state.metadata | rows.metadata
    return replace(state, tokens=rows.tokens, token_names=rows.token_names, metadata=metadata)


def _rename_words(concept: Concept, names: Mapping[str, str]) -> tuple[Placeholder, ...]:
    """The words of a file with the tokens' names in the result; tokens without a word are words."""
    words = embeddings.placeholder_words(concept.state, concept.path) if names else {}
    layers = embeddings.word_layers(concept.state, concept.path) if names else {}
    covered = set(itertools.chain.from_iterable(words.values()))
    alone = {name: (name,) for name in names if name not in covered}
    placeholders = []
    for word, tokens in (words | alone).items():
        renamed = tuple(names[token] for token in tokens)
        placeholders.append(Placeholder(word, renamed, layers=layers.get(word, 0)))
    return tuple(placeholders)


def _read_prompts(text: str) -> list[str]:
    """The prompts of a text, or of a file of that name: one a line.

    Raises UserError for none, and for the name of a text file that does not exist.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if os.path.isfile(text):
        try:
            lines = read_lines(Path(text))
        except OSError as error:
            raise UserError(f"cannot read the prompt file {text}: {error}") from None
    elif text.endswith(".txt"):
        raise UserError(f"the prompt file {text} does not exist; give a file, or the prompt itself")
    if not lines:
        raise UserError(f"--prompts {text!r} has no prompt")
    for line in lines:
        check_prompt_length(line, "a prompt")
    return lines


def _fill_templates(templates: Sequence[str], concept: Concept) -> list[str]:
    """The prompts of a concept. Raises UserError for one without words, or without a gap."""
    for template in templates:
        if GAP not in template:
            raise UserError(
                f"the prompt {template!r} has no {GAP} for the words of a concept, and others do; "
                "write all of them with it, or give one text or file for each concept"
            )
    if not concept.placeholders:
        raise UserError(
            f"{concept.path} has no learned words, so its prompts are not known; "
            "give --prompts, one text or file for each concept"
        )
    return [template.replace(GAP, concept.words) for template in templates]


def _check_words(concept: Concept, prompts: Sequence[str]) -> None:
    """Raises UserError where no prompt has one of the learned words."""
    words = [placeholder.word for placeholder in concept.placeholders]
    for prompt in prompts:
        if any(has_placeholder(prompt, word) for word in words):
            return
    if words:
        raise UserError(
            f"no prompt of {concept.path} has one of its learned words ({', '.join(words)}); "
            "put them into its --prompts"
        )


def _refuse_equal_prompts(concept: Concept, others: Sequence[Concept]) -> None:
    """Raises UserError for prompts that another concept has too."""
    own = set(concept.bound_prompts())
    for other in others:
        if own == set(other.bound_prompts()):
            raise UserError(
                f"{other.path} and {concept.path} have the same prompts, which cannot tell them "
                "apart; give each its own with --prompts"
            )
