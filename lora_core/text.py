"""Text files as UTF-8, their lines, and characters that are written in several ways."""

import codecs
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

from lora_core.errors import UserError, printable

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    r"""The text of a UTF-8 file, with or without a byte order mark; \r\n and \r become \n. UserError for other encodings
    and for zero bytes, which no text has."""
    content = path.read_bytes()
    if content.startswith(UTF16):
        raise UserError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8")
    if b"\0" in content:
        raise UserError(
            f"{path} is no text: it has a zero byte at byte {content.index(0)}; save it as UTF-8 text"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} is not UTF-8 text ({reason}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file that are not empty, without space around them. UserError for other encodings.

    Only \n, \r\n and \r end a line. Python's `splitlines` also cuts at the vertical tab, form feed, U+001C to U+001E,
    U+0085, U+2028 and U+2029, which are space inside a line in every editor (Word writes them for a soft break).
    """
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def parse_json(text: str, name: str, advice: str) -> Any:
    """The value of a JSON text. Raises UserError, which calls it `name` and ends in `advice`, for one that is no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{name} is not JSON ({error.msg}{line}); {advice}") from error
    except RecursionError:
        raise UserError(f"{name} is JSON in too many brackets; {advice}") from None


def print_escaped(text: str) -> None:
    """Prints a text; characters that the encoding of the terminal or file lacks are written as \\xe9."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


def normalize_unicode(text: str) -> str:
    """The text in the normal form C: one character for é, where macOS writes e and an accent."""
    return unicodedata.normalize("NFC", text)


def check_unicode(value: Any, name: str) -> None:
    """Raises UserError for a text, in any depth of tables and lists, with bytes that are no UTF-8. `name`: of the option."""
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
            f"{option} '{printable(value)}' has bytes that are no UTF-8; rename the file or folder, or write the text as UTF-8"
        )
