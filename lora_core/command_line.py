"""The command line of train.py and infer.py: a TOML file and flags, parsed into a config.

Nothing here imports torch, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import tyro

from lora_core.errors import print_help
from lora_core.option_types import REGISTRY
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


def answer_help(cls: type, words: Sequence[str], *, prog: str, example: str) -> None:
    """Prints the help and exits where the words ask for it; else returns.

    A script calls it before it imports torch, which takes seconds.
    """
    if "-h" in words or "--help" in words:
        print_help(partial(parse_command_line, cls, ["--help"], prog=prog, example=example))
        sys.exit(0)
