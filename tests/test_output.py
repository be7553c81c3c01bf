"""Outputs: files in the format that was asked for, or none; a full disk and dry runs."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import atomic_files, formats
from lora_core.formats import embeddings
from tests.embedding_readers import read_as_a1111
from tests.merge_commands import call, deltas, snapshot
from tests.tiny_pipeline import pipeline

SDXL = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}


@pytest.fixture
def rows(here, states):
    """The folder with a file of token rows beside the LoRAs: "rows.safetensors", of two tokens."""
    shutil.copy("run/run_emb.safetensors", "rows.safetensors")
    return states["a"].tokens["clip_l"]


def save_pair(path):
    state = formats.load("rows.safetensors")
    state.tokens = SDXL
    formats.save(state, path, format="embeddings")


# ---------------------------------------------------------------- token rows


@pytest.mark.parametrize("command", ["convert", "mix"])
@pytest.mark.parametrize(
    ("format", "out", "keys"),
    [
        ("", "o.safetensors", ["clip_l"]),
        ("", "o.pt", ["string_to_param"]),
        ("", "o.bin", ["TOK"]),
        ("embeddings", "o.safetensors", ["clip_l"]),
        ("a1111", "o.safetensors", ["emb_params"]),
        ("a1111", "o.pt", ["string_to_param"]),
        ("a1111", "o.bin", ["string_to_param"]),
        ("textual_inversion", "o.safetensors", ["TOK"]),
        ("textual_inversion", "o.bin", ["TOK"]),
        ("textual_inversion", "o.pt", ["TOK"]),
    ],
)
def test_rows_are_written_in_the_format_that_was_asked_for(here, rows, command, format, out, keys):
    if command == "convert":
        words = ["convert", "rows.safetensors", out, *(("--to", format) if format else ())]
    else:
        words = ["mix", "rows.safetensors", "--out", out, *(("--format", format) if format else ())]
    before = set(snapshot(here))
    call(*words, "--model", "base")
    assert set(snapshot(here)) - before == {str(here / out)}
    data = load_file(out) if out.endswith(".safetensors") else torch.load(out, weights_only=True)
    assert set(keys) <= set(data)
    if "string_to_param" in data:
        assert data["string_to_token"] == {"*": 265} and data["name"] == "o"
        assert {"step", "sd_checkpoint", "sd_checkpoint_name"} <= set(data)
    assert torch.equal(read_as_a1111(out)[""], rows)
    call("convert", out, "back.safetensors", "--to", "embeddings", "--model", "base")
    back = formats.load("back.safetensors")
    assert torch.equal(back.tokens["clip_l"], rows)
    assert embeddings.placeholder_words(back) in (
        {"TOK": back.token_names},
        {"o": back.token_names},
    )


@pytest.mark.parametrize("format", ["a1111", "textual_inversion"])
@pytest.mark.parametrize("ending", ["safetensors", "pt", "bin"])
def test_diffusers_loads_converted_rows(rows, format, ending):
    out = f"TOK.{ending}"
    call("convert", "rows.safetensors", out, "--to", format, "--model", "base")
    pipe = pipeline()
    named = format == "a1111" and ending == "safetensors"  # whose key is no word
    pipe.load_textual_inversion(out, token="TOK" if named else None)
    ids = pipe.tokenizer.convert_tokens_to_ids(["TOK", "TOK_1"])  # diffusers numbers the rows
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], rows)


def test_a_pair_of_encoders_is_written_whole_or_not_at_all(here, rows, capsys):
    save_pair("pair.safetensors")
    call("convert", "pair.safetensors", "o.safetensors", "--to", "embeddings")
    found = read_as_a1111("o.safetensors")
    assert found.keys() == SDXL.keys()
    assert all(torch.equal(found[key], SDXL[key]) for key in SDXL)
    for format, out in (("a1111", "p.pt"), ("textual_inversion", "p.bin"), ("a1111", "p.bin")):
        call("convert", "pair.safetensors", out, "--to", format, status=2)
        assert "rows of clip_g and clip_l, such a file has those of one" in capsys.readouterr().err
        assert not (here / out).exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("convert", "rows.safetensors", "o.safetensors", "--to", "kohya"), "only token rows"),
        (("convert", "rows.safetensors", "o.safetensors", "--to", "diffusers"), "only token rows"),
        (("convert", "rows.safetensors", "o.pt", "--to", "cloneofsimo"), "only token rows"),
        (("mix", "rows.safetensors", "--out", "o.pt", "--format", "kohya"), "ends in .safetensors"),
        (("convert", "rows.safetensors", "o.bin", "--to", "embeddings"), "ends in .safetensors"),
        (("convert", "b.safetensors", "o.safetensors", "--to", "a1111"), "only layers"),
        (("convert", "b.safetensors", "o.bin", "--to", "textual_inversion"), "only layers"),
        (("mix", "b.safetensors", "--out", "o.safetensors", "--format", "embeddings"), "only laye"),
        (("convert", "b.safetensors", "o.pt", "--to", "kohya"), "ends in .safetensors"),
        (("convert", "b.safetensors", "o.bin"), "should end in .safetensors"),
        (("mix", "rows.safetensors", "--out", "o.pt", "--rank", "2"), "leave out --rank"),
        (("mix", "rows.safetensors", "--out", "o.pt", "--method", "ties"), "leave out --method"),
        (("resize", "rows.safetensors", "o.safetensors", "--energy", "0.9"), "leave out --energy"),
        (("mix", "rows.safetensors@attn", "--out", "o.pt"), "choose nothing"),
        (("fold", "base", "rows.safetensors@OUTD", "o.safetensors"), "choose nothing"),
    ],
)
def test_a_format_without_a_place_for_the_content_is_refused(rows, words, sentence, here, capsys):
    before = snapshot(here)
    call(*words, *(("--model", "base") if words[0] != "fold" else ()), status=2)
    assert re.search(sentence, capsys.readouterr().err)
    assert snapshot(here) == before


def test_rows_beside_layers_are_written_alone_in_their_own_formats(here, states, capsys):
    call("convert", "run", "o.pt", "--to", "a1111", "--model", "base")
    said = capsys.readouterr()
    assert "gets the token rows alone" in said.err and "energy kept" not in said.out
    assert torch.equal(read_as_a1111("o.pt")[""], states["a"].tokens["clip_l"])


@pytest.mark.parametrize(
    ("out", "key"),
    [
        ("o.safetensors", "clip_l"),
        ("o.bin", "TOK"),
        ("l.safetensors", ""),
        ("l.pt", ""),
    ],  # l: with layers
)
def test_the_dtype_of_an_output_is_that_of_its_rows(here, rows, out, key):
    source = "rows.safetensors" if key else "c.safetensors"
    format = () if key or out.endswith("pt") else ("--format", "kohya")
    call("mix", source, "--out", out, "--dtype", "fp16", "--model", "base", *format)
    own = {"l.safetensors": "l_emb.safetensors", "l.pt": "l.ti.pt"}.get(out, out)
    data = load_file(own) if own.endswith(".safetensors") else torch.load(own, weights_only=True)
    assert {tensor.dtype for tensor in data.values()} == {torch.float16}
    if key:
        assert torch.equal(data[key], rows.half())


def test_rows_that_overflow_a_dtype_are_refused(here, rows, capsys):
    state = formats.load("rows.safetensors")
    state.tokens["clip_l"] = rows * 1e6
    formats.save(state, "large.safetensors", format="embeddings")
    for out in ("o.safetensors", "o.pt", "o.bin"):
        call("convert", "large.safetensors", out, "--dtype", "fp16", "--model", "base", status=2)
        assert "token rows overflow torch.float16" in capsys.readouterr().err
        assert not (here / out).exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("mix", "0.25*rows.safetensors", "--out", "o.safetensors"), "0.25 changes nothing"),
        (("mix", "-2*run", "--out", "o.safetensors"), "-2 acts on its layers only"),
        (("fold", "base", "0.5*a.safetensors", "o"), None),
        (("fold", "base", "0.5*rows.safetensors", "o"), "0.5 changes nothing"),
        (("mix", "rows.safetensors + b.safetensors", "--out", "o.safetensors"), None),
    ],
)
def test_weights_of_rows_are_said_to_be_without_effect(words, sentence, rows, here, states, capsys):
    call(*words, *(("--model", "base") if words[0] != "fold" else ()))
    said = capsys.readouterr().err
    assert ("are not scaled" in said) == bool(sentence)
    assert sentence is None or sentence in said


# ---------------------------------------------------------------- disks and dry runs


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "a.safetensors", "--out", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "taken", "--overwrite"),
        ("add", "c.safetensors", "c.safetensors", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "o.ckpt"),
    ],
)
def test_a_full_disk_leaves_everything_as_it_was(spoiled, words, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree("base", "taken")
    before = snapshot(spoiled)
    monkeypatch.setattr(atomic_files.os, "fsync", full)
    call(*words, *(("--model", "base") if words[0] != "fold" else ()), status=2)
    assert re.search("disk is full|No space left", capsys.readouterr().err)
    assert snapshot(spoiled) == before


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "a.safetensors", "--out", "taken.safetensors"),
        ("fold", "base", "run", "o"),
        ("fold", "base", "run", "o.ckpt"),
        ("distill", "base", "tuned", "o.safetensors", "--rank", "2"),
        ("resize", "a.safetensors", "o.safetensors", "--rank", "1"),
        ("convert", "a.safetensors", "o.safetensors", "--to", "kohya"),
        ("add", "a.safetensors", "a.safetensors", "o.safetensors"),
        ("add", "base", "c.safetensors", "o.ckpt", "--mode", "upl-ckpt-v2"),
    ],
)
def test_dry_runs_report_and_write_nothing(spoiled, words, capsys):
    if "tuned" in words:
        call("fold", "base", "a.safetensors", "tuned")
        capsys.readouterr()
    before = snapshot(spoiled)
    call(*words, "--dry-run", *(("--model", "base") if words[0] not in ("fold", "distill") else ()))
    said = capsys.readouterr().out
    assert "dry run: " in said and re.search(r"total +\d+ +\d+ ", said)
    assert snapshot(spoiled) == before


# ---------------------------------------------------------------- folders that exist


@pytest.mark.parametrize(
    "words",
    [
        ("fold", "base", "a.safetensors", "run"),
        ("mix", "0.5*base + 0.5*base", "photos"),
        ("convert", "base.safetensors", "photos"),
        ("add", "base", "a.safetensors", "photos", "--mode", "upl"),
        ("fold", "base", "a.safetensors", "linked"),
        ("redo", "folded", "photos"),
    ],
)
def test_overwrite_deletes_no_folder_but_that_of_a_model(here, words, capsys):
    os.mkdir("photos")
    Path("photos", "dog.png").write_bytes(b"precious")
    os.symlink("photos", "linked")
    if words[0] == "redo":
        call("fold", "base", "a.safetensors", "folded")
    if "base.safetensors" in words:
        call("convert", "base", "base.safetensors")
    capsys.readouterr()
    before = snapshot(here)
    call(*words, "--overwrite", status=2)
    said = capsys.readouterr().err
    assert f"error: {words[3] if words[0] in ('fold', 'add') else words[2]} is a folder" in said
    assert "--overwrite would delete what it holds" in said and said.count("\n") == 1
    assert snapshot(here) == before


def test_models_and_empty_folders_are_replaced(here):
    os.mkdir("o")
    call("fold", "base", "a.safetensors", "o", "--overwrite")
    Path("o", "mark").touch()
    call("fold", "base", "a.safetensors", "o", "--overwrite")
    assert Path("o", "model_index.json").exists() and not Path("o", "mark").exists()


def test_overwrite_deletes_neither_an_input_nor_the_current_folder(here, monkeypatch, capsys):
    call("fold", "base", "a.safetensors", "o")
    shutil.copy("a.safetensors", "o/kept.safetensors")
    before = snapshot(here)
    call("fold", "base", "o/kept.safetensors", "o", "--overwrite", status=2)
    assert "the input o/kept.safetensors lies in the output o" in capsys.readouterr().err
    monkeypatch.chdir("o")
    call("fold", "../base", "../a.safetensors", ".", "--overwrite", status=2)
    assert "in which this command runs" in capsys.readouterr().err
    assert snapshot(here) == before


# ---------------------------------------------------------------- what rounding loses


def save_scaled(path, dtype, state, layout, *, factors=1.0):
    """A kohya file of small factors in `dtype`, whose layers have several ranks and alphas.

    Returns key -> the update in fp64, from the tensors.
    """
    tensors, updates = {}, {}
    for component, modules in state.components.items():
        head = layout.component(component).prefixes[0]
        level = "text_model_" if component == "text_encoder" else ""
        for i, (name, lr) in enumerate(modules.items()):
            alpha = (3.0, 5.0, 0.02, 3.0)[i % 4]
            module = f"{head}_{level}{name.removeprefix('text_model.').replace('.', '_')}"
            down, up = (lr.down[: 1 + i % 3]).to(dtype), (factors * lr.up[:, : 1 + i % 3]).to(dtype)
            tensors[f"{module}.lora_down.weight"] = down
            tensors[f"{module}.lora_up.weight"] = up.contiguous()
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
            product = up.double().flatten(1) @ down.double().flatten(1)
            shape = (len(up), *down.shape[1:])
            updates[component, name] = (alpha / len(down) * product).reshape(shape)
    save_file(tensors, path)
    return updates


def true_error(path, updates, layout):
    """The relative error of a file over all layers, in fp64."""
    lost = total = 0.0
    found = deltas(formats.load(path, layout))
    assert set(found) == set(updates)
    for key, wanted in updates.items():
        lost += float((found[key] - wanted).square().sum())
        total += float(wanted.square().sum())
    return (lost / total) ** 0.5


def printed_error(text):
    return float(re.search(r"^total .* (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["diffusers", "kohya", "cloneofsimo"])
@pytest.mark.parametrize(
    "words",
    [
        ("convert", "e.safetensors", "o.safetensors"),
        ("convert", "e.safetensors", "o.safetensors", "--dtype", "fp16"),
        ("resize", "e.safetensors", "o.safetensors", "--energy", "1"),
        ("mix", "0.3*e.safetensors + 0.7*e.safetensors", "--out", "o.safetensors", "--rank", "4"),
        ("mix", "e.safetensors", "--out", "o.safetensors", "--dtype", "bf16"),
    ],
)
def test_the_error_of_half_precision_is_that_of_the_file(
    here, states, layout, dtype, format, words, capsys
):
    updates = save_scaled("e.safetensors", dtype, states["c"], layout)
    flag = "--to" if words[0] == "convert" else "--format"
    call(*words, flag, format, "--model", "base")
    shown = printed_error(capsys.readouterr().out)
    error = true_error("o.safetensors", updates, layout)
    assert shown == pytest.approx(error, rel=0.1)
    if format != "kohya" or words[0] != "convert":
        assert shown > 5e-5  # a scale of 5 / 3, and factors that are made anew


def test_small_factors_keep_their_digits_in_fp16(here, states, layout, capsys):
    """0.02 / 2 times numbers of 1e-3 is below the smallest numbers of fp16 with all digits."""
    updates = save_scaled("e.safetensors", torch.float16, states["c"], layout, factors=4e-3)
    call("convert", "e.safetensors", "o.safetensors", "--to", "diffusers", "--model", "base")
    found = deltas(formats.load("o.safetensors", layout))
    for key, wanted in updates.items():
        assert float((found[key] - wanted).norm()) < 1e-3 * float(wanted.norm()), key


def test_a_file_in_fp32_and_one_of_equal_alphas_lose_nothing(here, states, layout, capsys):
    updates = save_scaled("e.safetensors", torch.float32, states["c"], layout)
    call("convert", "e.safetensors", "o.safetensors", "--to", "kohya", "--model", "base")
    assert printed_error(capsys.readouterr().out) == 0.0
    assert true_error("o.safetensors", updates, layout) < 1e-6
    for words in (("--to", "kohya", "--dtype", "fp16"), ("--to", "diffusers", "--dtype", "fp16")):
        call("convert", "a.safetensors", "p.safetensors", *words, "--model", "base", "--overwrite")
        shown = printed_error(capsys.readouterr().out)
        assert shown == pytest.approx(
            true_error("p.safetensors", deltas(states["a"]), layout), rel=0.1
        )


def test_the_error_of_a_cast_dora_is_that_of_its_factors(here, states, layout, capsys):
    call("convert", "d.safetensors", "o.safetensors", "--dtype", "fp16", "--model", "base")
    wanted = deltas(states["d"])
    shown = printed_error(capsys.readouterr().out)
    assert shown == pytest.approx(true_error("o.safetensors", wanted, layout), rel=0.1)
    assert shown > 1e-4
