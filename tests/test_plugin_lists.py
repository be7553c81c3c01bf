"""`--list`: all entries of the tables, a sentence each, without torch and in 80 columns."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import train
from lora_core.plugin_lists import LISTED_TABLES, first_sentence, list_entries

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", LISTED_TABLES)
def test_the_source_is_read_as_python_imports_it(name: str) -> None:
    listed = LISTED_TABLES[name]
    table = getattr(importlib.import_module(listed.module), listed.table)
    entries = {entry.name: entry for entry in list_entries(listed.module, listed.table)}
    assert list(entries) == list(table)
    for key, value in table.items():
        sentence = entries[key].sentence
        assert len(sentence) > 10 and sentence.endswith("."), (key, sentence)
        function = getattr(value, "run", None) or getattr(value, "reference", None) or value
        if inspect.isfunction(function) or inspect.isclass(function):
            assert sentence == first_sentence(inspect.getdoc(function) or "")
        if inspect.isfunction(function):
            known = inspect.signature(function).parameters
            for argument in entries[key].arguments:
                option, _, default = argument.partition("=")
                assert repr(known[option].default) == default


def test_a_list_is_printed_at_once_and_fits_into_80_columns() -> None:
    code = "import sys; sys.argv = ['train.py', '--list', 'all']; import runpy\n"
    code += "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split(":")[0] for line in lines if line[:1].isalpha()] == list(LISTED_TABLES)


def test_an_unknown_list_is_refused_and_no_name_prints_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(["--list", "shedules"]) == 2
    assert "unknown list 'shedules', the nearest is 'schedules'" in capsys.readouterr().err
    assert train.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name, table in LISTED_TABLES.items():
        assert f"  {name} " in printed and table.choice in printed


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("[b] the mean (arXiv 1 eq. 14).\n\nMore.", "the mean (arXiv 1 eq. 14)."),
        ("Linear from 1 to 0. `end` is last.", "Linear from 1 to 0."),
        ("Two\nlines, e.g. this", "Two lines, e.g. this."),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence
