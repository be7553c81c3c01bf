"""A training's entries in the header outlive conversions; a sum has those that are true of it."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_core.formats.training_metadata import carry_metadata, rename_token_file
from tests.merge_commands import call
from tests.training_headers import TENSORS, TRAINING


@pytest.fixture
def trained(here):
    """b.safetensors, a file with kohya's names, with the header of a training."""
    save_file(load_file("b.safetensors"), "b.safetensors", TRAINING | TENSORS)
    return here


def header(path):
    with safe_open(path, "np") as opened:
        return opened.metadata()


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "b.safetensors", "o.safetensors", "--to", "kohya"),
        ("convert", "b.safetensors", "o.safetensors", "--to", "diffusers"),
        ("resize", "b.safetensors", "o.safetensors", "--rank", "1"),
        ("resize", "b.safetensors", "o.safetensors", "--energy", "0.9", "--format", "diffusers"),
        ("mix", "0.5*b.safetensors", "--out", "o.safetensors"),
        ("mix", "b.safetensors@unet", "--out", "o.safetensors", "--dtype", "bf16"),
    ],
)
def test_training_metadata_outlives_commands_with_one_input(trained, words):
    call(*words, "--model", "base")
    found = header("o.safetensors")
    assert TRAINING.items() <= found.items()
    for key, value in TENSORS.items():
        assert found.get(key) != value
    if "diffusers" not in words:
        ranks = {t.shape[0] for k, t in load_file("o.safetensors").items() if "lora_down" in k}
        dim = str(*ranks) if len(ranks) == 1 else "Dynamic"
        assert found["ss_network_dim"] == dim
        assert found["ss_network_module"] == "networks.lora"
        args = {"rank_dropout": "0.2", "loraplus_lr_ratio": "16"}
        assert json.loads(found["ss_network_args"]) == args
        assert found["ss_base_model_version"] == "sd_v1"


def test_there_and_back_keeps_the_training(trained):
    call("convert", "b.safetensors", "n.safetensors", "--to", "diffusers", "--model", "base")
    call("convert", "n.safetensors", "k.safetensors", "--to", "kohya", "--model", "base")
    assert TRAINING.items() <= header("k.safetensors").items()
    written, back = header("n.safetensors"), header("k.safetensors")
    assert written["ss_network_dim"] == back["ss_network_dim"] != TENSORS["ss_network_dim"]


