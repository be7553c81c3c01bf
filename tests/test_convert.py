"""merge.py convert: other names, the same updates and tokens."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import formats
from lora_core.adapters.weight_updates import scaled_product
from merging.convert import converted_name
from tests.adapter_checks import header
from tests.manager_readers import tensor_hash
from tests.merge_commands import SQUARE, assert_equal, call, deltas, dora_on, save_dora


@pytest.mark.parametrize("format", ["kohya", "diffusers", "cloneofsimo"])
def test_convert_changes_names_only(here, states, layout, format):
    call("convert", "c.safetensors", "o.safetensors", "--to", format, "--model", "base")
    assert_equal(deltas(formats.load("o.safetensors", layout)), deltas(states["c"]))
    tokens = formats.load(
        "o.safetensors" if format == "cloneofsimo" else "o_emb.safetensors", layout
    )
    assert torch.equal(tokens.tokens["clip_l"], states["c"].tokens["clip_l"])


@pytest.mark.parametrize("words", [("--rank", "5"), ("--max-error", "0.05"), ()])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_as_lora_writes_the_nearest_lora_of_the_dora(here, layout, words, columns, format, capsys):
    update = save_dora("e.safetensors", columns=columns)
    common = ("--as", "lora", "--model", "base", "--svd", "exact", "--to", format)
    call("convert", "e.safetensors", "o.safetensors", *common, *words)
    lr = formats.load("o.safetensors", layout).components["unet"][SQUARE]
    assert lr.magnitude is None
    sigma = torch.linalg.svdvals(update)
    lost = float((scaled_product(lr).double() - update).norm())
    assert lost == pytest.approx(float(sigma[lr.rank :].norm()), rel=1e-3)
    if words[:1] == ("--max-error",):
        assert lost <= 0.05 * update.norm() < sigma[lr.rank - 1 :].norm()
    else:
        assert lr.rank == (5 if words else 2)
    shown = capsys.readouterr()
    assert f"{lost / float(update.norm()):.2e}" in shown.out
    assert "warning" not in shown.err


def test_as_lora_takes_updates_of_lycoris_and_plain_layers_beside(here, layout):
    tensors, update = dora_on("base")
    other = SQUARE.replace("to_q", "to_k")
    module = "lora_unet_" + other.replace(".", "_")
    width = len(update)
    diff = torch.randn(width, width)
    plain = SQUARE.replace("to_q", "to_v")
    down, up = torch.randn(1, width), torch.randn(width, 1)
    module_v = "lora_unet_" + plain.replace(".", "_")
    tensors |= {f"{module}.diff": diff, f"{module_v}.lora_down.weight": down}
    save_file(
        tensors | {f"{module_v}.lora_up.weight": up},
        "e.safetensors",
        {"ss_network_args": '{"wd_on_output": "True"}'},
    )
    words = ("--as", "lora", "--model", "base")
    call("convert", "e.safetensors", "x.safetensors", *words, status=2)
    call("convert", "e.safetensors", "o.safetensors", *words, "--max-error", "1e-6")
    found = deltas(formats.load("o.safetensors", layout))
    assert_equal(
        found,
        {
            ("unet", SQUARE): update,
            ("unet", other): diff.double(),
            ("unet", plain): up.double() @ down.double(),
        },
        1e-5,
    )


@pytest.mark.parametrize(
    "words, expected",
    [
        (("a.safetensors", "--as", "lora", "--model", "base"), "is a plain LoRA already"),
        (("a.safetensors", "--rank", "4"), "--rank has no effect on convert without --as lora"),
        (("e.safetensors", "--max-error", "0.1"), "--max-error has no effect on convert without"),
        (("a.safetensors", "--svd", "exact"), "--svd has no effect on convert without"),
        (("a.safetensors", "--seed", "7"), "--seed has no effect on convert without"),
        (("d.safetensors", "--as", "lora"), "name it with --model"),
        (("base", "--as", "lora"), "is a whole model, .* drop --as lora"),
        (("c.safetensors", "--as", "dora"), "lora"),
    ],
)
def test_as_lora_has_an_effect_or_is_refused(here, words, expected, capsys):
    save_dora("e.safetensors")
    call("convert", words[0], "o.safetensors", *words[1:], status=2)
    assert re.search(expected, capsys.readouterr().err)
    assert not Path("o.safetensors").exists()


def test_as_lora_needs_weights_and_not_only_names(here, capsys):
    names = {"lora_A.weight": (2, 320), "lora_B.weight": (320, 2), "lora_magnitude_vector": (320,)}
    save_file({f"unet.{SQUARE}.{leaf}": torch.ones(names[leaf]) for leaf in names}, "e.safetensors")
    words = ("--as", "lora", "--model", "sd1")
    call("convert", "e.safetensors", "o.safetensors", *words, status=2)
    assert "--model sd1 is the name of a model's layers, without weights" in capsys.readouterr().err


def test_a_dora_by_columns_stays_in_kohyas_format_and_nowhere_else(here, capsys):
    save_dora("e.safetensors", columns=True)
    call("convert", "e.safetensors", "o.safetensors", "--to", "kohya", "--model", "base")
    first, again = load_file("e.safetensors"), load_file("o.safetensors")
    for key, tensor in first.items():
        assert torch.equal(again[key], tensor)
    assert '"wd_on_output": "False"' in header("o.safetensors")["ss_network_args"]
    for format in ("diffusers", "cloneofsimo"):
        capsys.readouterr()
        call("convert", "e.safetensors", "x.safetensors", "--to", format, "--model", "base",
             status=2)  # fmt: skip
        said = capsys.readouterr().err
        assert "is a DoRA by columns" in said and "--as lora --model BASE" in said
        assert said.count("\n") == 1 and not Path("x.safetensors").exists()


def test_a_lycoris_update_cannot_be_renamed_and_what_to_do_is_said(here, capsys):
    module = "lora_unet_" + SQUARE.replace(".", "_")
    save_file({f"{module}.diff": torch.randn(8, 8)}, "l.safetensors")
    for format in ("diffusers", "cloneofsimo"):
        words = ("x.safetensors", "--to", format, "--model", "base")
        call("convert", "l.safetensors", *words, status=2)
        said = capsys.readouterr().err
        assert "is a full update, not a product of two factors (--to kohya keeps it); --as" in said
    assert not Path("x.safetensors").exists()


def test_as_lora_is_repeated_from_its_recipe(here, capsys):
    save_dora("e.safetensors")
    words = ("--as", "lora", "--model", "base", "--rank", "3")
    call("convert", "e.safetensors", "o.safetensors", *words)
    capsys.readouterr()
    call("redo", "o.safetensors")
    shown = capsys.readouterr().out
    assert "--as lora" in shown and "the same as before: o.safetensors" in shown


def test_several_files_become_files_of_their_names_in_a_folder(here, capsys):
    """Each is what a call for it alone writes, its recipe included."""
    words = ["--to", "kohya", "--model", "base"]
    call("convert", "c.safetensors", "run", "a.safetensors", "--out", "new/all", *words)
    said = capsys.readouterr().out
    places = [said.index(f"[{i}/3] {name}") for i, name in ((1, "c."), (2, "run"), (3, "a."))]
    assert places == sorted(places)
    written = sorted(path.name for path in Path("new/all").iterdir())
    names = ["a", "c", "c_emb", "run", "run_emb"]
    assert written == [f"{name}.safetensors" for name in names]
    for name, source in (("a", "a.safetensors"), ("c", "c.safetensors"), ("run", "run")):
        call("convert", source, "--out", "alone.safetensors", "--overwrite", *words)
        together = load_file(f"new/all/{name}.safetensors")
        alone = load_file("alone.safetensors")
        assert together.keys() == alone.keys()
        assert all(torch.equal(together[key], alone[key]) for key in alone)
    call("redo", "new/all/a.safetensors", "--dry-run")


def test_a_lora_of_a_run_with_tokens_is_labelled_as_a_lora(here, layout, states):
    """As the run's own file with kohya's names is, in every format, and in files of older runs,
    whose file with diffusers' names says nothing about its kind.
    """
    state = replace(states["c"], metadata={"ss_output_name": "dog"})
    assert state.tokens
    Path("dog").mkdir()
    formats.save_run(state, "dog", layout=layout)
    own = header("dog/dog.safetensors")
    kinds = ("modelspec.architecture", "ss_base_model_version")
    same = [*kinds, *(f"ss_network_{name}" for name in ("module", "dim", "args"))]
    assert own["modelspec.architecture"].endswith("/lora")
    assert header("dog/dog_emb.safetensors")["modelspec.title"] == "dog_emb"
    for older in (False, True):
        if older:
            tensors = load_file("dog/pytorch_lora_weights.safetensors")
            kept = {"format": "pt", "token_names": own["token_names"]}
            save_file(tensors, "dog/pytorch_lora_weights.safetensors", kept)
        end = ("--model", "base", "--overwrite")
        call("convert", "dog", "--out", "k.safetensors", "--to", "kohya", *end)
        call("convert", "dog", "--out", "d.safetensors", "--to", "diffusers", *end)
        call("mix", "0.5*dog", "--out", "m.safetensors", *end)
        for name in "kdm":
            written = header(f"{name}.safetensors")
            assert {key: written[key] for key in same} == {key: own[key] for key in same}, name
            assert written["ss_network_alpha"] == f"{own['ss_network_dim']}.0"  # factors have it
            titles = (name, "dog") if older else ("dog",)
            assert written["modelspec.title"] in titles
            digest = tensor_hash(Path(f"{name}.safetensors"))
            assert written["sshs_model_hash"] == digest
            assert written["modelspec.hash_sha256"] == f"0x{digest}"


def test_files_have_an_ending_of_their_format(here):
    assert converted_name("run", "") == "run.safetensors"
    assert converted_name("run", "mixofshow") == "run.pth"
    assert converted_name("c.safetensors", "mixofshow") == "c.pth"
    assert converted_name("c.safetensors", "a1111") == "c.safetensors"
    assert converted_name("base", "") == "base"  # a model's folder


def test_names_that_exist_or_are_the_same_are_refused_before_any_work(here, capsys):
    words = ["--out", "all", "--to", "kohya", "--model", "base"]
    Path("all").mkdir()
    Path("all/c.safetensors").write_bytes(b"mine")
    call("convert", "a.safetensors", "c.safetensors", *words, status=2)
    assert "is there already; pass --overwrite" in capsys.readouterr().err
    assert [path.name for path in Path("all").iterdir()] == ["c.safetensors"]
    Path("other").mkdir()
    save_file(load_file("a.safetensors"), "other/a.safetensors")
    call("convert", "a.safetensors", "other/a.safetensors", *words, status=2)
    assert "would both be" in capsys.readouterr().err
    call("convert", "a.safetensors", "c.safetensors", "--out", "x.safetensors", status=2)
    assert "need a folder" in capsys.readouterr().err
    call("convert", "a.safetensors", "c.safetensors", "run", "--to", "kohya", status=2)
    assert "several files only with --out FOLDER" in capsys.readouterr().err
    call("convert", "a.safetensors", "none.safetensors", *words, status=2)
    assert not Path("all/a.safetensors").exists()
    call("convert", "a.safetensors", "c.safetensors", *words, "--overwrite")
    assert Path("all/a.safetensors").exists()


def test_the_others_are_converted_when_one_file_fails(here, capsys):
    """Each reason is said once, after the file's name; the last line counts, the status is 2."""
    Path("bad.safetensors").write_bytes(b"no tensors at all")
    words = ["--out", "all", "--to", "kohya", "--model", "base"]
    call("convert", "a.safetensors", "bad.safetensors", "c.safetensors", *words, status=2)
    said = capsys.readouterr()
    assert said.err == "error: 1 of 3 files could not be converted; see above\n"
    assert said.out.count("not converted: ") == said.out.count("bad.safetensors") == 1
    assert Path("all/a.safetensors").exists() and Path("all/c.safetensors").exists()
    assert not Path("all/bad.safetensors").exists()
    Path("worse.safetensors").write_bytes(b"none here")
    call("convert", "worse.safetensors", "bad.safetensors", *words, status=2)
    said = capsys.readouterr()
    assert said.err == "error: 2 of 2 files could not be converted; see above\n"
    assert said.out.count("worse.") == said.out.count("bad.") == 1
    assert Path("all/a.safetensors").exists() and Path("all/c.safetensors").exists()
    assert not Path("all/bad.safetensors").exists()


def test_two_words_are_still_a_file_and_its_output(here):
    call("convert", "a.safetensors", "o.safetensors", "--to", "kohya", "--model", "base")
    assert Path("o.safetensors").is_file()
