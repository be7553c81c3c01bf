"""Prompts with a text for each cross-attention layer (P+, arXiv 2303.09522), encoded.

Every different text goes through the text encoders once; the layers' rows are then put together
from the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_core.family import Conditioning
from lora_core.placeholders import Prompt


def encode_layer_prompts(
    encode: Callable[[Sequence[str]], Conditioning], prompts: Sequence[Prompt]
) -> Conditioning:
    """The conditioning of prompts, some or all of which have a text for each layer.

    `encode` is a family's encode_prompts or encode_negative. prompt_embeds are [b, layers, s, d],
    or [b, s, d] where no prompt has more than one text.
    """
    texts, rows = split_prompts(prompts)
    cond = encode(texts)
    return cond if rows is None else arrange_by_layer(cond, torch.tensor(rows))


def split_prompts(
    prompts: Sequence[Prompt], *, distinct: bool = True
) -> tuple[list[str], list[list[int]] | None]:
    """(texts, for each prompt and layer the number of its text); None where all have one text.

    Where some prompt has a text for each layer, a prompt of one text has it in every layer, and no
    text is listed twice, unless `distinct` is False: then each prompt has as many texts as layers.
    """
    layers = max((len(prompt) for prompt in prompts if isinstance(prompt, tuple)), default=0)
    if not layers:
        return [prompt for prompt in prompts if isinstance(prompt, str)], None
    texts: list[str] = []
    numbers: dict[str, int] = {}
    rows = []
    for prompt in prompts:
        row = []
        by_layer = (prompt,) * layers if isinstance(prompt, str) else prompt
        for text in by_layer:
            if text not in numbers or not distinct:
                numbers[text] = len(texts)
                texts.append(text)
            row.append(numbers[text])
        rows.append(row)
    return texts, rows


def arrange_by_layer(cond: Conditioning, rows: Tensor) -> Conditioning:
    """The conditioning [b, layers, s, d] whose image i has the text rows[i, l] in layer l.

    Members that the layers do not read, such as pooled prompts, are the means over the layers'
    texts: the sources have no rule, Mix-of-Show's only model has no such member.
    """
    rows = rows.to(cond.prompt_embeds.device)
    extra = {name: values[rows].mean(1) for name, values in cond.extra.items()}
    return Conditioning(cond.prompt_embeds[rows], extra)
