"""A tokenizer that knows only how many tokens there are, for models whose sizes are planned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PlannedIds(NamedTuple):
    """What a call of a tokenizer returns."""

    input_ids: Any  # [b, length] or a list of ids
    # [b, 1, length, length], as transformers makes it of one that marks padding
    attention_mask: Any = None


class PlannedTokenizer:
    """A tokenizer without words: every word is token 0, and a prompt has the length that is asked
    for. Learned tokens can be added. It has the methods of transformers' that are called here.
    """

    chat_template = "planned"

    def __init__(self, size: int, length: int) -> None:
        self.size = size  # tokens of the vocabulary
        self.model_max_length = length
        self.eos_token_id = size - 1
        self.pad_token_id = size - 1  # CLIP pads with the end too
        self.all_special_ids = [size - 1]
        self.added: dict[str, int] = {}

    def get_vocab(self) -> dict[str, int]:
        return {f"token {i}": i for i in range(self.size)} | self.added

    def get_added_vocab(self) -> dict[str, int]:
        return self.added

    def add_tokens(self, names: Sequence[str]) -> None:
        self.added |= {name: self.size + i for i, name in enumerate(names, len(self.added))}

    def convert_tokens_to_ids(self, name: str) -> int:
        return self.added[name]

    def apply_chat_template(self, chat: Sequence[Mapping[str, Any]], **_: Any) -> str:
        """The last message of a conversation, which is the prompt."""
        return str(chat[-1]["content"])

    def __call__(
        self, text: str | list[str], *, max_length: int = 0, add_special_tokens: bool = True,
        return_tensors: str = "", padding: str = "", truncation: bool = False, verbose: bool = True,
    ) -> PlannedIds:  # fmt: skip
        """With `return_tensors` ids [b, max_length] on the CPU, which end with the last token; else
        the list of one text's ids.
        """
        if return_tensors:
            mask = torch.ones(len(text), 1, max_length, max_length, dtype=torch.bool)
            return PlannedIds(self._padded_ids(len(text), max_length), mask)
        names = sorted(map(re.escape, self.added), key=len, reverse=True)
        found = re.findall("|".join([*names, r"[^\s<>]+"]), str(text))
        ids = [self.added.get(word, 0) for word in found]
        return PlannedIds([*ids, self.eos_token_id] if add_special_tokens else ids)

    def _padded_ids(self, count: int, length: int) -> Tensor:
        ids = torch.zeros(count, length, dtype=torch.int64)
        ids[:, -1] = self.eos_token_id
        return ids
