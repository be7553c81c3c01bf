"""The header of a sum of several files: the base model that they share, and their titles."""

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.merge_commands import call
from tests.training_headers import TRAINING

SUMS = [
    ("mix", "0.5*x/b.safetensors + b2.safetensors", "--out", "o.safetensors"),
    ("add", "x/b.safetensors", "b2.safetensors", "o.safetensors", "--mode", "ljl"),
    ("add", "x/b.safetensors", "b2.safetensors", "o.safetensors", "0.5", "0.5"),
]


def header(path):
    with safe_open(path, "np") as opened:
        return opened.metadata()


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
