"""Merge, fold, distill, resize, convert and inspect adapter files; sum whole models.

python merge.py mix "0.7*a.safetensors + 0.3*b.safetensors@attn" --out c.safetensors --rank 16
python merge.py fold toy/model "0.8*runs/demo" --out merged.safetensors
python merge.py COMMAND --help                               # every command has an example
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tyro

from lora_core.errors import UserError, exit_status, print_error, print_help
from lora_core.instant_answers import Script, answer_at_start, answer_instantly
from lora_core.option_types import REGISTRY
from lora_core.parser_errors import parse_words
from lora_core.program_flags import MERGE_FLAGS
from lora_core.text import check_unicode
from merging.arguments import escape_word, place_words
from merging.commands import COMMANDS, flatten, run_merge_command
from merging.lora_distill import HELP, run_lora_distill

EXAMPLES = (
    f"python merge.py mix {COMMANDS['mix'].example}",
    f"python merge.py fold {COMMANDS['fold'].example}",
    f"python merge.py info {COMMANDS['info'].example}",
)
ENDING = (
    "  COMMAND --help                its flags with an example;  --version",
    "  --tyro-print-completion bash  completion for the installed lora-merge (docs/training.md)",
    "Flags of other programs are answered with those here: try --ratios, --new_rank.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of merge.py; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if (status := answer_instantly(SCRIPT, words)) is not None:
        return status
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print_error(f"error: there is no command {words[0]}; choose {known}")
        return 2
    return run(words[0], words[1:])


def lora_add(argv: Sequence[str] | None = None) -> int:
    """The command line of the installed lora_add; returns its exit status."""
    return run("add", list(sys.argv[1:] if argv is None else argv), "lora_add")


def lora_distill(argv: Sequence[str] | None = None) -> int:
    """The command line of the installed lora_distill; returns its exit status."""
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


def show_merge_help(words: Sequence[str]) -> None:
    """Prints the help of the command that the words name, else the page of them all."""
    if words[0] in COMMANDS:
        parse_options(words[0], ["--help"], f"merge.py {words[0]}")
    print(overview())


def overview() -> str:
    """The page of merge.py: the most used lines, and every command in a line."""
    lines = ["merge.py: " + (__doc__ or "").splitlines()[0], "", *map("  {}".format, EXAMPLES), ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:9}{command.options.__doc__}")
    return "\n".join([*lines, "", *ENDING])


def merge_flags(words: Sequence[str]) -> set[str]:
    """The names of the flags of the command that the words name."""
    command = COMMANDS.get(words[0])
    return set(flatten(command.options())) if command else set()


def take_options(options: type) -> Callable[..., None]:
    """A function that takes the options of a command, as tyro wants to have it."""

    def take(options: Any = options()) -> None:  # noqa: B008 -- read by tyro, called by no one
        pass

    take.__annotations__["options"] = options
    return take


MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
SCRIPT = Script(
    "lora-merge",
    overview(),
    show_merge_help,
    MERGE_FLAGS,
    merge_flags,
    partial(
        tyro.extras.subcommand_cli_from_dict,
        {name: take_options(command.options) for name, command in COMMANDS.items()},
        config=MARKERS,
    ),
)


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
    parsed: tuple[Any, list[str]] = parse_words(parse, advice)
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


answer_at_start(__name__, sys.argv, SCRIPT)

if __name__ == "__main__":
    sys.exit(main())
