"""CLIP's encoding of prompts with weights: their tokens, and A1111's emphasis of hidden states."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.prompt_weights import parse_prompt_weights
from models.components import SHOWN_TOKENS, read_prompt_length

ZERO_MEAN = 1e-4  # of the root mean square: hidden states whose mean is that of rounding or chance


def tokenize_weighted(
    tokenizer: Any, prompts: Sequence[str], length: int, checked: set[str]
) -> tuple[Tensor, Tensor]:
    """Token ids [b, length] of prompts without their brackets, and the weights [b, length] fp32.

    Each segment is tokenized by itself, as A1111 does. BOS, EOS and padding have the weight 1.
    Prints a warning with what does not fit, once for each prompt that `checked` does not hold.
    """
    rows: list[list[int]] = []
    weights = torch.ones(len(prompts), length)
    for row, prompt in enumerate(prompts):
        ids: list[int] = []
        own: list[float] = []
        for text, weight in parse_prompt_weights(prompt):
            found = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids += found
            own += [weight] * len(found)
        kept = ids[: length - 2]
        if len(ids) > len(kept) and prompt not in checked:
            lost = tokenizer.decode(ids[len(kept) :][:SHOWN_TOKENS]).strip()
            print(
                f"warning: the prompt is {len(ids) + 2} tokens long and CLIP reads {length}; "
                f"cut off: {lost!r}",
                file=sys.stderr,
            )
        checked.add(prompt)
        padding = [tokenizer.pad_token_id] * (length - 2 - len(kept))
        rows.append([tokenizer.bos_token_id, *kept, tokenizer.eos_token_id, *padding])
        weights[row, 1 : 1 + len(kept)] = torch.tensor(own[: len(kept)])
    return torch.tensor(rows), weights


def split_weights(weights: Tensor, tokenizer: Any) -> Tensor:
    """[b n, 77] the weights of the chunks of prompts, as `prompt_chunks.split_chunks` has ids."""
    inner = read_prompt_length(tokenizer) - 2
    if weights.shape[1] == inner + 2:
        return weights
    parts = weights[:, 1:-1].unflatten(1, (-1, inner))
    ones = torch.ones_like(parts[..., :1])
    return torch.cat([ones, parts, ones], dim=-1).flatten(0, 1)


def emphasize_states(states: Tensor, weights: Tensor) -> Tensor:
    """Hidden states [n, s, d] times the weights [n, s] of their tokens, scaled to their old mean.

    This is A1111's "Original" emphasis, here for each prompt and chunk by itself (A1111 takes the
    mean of a whole batch). Rows of weights 1 are unchanged to the bit, and a mean of zero, which
    has no ratio, is not restored. ComfyUI interpolates between the hidden states and those of the
    empty prompt instead.
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scaled = wide * weights[..., None].to(wide)
    before = wide.mean(dim=(1, 2), keepdim=True)
    after = scaled.mean(dim=(1, 2), keepdim=True)
    smallest = ZERO_MEAN * wide.square().mean(dim=(1, 2), keepdim=True).sqrt()
    has_ratio = (before.abs() > smallest) & (after.abs() > smallest)
    factor = torch.where(has_ratio, before / after, 1.0)
    is_weighted = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(is_weighted, (scaled * factor).to(states.dtype), states)
