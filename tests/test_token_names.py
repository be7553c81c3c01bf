"""Token rows of several files in one: names that clash are changed, and said."""

import shutil
from pathlib import Path

import torch

from lora_core import formats
from lora_core.formats import embeddings
from tests.merge_commands import call


def test_tokens_that_clash_are_renamed_and_reported(here, states, layout, capsys):
    call(
        "mix", "0.5*run + 0.5*c.safetensors + run@unet", "--out", "m.safetensors", "--model", "base"
    )
    said = capsys.readouterr()
    assert (
        "<s1> of c.safetensors is called <s1-2> in the result" in said.err
        and said.err.count("is called") == 2
    )
    assert "written: m_emb.safetensors" in said.out
    state = formats.load("m_emb.safetensors", layout)
    assert state.token_names == ("<s1>", "<s2>", "<s1-2>", "<s2-2>")
    assert torch.equal(
        state.tokens["clip_l"],
        torch.cat([states["a"].tokens["clip_l"], states["c"].tokens["clip_l"]]),
    )
    assert embeddings.placeholder_words(state) == {"TOK": ("<s1>", "<s2>")}
    shutil.copytree("run", "run2")
    call("mix", "run + run2", "--out", "w.safetensors", "--model", "base")
    assert embeddings.placeholder_words(formats.load("w_emb.safetensors", layout)) == {
        "TOK": ("<s1>", "<s2>"),
        "TOK2": ("<s1-2>", "<s2-2>"),
    }
    assert "TOK of run2 is called TOK2" in capsys.readouterr().err
    call(
        "mix",
        "run@cross + c.safetensors@cross",
        "--out",
        "i.safetensors",
        "--model",
        "base",
        "--format",
        "cloneofsimo",
    )
    assert (
        formats.load("i.safetensors", layout).token_names == state.token_names
        and not Path("i_emb.safetensors").exists()
    )


def test_one_note_names_the_files_whose_tokens_the_result_lacks(here, capsys):
    note = "which the result does not have"
    file, rows = "run/run.safetensors", "run/run_emb.safetensors"
    shutil.copy(file, "one.safetensors")
    for words, names in (
        (("mix", f"{file} + one.safetensors"), f"{file}, one.safetensors were trained with"),
        (("mix", f"{file} + b.safetensors"), f"{file} was trained with"),
        (("fold", "base", f"{file} + b.safetensors"), f"{file} was trained with"),
    ):
        out = ("o",) if words[0] == "fold" else ("--out", "o.safetensors", "--model", "base")
        call(*words, *out, "--overwrite")
        said = capsys.readouterr().err
        assert said.count(note) == 1
        assert f"note: {names} learned tokens (TOK), {note}\n" in said
    for sum in (f"{file} + {rows}", "run + b.safetensors", "b.safetensors + c.safetensors"):
        call("mix", sum, "--out", "o.safetensors", "--model", "base", "--overwrite")
        assert note not in capsys.readouterr().err
