"""merge.py redo: the same bytes from the same inputs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.adapter_checks import header
from tests.merge_commands import call


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "0.7*a.safetensors + 0.3*c.safetensors@attn", "--rank", "3", "--out"),
        ("resize", "b.safetensors", "--energy", "0.9"),
        (
            "mix",
            "a.safetensors - b.safetensors",
            "--method",
            "dare",
            "--rank",
            "2",
            "--seed",
            "5",
            "--dtype",
            "fp16",
            "--out",
        ),
        ("add", "a.safetensors", "a.safetensors", "--mode", "lpl"),
        ("fold", "base", "0.5*a.safetensors"),
        ("convert", "c.safetensors", "--to", "kohya"),
    ],
)
def test_redo_gives_the_same_bytes(here, words, capsys):
    command = (
        [*words, "m.safetensors"]
        if words[0] != "add"
        else [*words[:3], "m.safetensors", *words[3:]]
    )
    call(*command, *(("--model", "base") if words[0] != "fold" else ()))
    before = Path("m.safetensors").read_bytes()
    call("redo", "m.safetensors")
    assert "the same as before: m.safetensors" in capsys.readouterr().out
    os.mkdir("other")
    call("redo", "m.safetensors", "--out", "other/m.safetensors")
    assert Path("other/m.safetensors").read_bytes() == before == Path("m.safetensors").read_bytes()
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_redo_wants_the_same_inputs(here, capsys, monkeypatch):
    call("mix", "0.7*a.safetensors", "--out", "m.safetensors", "--model", "base")
    recipe = json.loads(header("m.safetensors")["lora_core.merge"])
    assert recipe["options"] == {"sum": "0.7*a.safetensors", "model": "base"} and list(
        recipe["inputs"]
    ) == ["a.safetensors"]
    monkeypatch.chdir("/")
    call("redo", here / "m.safetensors")  # inputs beside the file are found
    monkeypatch.chdir(here)
    shutil.copy("m.safetensors", "old.safetensors")
    state = load_file("m.safetensors")
    save_file(
        {key: 2 * value for key, value in state.items()}, "m.safetensors", header("m.safetensors")
    )
    call("redo", "m.safetensors", status=2)
    assert "comes out differently" in capsys.readouterr().err
    call("redo", "m.safetensors", "--overwrite")
    assert Path("m.safetensors").read_bytes() == Path("old.safetensors").read_bytes()
    shutil.copy("c.safetensors", "a.safetensors")
    call("redo", "m.safetensors", status=2)
    os.remove("a.safetensors")
    call("redo", "m.safetensors", status=2)
    call("redo", "b.safetensors", status=2)
    assert re.search(
        r"(?s)its sha256 differs.*neither below.*has no recipe", capsys.readouterr().err
    )


def test_redo_of_a_model_folder(here, capsys):
    call("fold", "base", "0.5*run", "folded")
    call("redo", "folded")
    assert "the same as before: folded" in capsys.readouterr().out