def test_hashes_are_those_of_the_new_file(trained):
    call("convert", "b.safetensors", "o.safetensors", "--to", "kohya", "--model", "base")
    data = Path("o.safetensors").read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert header("o.safetensors")["sshs_model_hash"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("broken", ["{", "[1]", "[" * 5000, '"x"'])
def test_a_broken_entry_of_arguments_is_left_out(broken):
    own = {"ss_network_args": "{}"}
    assert carry_metadata({"ss_network_args": broken}, own) == own


def test_what_a_writer_does_not_know_is_not_taken_away():
    old = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.title": "x"}
    own = {"ss_base_model_version": "", "ss_v2": "True", "modelspec.title": "o"}
    assert carry_metadata(old, own) == old | {"ss_v2": "True"}


# ---------------------------------------------------------------- sums


SUMS = [
    ("mix", "0.5*x/b.safetensors + b2.safetensors", "--out", "o.safetensors"),
    ("add", "x/b.safetensors", "b2.safetensors", "o.safetensors", "--mode", "ljl"),
    ("add", "x/b.safetensors", "b2.safetensors", "o.safetensors", "0.5", "0.5"),
]


@pytest.fixture
def pair(here):
    """Two files of trainings on one model, one of them with a title."""
    tensors = load_file("b.safetensors")
    (here / "x").mkdir()
    save_file(tensors, "x/b.safetensors", TRAINING)
    other = {"ss_learning_rate": "1", "ss_tag_frequency": "{}"}
    untitled = {k: v for k, v in TRAINING.items() if k != "modelspec.title"}
    save_file(tensors, "b2.safetensors", untitled | other | {"ss_sd_model_hash": "another"})
    return here


@pytest.mark.parametrize("words", SUMS)
def test_a_sum_names_its_parts_and_no_single_training(pair, words, capsys):
    call(*words, "--model", "base")
    found = header("o.safetensors")
    assert found["modelspec.merged_from"] == "My cat, b2"  # as kohya's: titles, or names of files
    assert found["ss_sd_model_name"] == "v1-5-pruned.safetensors"
    assert not {"ss_sd_model_hash", "ss_tag_frequency", "ss_learning_rate", "note"} & set(found)
    assert found["ss_output_name"] == "o" and found["modelspec.title"] == "o"
    said = capsys.readouterr().err
    assert "the training metadata of 2 files (7 entries ss_*) is left out of their sum" in said


def test_files_without_a_training_are_summed_without_a_line_about_it(here, capsys):
    call("mix", "a.safetensors + b.safetensors", "--out", "o.safetensors", "--model", "base")
    assert "training metadata" not in capsys.readouterr().err
    assert header("o.safetensors")["modelspec.merged_from"] == "a, b"


# ---------------------------------------------------------------- trigger words


@pytest.fixture
def triggers(here):
    """Two files of runs with learned tokens of their own, and one with a plain word."""
    tensors = load_file("b.safetensors")
    for name, trigger in (("cat", "cat_emb"), ("dog", "dog_emb"), ("sks", "sks")):
        header = {
            "modelspec.trigger_phrase": trigger,
            "modelspec.tags": f"pet, {name}",
            "modelspec.license": "mit" if name != "sks" else "cc0-1.0",
        }
        if trigger.endswith("_emb"):
            hint = f"TOK of the captions is {trigger} in prompts, with {trigger}.safetensors"
            header["modelspec.usage_hint"] = hint
        save_file(tensors, f"{name}.safetensors", TRAINING | header)
    return here


def test_a_sum_has_all_trigger_words_and_shows_them(triggers, capsys):
    words = ("--out", "o.safetensors", "--model", "base", "--format", "kohya", "--sidecar")
    call("mix", "cat.safetensors + 0.5*sks.safetensors", *words)
    found = header("o.safetensors")
    assert found["modelspec.trigger_phrase"] == "cat_emb, sks"
    assert found["modelspec.tags"] == "pet, cat, sks"
    assert "modelspec.license" not in found  # theirs differ
    assert "written: o.json" in capsys.readouterr().out
    table = json.loads(Path("o.json").read_text())
    assert table["activation text"] == "cat_emb, sks" and "cat_emb.safetensors" in table["notes"]
    call("info", "o.safetensors", "--model", "base")
    said = capsys.readouterr().out
    assert "trigger words: cat_emb, sks" in said and "merged from: My cat, My cat" in said


def test_trigger_words_name_the_file_of_tokens_that_was_written():
    old = {
        "modelspec.trigger_phrase": "cat_emb, sks, big cat_emb",
        "modelspec.usage_hint": "embedding:cat_emb, with cat_emb.safetensors; big cat_emb",
        "ss_tag_frequency": json.dumps({"images": {"a cat_emb": 2}}),
    }
    found = rename_token_file(old, "o_emb")
    assert found == {
        "modelspec.trigger_phrase": "o_emb, sks",
        "modelspec.usage_hint": "embedding:o_emb, with o_emb.safetensors; o_emb",
        "ss_tag_frequency": json.dumps({"images": {"a o_emb": 2}}),
    }
    plain = {"modelspec.trigger_phrase": "sks"}
    assert rename_token_file(plain, "o_emb") == plain


@pytest.mark.parametrize(
    "words, message",
    [
        (("convert", "b.safetensors", "o.safetensors", "--sidecar"), "choose that format"),
        (("convert", "b.safetensors", "o.pt", "--sidecar"), "choose that format"),
        (("convert", "base", "o", "--sidecar"), "is a whole model; leave it out"),
    ],
)
def test_a_sidecar_is_for_kohyas_files(here, capsys, words, message):
    call(*words, "--model", "base", status=2)
    assert message in capsys.readouterr().err


def test_a_sidecar_that_is_there_is_not_replaced_unasked(triggers, capsys):
    Path("o.json").write_text("mine")
    words = ("convert", "cat.safetensors", "o.safetensors", "--to", "kohya", "--sidecar")
    call(*words, "--model", "base", status=2)
    assert "o.json is there already" in capsys.readouterr().err
    assert Path("o.json").read_text() == "mine" and not Path("o.safetensors").exists()
    call(*words, "--model", "base", "--overwrite")
    assert json.loads(Path("o.json").read_text())["activation text"] == "cat_emb"
