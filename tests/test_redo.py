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


# ---------------------------------------------------------------- recipes of strangers


def save_stranger(command: str, options: dict, inputs: dict, file: str = "s.safetensors") -> None:
    recipe = {"command": command, "options": options, "inputs": inputs}
    state = load_file("a.safetensors")
    save_file(state, file, header("a.safetensors") | {"lora_core.merge": json.dumps(recipe)})


@pytest.fixture
def opened(monkeypatch):
    """The names of all files that are opened for reading by the digest, the formats or the hub."""
    names = []
    monkeypatch.setattr("merging.redo.sha256_digest", lambda name: names.append(name) or "0")
    monkeypatch.setattr("models.hub_models.download_model", names.append)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", names.append)
    return names


@pytest.mark.parametrize(
    ("options", "inputs", "said"),
    [
        ({"file": "a.safetensors"}, ["a.safetensors", "/"], "a folder without a model"),
        ({"file": "a.safetensors"}, ["a.safetensors", "private"], "a folder without a model"),
        ({"file": "a.safetensors"}, ["a.safetensors", "secret.txt"], "reads files in .safe"),
        ({"file": "a.safetensors"}, ["a.safetensors", "/dev/zero"], "not on this disk"),
        ({"file": "a.safetensors"}, ["a.safetensors", "mallory/big"], "not on this disk"),
        ({"file": "mallory/big"}, ["mallory/big"], "mallory/big, which is not on this disk"),
        ({"file": "a.safetensors", "model": "mallory/big"}, ["a.safetensors"], "mallory/big"),
        ({"file": "a.safetensors", "model_config": "private"}, ["a.safetensors"], "private"),
        ({"file": "b.safetensors"}, ["a.safetensors"], "b.safetensors, which is not among"),
        ({"sum": "a.safetensors + 'b.safetensors'@attn"}, ["a.safetensors"], "not among"),
        ({"file": "a.safetensors"}, ["a.safetensors", "wide"], "files or 64 GB"),
    ],
)
def test_redo_reads_no_more_than_models_and_adapters(
    here, capsys, opened, monkeypatch, options, inputs, said
):
    Path("secret.txt").write_text("the password")
    (Path("private") / "photos").mkdir(parents=True)
    Path("private/photos/face.png").write_bytes(b"x")
    shutil.copytree("private", "wide")
    shutil.copy("a.safetensors", "wide")
    monkeypatch.setattr("merging.redo.MOST_FILES", 2)
    save_stranger("mix" if "sum" in options else "convert", options, dict.fromkeys(inputs, "0"))
    call("redo", "s.safetensors", "--out", "new.safetensors", status=2)
    assert said in capsys.readouterr().err
    assert not opened and not Path("new.safetensors").exists()


def test_a_model_that_was_fetched_before_may_be_read(here, capsys, opened, monkeypatch):
    def find(name: str, file: str) -> str | None:
        return file if name == "mine/base" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", find)
    options = {"file": "a.safetensors", "model": "mine/base", "to": "kohya"}
    save_stranger("convert", options, {"a.safetensors": "1"})
    call("redo", "s.safetensors", status=2)
    assert "its sha256 differs" in capsys.readouterr().err and opened == ["a.safetensors"]


def test_a_merge_names_no_home_folder_and_is_repeated(here, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    Path("far").mkdir()
    mine = here / "a.safetensors"
    for words in (
        ["mix", f"0.7*{mine} + 0.3*'{here / 'c.safetensors'}'@attn", "--out", "m.safetensors"],
        ["convert", mine, "m.safetensors", "--to", "kohya", "--overwrite"],
        ["add", mine, mine, "m.safetensors", "--mode", "lpl", "--overwrite"],
        ["fold", here / "base", f"0.5*{mine}", "m.safetensors", "--overwrite"],
    ):
        model = () if words[0] == "fold" else ("--model", here / "base")
        call(*words, *model)
        text = header("m.safetensors")["lora_core.merge"]
        assert str(here) not in text and '"~/a.safetensors"' in text, text
        with monkeypatch.context() as patch:
            patch.chdir("far")
            call("redo", "../m.safetensors")
            assert "the same as before" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["sum", "model", "model_config"])
@pytest.mark.parametrize("value", [{"a": 1}, ["a.safetensors"], 7, True])
def test_a_recipe_names_files_by_texts(here, capsys, option, value):
    call("mix", "0.5*a.safetensors", "--out", "made.safetensors")
    tensors, metadata = load_file("made.safetensors"), header("made.safetensors")
    recipe = json.loads(metadata["lora_core.merge"])
    recipe["options"][option] = value
    save_file(tensors, "made.safetensors", metadata | {"lora_core.merge": json.dumps(recipe)})
    capsys.readouterr()
    call("redo", "made.safetensors", "--dry-run", status=2)
    assert f"as {option}, expected a name" in capsys.readouterr().err
