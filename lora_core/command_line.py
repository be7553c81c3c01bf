"""The command line of train.py and infer.py: a TOML file and flags, parsed into a config.

Nothing here imports torch, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tyro

from lora_core.errors import print_help
from lora_core.option_types import REGISTRY
from lora_core.text import check_unicode
from lora_core.toml import read_toml

C = TypeVar("C")

# An option that names a function or a class -> the option with its arguments.
ARGUMENTS_OF = {
    "loss": "loss_arg",
    "weighting": "weighting_arg",
    "noise.density": "noise.density_args",
    "optimizer.name": "optimizer.args",
    "optimizer.schedule": "optimizer.schedule_args",
    "samples.sampler": "samples.sampler_args",
    "sampler": "sampler_args",
}


def parse_command_line(
    cls: type[C],
    words: Sequence[str],
    *,
    prog: str,
    example: str,
    takes_file: bool = True,
    default: C | None = None,
) -> C:
    """The config that a command line describes: an optional TOML file first, then flags.

    Without `takes_file` there are flags only. `default`: what they change, in place of the class's
    own defaults.

    Prints the help, or the nearest flag for a wrong one, and exits (status 0, 2). Where a flag
    replaces a choice of the file, such as its optimizer, the file's arguments of that choice are
    left out, which a printed line says.
    """
    words = list(words)
    check_unicode(words, "the argument")
    file = words.pop(0) if takes_file and words and not words[0].startswith("-") else ""
    default = read_toml(Path(file), cls) if file else default or cls()
    usage = f"usage: {prog} [CONFIG.toml] [flags]      flags win over the file\n\n"
    description = f"{cls.__doc__}\n\n{usage if takes_file else ''}example: {example}"
    config = tyro.cli(
        cls, default=default, args=words, prog=prog, description=description, registry=REGISTRY
    )
    return leave_out_arguments(config, default, words, file)


def override_options(config: C, words: Sequence[str], prog: str) -> C:
    """The config with the options that the flags set; a wrong flag ends the process as above."""
    check_unicode(words, "the argument")
    return tyro.cli(type(config), default=config, args=list(words), prog=prog, registry=REGISTRY)


def leave_out_arguments(config: C, default: C, words: Sequence[str], file: str) -> C:
    """The config without the file's arguments of choices that the flags `words` replace.

    `default` is the config of the file. Learning rates are left out too between Prodigy, which
    multiplies its own estimate by them, and other optimizers: they differ by a factor of thousands.
    """
    for choice, option in ARGUMENTS_OF.items():
        before, now = _read_option(default, choice), _read_option(config, choice)
        if before == now:
            continue
        options = [option]
        if choice == "optimizer.name" and _is_prodigy(before) != _is_prodigy(now):
            options.append("optimizer.lr")
            options += [f"stages.{i}.lr" for i in range(len(_read_option(config, "stages")))]
        left_out = []
        for each in options:
            if _read_option(config, each) and not is_given(each, words):
                left_out.append(each)
                config = _replace_option(config, each, {})
        if left_out:
            print(
                f"warning: {file} has {' and '.join(left_out)} for {before}; left out, because "
                f"--{choice} is {now}",
                file=sys.stderr,
            )
    return config


def _read_option(config: Any, path: str) -> Any:
    """The value of an option such as stages.0.lr; None for a class without it."""
    for name in path.split("."):
        config = config[int(name)] if name.isdigit() else getattr(config, name, None)
    return config


def _replace_option(config: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    if name.isdigit():
        changed = _replace_option(config[int(name)], rest, value)
        return (*config[: int(name)], changed, *config[int(name) + 1 :])
    if rest:
        value = _replace_option(getattr(config, name), rest, value)
    return replace(config, **{name: value})


def _is_prodigy(optimizer: str) -> bool:
    return "prodigy" in optimizer.lower()


def is_given(option: str, words: Sequence[str]) -> bool:
    """Whether a flag sets the option; both spellings, --loss-arg and --loss_arg, are flags."""
    flag = f"--{option}".replace("_", "-")
    return any(word.partition("=")[0].replace("_", "-") == flag for word in words)


def answer_help(
    cls: type, words: Sequence[str], *, prog: str, example: str, takes_file: bool = True
) -> None:
    """Prints the help and exits where the words ask for it; else returns.

    A script calls it before it imports torch, which takes seconds.
    """
    if "-h" in words or "--help" in words:
        asked = partial(parse_command_line, cls, ["--help"], prog=prog, example=example)
        print_help(partial(asked, takes_file=takes_file))
        sys.exit(0)
