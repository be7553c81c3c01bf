"""Options of a dataclass as flags: what tyro is given, and what a parse need not import."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from infer import Infer
from lora_core import option_types
from lora_core.config import Config
from lora_core.option_types import parse_value
from merging.commands import COMMANDS
from training.comparisons.compare_options import CompareRuns

ROOT = Path(__file__).parent.parent
PARSE = """
import json, sys
import merge
from lora_core import option_types
words = ["0.7*a + 0.3*b", "--out", "c", "--rank", "4"]
options = merge.parse_options("mix", words, "merge.py mix")
texts = option_types._help_texts.cache_info().currsize
print(json.dumps([options.sum, options.keep.rank, texts, "typeguard" in sys.modules]))
"""


def test_a_parse_reads_no_help_text_and_checks_no_default() -> None:
    """Both take longer than the parse: 0.1 s for docstrings, as much for importing typeguard."""
    command = [sys.executable, "-c", PARSE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["0.7*a + 0.3*b", 4, 0, False]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("snr", "snr"),
    ],
)
def test_a_value_is_read_as_toml_or_python_writes_it(text: str, value: object) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


# ---------------------------------------------------------------- texts of all options

UNITS = re.compile(
    r"\b(pixels?|steps?|images?|tokens|threads|visits?|vectors|octaves|layers|processes|ranks?|"
    r"weight|probability|share|fraction|scale|seed|checkpoints|timesteps?|draws|norm|rate|strength|"
    r"decay|alpha|passes|frames|milliseconds|seconds|bytes|GB|gigabytes|epochs?|vectors|lines|"
    r"columns|relative|power|sigma|times|words|ridge|mean square|tags)\b",
    re.IGNORECASE,
)
EMPTY = re.compile(r"\b(empty|none|others|no default|instead of|also without)\b", re.IGNORECASE)
# Options of which 0 is a value like any other: the first seed, and what begins at 0.
PLAIN_ZERO = {"seed", "validation.seed"}
UNSET = "Options that are not set are those of"  # the text of a class whose options are None


def all_options(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str | None, str]]:
    """(dotted name, default, help text, text of its class) of every option."""
    default = cls()
    for field in fields(cls):
        value, name = getattr(default, field.name), prefix + field.name
        if is_dataclass(value):
            yield from all_options(type(value), f"{name}.")
        elif name == "stages":
            yield from all_options(type(value[0]), "stages.0.")
        else:
            yield name, value, option_types._help_text(cls, field.name), cls.__doc__ or ""


SCRIPT_OPTIONS = [*all_options(Config), *all_options(Infer), *all_options(CompareRuns)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_every_option_has_a_text() -> None:
    assert len(SCRIPT_OPTIONS) > 150
    assert not [name for name, _, text, _ in SCRIPT_OPTIONS if not text]


def test_every_number_says_what_it_counts() -> None:
    numbers = [(name, text) for name, value, text, _ in SCRIPT_OPTIONS if is_number(value)]
    assert not [f"{name}: {text}" for name, text in numbers if not UNITS.search(text or "")]


def test_every_empty_default_says_what_it_means() -> None:
    offenders = []
    for name, value, text, about in SCRIPT_OPTIONS:
        is_empty = value is None or value in ("", (), {})
        if is_empty and not EMPTY.search(text or "") and UNSET not in " ".join(about.split()):
            offenders.append(f"{name}: {text}")
    assert not offenders


def test_every_zero_says_what_it_means() -> None:
    offenders = []
    for name, value, text, _ in SCRIPT_OPTIONS:
        if is_number(value) and value in (0, -1) and name not in PLAIN_ZERO:
            said = rf"(?<![\d.]){int(value)}( and \d+)?:|\b{int(value)} (is|are)\b"
            if not re.search(said, text or ""):
                offenders.append(f"{name}: {text}")
    assert not offenders


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_merge_has_a_text_with_its_default(command: str) -> None:
    offenders = []
    required = {*COMMANDS[command].required, COMMANDS[command].words}
    for name, value, text, _ in all_options(COMMANDS[command].options):
        last = name.rpartition(".")[2]
        shown = f"{value:g}" if is_number(value) else str(value)
        is_default = is_number(value) or (isinstance(value, str) and bool(value))
        # 0 stands for what the brackets say: (the model's own)
        in_words = value == 0 and (text or "").endswith(")")
        is_said = not is_default or last in required or in_words or shown in (text or "")
        if not text or not is_said:
            offenders.append(f"{name} = {value!r}: {text}")
    assert not offenders
