"""JSON files and JSON lines that others wrote: read, and checked to have the fields they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_core.errors import UserError, describe_disk_error
from lora_core.text import LONGEST_TABLE, parse_json, read_text, shorten_value

Fields = Mapping[str, tuple[type, ...]]  # name -> types that its value may have
INTEGER, NUMBER, TEXT, OBJECT = (int,), (int, float), (str,), (dict,)
NONE: Fields = MappingProxyType({})
WORDS: dict[tuple[type, ...], str] = {
    INTEGER: "an integer",
    NUMBER: "a number",
    TEXT: "a text",
    OBJECT: "an object",
}
LARGEST_INTEGER = 2**63 - 1
LARGEST_NUMBER = 1e100  # its square is a double too
LONGEST_JSON = 1 << 26  # bytes of one value; the tokenizer of T5, the longest in a model, has 2 MB


def parse_object(text: str, name: str, advice: str, fields: Fields = NONE) -> dict[str, Any]:
    """The object of a JSON text, which has the fields.

    Raises UserError, which calls the text `name` and ends in `advice`, for anything else.
    """
    value = parse_json(text, name, advice)
    if not isinstance(value, dict):
        raise UserError(f"{name} is {shorten_value(value)}, expected a JSON object; {advice}")
    for field, types in fields.items():
        found = value.get(field)
        if not isinstance(found, types) or isinstance(found, bool) or not _is_usable(found):
            what = f"{shorten_value(found)} as {field}, expected {WORDS[types]}"
            raise UserError(f"{name} has {what}; {advice}")
    return value


def read_object(path: Path, advice: str, fields: Fields = NONE) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError as `parse_object` does, and for no such file."""
    return parse_object(_read_file(path, LONGEST_JSON, advice), str(path), advice, fields)


def read_rows(path: Path, advice: str, fields: Fields) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, which have the fields; empty lines are left out.

    Raises UserError, naming the line, as `parse_object` does.
    """
    # Not splitlines: the texts may hold U+2028.
    for number, line in enumerate(_read_file(path, LONGEST_TABLE, advice).split("\n"), start=1):
        if line.strip():
            yield parse_object(line, f"{path}, line {number}", advice, fields)


def _is_usable(value: Any) -> bool:
    """False for a number that cannot be computed with: NaN, infinity, 10^400."""
    if isinstance(value, int):
        return abs(value) <= LARGEST_INTEGER
    return not isinstance(value, float) or abs(value) <= LARGEST_NUMBER


def _read_file(path: Path, limit: int, advice: str) -> str:
    try:
        return read_text(path, limit)
    except OSError as error:
        raise UserError(f"cannot read {describe_disk_error(error)}; {advice}") from None
