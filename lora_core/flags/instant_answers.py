"""What a script answers before it imports torch, which takes seconds: its page, --help, --version,
the completion of a shell, and the flags of other tools.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lora_core.errors import UserError, exit_status, print_help
from lora_core.flags.flag_values import OtherFlag
from lora_core.flags.other_flags import refuse_other_flags
from lora_core.plugin_lists import answer_list
from lora_core.quiet_libraries import speak_alone

VERSION_FLAG = "--version"
COMPLETION_FLAG = "--tyro-print-completion"
SHELLS = ("bash", "zsh")
LIBRARIES = ("torch", "diffusers", "transformers")  # whose versions decide what a run does
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# tyro's script completes no file names as the first word. Where it finds nothing, the shell's own
# completion has its turn. zsh reads its script as a file of its fpath.
FILES_TOO = {
    "bash": """
_{name}_or_files() {{
  _tyro_{name} "$@"
  [[ -n "${{COMPREPLY[*]}}" ]] || COMPREPLY=()
}}
complete -o default -F _{name}_or_files {command}
""",
    "zsh": "(( compstate[nmatches] )) || _files\n",
}


class Script(NamedTuple):
    """A script and its instant answers."""

    command: str  # its name where it is installed: lora-train
    page: str  # printed without arguments
    show_help: Callable[[Sequence[str]], object]  # called with the words that ask for it
    other_flags: Sequence[OtherFlag]
    own_flags: Callable[[Sequence[str]], Collection[str]]  # names of the flags that words may have
    parse: Callable[..., object]  # tyro's parser of its options, which also writes completions


def answer_at_start(module: str, argv: Sequence[str], script: Script) -> None:
    """Answers and ends the process where its words ask for an instant answer or a list.

    Else the libraries are silenced, which the script imports then.

    A script calls it before it imports torch. Nothing happens where this process runs another
    program: `module` is "__main__" for `python train.py`, and the installed command imports the
    script as a module.
    """
    if module != "__main__" and Path(argv[0]).stem != script.command:
        return
    answer_list(argv[1:])
    if (status := answer_instantly(script, argv[1:])) is not None:
        sys.exit(status)
    speak_alone()


def answer_instantly(script: Script, words: Sequence[str]) -> int | None:
    """The exit status where the words ask for an instant answer, which is printed; else None.

    0: help, versions or a completion; 2: no words, or flags of other tools.
    """
    if not words or set(words) & {"-h", "--help"}:
        print_help(partial(script.show_help, words) if words else partial(print, script.page))
        return 0 if words else 2
    if words[0] == VERSION_FLAG:
        print(describe_versions())
        return 0
    if words[0].replace("_", "-") == COMPLETION_FLAG:
        return exit_status(lambda: print(make_completion(script, words[1:])))
    refuse = partial(refuse_other_flags, words, script.other_flags, script.own_flags(words))
    return exit_status(refuse) or None


def describe_versions() -> str:
    """Our version and those of the libraries, read without importing them."""
    try:
        ours = metadata.version("lora_core")
    except metadata.PackageNotFoundError:  # a clone that is not installed
        found = re.search(r'^version = "(.+)"', PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
        ours = found[1] if found else "unknown"
    others = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    return ", ".join([f"lora_core {ours}", *others])


def make_completion(script: Script, shells: Sequence[str]) -> str:
    """The script that makes a shell complete the installed command: its flags and choices, and
    names of files. Raises UserError for another shell.
    """
    if len(shells) != 1 or shells[0] not in SHELLS:
        raise UserError(
            f"{COMPLETION_FLAG} is {' '.join(shells) or 'without a shell'}; "
            f"expected {' or '.join(SHELLS)}"
        )
    box = io.StringIO()
    with contextlib.redirect_stdout(box), contextlib.suppress(SystemExit):
        script.parse(args=[COMPLETION_FLAG, shells[0]], prog=script.command)
    name = script.command.replace("-", "_")
    return box.getvalue() + FILES_TOO[shells[0]].format(name=name, command=script.command)
