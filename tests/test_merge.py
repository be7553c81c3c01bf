"""merge.py's command line: a mistake is one sentence and touches nothing, help fits a screen."""

import re

import pytest

import merge
from tests.merge_commands import call, snapshot

BAD = [
    (("mix", "0.7*a.safetensors + ", "--out", "o.safetensors"), "ends too early"),
    (("mix", "a.safetensors", "--out", ""), "--out is required"),
    (
        ("mix", "nowhere.safetensors", "--out", "o.safetensors"),
        "nowhere.safetensors does not exist",
    ),
    (
        ("mix", "a.safetensors@nowhere", "--out", "o.safetensors"),
        "a.safetensors: @nowhere matches none",
    ),
    (("mix", "a.safetensors", "--out", "taken.safetensors"), "--overwrite"),
    (("mix", "a.safetensors", "--out", "run"), "is a folder"),
    (("mix", "a.safetensors", "--out", "o.txt"), "should end in .safetensors"),
    (("mix", "a.safetensors", "--out", "locked/o.safetensors"), "not writable"),
    (("mix", "a.safetensors", "--out", "a.safetensors/o.safetensors"), "not a folder"),
    (("mix", "nan.safetensors", "--out", "o.safetensors"), "NaN or Inf"),
    (("mix", "cut.safetensors", "--out", "o.safetensors"), "cannot be read|truncated"),
    (("mix", "empty.safetensors", "--out", "o.safetensors"), "is empty"),
    (
        ("mix", "other.safetensors", "--out", "o.safetensors", "--model", "base"),
        "other.safetensors",
    ),
    (("mix", "1e30*a.safetensors", "--out", "o.safetensors", "--dtype", "fp16"), "overflow"),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--rank", "2", "--energy", "0.5"),
        "exclude each other",
    ),
    (("mix", "a.safetensors", "--out", "o.safetensors", "--rank", "0"), "a rank is at least 1"),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--budget", "many"),
        "not a number of ranks",
    ),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--density", "0.1"),
        "--density has no effect",
    ),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--residual", "r.safetensors"),
        "--residual has no effect",
    ),
    (("mix", "0.5*base + 0.5*base@attn", "--out", "o"), "layers can be chosen of adapters only"),
    (("fold", "a.safetensors", "a.safetensors", "o"), "is not a whole model"),
    (("fold", "base", "base", "o"), "is a whole model"),
    (("fold", "base", "a.safetensors", "run"), "is there already"),
    (("fold", "base", "a.safetensors", "a.safetensors"), "is there already"),
    (("fold", "nowhere/none", "a.safetensors", "o"), "the hub gave no model"),
    (("distill", "base", "a.safetensors", "o.safetensors", "--rank", "2"), "is not a whole model"),
    (("distill", "base", "base", "o.safetensors"), "choose how much"),
    (("convert", "base", "o.safetensors", "--to", "kohya"), "drop --to"),
    (("convert", "d.safetensors", "o.safetensors", "--to", "cloneofsimo"), "DoRA"),
    (("info", "nowhere.safetensors"), "does not exist"),
    (("info", "base", "--plot", "s.png"), "whole model"),
    (("diff", "a.safetensors", "base"), "whole model"),
    (("explain", "base", "base", "a.safetensors"), "nothing to explain"),
    (("redo", "nowhere"), "does not exist"),
    (("add", "a.safetensors", "b.safetensors"), "one of these is missing"),
    (("add", "a.safetensors", "b.safetensors", "o.safetensors", "x"), "is not a number"),
    (("add", "a.safetensors", "b.safetensors", "o.safetensors", "1", "1", "1"), "in addition"),
    (("add", "a.safetensors", "c.safetensors", "o", "--mode", "upl"), "first"),
    (("add", "base", "a.safetensors", "o", "1", "1", "--mode", "upl"), "one alpha"),
    (("add", "base", "a.safetensors", "o.safetensors"), "choose --mode upl"),
    (("mix",), "error: SUM and --out are required; see merge.py mix --help"),
    (("fold",), "BASE, SUM and --out are required; see merge.py fold --help"),
    (("explain", "tuned"), "BASE and LORAS are required"),
    (("mix", "a", "--rank", "x"), "invalid int"),
    (("nothing",), "there is no command"),
    (("mix", "a", "--outt", "b"), "nearest flag is --out;"),
    (("mix", "a", "--rank"), "argument --rank: no value; see merge.py mix --help"),
    (("resize", "a", "b", "--overwrite=yes"), "argument --overwrite takes no value, got 'yes'"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_mistakes_are_one_sentence_and_touch_nothing(spoiled, words, sentence, capsys):
    before = snapshot(spoiled)
    model = (
        ("--model", "base")
        if words[0] in ("mix", "convert", "info", "diff", "add")
        and "--model" not in words
        and len(words) > 1
        else ()
    )
    call(*words, *model, status=2)
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("warning", "note"))
    ]
    assert re.search(sentence, "\n".join(said)), said
    assert len(said) <= 3 and not any("Traceback" in line for line in said)
    assert snapshot(spoiled) == before


@pytest.mark.parametrize("command", ["", *merge.COMMANDS])
def test_help_fits_on_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", True)  # as on a terminal
    call(*([command] if command else []), "--help")
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) <= 36
        and max(map(len, lines)) <= 120
        and any(line.startswith(("example: merge.py", "  python merge.py")) for line in lines)
    )


def test_examples_of_the_help_are_commands(monkeypatch):
    import shlex

    seen = []
    monkeypatch.setattr(merge, "run_merge_command", lambda name, options: seen.append(name))
    for name, command in merge.COMMANDS.items():
        call(name, *shlex.split(command.example))
    assert seen == list(merge.COMMANDS)


def test_an_interruption_is_said(here, monkeypatch, capsys):
    def stop(name, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "run_merge_command", stop)
    call("info", "a.safetensors", status=130)
    assert "interrupted" in capsys.readouterr().err
