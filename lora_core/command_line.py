"""The command line of the scripts: parse flags into a config, and set the exit status.

Nothing here imports torch, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from lora_core.text import check_unicode
from lora_core.toml import read_toml

C = TypeVar("C")


def parse_command_line(cls: type[C], words: Sequence[str], *, prog: str, example: str) -> C:
    """The config that a command line describes: an optional TOML file first, then flags.

    Prints the help, or the nearest flag for a wrong one, and exits (status 0, 2).
    """
    words = list(words)
    check_unicode(words, "the argument")
    has_file = bool(words) and not words[0].startswith("-")
    default = read_toml(Path(words.pop(0)), cls) if has_file else cls()
    usage = f"usage: {prog} [CONFIG.toml] [flags]      flags win over the file"
    description = f"{cls.__doc__}\n\n{usage}\n\nexample: {example}"
    return tyro.cli(
        cls, default=default, args=words, prog=prog, description=description, registry=REGISTRY
    )


# ---------------------------------------------------------------- tables: KEY=VALUE ...


def parse_value(text: str) -> Any:
    """A number, a boolean or a list as TOML or Python writes it (false, False, .5), else text."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
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
    dict[str, str]: (str, "WORD=CLASS ..."),
    dict[str, tuple[float, float]]: (_two_numbers, "GROUP=B1,B2 ..."),
    dict[str, Any]: (parse_value, "KEY=VALUE ..."),
}
REGISTRY = ConstructorRegistry()


@REGISTRY.struct_rule
def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The options of a dataclass, with each help text joined into one paragraph.

    tyro itself keeps the line ends of an indented docstring.
    """
    if not is_dataclass(info.type):
        return None
    texts = _help_texts(info.type)
    hints = get_type_hints(info.type, include_extras=True)
    default = info.default if isinstance(info.default, info.type) else info.type()
    options = [
        StructFieldSpec(f.name, hints[f.name], getattr(default, f.name), texts.get(f.name))
        for f in fields(info.type)
    ]
    return StructConstructorSpec(instantiate=info.type, fields=tuple(options))


@lru_cache(maxsize=32)
def _help_texts(cls: type) -> dict[str, str]:
    """Option -> the text below it in a settings class or the classes that it inherits from."""
    texts: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):
        for option in docstring_parser.parse_from_object(parent).params:
            texts[option.arg_name] = " ".join((option.description or "").split())
    return texts


@REGISTRY.primitive_rule
def _table_option(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Reads `--option a=1 b=2` for the types above; None leaves other types to tyro."""
    found = next((how for kind, how in TABLE_TYPES.items() if kind == info.type), None)
    if found is None:
        return None
    read, metavar = found
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


# ---------------------------------------------------------------- how a script ends


def answer_help(cls: type, words: Sequence[str], *, prog: str, example: str) -> None:
    """Prints the help and exits where the words ask for it; else returns.

    A script calls it before it imports torch, which takes seconds.
    """
    if "-h" in words or "--help" in words:
        parse_command_line(cls, ["--help"], prog=prog, example=example)
