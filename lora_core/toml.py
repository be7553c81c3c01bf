"""A config from a TOML file and back; an unknown key is refused with the nearest known name."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import cattrs
import tomli_w

from lora_core.config import PLUGIN_NAMES, Config, MaskSource
from lora_core.errors import UserError
from lora_core.option_types import ALL_GROUPS, GROUP_NUMBERS
from lora_core.shared_paths import nearest_path
from lora_core.text import nearest_names, read_text, shorten_value

C = TypeVar("C")
# Limits of TOML that others wrote: of 5,000 names in one key, tomllib makes 5,000 tables in tables.
LONGEST_TOML = 1 << 18  # bytes of a config; one with every option has 8,000
# Fifty names with dots between them.
LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')\s*\.\s*){50}""")


def read_toml(path: Path, cls: type[C] = Config) -> C:  # type: ignore[assignment]
    """The config in a TOML file.

    Raises UserError when the file is missing, is no TOML, or has an unknown key.
    """
    return from_file_table(path, read_table(path), cls)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises UserError when the file is missing or is no TOML."""
    try:
        text = read_text(path, LONGEST_TOML)
    except FileNotFoundError:
        raise missing_config(path) from None
    except OSError as error:  # a folder, no permission
        raise UserError(
            f"cannot read the config {path}: {error.strerror}; name a TOML file"
        ) from None
    return parse_toml(text, str(path))


def missing_config(path: Path) -> UserError:
    """The error for a config file that is not there, with the nearest that is."""
    near = nearest_path(path)
    return UserError(f"no config file {path}{f'; the nearest is {near}' if near else ''}")


def from_file_table(path: Path, table: dict[str, Any], cls: type[C]) -> C:
    """The config of a file's table. Raises UserError, which names the file, like `from_table`."""
    try:
        return from_table(table, cls)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def layer_tables(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables of options in one. Where both have an option, it is that of `above`; a list, such
    as the stages, is taken whole.
    """
    layered = dict(below)
    for name, value in above.items():
        lower = below.get(name)
        both = isinstance(value, dict) and isinstance(lower, dict)
        layered[name] = layer_tables(lower, value) if both else value  # type: ignore[arg-type]
    return layered


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The table that a TOML text describes. Raises UserError, which calls it `name`, for others."""
    if len(text) > LONGEST_TOML or LONG_KEY.search(text):
        raise UserError(
            f"{name} is not a TOML file of options: it has more than {LONGEST_TOML:,} characters "
            "or a name in more than 50 parts"
        )
    try:
        return tomllib.loads(text)
    except ValueError as error:  # also an integer of thousands of digits
        raise UserError(f"{name} is not a TOML file: {error}") from None
    except RecursionError:
        raise UserError(f"{name} is not a TOML file of options: brackets in brackets") from None


def from_table(table: dict[str, Any], cls: type[C] = Config) -> C:  # type: ignore[assignment]
    """The config that a parsed TOML table describes.

    Raises UserError for unknown keys and values of a wrong type.
    """
    _check_keys(table, cls, "", _dotted_names(cls, ""))  # type: ignore[arg-type]
    try:
        return _make_converter().structure(_spread_numbers(table, cls), cls)
    except cattrs.BaseValidationError as error:
        lines = cattrs.transform_error(error, format_exception=lambda e, _: str(e))
        raise UserError("; ".join(map(_place_first, lines))) from None


def _spread_numbers(value: Any, kind: Any, place: str = "") -> Any:
    """A value of a TOML file with each number for all groups (lr = 1e-4) as a table of its own.

    Raises UserError for what is neither a number nor a table.
    """
    if GROUP_NUMBERS in getattr(kind, "__metadata__", ()):
        if not _is_number(value) and not isinstance(value, dict):
            raise UserError(
                f"{place} is {shorten_value(value)}, expected a number for all groups, or a table "
                "with a number for each"
            )
        return {ALL_GROUPS: value} if _is_number(value) else value
    if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
        stages = enumerate(value)
        return [_spread_numbers(item, get_args(kind)[0], f"{place}.{i}") for i, item in stages]
    if not is_dataclass(kind):
        return value
    kinds = _option_types(kind, include_extras=True)  # type: ignore[arg-type]
    start = f"{place}." if place else ""
    return {name: _spread_numbers(v, kinds[name], start + name) for name, v in value.items()}


@cache  # it compiles a function for each section
def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=False)
    for kind, (accepts, expected) in PLAIN_TYPES.items():
        converter.register_structure_hook(kind, _strict(kind, accepts, expected))
    converter.register_structure_hook_func(lambda kind: get_origin(kind) is Literal, _one_of)
    converter.register_structure_hook_func(
        lambda kind: kind == MaskSource, _strict(str, *PLAIN_TYPES[str])
    )
    return converter


def to_table(config: Any) -> Any:
    """A config as a tree of plain values; options that are None are left out: TOML has no None."""
    if is_dataclass(config):
        table = {f.name: to_table(getattr(config, f.name)) for f in fields(config)}
        return {name: value for name, value in table.items() if value is not None}
    if isinstance(config, tuple | list):
        return [to_table(item) for item in config]
    return config


