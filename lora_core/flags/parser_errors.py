"""The parser of command lines draws its errors in boxes; here they become one sentence each."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Callable
from typing import TypeVar

from lora_core.errors import UserError
from lora_core.text import nearest_flag_hint

T = TypeVar("T")

COLOR = re.compile(r"\x1b\[[0-9;]*m")
CHOICE_ERROR = re.compile(r"invalid choice (.+) for argument '(.+)'\. Expected one of \((.+)\)\.?")
NUMBER_ERRORS = {  # Python's -> ours
    r"invalid literal for int\(\) with base 10: (.+)": r"\1 is no whole number",
    r"could not convert string to float: (.+)": r"\1 is no number",
}
UNKNOWN = re.compile(r"Unrecognized options: (.+)")
FLAG_LINE = re.compile(
    r"^[│|]? +(--[a-z][\w.-]*)", re.MULTILINE
)  # of a flag that the parser suggests


def parse_words(parse: Callable[[], T], advice: str) -> T:
    """What the parser returns. Raises UserError, which ends in `advice`, for a mistake.

    Help pages are printed, and end the process as the parser does.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parse()
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{read_parser_error(box.getvalue())}; {advice}") from None


def read_parser_error(box: str) -> str:
    """The sentence in a box that the parser has drawn, up to its first rule."""
    lines = [COLOR.sub("", line).strip(" │") for line in box.splitlines()]
    below_title = itertools.dropwhile(_is_rule, lines[1:])
    sentence = " ".join(itertools.takewhile(lambda line: not _is_rule(line), below_title))
    if match := UNKNOWN.fullmatch(sentence):
        near = FLAG_LINE.search(COLOR.sub("", box))
        words = match[1].replace(", ", " ")
        hint = nearest_flag_hint(words.split()[0], [near[1]]) if near else ""
        return f"unrecognized arguments: {words}{hint}"
    if match := CHOICE_ERROR.fullmatch(sentence):
        value, flag, names = match.groups()
        known = names.replace("'", "").rstrip(",")  # of one choice, Python writes ('lora',)
        return f"argument {flag}: invalid choice: {value} (choose from {known})"
    for pattern, words in NUMBER_ERRORS.items():
        sentence = re.sub(pattern, words, sentence)
    sentence = re.sub(r"^Error parsing (--[\w.-]+)", r"argument \1", sentence.rstrip("."))
    sentence = re.sub(
        r"^Missing value for .*'(?:--[\w.-]+/)*(--[\w.-]+)'.*", r"argument \1: no value", sentence
    )
    return re.sub(r"^Error parsing \w+: ", "", sentence)


def _is_rule(line: str) -> bool:
    return not line.strip("─-╰╯")
