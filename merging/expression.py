"""The language of `mix`: a weighted sum of files.

    0.7*a.safetensors + 0.3*(b.safetensors@attn - 'my c.safetensors')

    sum    := [sign] term { sign term | [","] tag [choice] }
    term   := number ["*"] term | ["mean"] "(" sum ")" [choice] | file [choice] | tag [choice]
    choice := "@" layers                       the layers that are used, see `layer_choice`
    file   := a word, or anything in quotes; with a * in it every file that it matches
    tag    := <lora:NAME:0.7>                  as in A1111's prompts, see `prompt_tags`

Tags need no "+" between them, so that those of a prompt can be pasted. A "-" or "+" is part of a
word unless it follows a space, a parenthesis or a quote; spaces around operators avoid doubt. A
"*" is multiplication after a number and otherwise part of a word that it does not begin. mean(...)
is the sum divided by the number of its files.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_core.errors import UserError
from lora_core.escaped_output import one_line
from lora_core.text import shorten_value

if TYPE_CHECKING:
    from lora_core.prompt_tags import LoraTag

NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# a "+" ends a word before a space, a number or a group
WORD = re.compile(r"[^\s*()@\"'+][^\s()@\"']*?(?=\s|[()@\"']|\+(?=[\s\d.(\"'-]|$)|$)")
MEAN = re.compile(r"mean(?=\()")
CHOICE = re.compile(r"\"[^\"]*\"|'[^']*'|(\[[^\]]*\]|[^\s()@+\"'])+")
QUOTED = re.compile(r"\"([^\"]*)\"|'([^']*)'")
NEXT_TAG = re.compile(r"\s*,?\s*(?=<(?:lora|lyco):)")  # where a tag follows without a sign
LONGEST_SUM = 100_000  # characters; a sum of 1,000 files has half as many
DEEPEST_SUM = 50  # parentheses in parentheses, and signs or numbers before one file
UNQUOTED = re.compile(r"[^\s*()@\"'+-][^\s*()@\"'+]*")  # a path that needs no quotes in a sum
BORDERS = " *@()+-\"'"  # characters next to which a path in a sum begins or ends
MOST_BORDERS = 100  # looked at; a sum has a few
LONGEST_SHOWN = 400  # characters of a sum that an error shows whole; of a longer one a part
POINTED = 60  # characters of that part before the place of the mistake
NAMED_FILES = 3  # of a long sum, in an error


@dataclass(frozen=True)
class WeightedFile:
    """One file of a sum."""

    weight: float
    path: str
    choices: tuple[str, ...] = ()  # of layers; several, from nested groups, are multiplied

    def __str__(self) -> str:
        """The file with its weight, without the sign, as `parse_sum` reads it."""
        is_plain = UNQUOTED.fullmatch(self.path) and not NUMBER.match(self.path)
        words = [repr(abs(self.weight)).removesuffix(".0"), "*"]
        words.append(self.path if is_plain else _quote(self.path))
        for choice in self.choices:
            words += ["@", choice if CHOICE.fullmatch(choice) else _quote(choice)]
        return "".join(words)


def parse_sum(
    text: str, match: Callable[[str], list[str]] = lambda name: [name]
) -> list[WeightedFile]:
    """The files of a sum in order, with parentheses expanded and equal files combined.

    `match` gives the files that a name stands for. Raises UserError for a text that is not a sum,
    with two more lines that point at the position, and for weights that cancel.
    """
    if len(text) > LONGEST_SUM:
        raise UserError(f"the sum has {len(text):,} characters, expected at most {LONGEST_SUM:,}")
    parser = _SumParser(text, match)
    files = parser.read_sum()
    parser.expect_end()
    kept = _combine(files)
    if not kept:
        raise UserError(
            f"nothing is left of the sum {shorten_value(text)}; every weight in it is 0"
        )
    return kept


def _combine(files: Sequence[WeightedFile]) -> list[WeightedFile]:
    """The files with equal ones combined, without those of weight 0."""
    added: dict[tuple[str, tuple[str, ...]], float] = {}
    for file in files:
        key = (file.path, file.choices)
        added[key] = added.get(key, 0.0) + file.weight
    kept = []
    for (path, choices), weight in added.items():
        if weight:
            kept.append(WeightedFile(weight, path, choices))
    return kept


def parse_files(text: str, output: str = "") -> list[WeightedFile]:
    """The files of a sum; ~ at the start of a path is the home folder, a * matches names.

    No shell expands them inside quotes. A file with a * in its own name is that file. Raises
    UserError for a name that needs quotes, and for a * that matches nothing, or the output too.
    """

    def match(name: str) -> list[str]:
        path = os.path.expanduser(name)
        if "*" not in path or os.path.exists(path):
            return [path]
        from merging.file_patterns import expand_pattern  # few sums have a *

        return expand_pattern(path, output)

    files = parse_sum(text, match)
    for file in files:
        if not os.path.exists(file.path) and (advice := advise_quotes(text, file.path)):
            raise UserError(f"{file.path} does not exist{advice}")
    return files


def render_sum(files: Sequence[WeightedFile]) -> str:
    """The sum as text that `parse_sum` reads as the same."""
    words = [f"{'-' if file.weight < 0 else '+'} {file}" for file in files]
    return " ".join(words).removeprefix("+ ")


def shorten_sum(files: Sequence[WeightedFile]) -> str:
    """The sum as text for an error, of many files the first."""
    if len(files) <= NAMED_FILES + 1:
        return render_sum(files)
    return f"{render_sum(files[:NAMED_FILES])} + ... ({len(files):,} files)"


class _SumParser:
    """A recursive-descent parser: every method reads one rule at the current position."""

    def __init__(self, text: str, match: Callable[[str], list[str]]) -> None:
        self.text, self.at = text, 0
        self.match = match
        self.depth = 0  # of terms in terms

    def read_sum(self) -> list[WeightedFile]:
        sign = self._take_sign()
        files = _scale(-1.0 if sign == -1 else 1.0, self.read_term())
        while (sign := self._take_sign() or self._find_next_tag()) is not None:
            files += _scale(sign, self.read_term())
        return files

    def read_term(self) -> list[WeightedFile]:
        self.depth += 1
        if self.depth > DEEPEST_SUM:
            raise self._error(f"more than {DEEPEST_SUM} parentheses, signs or numbers in a row")
        files = self._read_term()
        self.depth -= 1
        return files

    def _read_term(self) -> list[WeightedFile]:
        if self._take_sign() == -1:
            return _scale(-1.0, self.read_term())
        number = self._take_number()
        if number is not None:
            return _scale(number, self.read_term())
        mean = MEAN.match(self._rest())
        self.at += len("mean") if mean else 0
        if self._take("("):
            files = self._read_group()
            if mean:
                files = _scale(1 / max(1, len(_combine(files))), files)
        elif self._rest().startswith("<"):
            files = [self._take_tag()]
        else:
            files = [WeightedFile(1.0, path) for path in self.match(self._take_path())]
        while self._take("@"):
            choice = self._take_choice()
            files = [replace(file, choices=(*file.choices, choice)) for file in files]
        return files

    def expect_end(self) -> None:
        """Raises UserError where something is left."""
        if not self._rest():
            return
        if self.text[self.at] == ")":
            raise self._error("this parenthesis was never opened")
        raise self._error("expected + or - with a space before it")

    def _read_group(self) -> list[WeightedFile]:
        """The sum between parentheses, of which the first is read."""
        opened = self.at - 1
        files = self.read_sum()
        if self._take(")"):
            return files
        if self._rest():
            raise self._error("expected + , - or )")
        raise self._error("this parenthesis is not closed", opened)

    def _error(self, what: str, at: int | None = None) -> UserError:
        place = self.at if at is None else at
        advice = advise_quotes(self.text)
        start = max(0, place - POINTED) if len(self.text) > LONGEST_SHOWN else 0
        shown = one_line(self.text[start : start + LONGEST_SHOWN])
        pointer = f"\n  {shown}\n  {' ' * (place - start)}^"
        return UserError(f"the sum cannot be read: {what}{advice}", pointer)

    def _rest(self) -> str:
        """The text that is left, from the next character that is no space."""
        self.at += len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
        return self.text[self.at :]

    def _take(self, character: str) -> bool:
        if self._rest().startswith(character):
            self.at += 1
            return True
        return False

    def _take_sign(self) -> int | None:
        """1 or -1, or None where there is no sign."""
        for character, sign in (("+", 1), ("-", -1), ("−", -1)):
            if self._take(character):
                return sign
        return None

    def _find_next_tag(self) -> int | None:
        """1 where a tag follows, after a comma or directly; None elsewhere."""
        found = NEXT_TAG.match(self.text, self.at)
        if not found:
            return None
        self.at = found.end()
        return 1

    def _take_tag(self) -> WeightedFile:
        from lora_core.prompt_tags import TAG, parse_lora_tag  # few sums have tags

        found = TAG.match(self._rest())
        if not found:
            raise self._error("expected a tag such as <lora:NAME:0.7>")
        self.at += found.end()
        return _tagged_file(parse_lora_tag(found[0]))

    def _take_number(self) -> float | None:
        """The number before a "*" or a group, or None."""
        rest = self._rest()
        found = NUMBER.match(rest)
        if not found:
            return None
        behind = rest[found.end() :]
        after = behind.lstrip()
        if after.startswith(("*", "(")):
            if not math.isfinite(float(found[0])):
                raise self._error(f"the weight {found[0]} is larger than a number can be")
            self.at += found.end()
            self._take("*")
            return float(found[0])
        if not after or after[0] in "+-)" or behind[:1].isspace():
            place = self.at + found.end()
            raise self._error(f"expected * and a file after the number {found[0]}", place)
        return None

    def _take_path(self) -> str:
        rest = self._rest()
        if found := QUOTED.match(rest):
            path = found[1] if found[1] is not None else found[2]
            if not path:
                raise self._error("these quotes are empty")
        elif rest[:1] in ("'", '"'):
            raise self._error("this quote is not closed")
        elif found := WORD.match(rest):
            path = found[0]
        elif rest:
            raise self._error("expected a file, a number or (")
        else:
            raise self._error("expected a file; it ends too early")
        self.at += found.end()
        return path

    def _take_choice(self) -> str:
        found = CHOICE.match(self.text[self.at :])
        if not found:
            raise self._error(
                "expected layers right after the @: attn, unet, a glob, a list of block weights ..."
            )
        self.at += found.end()
        return found[0].strip("\"'")


def _tagged_file(tag: LoraTag) -> WeightedFile:
    """The file of a tag with its weight, or with both of them as a choice of layers."""
    from lora_core.prompt_tags import find_tagged_file

    blocks = (tag.blocks,) if tag.blocks else ()
    path = find_tagged_file(tag.name)
    if tag.text == tag.unet:
        return WeightedFile(tag.unet, path, blocks)
    return WeightedFile(1.0, path, (f"te={tag.text!r}:unet={tag.unet!r}", *blocks))


def _scale(factor: float, files: Sequence[WeightedFile]) -> list[WeightedFile]:
    return [replace(file, weight=file.weight * factor) for file in files]


def _quote(text: str) -> str:
    mark = "'" if '"' in text else '"'
    return f"{mark}{text}{mark}"


# ---------------------------------------------------------------- names that need quotes


def find_unquoted_name(text: str, among: Sequence[str] = ()) -> str:
    """The longest name of an existing file in a text that a sum cannot have without quotes.

    Empty where there is none, or where it is part of one of the words `among`.
    """
    borders = [i for i, character in enumerate(text) if character in BORDERS][:MOST_BORDERS]
    ends = [*borders, len(text)]
    found = ""
    for start in (0, *(i + 1 for i in borders)):
        for end in ends:
            name = text[start:end]
            if len(name) <= len(found) or UNQUOTED.fullmatch(name) or name != name.strip():
                continue
            is_inside = any(name in word for word in among)
            if not is_inside and os.path.exists(os.path.expanduser(name)):
                found = name
    return found


def quote_name(name: str) -> str:
    """A name in the quotes of a sum that itself is in double quotes."""
    return f'\\"{name}\\"' if "'" in name else f"'{name}'"


def quote_where_needed(name: str) -> str:
    """A name as it is written in a sum."""
    return name if UNQUOTED.fullmatch(name) else quote_name(name)


def advise_quotes(text: str, path: str = "") -> str:
    """A clause for an error about a sum: which name in it needs quotes, and how they are written.

    Empty where no file of such a name exists, or where `path` is not a part of its name.
    """
    name = find_unquoted_name(text)
    if not name or path not in name or name == path:
        return ""
    return f'; if {name} is one name, write it in quotes: "0.7*{quote_name(name)}"'
