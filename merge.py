"""Merge, fold, distill, resize, convert and inspect adapter files; sum whole models.

python merge.py mix "0.7*a.safetensors + 0.3*b.safetensors@attn" --out c.safetensors --rank 16
python merge.py fold toy/model "0.8*runs/demo" --out merged.safetensors
python merge.py COMMAND --help                               # every command has an example
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from lora_core.errors import UserError, exit_status, print_error, print_help
from lora_core.option_types import REGISTRY
from lora_core.text import check_unicode
from merging.arguments import escape_word, place_words
from merging.commands import COMMANDS, flatten, run_merge_command

MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of merge.py; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not has_own_flags(words):
        from merging.command_page import answer_words  # with tables of other programs' flags

        if (status := answer_words(words, show_command_help)) is not None:
            return status
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print_error(f"error: there is no command {words[0]}; choose {known}")
        return 2
    return run(words[0], words[1:])


def has_own_flags(words: Sequence[str]) -> bool:
    """Whether the words are a command and no other flags than its own."""
    if not words or words[0] not in COMMANDS:
        return False
    own = {f"--{name}" for name in flatten(COMMANDS[words[0]].options())}
    given = {word.partition("=")[0].replace("-", "_") for word in words[1:] if word[:1] == "-"}
    return {f"--{flag[2:]}" for flag in given} <= own


def show_command_help(command: str) -> None:
    """Prints the help of a command and ends as the parser does."""
    parse_options(command, ["--help"], f"merge.py {command}")


def lora_add(argv: Sequence[str] | None = None) -> int:
    """The command line of the installed lora_add; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    status = run("add", words or ["--help"], "lora_add")
    return status if words else 2


def lora_distill(argv: Sequence[str] | None = None) -> int:
    """The command line of the installed lora_distill; returns its exit status."""
    from merging.lora_distill import HELP, run_lora_distill

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or {"-h", "--help"} & set(words):
        print_help(lambda: print(HELP))
        return 0 if words else 2

    def carry_out() -> None:
        check_unicode(words, "the argument")
        run_lora_distill(words)

    return exit_status(carry_out, undone="nothing was written")


def run(command: str, words: Sequence[str], prog: str = "") -> int:
    """Runs one command and returns the exit status.

    0: done; 2: a mistake, which the printed sentence explains; 130: interrupted.
    """
    prog = prog or f"merge.py {command}"
    if "-h" in words or "--help" in words:
        print_help(partial(parse_options, command, ["--help"], prog))  # with colors: not escaped
        return 0

    def carry_out() -> None:
        check_unicode(words, "the argument")
        run_merge_command(command, parse_options(command, words, prog))

    return exit_status(carry_out, undone="nothing was written")


# ---------------------------------------------------------------- parsing


def parse_options(name: str, words: Sequence[str], prog: str) -> Any:
    """The options of a command from the words after its name.

    Prints the help and raises SystemExit for --help. Raises UserError, one sentence with the
    nearest flag, for a mistake.
    """
    command, advice = COMMANDS[name], f"see {prog} --help"
    _refuse_switch_values(command.options, words, advice)
    description = f"{command.options.__doc__}\n\nexample: {prog} {command.example}"
    parse = partial(
        tyro.cli,
        command.options,
        args=[_read_word(word, following) for word, following in _pairs(words)],
        prog=prog,
        description=description,
        config=MARKERS,
        registry=REGISTRY,
        return_unknown_args=True,
    )
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed: tuple[Any, list[str]] = parse()
    except SystemExit as end:
        if not end.code:
            raise
        from lora_core.flags.parser_errors import read_parser_error

        raise UserError(f"{read_parser_error(box.getvalue())}; {advice}") from None
    return place_words(name, *parsed, advice)


def _refuse_switch_values(options: type, words: Sequence[str], advice: str) -> None:
    """Raises UserError for --overwrite=yes: the parser would take `yes` for the next argument."""
    defaults = flatten(options())
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        is_switch = defaults.get(name) is False and name != "with_text_lora"
        if word.startswith("--") and equals and is_switch:
            raise UserError(f"argument {flag} takes no value, got {value!r}; {advice}")


def _pairs(words: Sequence[str]) -> zip[tuple[str, str]]:
    """Each word with the one after it."""
    return zip(words, [*words[1:], ""])


def _read_word(word: str, following: str) -> str:
    """A word for the parser: --with-text-lora without a value is True, as in python-fire."""
    if word in ("--with-text-lora", "--with_text_lora"):
        has_value = following.lower() in ("true", "false")
        return word if has_value else f"{word}=True"
    return escape_word(word)


if __name__ == "__main__" or Path(sys.argv[0]).stem == "lora-merge":
    from lora_core.quiet_libraries import speak_alone

    speak_alone()

if __name__ == "__main__":
    sys.exit(main())
