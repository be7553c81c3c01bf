"""Options of a dataclass as flags: what tyro is given, and what a parse need not import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core.option_types import parse_value

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
