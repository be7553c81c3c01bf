"""The command line of train.py and infer.py: a TOML file and flags, parsed into a config.

Nothing here imports torch, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from lora_core.errors import UserError
from lora_core.flags.parser_errors import parse_words
from lora_core.option_types import REGISTRY
from lora_core.text import check_unicode
from lora_core.toml import flatten_table, from_file_table, layer_tables, read_table, read_toml

C = TypeVar("C")
STAGE_FLAG = re.compile(r"--stages\.(\d{1,6})\.")

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
    preset: Path | None = None,
    default: C | None = None,
) -> C:
    """The config that a command line describes: an optional TOML file first, then flags.

    Without `takes_file` there are flags only. `preset` is a TOML file with options that take the
    place of the defaults; `default` is what flags change where there is no file.

    Prints the help and exits where the words ask for it. Raises UserError, which names the nearest
    flag, for a wrong one. Where a flag replaces a choice of the file, such as its optimizer, the
    file's arguments of that choice are left out, which a printed line says.
    """
    words = list(words)
    check_unicode(words, "the argument")
    file = words.pop(0) if takes_file and words and not words[0].startswith("-") else ""
    default = default or read_layers(preset, Path(file) if file else None, cls)
    default = add_stages(default, words)
    usage = f"usage: {prog} [CONFIG.toml] [flags]      flags win over the file\n\n"
    description = f"{cls.__doc__}\n\n{usage if takes_file else ''}example: {example}"
    parse = partial(
        tyro.cli,
        cls,
        default=default,
        args=words,
        prog=prog,
        description=description,
        registry=REGISTRY,
    )
    config = parse_words(parse, f"see {prog} --help")
    return leave_out_arguments(config, default, words, file or str(preset))


def read_layers(preset: Path | None, file: Path | None, cls: type[C]) -> C:
    """The config of two TOML files; the options of `file` replace those of `preset`."""
    if preset is None:
        return read_toml(file, cls) if file else cls()
    below = read_table(preset)
    above = read_table(file) if file else {}
    config = from_file_table(file or preset, layer_tables(below, above), cls)
    given = [f"--{name}" for name in flatten_table(above)]
    return leave_out_arguments(config, from_file_table(preset, below, cls), given, str(preset))


def add_stages(default: C, words: Sequence[str]) -> C:
    """The config with a stage more for each number after its last that the flags name.

    Raises UserError for a gap: --stages.3.steps where there is one stage.
    """
    before = getattr(default, "stages", None)
    if before is None:
        return default
    stages = tuple(before)
    for number in sorted({int(found[1]) for found in map(STAGE_FLAG.match, words) if found}):
        if number > len(stages):
            raise UserError(
                f"--stages.{number} leaves a gap: the stages before it are missing; "
                f"the next is --stages.{len(stages)}"
            )
        if number == len(stages):
            stages = (*stages, get_args(get_type_hints(type(default))["stages"])[0]())
    if stages == before:
        return default
    return replace(default, stages=stages)  # type: ignore[type-var]


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


def take_flag(option: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(value, the other words) of the last flag --option VALUE or --option=VALUE; None: not given.

    Raises UserError for a flag without a value.
    """
    value, others, rest = None, [], iter(words)
    for word in rest:
        flag, equals, text = word.partition("=")
        if flag.replace("_", "-") != f"--{option}".replace("_", "-"):
            others.append(word)
            continue
        value = text if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise UserError(f"--{option} has no value; write --{option} VALUE")
    return value, others


def parser_of(cls: type) -> Callable[..., object]:
    """tyro's parser of a class of options."""
    return partial(tyro.cli, cls, registry=REGISTRY)


def top_flags(cls: type) -> set[str]:
    """The names of a class's flags without a dot, with _ for -."""
    names = set()
    for name, hint in get_type_hints(cls, include_extras=True).items():
        extras = getattr(hint, "__metadata__", ())  # of Annotated[...]
        names |= {name, *(getattr(extra, "name", None) or name for extra in extras)}
    return names


def show_help(cls: type, *, prog: str, example: str, takes_file: bool = True) -> None:
    """Prints the help of a class's flags and ends the process."""
    parse_command_line(cls, ["--help"], prog=prog, example=example, takes_file=takes_file)
