"""Names that need quotes in a sum or in a shell: the error says so and how they are written."""

import shlex
import shutil

import pytest

from tests.merge_commands import call, snapshot

ODD_NAMES = [
    "my style.safetensors",
    "style (1).safetensors",
    "a - b.safetensors",
    "night+1.safetensors",
    "3*red.safetensors",
    "cat@home.safetensors",
    "2 dogs.safetensors",
    "it's me.safetensors",
    "-dash.safetensors",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_without_its_quotes_in_a_sum_gets_them_as_advice(here, name, capsys):
    shutil.copy("a.safetensors", name)
    before = snapshot(here)
    for line in (f"0.7*{name} + 0.3*b.safetensors", name, f"b.safetensors + {name}@attn"):
        call("mix", line, "--out", "o.safetensors", "--model", "base", status=2)
        first = capsys.readouterr().err.splitlines()[0]
        assert f"if {name} is one name, write it in quotes" in first
        (advice,) = shlex.split(first.partition("in quotes: ")[2])
    assert snapshot(here) == before
    call("mix", advice, "--out", "o.safetensors", "--model", "base")
    assert (here / "o.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if " " in name])
@pytest.mark.parametrize(
    "line", ["mix 0.7*{}", "mix 0.7*{} --out o.safetensors", "convert {}", "info {}",
             "convert {} --out o.safetensors", "resize {} o.safetensors --rank 1",
             "fold base 0.5*{} out", "add {} a.safetensors o.safetensors", "redo {}",
             "diff {} a.safetensors", "explain base base {}"],
)  # fmt: skip
def test_a_name_that_a_shell_has_split_is_said(here, name, line, capsys):
    shutil.copy("a.safetensors", name)
    before = snapshot(here)
    call(*line.format(name).split(" "), status=2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"split the name {name} at its spaces" in said[0]
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.safetensors", "+", "b.safetensors"], '"a.safetensors + b.safetensors"'),
        (["a.safetensors", "-", "b.safetensors"], '"a.safetensors - b.safetensors"'),
        (["a.safetensors", "-b.safetensors"], '"a.safetensors -b.safetensors"'),
        # *.safetensors without quotes, and 0.7 * a.safetensors
        (
            ["a.safetensors", "b.safetensors", "c.safetensors"],
            '"a.safetensors + b.safetensors + c.safetensors"',
        ),
        (["0.7", "a.safetensors", "b.safetensors", "a.safetensors"], "double quotes"),
        # a shell of Windows, for which ' is no quote
        (["'0.7*a.safetensors", "+", "b.safetensors'"], "double quotes"),
        (["a.safetensors", "b.safetensors"], "double quotes"),
    ],
)
def test_a_sum_that_a_shell_has_split_gets_its_quotes_as_advice(here, words, sentence, capsys):
    before = snapshot(here)
    for out in ([], ["--out", "o.safetensors"]):
        call("mix", *words, *out, status=2)
        said = capsys.readouterr().err
        assert sentence in said and "double quotes" in said and len(said.splitlines()) == 1
    assert snapshot(here) == before


def test_a_path_that_needs_no_quotes_gets_no_advice(here, capsys):
    for line in ("a.safetensors + nowhere.safetensors", "'my style.safetensors'", "a.st b.st"):
        shutil.copy("a.safetensors", "my other style.safetensors")
        call("mix", line, "--out", "o.safetensors", "--model", "base", status=2)
        assert "is one name" not in capsys.readouterr().err
