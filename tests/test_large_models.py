"""Merges of whole models: memory is that of a few tensors, however many there are."""

import shutil
from pathlib import Path

import pytest
import torch

from lora_core.formats.model_folders import open_model_folder
from merging import distill, rounding
from tests.large_models import AliveTensors, cut_into_shards, run_limited, save_large_model
from tests.merge_commands import call

WIDTHS = (32, 64)
COMMANDS = {
    "distill": ("distill", "one", "two", "lora.safetensors", "--rank", "1"),
    "fold": ("fold", "one", "lora.safetensors", "out"),
    "mix": ("mix", "0.5*one + 0.5*two", "--out", "out"),
    "convert": ("convert", "one", "out.safetensors"),
}
# Tensors of the largest size, in fp32, that are alive at once: of both models with their sum; of a
# weight, its update and the sum in two dtypes; of a difference in fp32, and its squares in fp64.
MOST_TENSORS = {"mix": 4, "fold": 4, "distill": 6, "convert": 2}


def save_models(folder, layers):
    """Writes two models; returns the bytes of their largest tensor in fp32."""
    largest = 0
    for seed, name in enumerate(("one", "two")):
        largest = save_large_model(folder / name, WIDTHS, layers, seed=seed)
    return largest


@pytest.mark.parametrize("layers", [1, 3])
def test_memory_does_not_grow_with_the_number_of_layers(layers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (rounding, distill):
        monkeypatch.setattr(module, "MOST_DOUBLES", 1000)
    largest = save_models(tmp_path, layers)
    for name, words in COMMANDS.items():
        with AliveTensors() as alive:
            call(*words)
        # the factors: of distill in fp32 and as they are written, of fold as they are read
        factors = Path("lora.safetensors").stat().st_size
        kept = {"distill": 2 * factors, "fold": factors}.get(name, 0)
        assert alive.peak <= MOST_TENSORS[name] * largest + kept, (name, alive.peak / largest)
        shutil.rmtree("out", ignore_errors=True)
        Path("out.safetensors").unlink(missing_ok=True)


def test_a_model_in_shards_is_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_models(tmp_path, 1)
    call("mix", "0.25*one + 0.75*two", "--out", "whole")
    cut_into_shards(tmp_path / "one", 3)
    cut_into_shards(tmp_path / "two", 2)
    call("mix", "0.25*one + 0.75*two", "--out", "parts")
    file = "unet/diffusion_pytorch_model.safetensors"
    assert Path("whole", file).read_bytes() == Path("parts", file).read_bytes()
    one, two, mixed = (open_model_folder(name)["unet"] for name in ("one", "two", "whole"))
    for key in one.infos:
        exact = 0.25 * one.read(key).double() + 0.75 * two.read(key).double()
        torch.testing.assert_close(mixed.read(key).double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.soak
def test_models_larger_than_the_memory_are_merged(tmp_path):
    """Two models of 1.6 GB in processes that may have 1.2 GB, of which 0.4 are the libraries'."""
    for seed, name in enumerate(("one", "two")):
        save_large_model(tmp_path / name, (512, 1024), 8, seed=seed)
    size = sum(file.stat().st_size for file in (tmp_path / "one").rglob("*.safetensors"))
    limit = 1_200_000_000
    assert size > 1.25 * limit
    one, two = tmp_path / "one", tmp_path / "two"
    for words in (
        ("distill", one, two, tmp_path / "lora.safetensors", "--rank", 4),
        ("fold", one, tmp_path / "lora.safetensors", tmp_path / "folded"),
        ("mix", f"0.5*{one} + 0.5*{two}", tmp_path / "mixed"),
        ("convert", one, tmp_path / "one.safetensors"),
    ):
        status, most, seconds = run_limited(words, limit)
        print(f"{words[0]}: {most / 1e6:.0f} MB, {size / seconds / 1e6:.0f} MB/s")
        assert status == 0 and most < limit
