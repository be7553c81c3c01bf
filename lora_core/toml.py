"""A config from TOML and from a command line, and back to TOML; unknown keys are refused with the nearest name."""

from __future__ import annotations

import difflib
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import cattrs
import tomli_w
import tyro

from lora_core.config import Config, ScheduleName
from lora_core.errors import UserError
from lora_core.optim.schedules import SCHEDULES
from lora_core.text import check_unicode, read_text

C = TypeVar("C")


def _check_keys(table: dict[str, Any], cls: type, where: str, every: dict[str, str]) -> None:
    """Raises UserError for a key that is no field, with the nearest name. `every`: the last part of a dotted name -> the whole name."""
    hints = get_type_hints(cls)
    for key, value in table.items():
        if key not in hints:
            near = [where + n for n in difflib.get_close_matches(key, hints, 1, 0.7)] or [
                every[n] for n in difflib.get_close_matches(key, every, 1, 0.6)
            ]
            raise UserError(
                f"unknown key {where}{key}"
                + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(hints)}")
            )
        kind = hints[key]
        if is_dataclass(kind) and isinstance(value, dict):
            _check_keys(value, kind, f"{where}{key}.", every)  # type: ignore[arg-type]
        if is_dataclass(kind) and not isinstance(value, dict):
            raise UserError(
                f"{where}{key} is {value!r}, expected a table; write [{where}{key}] and its options below"
            )
        for inner in filter(is_dataclass, get_args(kind)):
            if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
                raise UserError(
                    f"{where}{key} is {value!r}, expected a list of tables; write [[{where}{key}]] in double brackets for each"
                )
            for i, row in enumerate(value):
                _check_keys(row, inner, f"{where}{key}.{i}.", every)  # type: ignore[arg-type]


def _names(cls: type, where: str = "") -> dict[str, str]:
    """Last part -> dotted name, of every field."""
    found = {}
    for name, kind in get_type_hints(cls).items():
        found[name] = where + name
        if is_dataclass(kind):
            found |= _names(kind, f"{where}{name}.")  # type: ignore[arg-type]
    return found


def from_table(table: dict[str, Any], cls: type[C] = Config) -> C:  # type: ignore[assignment]
    """The config that a parsed TOML table describes. Raises UserError for unknown keys and values of a wrong type."""
    _check_keys(table, cls, "", _names(cls))
    converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=False)
    converter.register_structure_hook(
        bool, lambda v, _: v if isinstance(v, bool) else _refuse(v, "true or false")
    )
    converter.register_structure_hook(
        int,
        lambda v, _: (
            v if isinstance(v, int) and not isinstance(v, bool) else _refuse(v, "an integer")
        ),
    )
    converter.register_structure_hook(
        float,
        lambda v, _: (
            float(v)
            if isinstance(v, int | float) and not isinstance(v, bool)
            else _refuse(v, "a number")
        ),
    )
    converter.register_structure_hook(
        str, lambda v, _: v if isinstance(v, str) else _refuse(v, "a text in quotes")
    )
    converter.register_structure_hook(
        ScheduleName,
        lambda v, _: v if _is_schedule(v) else _refuse(v, f"{', '.join(SCHEDULES)} or file.py:fn"),
    )
    try:
        return converter.structure(table, cls)
    except cattrs.BaseValidationError as error:
        lines = cattrs.transform_error(error, format_exception=lambda e, _: str(e))
        raise UserError(
            "; ".join(
                f"{place.removeprefix('$.')}: {what}"
                for what, _, place in (line.partition(" @ ") for line in lines)
            )
        ) from None


def _is_schedule(value: Any) -> bool:
    return isinstance(value, str) and (value in SCHEDULES or ".py:" in value)


def _refuse(value: Any, wanted: str) -> Any:
    raise ValueError(f"got {value!r}, expected {wanted}")


def read_toml(path: Path, cls: type[C] = Config) -> C:  # type: ignore[assignment]
    """The config in a TOML file. Raises UserError when it is missing, is no TOML, or has an unknown key."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"no config file {path}") from None
    except OSError as error:  # a folder, no permission
        raise UserError(
            f"cannot read the config {path}: {error.strerror}; name a TOML file"
        ) from None
    try:
        return from_table(tomllib.loads(text), cls)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_table(config: Any) -> dict[str, Any]:
    """A config as a tree of plain values; fields that are None are left out, as TOML has no None."""
    if is_dataclass(config):
        pairs = ((f.name, to_table(getattr(config, f.name))) for f in fields(config))
        return {name: value for name, value in pairs if value is not None}
    if isinstance(config, tuple | list):
        return [to_table(item) for item in config]  # type: ignore[return-value]
    return config


def to_toml(config: Any) -> str:
    """The config as TOML; `from_table(tomllib.loads(...))` gives it back."""
    return tomli_w.dumps(to_table(config))


def parse_command_line(cls: type[C], argv: Sequence[str] | None, *, prog: str, example: str) -> C:
    """The config that a command line describes: an optional TOML file first, then flags. Ends with status 2 and the nearest flag on a wrong one."""
    words = list(sys.argv[1:] if argv is None else argv)
    check_unicode(words, "the argument")
    default = (
        read_toml(Path(words.pop(0)), cls) if words and not words[0].startswith("-") else cls()
    )
    description = f"{cls.__doc__}\n\nusage: {prog} [CONFIG.toml] [flags]      flags win over the file\n\nexample: {example}"
    return tyro.cli(cls, default=default, args=words, prog=prog, description=description)
