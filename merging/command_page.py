"""Answers of merge.py besides its commands: its page, versions, completions, and the flags of other
programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tyro

from lora_core.flags.instant_answers import Script, answer_instantly
from lora_core.flags.program_flags import MERGE_FLAGS
from merging.commands import COMMANDS, flatten

TITLE = (
    "merge.py: Merge, fold, distill, resize, convert and inspect adapter files; sum whole models."
)
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


def answer_words(words: Sequence[str], show_command_help: Callable[[str], None]) -> int | None:
    """The exit status where the words ask for such an answer, which is printed; else None.

    `show_command_help` prints the help of a command.
    """

    def show_help(words: Sequence[str]) -> None:
        if words[0] in COMMANDS:
            show_command_help(words[0])
        print(make_overview())

    options = {name: _take_options(command.options) for name, command in COMMANDS.items()}
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    parse = partial(tyro.extras.subcommand_cli_from_dict, options, config=markers)
    script = Script("lora-merge", make_overview(), show_help, MERGE_FLAGS, _own_flags, parse)
    return answer_instantly(script, words)


def make_overview() -> str:
    """The page of merge.py: the most used lines, and every command in a line."""
    lines = [TITLE, "", *map("  {}".format, EXAMPLES), ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:9}{command.options.__doc__}")
    return "\n".join([*lines, "", *ENDING])


def _own_flags(words: Sequence[str]) -> set[str]:
    """The names of the flags of the command that the words name."""
    command = COMMANDS.get(words[0])
    return set(flatten(command.options())) if command else set()


def _take_options(options: type) -> Callable[..., None]:
    """A function that takes the options of a command, as tyro wants to have it."""

    def take(options: Any = options()) -> None:  # noqa: B008 -- read by tyro, called by no one
        pass

    take.__annotations__["options"] = options
    return take
