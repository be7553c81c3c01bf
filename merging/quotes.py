"""Names of files that a sum can only have in quotes: with spaces, parentheses or operators."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

UNQUOTED = re.compile(r"[^\s*()@\"'+-][^\s*()@\"'+]*")  # a path that needs no quotes in a sum
BORDERS = " *@()+-\"'"  # characters next to which a path in a sum begins or ends
MOST_BORDERS = 100  # looked at; a sum has a few


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
