"""What a visit to an image makes of its caption: wildcards, tags in another order, tags left out.

The laws are those of kohya's sd-scripts (`process_caption`), with one difference: prefix and suffix
are part of every line of a caption file, where kohya has them before the first and after the last.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import torch

from lora_core.settings import CaptionSettings

OPEN, CLOSE = "\ue000", "\ue001"  # private characters in place of {{ and }}
WILDCARD = re.compile(r"\{([^}]+)\}")


def add_fixed_texts(texts: Sequence[str], settings: CaptionSettings) -> tuple[str, ...]:
    """The captions of an image with prefix and suffix; the first alone if only that is read."""
    chosen = texts[:1] if settings.caption_lines == "first" else texts
    parts = ([settings.caption_prefix, text, settings.caption_suffix] for text in chosen)
    return tuple(" ".join(filter(None, words)) for words in parts)


def compose_caption(
    text: str, settings: CaptionSettings, generator: torch.Generator | None = None
) -> str:
    """The caption of one visit, drawn with a CPU generator.

    Without a generator it is the caption as people are shown it and as validation reads it: the
    first word of each wildcard, and all tags in their order.
    """
    if settings.wildcards:
        text = _replace_wildcards(text, generator)
    if settings.orders_tags:
        text = ", ".join(_order_tags(text, settings, generator))
    if settings.secondary_separator:
        text = text.replace(settings.secondary_separator, settings.tag_separator)
    return text


def _replace_wildcards(text: str, generator: torch.Generator | None) -> str:
    """The text with one word in place of each {a|b}; {{ and }} are braces."""

    def choose(match: re.Match[str]) -> str:
        words = match[1].split("|")
        return words[0 if generator is None else _draw_below(len(words), generator)]

    hidden = text.replace("{{", OPEN).replace("}}", CLOSE)
    return WILDCARD.sub(choose, hidden).replace(OPEN, "{").replace(CLOSE, "}")


def _order_tags(
    text: str, settings: CaptionSettings, generator: torch.Generator | None
) -> list[str]:
    """The tags of one visit. Those between the kept ones are shuffled, then dropped."""
    first, middle, last = split_caption(text, settings)
    if generator is None:
        return [*first, *middle, *last]
    if settings.shuffle_caption:
        middle = [middle[i] for i in torch.randperm(len(middle), generator=generator).tolist()]
    if settings.tag_dropout:
        draws = torch.rand(len(middle), generator=generator, dtype=torch.float64)
        kept = (draws >= settings.tag_dropout).tolist()
        middle = list(itertools.compress(middle, kept))
    return [*first, *middle, *last]


def split_caption(text: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """(kept tags before the others, the others, kept tags after them).

    Empty tags stay, as in kohya's, in a caption without --data.keep-tokens-separator.
    """
    mark, between = settings.keep_tokens_separator, settings.tag_separator
    if mark and mark in text:
        parts = (text.split(mark, 2) + [""])[:3]
        stripped = [[tag.strip() for tag in part.split(between)] for part in parts]
        first, middle, last = ([tag for tag in tags if tag] for tags in stripped)
        return first, middle, last
    tags = [tag.strip() for tag in text.strip().split(between)]
    return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []


def _draw_below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
