"""The words of a command line that belong to no flag: their places, and quotes that are missing.

A shell splits an unquoted path at its spaces and replaces an unquoted `*` by the names of files.
Nothing here imports torch, because every command line is read with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_core.errors import UserError
from lora_core.text import nearest_flag_hint
from merging.commands import COMMANDS, Command, flatten
from merging.expression import find_unquoted_name, quote_name, quote_where_needed

FLAG = re.compile(r"--?[a-zA-Z][\w.-]*(=.*)?", re.DOTALL)
NUMBER = re.compile(r"-\d*\.?\d*(e[+-]?\d+)?", re.IGNORECASE)
SUFFIXED = re.compile(r".*\.(safetensors|pt|ckpt|bin)", re.IGNORECASE)
OTHER_NAMES_OF_OUT = ("-o", "--output")  # in other tools
SHOWN_WORDS = 4
MOST_SHOWN = 100  # characters of an example
EXAMPLE = "0.7*a.safetensors + 0.3*b.safetensors"


def is_flag(word: str) -> bool:
    """Whether a word is meant as a flag; -0.5 is a number, -, -1*a and -b.safetensors are sums."""
    return FLAG.fullmatch(word) is not None and not SUFFIXED.fullmatch(word.partition("=")[0])


def escape_word(word: str) -> str:
    """A word with a space in front where the parser would take it for a flag, and it is none."""
    is_taken = word.startswith("-") and not is_flag(word) and not NUMBER.fullmatch(word)
    return f" {word}" if is_taken else word


def flag_names(options: type) -> list[str]:
    """The flags of a command, such as --dry-run."""
    return [f"--{name.strip('_').replace('_', '-')}" for name in flatten(options())]


def place_words(name: str, options: Any, rest: Sequence[str], advice: str) -> Any:
    """The options with the words that the parser left over in their fields.

    The last word of a command with an output is its --out. Raises UserError for unknown flags, for
    words without a place, for an output that is given twice, and for what is missing.
    """
    command = COMMANDS[name]
    options, rest = _unescape_words(options), list(map(_unescape_word, rest))
    flags = [word for word in rest if is_flag(word)]
    if flags:
        known = flag_names(command.options)
        hint = nearest_flag_hint(flags[0], known)
        if flags[0].lower() in OTHER_NAMES_OF_OUT and "--out" in known:
            hint = "; the nearest flag is --out"
        raise UserError(f"unrecognized arguments: {_first_words(rest)}{hint}; {advice}")
    if command.takes_others:
        options, rest = _place_others(name, options, rest)
    words = [*_placed_words(name, options), *rest]
    if len(words) > 1:
        _refuse_split_names(words, "sum" in command.required)
    if command.words:
        options = _place_listed_words(command, options, rest)
    elif len(rest) == 1 and getattr(options, "out", None) == "" and not rest[0].startswith("-"):
        _refuse_file_as_output(name, words, options)
        options = replace(options, out=rest[0])
    elif rest:
        raise UserError(f"{_surplus_error(name, words, rest, options)}; {advice}")
    missing = [field for field in command.required if not getattr(options, field)]
    if missing:
        names = ["--out" if field == "out" else field.upper() for field in missing]
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{join_words(names)} {verb} required; {advice}")
    return options


def _place_listed_words(command: Command, options: Any, rest: Sequence[str]) -> Any:
    """The options of a command that takes two or more words; a further one may be its output.

    Raises UserError for an output that exists, or is given twice.
    """
    words: tuple[str, ...] = (*getattr(options, command.words), *rest)
    if "out" in command.required and len(words) > 2:
        last = words[-1]
        is_input = os.path.exists(last)
        if options.out and not is_input and ":" not in last:
            raise UserError(_output_given_twice(last, options.out))
        if not options.out and is_input and not options.files.overwrite:
            raise UserError(
                f"{last} is there already, and the last word is the output; name the output with "
                "--out, or pass --overwrite to replace it"
            )
        if not options.out:
            options, words = replace(options, out=last), words[:-1]
    return replace(options, **{command.words: words})


def _place_others(name: str, options: Any, rest: Sequence[str]) -> tuple[Any, list[str]]:
    """The options with the words after the first as further inputs, and the words that are left.

    With an output only the words that exist are inputs, and only next to --out. Raises UserError
    for several files without it.
    """
    words = [*options.others, *rest]
    options = replace(options, others=())
    if not hasattr(options, "out"):
        return replace(options, others=tuple(words)), []
    if options.out and words and all(map(os.path.exists, words)):
        return replace(options, others=tuple(words)), []
    if not options.out and len(words) > 1 and all(map(os.path.exists, words[:-1])):
        shown = _first_words([options.file, *words], ", ")
        raise UserError(
            f"{name} takes several files only with --out FOLDER, got {shown}; a path with spaces "
            "needs quotes"
        )
    return options, words


def _output_given_twice(word: str, out: str) -> str:
    return (
        f"the output is given twice, as {word} and as --out {out}; give one of them, and "
        "write a path with spaces in quotes"
    )


def join_words(words: Sequence[str]) -> str:
    """The words as a list in a sentence: A, B and C."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _unescape_words(options: Any) -> Any:
    """The options with the spaces of `escape_word` removed."""
    changes: dict[str, Any] = {}
    for field, value in vars(options).items():
        if isinstance(value, str):
            changes[field] = _unescape_word(value)
        elif isinstance(value, tuple):
            changes[field] = tuple(map(_unescape_word, value))
    return replace(options, **changes)


