"""Text files as UTF-8, their lines, Unicode forms, and the names nearest to a wrong one."""

import codecs
import difflib
import json
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_core.errors import UserError, printable

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    r"""The text of a UTF-8 file, with or without a byte order mark; \r\n and \r become \n.

    Raises UserError for other encodings and for zero bytes, which no text has.
    """
    content = path.read_bytes()
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


def read_lines(path: Path) -> list[str]:
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
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{name} is not JSON ({error.msg}{line}); {advice}") from error
    except RecursionError:
        raise UserError(f"{name} is JSON in too many brackets; {advice}") from None


def nearest_names(
    name: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.0
) -> list[str]:
    """Up to `count` of the known names, the most similar first.

    `cutoff`: the least similarity, from 0 (any) to 1 (the same), as difflib measures it.
    """
    return difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)


def print_escaped(text: str) -> None:
    r"""Prints a text; characters that the output's encoding lacks are written as \xe9."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


def normalize_unicode(text: str) -> str:
    """The text in Unicode's normal form C: é is one character (macOS writes e and an accent)."""
    return unicodedata.normalize("NFC", text)


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
