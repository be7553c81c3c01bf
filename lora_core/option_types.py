"""How tyro reads a dataclass of options: one flag for each field, KEY=VALUE words for a table.

A script passes `REGISTRY` to `tyro.cli`. Nothing here imports torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache, partial
from typing import Annotated, Any, get_type_hints

import docstring_parser
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from lora_core.text import is_number, unknown_name

REGISTRY = ConstructorRegistry()

# Functions that options name, or file.py:fn; their own tables are imported with torch only.
WEIGHTING_NAMES = (
    "none", "min_snr", "soft_min_snr", "debiased", "p2", "snr", "sigma_sqrt", "cosmap",
)  # fmt: skip
DENSITY_NAMES = ("uniform", "logit_normal", "mode", "cosmap")
SCHEDULE_NAMES = (
    "constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd", "rex", "inverse_sqrt",
)  # fmt: skip

# ---------------------------------------------------------------- options of a dataclass


@REGISTRY.struct_rule
def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The options of a dataclass, with each help text joined into one paragraph.

    tyro itself keeps the line ends of an indented docstring. A help text is read when it is shown.
    """
    if not is_dataclass(info.type):
        return None
    default = info.default if isinstance(info.default, info.type) else info.type()
    options = []
    for name, hint in _option_types(info.type).items():
        help_text = partial(_help_text, info.type, name)
        options.append(StructFieldSpec(name, hint, getattr(default, name), help_text))
    return StructConstructorSpec(instantiate=info.type, fields=tuple(options))


@lru_cache(maxsize=32)
def _option_types(cls: type) -> dict[str, Any]:
    """Option -> its type; `object` for one that has its own PrimitiveConstructorSpec.

    tyro 1.0.17 would test the default of such an option against `int | None` with typeguard, whose
    import takes 0.1 s.
    """
    hints = get_type_hints(cls, include_extras=True)
    types = {}
    for field in fields(cls):
        hint = hints[field.name]
        extras = getattr(hint, "__metadata__", ())  # of Annotated[...]
        has_own_spec = any([isinstance(extra, PrimitiveConstructorSpec) for extra in extras])
        types[field.name] = Annotated[(object, *extras)] if has_own_spec else hint
    return types


def _help_text(cls: type, option: str) -> str | None:
    return _help_texts(cls).get(option)


@lru_cache(maxsize=32)
def _help_texts(cls: type) -> dict[str, str]:
    """Option -> the text below it in a settings class or the classes that it inherits from."""
    texts: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):
        for option in docstring_parser.parse_from_object(parent).params:
            texts[option.arg_name] = " ".join((option.description or "").split())
    return texts


# ---------------------------------------------------------------- tables: KEY=VALUE ...


def parse_value(text: str) -> Any:
    """A number, a boolean or a list as TOML or Python writes it (false, False, .5), else text."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        pass
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def _two_numbers(text: str) -> tuple[float, ...]:
    numbers = tuple(map(float, text.split(",")))
    if len(numbers) != 2:
        raise ValueError(f"expected two numbers B1,B2, got {text}")
    return numbers


# type of an option -> (how one value is read, how the help writes the option)
TABLE_TYPES: dict[Any, tuple[Callable[[str], Any], str]] = {
    dict[str, float]: (float, "KEY=NUMBER ..."),
    dict[str, str]: (str, "KEY=TEXT ..."),
    dict[str, tuple[float, float]]: (_two_numbers, "GROUP=B1,B2 ..."),
    dict[str, Any]: (parse_value, "KEY=VALUE ..."),
}


@REGISTRY.primitive_rule
def _table_option(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Reads `--option a=1 b=2` for the types above; None leaves other types to tyro."""
    for kind, (read, metavar) in TABLE_TYPES.items():
        if kind == info.type:
            return _table_spec(read, metavar)
    return None


def _table_spec(read: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: _parse_pairs(words, read),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda table: [f"{key}={value}" for key, value in table.items()],
    )


def _parse_pairs(words: Sequence[str], read: Callable[[str], Any]) -> dict[str, Any]:
    """{KEY: VALUE} of KEY=VALUE words. Raises ValueError, which tyro prints with the flag."""
    table: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, got {word}")
        if key in table:
            times = sum(other.startswith(f"{key}=") for other in words)
            raise ValueError(f"{key} is given {times} times, expected once")
        table[key] = read(value)
    return table


# ---------------------------------------------------------------- numbers of groups

ALL_GROUPS = "all"  # the key of a number that is for every group without one of its own


def _read_groups(words: list[str]) -> dict[str, float]:
    """{GROUP: NUMBER} of GROUP=NUMBER words; a number alone is for all groups."""
    pairs = [f"{ALL_GROUPS}={word}" if is_number(word) else word for word in words]
    return _parse_pairs(pairs, float)


GROUP_NUMBERS = replace(
    _table_spec(float, "NUMBER | GROUP=NUMBER ..."), instance_from_str=_read_groups
)

# ---------------------------------------------------------------- options of one word


def number(metavar: str, convert: Callable[[str], Any]) -> PrimitiveConstructorSpec[Any]:
    """A flag with an `int` or `float` as its value, or none."""

    def read(words: list[str]) -> Any:
        try:
            return convert(words[0])
        except ValueError:
            raise ValueError(f"invalid {convert.__name__} value: {words[0]!r}") from None

    return _one_word(metavar, read)


def choice(metavar: str, names: tuple[str, ...]) -> PrimitiveConstructorSpec[Any]:
    """A flag with one of some names as its value."""
    return replace(_one_word(metavar, lambda words: words[0]), choices=names)


def name_or_file(what: str, names: tuple[str, ...]) -> PrimitiveConstructorSpec[Any]:
    """A flag with one of some names as its value, or FILE.py:FUNCTION."""

    def read(words: list[str]) -> str:
        if words[0] not in names and ":" not in words[0]:
            raise ValueError(unknown_name(words[0], names, what))
        return words[0]

    return _one_word("NAME|FILE.py:FN", read)


def _read_truth(words: list[str]) -> bool:
    """True or False as python-fire reads it."""
    if words[0].lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"{words[0]!r} is neither True nor False")
    return words[0].lower() in ("true", "1")


def _read_count(words: list[str]) -> int:
    """A number of things that are shown."""
    if not words[0].isdecimal() or len(words[0]) > 9 or not int(words[0]):
        raise ValueError(f"invalid number: {words[0]!r}, expected 1 or more")
    return int(words[0])


def _one_word(metavar: str, read: Callable[[list[str]], Any]) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


TRUTH = _one_word("BOOL", _read_truth)
COUNT = _one_word("N", _read_count)