def flatten_table(table: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name (stages.0.steps) -> value, of every option in a config's table."""
    is_list = isinstance(table, list) and table and all(isinstance(v, dict) for v in table)
    inner = dict(enumerate(table)) if is_list else table
    if not isinstance(inner, dict):
        return {prefix.removesuffix("."): table}
    flat: dict[str, Any] = {}
    for name, value in inner.items():
        flat |= flatten_table(value, f"{prefix}{name}.")
    return flat


def to_toml(config: Any) -> str:
    """The config as TOML; `from_table(tomllib.loads(...))` gives it back."""
    return tomli_w.dumps(to_table(config))


# ---------------------------------------------------------------- values of a wrong type


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _fits_double(value)


def _fits_double(value: float) -> bool:
    """Whether it is a float or an integer of a float's range; JSON can also write 10^400."""
    return isinstance(value, float) or abs(value) < 2**1023


# type of an option -> (test of a TOML value, description of the expected value for errors)
PLAIN_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (_is_integer, "an integer"),
    float: (_is_number, "a number"),
    str: (lambda value: isinstance(value, str), "a text in quotes"),
}


def _plugin_type(names: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    """The entry of PLAIN_TYPES for one of some names or file.py:fn."""
    known = f"{', '.join(names)} or file.py:fn"
    return lambda value: isinstance(value, str) and (value in names or ":" in value), known


PLAIN_TYPES |= {kind: _plugin_type(names) for kind, names in PLUGIN_NAMES.items()}


def _strict(kind: Any, accepts: Callable[[Any], bool], expected: str) -> Callable[[Any, Any], Any]:
    """A cattrs hook that refuses a TOML value of another type, which cattrs would convert."""

    def structure(value: Any, _: Any) -> Any:
        if not accepts(value):
            raise ValueError(f"got {shorten_value(value)}, expected {expected}")
        return float(value) if kind is float else value

    return structure


# Choices that were true or false before: where one was written, what it means now.
CHECKPOINTING = ("none", "blocks", "all")
FORMER_WORDS = {
    CHECKPOINTING: {
        True: "write \"all\", which is what true was (the denoiser's blocks and the text encoders' "
        'layers), or "blocks" (the denoiser\'s alone)',
        False: 'write "none"',
    }
}


def _one_of(value: Any, kind: Any) -> Any:
    """The value, if it is one of a Literal's. cattrs' own error shows the type as Python does."""
    if value not in get_args(kind):
        known = ", ".join(map(str, get_args(kind)))
        former = FORMER_WORDS.get(get_args(kind), {}) if isinstance(value, bool) else {}
        advice = f"; {former[value]}" if value in former else ""
        raise ValueError(f"got {shorten_value(value)}, expected one of {known}{advice}")
    return value


def _place_first(line: str) -> str:
    """ "got 3, expected a text @ $.model" as "model: got 3, expected a text"."""
    reason, _, place = line.partition(" @ ")
    return f"{place.removeprefix('$.')}: {reason}"


# ---------------------------------------------------------------- unknown keys


def _check_keys(table: dict[str, Any], cls: type, prefix: str, known: dict[str, str]) -> None:
    """Raises UserError for a key that is not an option, with the nearest name.

    `known`: the last part of a dotted name -> the whole name, of every option.
    """
    hints = _option_types(cls)
    for key, value in table.items():
        if key not in hints:
            raise UserError(_unknown_key(key, prefix, list(hints), known))
        kind, name = hints[key], prefix + key
        if is_dataclass(kind):
            if not isinstance(value, dict):
                message = f"{name} is {shorten_value(value)}, expected a table"
                raise UserError(f"{message}; write [{name}] and its options below")
            _check_keys(value, kind, f"{name}.", known)  # type: ignore[arg-type]
        for inner in filter(is_dataclass, get_args(kind)):
            for i, inner_table in enumerate(_tables(value, name)):
                _check_keys(inner_table, inner, f"{name}.{i}.", known)  # type: ignore[arg-type]


def _unknown_key(key: str, prefix: str, hints: list[str], known: dict[str, str]) -> str:
    """The error for an unknown key: a near option of its own section, else of any section."""
    near = [prefix + name for name in nearest_names(key, hints, cutoff=0.7)]
    near += [known[name] for name in nearest_names(key, known, cutoff=0.6)]
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(hints)}"
    return f"unknown key {prefix}{key}; {advice}"


def _tables(value: Any, name: str) -> list[dict[str, Any]]:
    """The value of a list of tables. Raises UserError for anything else."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    message = f"{name} is {shorten_value(value)}, expected a list of tables"
    raise UserError(f"{message}; write [[{name}]] in double brackets for each")


_option_types = cache(get_type_hints)  # class of options -> name -> type; evaluated once


@cache
def _dotted_names(cls: type, prefix: str) -> dict[str, str]:
    """Last part -> dotted name, of every option."""
    found = {}
    for name, kind in _option_types(cls).items():
        found[name] = prefix + name
        if is_dataclass(kind):
            found |= _dotted_names(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found
