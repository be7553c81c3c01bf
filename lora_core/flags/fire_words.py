"""A command line in the grammar of python-fire, with which cloneofsimo's commands are called.

--flag=value and --flag value set a value; --flag alone is True and --noflag False, whatever the
flag takes; - and _ in a name are the same, and -x is the one flag that begins with x. Words without
a flag fill the arguments that no flag sets, in their order. A value is read as Python writes it
(1e-4, True, None, [a, b]), and as a text where that fails.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.errors import UserError
from lora_core.text import nearest_hint, shorten_value

REQUIRED = object()  # default of an argument that must be given


def parse_fire_words(
    words: Sequence[str], defaults: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Name -> value of the arguments that were given.

    `defaults`: name -> default, in the function's order; None takes anything, a text takes any
    word as a text, a number or bool takes its kind. Raises UserError for an unknown flag, a word
    too many, a value of another kind, and an argument that is missing.
    """
    given: dict[str, Any] = {}
    loose: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not _is_flag(word):
            loose.append(word)
            continue
        flag, equals, text = word.partition("=")
        following = words[position : position + 1]
        is_switch = not equals and (not following or _is_flag(following[0]))
        name, switched = _resolve_name(flag, defaults, command, is_switch=is_switch)
        if is_switch:
            given[name] = switched
            continue
        position += not equals
        text = text if equals else following[0]
        given[name] = _read_value(text, name, defaults[name], command)
    free = [name for name in defaults if name not in given]
    if len(loose) > len(free):
        raise UserError(f"{command} has no place for {shorten_value(loose[-1])}; leave it out")
    for name, word in zip(free, loose, strict=False):
        given[name] = _read_value(word, name, defaults[name], command)
    for name, default in defaults.items():
        if default is REQUIRED and name not in given:
            raise UserError(f"{command} needs --{name}; see {command} --help")
    return given


def _is_flag(word: str) -> bool:
    """Whether fire takes a word as a flag: --name or -x, and not -1."""
    return word.startswith("--") or (len(word.partition("=")[0]) == 2 and word[1:2].isalpha())


def _resolve_name(
    flag: str, defaults: Mapping[str, Any], command: str, *, is_switch: bool
) -> tuple[str, bool]:
    """(argument, its value if the flag has none)."""
    name = flag.lstrip("-").replace("-", "_")
    if name in defaults:
        return name, True
    if is_switch and name.startswith("no") and name[2:] in defaults:
        return name[2:], False
    if len(name) == 1 and not flag.startswith("--"):
        begun = [known for known in defaults if known.startswith(name)]
        if len(begun) == 1:
            return begun[0], True
    near = nearest_hint(name, defaults, "; the nearest is --{}") or f"; see {command} --help"
    raise UserError(f"{command} has no flag {flag}{near}")


def _read_value(word: str, name: str, default: Any, command: str) -> Any:
    """A word as the kind of value that the argument's default is."""
    if default is REQUIRED or isinstance(default, str):
        return word
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = _read_bare_list(word)
    if default is None or value is None:
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        expected = "True or False"
    elif isinstance(default, int | float):
        if is_number and (isinstance(default, float) or value == int(value)):
            return type(default)(value)
        expected = "a whole number" if isinstance(default, int) else "a number"
    else:
        return value
    raise UserError(f"--{name} of {command} is {shorten_value(word)}, expected {expected}")


def _read_bare_list(word: str) -> Any:
    """[a.png,b.png] and {a,b} without quotes as a list; any other word as it is."""
    if word[:1] + word[-1:] in ("[]", "()", "{}"):
        return [part.strip() for part in word[1:-1].split(",") if part.strip()]
    return word
