"""The captions of a step for its loss: their texts, and the places of words among their tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.diffusion.step_output import CaptionTokens
from lora_core.errors import UserError
from lora_core.placeholders import has_placeholder, token_positions, word_positions
from training.checks import model_checks
from training.setup import Data, Model


class CaptionReader:
    """Finds the tokens of words in the captions of a run, each caption once.

    For losses that read attention. `keeps_text`: whether a step may hold the captions themselves,
    which a CUDA graph may not.
    """

    def __init__(self, data: Data, model: Model, *, keeps_text: bool) -> None:
        self.model, family = model, model.family
        self.keeps_text = keeps_text
        self.labels = family.layout.encoders  # "text_encoder" -> "clip_l"
        if not family.attended:
            raise UserError(
                f"this loss reads attention, and the family {family.name} records no attention "
                "maps; choose a loss that reads none"
            )
        learning = [name for name in family.attended if name in model.embeddings]
        # the text encoder whose tokens attention maps are on, and whether it learns some
        self.attended, self.learns = (learning or list(family.attended))[0], bool(learning)
        self.limits = model_checks.token_limits(family)
        self.captions: list[str] = []  # of the run
        for record in data.training.records:
            self.captions += record.captions
        self.found_words: set[str] = set()  # words that some caption of the run has
        self.known: dict[tuple[str, str, str], list[int]] = {}  # (encoder, word, caption) -> places

    def read(self, captions: Sequence[str]) -> CaptionTokens:
        """The captions and the places of their tokens, on the CPU."""
        places: dict[str, dict[str, Tensor]] = {}
        for name in self.model.family.tokenizers:
            found = places.setdefault(self.labels[name], {})
            for placeholder in self.model.placeholders:
                found[placeholder.word] = self._places(name, placeholder.word, captions)
        return CaptionTokens(
            tuple(captions) if self.keeps_text else (),
            places,
            self.labels[self.attended],
            self._learned_places(captions) if self.learns else None,
            functools.partial(self.find_word, tuple(captions)) if self.keeps_text else None,
        )

    def find_word(self, captions: Sequence[str], word: str) -> Tensor:
        """[b, n] places of any word in these captions, as the attended encoder reads them.

        Raises UserError for a word that no caption of the run has.
        """
        if word not in self.found_words:
            if not any(has_placeholder(caption, word) for caption in self.captions):
                raise UserError(
                    f"step.attention_of({word!r}) names a word that no caption has; captions are "
                    f"like {self.captions[0]!r}"
                )
            self.found_words.add(word)
        return self._places(self.attended, word, captions)

    def _learned_places(self, captions: Sequence[str]) -> Tensor:
        """[b, n] places of the learned tokens of all words, in each caption's order."""
        n = sum(len(placeholder.names_at(0)) for placeholder in self.model.placeholders)
        rows = self._search(self.attended, "", captions)
        return pad_places([row[:n] for row in rows], n)

    def _places(self, encoder: str, word: str, captions: Sequence[str]) -> Tensor:
        """[b, n] places of a word in one encoder."""
        rows = self._search(encoder, word, captions)
        return pad_places(rows, max(1, *map(len, rows)))

    def _search(self, encoder: str, word: str, captions: Sequence[str]) -> list[list[int]]:
        """The places of a word in each caption; for an empty word those of all learned tokens."""
        given = self.model.placeholders, self.model.family.tokenizers[encoder], self.limits[encoder]
        rows = []
        for caption in captions:
            key = (encoder, word, caption)
            if key not in self.known:
                find = functools.partial(word_positions, word) if word else token_positions
                self.known[key] = find(caption, *given)
            rows.append(self.known[key])
        return rows


def pad_places(rows: Sequence[list[int]], n: int) -> Tensor:
    """[b, n] places, -1 after the end of each row."""
    return torch.tensor([[*row, *[-1] * (n - len(row))] for row in rows])
