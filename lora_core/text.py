"""Text files as UTF-8, their lines, Unicode forms, and the names nearest to a wrong one."""

import codecs
import difflib
import json
import re
import reprlib
import sys
import unicodedata
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from lora_core.errors import UserError, printable

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Limits of what is read from files that others wrote. A gigabyte of text would take 20 GB of memory
# once it is lines, words and tokens.
LONGEST_TEXT = 1 << 20  # bytes of captions next to an image, prompts or a config
LONGEST_TABLE = 1 << 27  # bytes of a table or a log: 500,000 rows of 250 bytes
LONGEST_PROMPT = 1 << 14  # characters of a prompt or caption; 512 tokens of T5 are about 2,500
DEEPEST_JSON = 100  # brackets in brackets; what is written here has 6
LONGEST_NAME, MOST_NAMES = 200, 5_000  # that are compared to find the nearest one
ALIKE = 0.65  # similarity of a name to the one that is meant; lora and format have 0.6
SHOWN = 80  # characters of a value that an error quotes
SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxlevel, SHORT_REPR.maxstring, SHORT_REPR.maxother = 3, SHOWN, SHOWN


class ByteSource(Protocol):
    """A file that can be read: a path, or a file inside an archive. As text it is its name."""

    def open(self, mode: str, /) -> BinaryIO:
        """The file, opened with mode "rb"."""


def read_text(path: Path | ByteSource, limit: int = LONGEST_TEXT) -> str:
    r"""The text of a UTF-8 file, with or without a byte order mark; \r\n and \r become \n.

    Raises UserError for other encodings, for zero bytes, which no text has, and for more than
    `limit` bytes, of which none is kept.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(
            f"{path} has more than {limit:,} bytes, the limit for such a text; "
            "is it the right file? shorten or split it"
        )
    if content.startswith(UTF16_MARKS):
        raise UserError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8")
    if b"\0" in content:
        place = content.index(0)
        raise UserError(
            f"{path} is not text: it has a zero byte at byte {place}; save it as UTF-8 text"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} is not UTF-8 text ({reason}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path | ByteSource) -> list[str]:
    r"""The lines of a UTF-8 file that are not empty, without space around them.

    Only \n, \r\n and \r end a line. Python's `splitlines` also cuts at the vertical tab, form feed,
    U+001C to U+001E, U+0085, U+2028 and U+2029, which are space inside a line in every editor (Word
    writes them for a soft break). Raises UserError as `read_text` does.
    """
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def parse_json(text: str, name: str, advice: str) -> Any:
    """The value of a JSON text.

    Raises UserError, which calls the text `name` and ends in `advice`, where it is not JSON.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{name} is not JSON ({error.msg}{line}); {advice}") from error
    except ValueError:  # Python reads integers of up to 4,300 digits
        raise UserError(f"{name} has a number of thousands of digits; {advice}") from None
    except RecursionError:
        value = None
        deep = True
    else:
        deep = text.count("[") + text.count("{") > DEEPEST_JSON and _is_deep(value)
    if deep:
        raise UserError(f"{name} is JSON in too many brackets; {advice}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a JSON value has more than DEEPEST_JSON brackets in brackets."""
    level = [value]
    for _ in range(DEEPEST_JSON + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
    return bool(level)


def check_prompt_length(text: str, name: str) -> None:
    """Raises UserError, which calls the text `name`, for one that is no prompt or caption."""
    if len(text) > LONGEST_PROMPT:
        raise UserError(
            f"{name} has {len(text):,} characters, expected at most {LONGEST_PROMPT:,}; "
            "text encoders read 77 to 512 tokens of it, shorten it"
        )


def is_number(text: str) -> bool:
    """Whether Python reads a text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def shorten_value(value: Any) -> str:
    """A value of a file as Python writes it, for quoting in an error: at most SHOWN characters.

    Of lists in lists only the first are looked at: those of a pickle may hold one another, and
    would be written 2^100 times.
    """
    try:
        return SHORT_REPR.repr(value)[:SHOWN]
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a very long {type(value).__name__}"


def nearest_names(
    name: str, known: Iterable[str], *, count: int = 1, cutoff: float = ALIKE
) -> list[str]:
    """Up to `count` of the known names, the most similar first.

    `cutoff`: the least similarity, from 0 (any) to 1 (the same), as difflib measures it; by default
    that of a mistyped name. Only the beginnings of long names are compared, and none with the known
    names after the first thousands: the time grows with the product of their lengths.
    """
    beginnings = {other[:LONGEST_NAME]: other for other in islice(known, MOST_NAMES)}
    found = difflib.get_close_matches(name[:LONGEST_NAME], beginnings, n=count, cutoff=cutoff)
    return [beginnings[other] for other in found]


def nearest_hint(name: str, known: Iterable[str], hint: str = "; the nearest is {}") -> str:
    """The end of a sentence about an unknown name; "" where no known name is near."""
    near = nearest_names(name, known)
    return hint.format(near[0]) if near else ""


def nearest_flag_hint(flag: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown flag, whose name or last part a known one resembles:
    --rank and --adapter.rank.
    """
    flags = list(known)
    names = {own.lstrip("-").rpartition(".")[2]: own for own in reversed(flags)}
    names |= {own.lstrip("-"): own for own in reversed(flags)}
    near = nearest_names(flag.partition("=")[0].lstrip("-"), names)
    return f"; the nearest flag is {names[near[0]]}" if near else ""


def suggest_name(name: str, known: Iterable[str]) -> str:
    """ " (nearest: NAME)", or nothing where no known name is near."""
    return nearest_hint(name, known, " (nearest: {})")


def unknown_name(name: str, known: Iterable[str], what: str, noun: str = "function") -> str:
    """The sentence for an option's value that is no known name and no path/to/file.py:noun.

    `what` ("loss", "schedule" ...) is the word for the value.
    """
    known, other = list(known), f"path/to/file.py:{noun}"
    if not known:
        return f"unknown {what} {name!r}; expected {other}"
    near = nearest_hint(name, known, ", the nearest is {!r}")
    return f"unknown {what} {name!r}{near}; choose {', '.join(known)} or {other}"


def print_escaped(text: str) -> None:
    r"""Prints a text; characters that the output's encoding lacks are written as \xe9."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


def normalize_unicode(text: str) -> str:
    """The text in Unicode's normal form C: é is one character (macOS writes e and an accent)."""
    return unicodedata.normalize("NFC", text)


def hide_home(text: str) -> str:
    """The text with ~ for the home folder at the start of every path in it."""
    home = str(Path.home())
    if len(Path(home).parts) < 2:
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(home)}(?=[/\\])", "~", text)


def check_unicode(value: Any, name: str) -> None:
    """Raises UserError for a text with bytes that are not UTF-8, also inside tables and lists.

    `name` is the option's name in the error.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_unicode(key, name)
            check_unicode(inner, f"{name}.{printable(key)}" if name else f"--{printable(key)}")
    elif isinstance(value, list | tuple):
        for inner in value:
            check_unicode(inner, name)
    elif isinstance(value, str) and printable(value) != value:
        option = name.replace("_", "-")
        raise UserError(
            f"{option} '{printable(value)}' has bytes that are not UTF-8; "
            "rename the file or folder, or write the text as UTF-8"
        )
