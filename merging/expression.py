"""The language of `mix`: a weighted sum of files, "0.7*a.safetensors + 0.3*(b.safetensors@attn - 'my c.safetensors')".

    sum    := [sign] term { sign term }
    term   := number ["*"] term | "(" sum ")" [choice] | file [choice]
    choice := "@" layers                       which layers of it count, see `selection`
    file   := a word, or anything in quotes

A "-" or "+" inside a word belongs to it where it does not follow a space, a parenthesis or a quote; spaces around operators make it plain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_core.errors import UserError

NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
WORD = re.compile(
    r"[^\s*()@\"'+][^\s*()@\"']*?(?=\s|[*()@\"']|\+(?=[\s\d.(\"'-]|$)|$)"
)  # a "+" ends it before a space, a number or a group
CHOICE = re.compile(r"\"[^\"]*\"|'[^']*'|(\[[^\]]*\]|[^\s()@+\"'])+")
QUOTED = re.compile(r"\"([^\"]*)\"|'([^']*)'")
PLAIN = re.compile(r"[^\s*()@\"'+-][^\s*()@\"'+]*")  # what needs no quotes


@dataclass(frozen=True)
class WeightedFile:
    """One file of a sum."""

    weight: float
    path: str
    choices: tuple[str, ...] = ()  # of layers; several, from groups in groups, all count

    def __str__(self) -> str:
        plain = PLAIN.fullmatch(self.path) and not NUMBER.match(self.path)
        return (
            f"{repr(abs(self.weight)).removesuffix('.0')}*{self.path if plain else _quoted(self.path)}"
            + "".join(
                f"@{choice if CHOICE.fullmatch(choice) else _quoted(choice)}"
                for choice in self.choices
            )
        )


def parse_sum(text: str) -> list[WeightedFile]:
    """The files of a sum in order, parentheses multiplied out; what names one file with the same layers twice is added up.

    Raises UserError, with a second and a third line that point at the place, for what is no sum, and for weights that cancel.
    """
    reader = _SumParser(text)
    entries = reader.sum()
    reader.end()
    added: dict[tuple[str, tuple[str, ...]], float] = {}
    for entry in entries:
        key = (entry.path, entry.choices)
        added[key] = added.get(key, 0.0) + entry.weight
    kept = [
        WeightedFile(weight, path, choices) for (path, choices), weight in added.items() if weight
    ]
    if not kept:
        raise UserError(f"nothing is left of the sum {text!r}; every weight in it is 0")
    return kept


def render_sum(entries: Sequence[WeightedFile]) -> str:
    """The sum as text that `parse` reads as the same."""
    words = [f"{'-' if entry.weight < 0 else '+'} {entry}" for entry in entries]
    return " ".join(words).removeprefix("+ ")


class _SumParser:
    """A position in a text. Every method reads one thing of the grammar from there on."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def sum(self) -> list[WeightedFile]:
        entries = list(self._scaled(self._sign(required=False), self.term()))
        while (sign := self._sign(required=True)) is not None:
            entries += self._scaled(sign, self.term())
        return entries

    def term(self) -> list[WeightedFile]:
        inner = self._sign(required=False)
        if inner == -1:
            return list(self._scaled(inner, self.term()))
        number = self._number()
        if number is not None:
            return list(self._scaled(number, self.term()))
        if self._take("("):
            opened = self.at - 1
            entries = self.sum()
            if not self._take(")"):
                raise (
                    self.error("this parenthesis is not closed", opened)
                    if self._rest() == ""
                    else self.error("expected + , - or )")
                )
        else:
            entries = [WeightedFile(1.0, self._path())]
        while self._take("@"):
            choice = self._choice()
            entries = [replace(entry, choices=(*entry.choices, choice)) for entry in entries]
        return entries

    def end(self) -> None:
        if self._rest():
            raise self.error(
                "this parenthesis was never opened"
                if self.text[self.at] == ")"
                else "expected + or - with a space before it"
            )

    def error(self, what: str, at: int | None = None) -> UserError:
        place = self.at if at is None else at
        return UserError(f"the sum cannot be read: {what}\n  {self.text}\n  {' ' * place}^")

    def _rest(self) -> str:
        """What is left, from the next character that is no space."""
        self.at += len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
        return self.text[self.at :]

    def _take(self, character: str) -> bool:
        if self._rest().startswith(character):
            self.at += 1
            return True
        return False

    def _sign(self, *, required: bool) -> int | None:
        """1 or -1; where there is none, None if it was required and else 1."""
        for character, sign in (("+", 1), ("-", -1), ("−", -1)):
            if self._take(character):
                return sign
        return None if required else 1

    def _number(self) -> float | None:
        """The number before a "*" or a group, or None."""
        rest = self._rest()
        found = NUMBER.match(rest)
        if not found:
            return None
        after = rest[found.end() :].lstrip()
        if after.startswith(("*", "(")):
            self.at += found.end()
            self._take("*")
            return float(found[0])
        if not after or after[0] in "+-)" or rest[found.end() :][:1].isspace():
            raise self.error(
                f"expected * and a file after the number {found[0]}", self.at + found.end()
            )
        return None

    def _path(self) -> str:
        rest = self._rest()
        if found := QUOTED.match(rest):
            path = found[1] if found[1] is not None else found[2]
            if not path:
                raise self.error("these quotes are empty")
        elif rest[:1] in ("'", '"'):
            raise self.error("this quote is not closed")
        elif found := WORD.match(rest):
            path = found[0]
        else:
            raise self.error(
                "expected a file, a number or (" if rest else "expected a file; it ends too early"
            )
        self.at += found.end()
        return path

    def _choice(self) -> str:
        found = CHOICE.match(self.text[self.at :])
        if not found:
            raise self.error(
                "expected layers right after the @: attn, unet, a glob, a list of block weights ..."
            )
        self.at += found.end()
        return found[0].strip("\"'")

    @staticmethod
    def _scaled(factor: float | None, entries: Sequence[WeightedFile]) -> Iterator[WeightedFile]:
        return (
            replace(entry, weight=entry.weight * (1.0 if factor is None else factor))
            for entry in entries
        )


def _quoted(text: str) -> str:
    mark = "'" if '"' in text else '"'
    return f"{mark}{text}{mark}"
