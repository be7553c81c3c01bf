"""`--preset`: recipes for a character, a style or an object, one TOML file for each model family.

A preset takes the place of the defaults: a config file and flags win over it. To change one for
good, copy its file and name the copy as the config file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import is_given, take_flag
from lora_core.text import nearest_hint
from lora_core.toml import flatten_table, read_table
from models import read_layout
from models.published_configs import config_source

FOLDER = Path(__file__).parent.parent / "configs" / "presets"
PRESETS = ("character", "style", "object")
MODEL_OPTIONS = ("model", "model_config", "family")


def take_preset(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """(TOML file of the preset that the words name with --preset, the other words).

    The file is that of the model's family; the model is the one of the flags, else of the config
    file. Raises UserError for an unknown preset, and without a model.
    """
    name, others = take_flag("preset", words)
    if name is None:
        return None, others
    if name not in PRESETS:
        near = nearest_hint(name, PRESETS, ", the nearest is {!r}")
        raise UserError(f"there is no preset {name!r}{near}; choose {', '.join(PRESETS)}")
    path, config, own = (_find_option(option, others) for option in MODEL_OPTIONS)
    if not path:
        raise UserError(f"--preset {name} depends on the model; name one with --model")
    source = path if own else config_source(path)  # without the hub for published models
    return preset_file(name, read_layout(source, config, own).family), others


def fit_intervals(config: Config, words: Sequence[str]) -> Config:
    """The config of a preset and words, in which a shorter run than the preset's has a checkpoint
    at its end alone, and no samples before. Intervals that the user gave stay as they are.
    """
    own = flatten_table(_config_table(words))

    def is_preset(option: str, every: int) -> bool:
        return every > config.steps and not (option in own or is_given(option, words))

    if is_preset("save_every", config.save_every):
        config = replace(config, save_every=config.steps)
    if is_preset("samples.every", config.samples.every):
        config = replace(config, samples=replace(config.samples, every=0))
    return config


def preset_file(name: str, family: str) -> Path:
    """The TOML file of a preset. Raises UserError for a family that has none."""
    file = FOLDER / f"{family}_{name}.toml"
    if not file.is_file():
        raise UserError(
            f"there is no preset {name!r} for models of the family {family}; leave --preset out "
            "and set the options, see docs/training.md"
        )
    return file


def read_preset(name: str, family: str) -> dict[str, Any]:
    """The options of a preset as a table. Raises UserError like `preset_file`."""
    return read_table(preset_file(name, family))


def _find_option(option: str, words: Sequence[str]) -> str:
    """The value of a text option on the command line, else in its config file, else the default."""
    value, _ = take_flag(option.replace("_", "-"), words)
    if value is not None:
        return value
    return str(_config_table(words).get(option, getattr(Config, option)))


def _config_table(words: Sequence[str]) -> dict[str, Any]:
    """The table of the config file that a command line begins with; empty without one."""
    file = words[0] if words and not words[0].startswith("-") else ""
    return read_table(Path(file)) if file else {}
