"""Flags of ours that other tools' commands take as well: our messages about --out name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_core import distributed
from lora_core.config import Config
from lora_core.flags.command_line import take_flag
from lora_core.runs.run_folder import Run

RUN_FLAGS: dict[str, Any] = {"overwrite": False, "resume": False, "resume_anyway": False, "out": ""}


def split_run_flags(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(RUN_FLAGS that the words give, the other words).

    A switch is ours without a value alone: kohya's own --resume has a path after it.
    """
    out, words = take_flag("out", words)
    given: dict[str, Any] = {} if out is None else {"out": out}
    rest = []
    for position, word in enumerate(words):
        name = word.removeprefix("--").replace("-", "_")
        has_value = any(not other.startswith("-") for other in words[position + 1 : position + 2])
        if word.startswith("--") and RUN_FLAGS.get(name) is False and not has_value:
            given[name] = True
        else:
            rest.append(word)
    return given, rest


def apply_run_flags(config: Config, given: Mapping[str, Any]) -> Config:
    """The config with the flags of RUN_FLAGS that were given."""
    return replace(config, **{name: value for name, value in given.items() if value})


def check_free_folder(config: Config) -> None:
    """Raises UserError where the run's folder is occupied: before a table is printed.

    Several processes look when they have met: a restart of torchrun resumes the run that it finds.
    """
    if not distributed.is_one_of_several():
        Run.check_folder(config.out, resume=config.resume, overwrite=config.overwrite)