def _unescape_word(word: str) -> str:
    return word[1:] if word.startswith(" -") else word


def _placed_words(name: str, options: Any) -> list[str]:
    """The words that have a field without a flag, in their order."""
    placed: list[str] = []
    for field in [field for field in COMMANDS[name].required if field != "out"]:
        value = getattr(options, field)
        placed += [value] if isinstance(value, str) else value
    placed += getattr(options, "others", ())
    field = COMMANDS[name].words
    if field and field not in COMMANDS[name].required:
        placed += getattr(options, field)
    return [word for word in placed if word]


def _surplus_error(name: str, words: Sequence[str], rest: Sequence[str], options: Any) -> str:
    """What is wrong with a command line of too many words."""
    required = COMMANDS[name].required
    out = getattr(options, "out", "")
    is_more_of_sum = rest[0].startswith("-") or os.path.exists(rest[0])
    if out and len(rest) == 1 and not (required[0] == "sum" and is_more_of_sum):
        return _output_given_twice(rest[0], out)
    shown = _first_words(words, ", ")
    if required[0] == "sum":
        return (
            f"{name} takes one sum and --out, got the {len(words)} words {shown}; "
            f"{_advise_on_sum(words)}"
        )
    fields = dict.fromkeys((*required, "out") if hasattr(options, "out") else required)
    places = join_words([field.upper() for field in fields])
    return (
        f"{name} takes {places}, got the {len(words)} words {shown}; "
        "a path with spaces and a sum need quotes"
    )


def _first_words(words: Sequence[str], between: str = " ") -> str:
    """The first of many words, for a shell makes a thousand of one *."""
    return between.join(words[:SHOWN_WORDS]) + (" ..." if len(words) > SHOWN_WORDS else "")


def _advise_on_sum(words: Sequence[str]) -> str:
    """How to write a sum that the shell has split, or whose * it has replaced."""
    files = list(map(os.path.exists, words))
    if all(files):
        example = " + ".join(map(quote_where_needed, words))
    elif sum(files) < 2 or {"+", "-"} & set(words):
        example = " ".join(words)
    else:
        example = f"{EXAMPLE} ..."
    if len(example) > MOST_SHOWN:
        example = f"{example[:MOST_SHOWN]}..."
    return f'write it in double quotes, for the shell splits it and replaces its *: "{example}"'


def _refuse_file_as_output(name: str, words: Sequence[str], options: Any) -> None:
    """Raises UserError where a shell's `*` made the output of a sum from a second input."""
    first, last = words[0], words[-1]
    if name == "mix" and os.path.exists(last) and not options.files.overwrite:
        raise UserError(
            f"{last} is there already, and the last word is the output; pass --overwrite to "
            f'replace it, name another, or write a sum in double quotes: "{first} + {last}"'
        )


def _refuse_split_names(words: Sequence[str], has_sum: bool) -> None:
    """Raises UserError where several words together are the name of an existing file."""
    name = find_unquoted_name(" ".join(words), among=words)
    if name and not os.path.exists(name.split(" ")[0]):
        raise UserError(
            f"the shell has split the name {name} at its spaces; write it in quotes: "
            + (f'"0.7*{quote_name(name)}"' if has_sum else f'"{name}"')
        )
