"""Weights of words in prompts, (word:1.2), in A1111's grammar (modules/prompt_parser.py).

(a)       weight 1.1          ((a))    1.21
[a]       weight 1 / 1.1      (a:1.3)  1.3
\\( \\) \\[ \\] \\\\   the character itself

Brackets nest, and their weights multiply; one that is never closed acts to the end. A backslash
before another character is left out. What changes during sampling or splits a prompt ([a:b:0.5],
[a|b], AND, BREAK) has no counterpart here and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from lora_core.errors import UserError
from lora_core.text import is_number

PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>:|[^\\()\[\]:]+)"
)
ROUND, SQUARE = 1.1, 1 / 1.1
CLOSES = {")": "(", "]": "["}
NUMBERED = re.compile(r"(?<!\\)\([^()]*:\s*[+-]?[.\d]+\s*\)")
OTHER_SYNTAX = {
    re.compile(r"\[[^\[\]|]*:\s*[.\d]+\s*\]"): "changes the prompt during sampling",
    re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"): "alternates between prompts",
    re.compile(r"\bAND\b"): "joins prompts",
    re.compile(r"\bBREAK\b"): "begins a chunk of tokens",
}


class WeightedPrompt(str):
    """A prompt whose brackets are weights, for families with `reads_weights`."""

    __slots__ = ()


class Segment(NamedTuple):
    """A part of a prompt, without its brackets, and its weight."""

    text: str
    weight: float


def parse_prompt_weights(text: str) -> list[Segment]:
    """The segments of a prompt in order, neighbors of one weight joined.

    Raises UserError for a weight that is no number and for what is refused (see above).
    """
    for syntax, meaning in OTHER_SYNTAX.items():
        if found := syntax.search(text):
            raise UserError(
                f"the prompt has {found[0]!r}, which in A1111 {meaning}; --emphasis a1111 reads "
                "weights alone, so leave it out (or write a backslash before a bracket)"
            )
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    for piece in PIECE.finditer(text):
        bracket, weight = piece["bracket"], piece["weight"]
        if bracket in opened:
            opened[bracket].append(len(texts))
        elif weight is not None and opened["("]:
            close("(", _read_weight(weight, text))
        elif bracket is not None and opened[CLOSES[bracket]]:
            close(CLOSES[bracket], ROUND if bracket == ")" else SQUARE)
        else:
            escaped = piece["escaped"]
            texts.append(piece[0] if escaped is None else escaped)
            weights.append(1.0)
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            weights[start:] = [own * factor for own in weights[start:]]
    return _join_equal(texts, weights)


def check_prompt_weights(prompts: Iterable[str], emphasis: str) -> str:
    """One sentence about weights that are read as text, or "".

    Raises UserError for prompts that cannot be read with this emphasis, and where none has a
    weight, so that it would have no effect.
    """
    every = list(prompts)
    if emphasis == "none":
        found = next(filter(None, map(NUMBERED.search, every)), None)
        if found is None:
            return ""
        return f"{found[0]} is read as text; --emphasis a1111 makes it a weight"
    parts = list(chain.from_iterable(map(parse_prompt_weights, every)))
    if all(segment.weight == 1 for segment in parts):
        raise UserError(
            f"--emphasis {emphasis} has no effect: no prompt has a weight, such as (word:1.2); "
            "leave it out"
        )
    return ""


def _read_weight(number: str, prompt: str) -> float:
    if not is_number(number) or not math.isfinite(float(number)):
        raise UserError(f"the prompt {prompt!r} has the weight {number!r}; write one such as 1.2")
    return float(number)


def _join_equal(texts: list[str], weights: list[float]) -> list[Segment]:
    joined: list[Segment] = []
    for text, weight in zip(texts, weights, strict=True):
        if joined and joined[-1].weight == weight:
            joined[-1] = Segment(joined[-1].text + text, weight)
        else:
            joined.append(Segment(text, weight))
    return joined or [Segment("", 1.0)]
