"""`--preset`: recipes for a character, a style or an object, one TOML file for each model family.

A preset takes the place of the defaults: a config file and flags win over it. To change one for
good, copy its file and name the copy as the config file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import take_flag
from lora_core.text import nearest_hint
from lora_core.toml import read_table
from models import read_layout

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
    return preset_file(name, read_layout(path, config, own).family), others


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
    file = words[0] if words and not words[0].startswith("-") else ""
    table = read_table(Path(file)) if file else {}
    return str(table.get(option, getattr(Config, option)))
