"""Prompts longer than a CLIP text encoder reads at once: chunks of 75 tokens, as kohya reads them.

A long prompt is tokenized as one sequence of BOS, 75 n tokens, EOS. Each chunk gets a BOS and an
EOS of its own and is encoded by itself; of the encoded chunks, the first BOS, the tokens of all
chunks and the last EOS remain, so that hidden state i belongs to token i of the sequence. A chunk
ends after 75 tokens, whatever stands there: a learned token of several vectors may continue in the
next.

A1111 and ComfyUI keep the BOS and EOS of every chunk (77 n states), and A1111 moves a break of up
to 20 tokens back to a comma.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError
from models.components import read_prompt_length

CHUNK = 75  # tokens of CLIP's 77 that are not BOS and EOS; an option's unit
LENGTHS = (CHUNK, 2 * CHUNK, 3 * CHUNK)  # sd-scripts' --max_token_length


def check_token_length(max_token_length: int) -> int:
    """The option, 75 for 0. Raises UserError for another length than sd-scripts has."""
    if max_token_length not in (0, *LENGTHS):
        raise UserError(
            f"--max-token-length is {max_token_length}; expected one of "
            f"{', '.join(map(str, LENGTHS))}"
        )
    return max_token_length or CHUNK


def long_prompt_length(tokenizer: Any, max_token_length: int) -> int:
    """The tokens of a prompt of so many chunks, with one BOS and one EOS: 77, 152 or 227."""
    length = read_prompt_length(tokenizer)
    return (length - 2) * (max_token_length // CHUNK) + 2


def split_chunks(ids: Tensor, tokenizer: Any) -> Tensor:
    """[b n, 77] token ids of the chunks of prompts [b, 75 n + 2], those of a prompt together.

    A full chunk ends with EOS. One that the prompt does not reach is BOS, EOS and padding. Runs on
    the ids' device without a sync. The ids themselves where they are one chunk.
    """
    length = read_prompt_length(tokenizer)
    count = (ids.shape[1] - 2) // (length - 2)
    if count == 1:
        return ids
    eos = tokenizer.eos_token_id
    end = (ids == eos).int().argmax(dim=1, keepdim=True)  # [b, 1] of the first EOS
    chunks = []
    for number in range(count):
        first = 1 + number * (length - 2)
        own = ids[:, first : first + length - 2]
        is_full = end >= first + length - 2
        is_empty = end < first
        head = torch.where(is_empty, eos, own[:, :1])
        tail = torch.where(is_full, eos, ids[:, -1:])
        chunks.append(torch.cat([ids[:, :1], head, own[:, 1:], tail], dim=1))
    return torch.stack(chunks, dim=1).flatten(0, 1)


def join_chunks(states: Tensor, prompts: int) -> Tensor:
    """[b, 75 n + 2, d] hidden states of prompts from those of their chunks [b n, 77, d].

    The states themselves where each prompt is one chunk.
    """
    if len(states) == prompts:
        return states
    parts = states.unflatten(0, (prompts, -1))  # [b, n, 77, d]
    inner = parts[:, :, 1:-1].flatten(1, 2)
    return torch.cat([parts[:, 0, :1], inner, parts[:, -1, -1:]], dim=1)
