"""Names with a * in a sum: all files that they match, in order, found again by redo."""

import shutil
from pathlib import Path

import pytest

from lora_core import formats
from lora_core.errors import UserError
from merging import file_patterns
from merging.expression import WeightedFile, parse_files
from merging.file_patterns import expand_pattern
from tests.merge_commands import assert_equal, call, deltas, summed

NAMES = ["b-1", "b-2", "b-10", "[x] y", ".hidden"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loras/deep").mkdir(parents=True)
    for name in NAMES:
        Path(f"loras/{name}.safetensors").touch()
    Path("loras/deep/c.safetensors").touch()
    Path("loras/notes.txt").touch()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("loras/*.safetensors", ["[x] y", "b-1", "b-10", "b-2"]),
        ("loras/b-*.safetensors", ["b-1", "b-10", "b-2"]),
        ("loras/b-*0.safetensors", ["b-10"]),
        ("'loras/[x]*.safetensors'", ["[x] y"]),
        ("l*/*/c.safetensors", ["deep/c"]),
        ("loras/*.safetensors - loras/b-1.safetensors", ["[x] y", "b-10", "b-2"]),
    ],
)
def test_a_star_is_every_name_that_it_matches(folder, text, names):
    files = parse_files(text)
    assert files == [WeightedFile(1.0, f"loras/{name}.safetensors") for name in names]


def test_each_file_has_the_weight_and_the_layers_of_the_name(folder):
    for text in ("0.5*(loras/b-*.safetensors@attn)", "0.5*loras/b-*.safetensors@attn"):
        assert {(file.weight, file.choices) for file in parse_files(text)} == {(0.5, ("attn",))}
    files = parse_files("mean(loras/b-*.safetensors + 2*loras/deep/c.safetensors)")
    assert [file.weight for file in files] == [0.25, 0.25, 0.25, 0.5]
    assert [file.weight for file in parse_files("2*mean(loras/b-*.safetensors)@unet")] == [
        2 / 3
    ] * 3


def test_a_file_with_a_star_in_its_name_is_itself(folder):
    Path("loras/b-*.safetensors").touch()
    assert parse_files("loras/b-*.safetensors") == [WeightedFile(1.0, "loras/b-*.safetensors")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("loras/*.pt", "loras/[*].pt matches no file; a [*] in a name stands for"),
        ("loras/b-1.safetensors*0.5", "a weight stands before its file: 0.5[*]loras/b-1.safe"),
        ("nowhere/*", "nowhere/[*] matches no file"),
    ],
)
def test_a_star_that_matches_nothing_is_said(folder, text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_files(text)


def test_the_output_is_no_input_of_the_next_mix(folder):
    with pytest.raises(UserError, match=r"output loras/sum\.safetensors matches loras/\*"):
        parse_files("loras/*.safetensors", "loras/sum.safetensors")
    for output in ("sum.safetensors", "loras/deep/sum.safetensors", "loras/sum.pt"):
        assert len(parse_files("loras/*.safetensors", output)) == 4


def test_a_folder_of_too_many_files_is_refused(folder, monkeypatch):
    monkeypatch.setattr(file_patterns, "MOST_MATCHES", 3)
    with pytest.raises(UserError, match="more than 3 files"):
        expand_pattern("loras/*.safetensors")


# ---------------------------------------------------------------- through the command


def test_the_mix_of_a_folder_is_the_sum_of_its_files_and_can_be_redone(
    here, states, layout, capsys
):
    Path("loras").mkdir()
    for name in "ab":
        shutil.copy(f"{name}.safetensors", f"loras/{name}.safetensors")
    call("mix", "mean(loras/*.safetensors)", "--out", "m.safetensors", "--model", "base")
    exact = summed([(0.5, states["a"]), (0.5, states["b"])])
    assert_equal(deltas(formats.load("m.safetensors", layout)), exact, 1e-5)
    call("fold", "base", "0.25*loras/*.safetensors", "folded")
    capsys.readouterr()
    call("redo", "m.safetensors")
    assert "the same as before" in capsys.readouterr().out
    shutil.copy("c.safetensors", "loras/c.safetensors")
    call("redo", "m.safetensors", status=2)
    said = capsys.readouterr().err
    assert "reads loras/c.safetensors, which is not among its inputs" in said


def test_the_token_files_of_loras_are_no_terms_of_a_pattern(here, states, layout, capsys):
    """A mean of two LoRAs is of two files; a name that is written out stays what it is."""
    Path("ten").mkdir()
    for name in ("one", "two"):
        shutil.copy("run/run.safetensors", f"ten/{name}.safetensors")
        shutil.copy("run/run_emb.safetensors", f"ten/{name}_emb.safetensors")
    shutil.copy("run/run_emb.safetensors", "ten/apart_emb.safetensors")
    pattern = "ten/*.safetensors"
    assert [(file.weight, file.path) for file in parse_files("mean(ten/*o*.safetensors)")] == [
        (0.5, "ten/one.safetensors"),
        (0.5, "ten/two.safetensors"),
    ]
    assert capsys.readouterr().err == (
        "note: 2 token files of the LoRAs in ten/*o*.safetensors are left out, such as "
        "ten/one_emb.safetensors; give run folders to have the tokens in the result\n"
    )
    kept = [file.path for file in parse_files(pattern)]  # one belongs to no LoRA of the pattern
    assert kept == ["ten/apart_emb.safetensors", "ten/one.safetensors", "ten/two.safetensors"]
    assert len(parse_files("ten/*_emb.safetensors")) == 3
    assert len(parse_files("ten/one.safetensors + ten/one_emb.safetensors")) == 2
    capsys.readouterr()
    assert len(parse_files("ten/one*.safetensors")) == 1
    assert (
        "1 token file of the LoRAs in ten/one*.safetensors is left out" in capsys.readouterr().err
    )
    call("mix", "mean(ten/*o*.safetensors)", "--out", "m.safetensors", "--model", "base")
    result = formats.load("m.safetensors", layout)
    assert_equal(deltas(result), deltas(states["a"]), 1e-5)
    assert not Path("m_emb.safetensors").exists()
