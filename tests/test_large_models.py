"""Merges of whole models: memory is that of a few tensors, however many there are."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lora_core.formats.model_folders import open_model_folder
from merging import distill, rounding, svd
from tests.large_models import (
    AliveTensors,
    cut_into_shards,
    run_limited,
    save_large_model,
    save_loras,
)
from tests.merge_commands import call

WIDTHS = (32, 64)
COMMANDS = {
    "distill": ("distill", "one", "two", "lora.safetensors", "--rank", "1"),
    "fold": ("fold", "one", "lora.safetensors", "out"),
    "mix": ("mix", "0.5*one + 0.5*two", "--out", "out"),
    "convert": ("convert", "one", "out.safetensors"),
}
# Tensors of the largest size, in fp32, that are alive at once: of both models with their sum; of a
# weight, its update and the sum in two dtypes; of a difference in fp32 and fp64.
MOST_TENSORS = {"mix": 4, "fold": 4, "distill": 4, "convert": 2}


def save_models(folder, layers):
    """Writes two models; returns the bytes of their largest tensor in fp32."""
    largest = 0
    for seed, name in enumerate(("one", "two")):
        largest = save_large_model(folder / name, WIDTHS, layers, seed=seed)
    return largest


@pytest.mark.parametrize("layers", [1, 3])
def test_memory_does_not_grow_with_the_number_of_layers(layers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in (rounding, distill, svd):
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
def test_models_larger_than_the_memory_are_merged_in_linear_time(tmp_path):
    """Models of 0.4, 0.9 and 1.7 GB in processes that may have 1 GB, of which 0.4 are the
    libraries'. A further byte costs in the largest what it costs in the middle one.
    """
    limit, found = 1_000_000_000, []
    for layers in (1, 4, 9):
        here = tmp_path / str(layers)
        for seed, name in enumerate(("one", "two")):
            save_large_model(here / name, (512, 1024), layers, seed=seed)
        size = sum(file.stat().st_size for file in (here / "one").rglob("*.safetensors"))
        found.append((size, merge_limited(here, limit)))
        shutil.rmtree(here)
    assert found[-1][0] > 1.6 * limit
    for name in COMMANDS:
        (small, first), (middle, second), (large, third) = ((n, own[name]) for n, own in found)
        assert (third - second) / (large - middle) < 1.5 * (second - first) / (middle - small), name


def merge_limited(here, limit):
    """Seconds of a core of each command; prints them with the memory, which is asserted."""
    one, two, seconds = here / "one", here / "two", {}
    for words in (
        ("distill", one, two, here / "lora.safetensors", "--rank", 4),
        ("fold", one, here / "lora.safetensors", here / "folded"),
        ("mix", f"0.5*{one} + 0.5*{two}", here / "mixed"),
        ("convert", one, here / "one.safetensors"),
    ):
        status, most, seconds[words[0]] = run_limited(words, limit)
        print(f"{here.name}: {words[0]}: {most / 1e6:.0f} MB, {seconds[words[0]]:.1f} s")
        assert status == 0 and most < limit
    return seconds


@pytest.mark.soak
@pytest.mark.parametrize("rank", [(), ("--rank", "16")], ids=["exact", "rank 16"])
def test_a_folder_of_lora_files_is_one_sum(rank, tmp_path):
    """A mean of 1,000 files (or SOAK_LORAS) in a process that may have 256 open files: its own
    memory is at most 2 GB (the factors of one layer, of rank 4,000, are 0.2), its time linear in
    their number.
    """
    count, limit, found = int(os.environ.get("SOAK_LORAS", "1000")), 2_000_000_000, []
    for number in (count // 5, count):
        folder, out = tmp_path / f"{number}", tmp_path / f"{number}.safetensors"
        folder.mkdir()
        size = save_loras(folder, number)
        words = ("mix", f"mean({folder}/*.safetensors)", "--out", out, *rank)
        # not limited: files that are mapped, the result's among them, would count as its memory
        status, most, seconds = run_limited(words, resource.RLIM_INFINITY, files=256)
        print(f"{number} files of {size / 1e6:.1f} MB {' '.join(rank)}: {seconds:.0f} s, ", end="")
        print(f"{most / 1e9:.2f} GB")
        assert status == 0 and most < limit
        check_mean(out, folder, number, is_exact=not rank)
        found.append(seconds)
        shutil.rmtree(folder)
        out.unlink()
    assert found[1] < 1.5 * 5 * found[0]


def check_mean(out, folder, count, is_exact):
    """A layer of the result against the mean of the files, each multiplied out in fp64."""
    name, total = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 0.0
    for number in range(count):
        with safe_open(folder / f"{number:04}.safetensors", "pt") as file:
            total = total + multiplied_out(file, name)
    total = total / count
    with safe_open(out, "pt") as file:
        found = multiplied_out(file, name)
    if is_exact:
        torch.testing.assert_close(found, total, rtol=0, atol=1e-3 * total.abs().max().item())
        return
    u, values, v = torch.linalg.svd(total)
    nearest = u[:, :16] * values[:16] @ v[:16]
    error, least = ((total - x).norm().item() for x in (found, nearest))
    assert error <= 1.001 * least


def multiplied_out(file, name):
    """The update of a layer in an open LoRA file under kohya's names, in fp64."""
    up, down = (file.get_tensor(f"{name}.lora_{role}.weight").double() for role in ("up", "down"))
    return file.get_tensor(f"{name}.alpha").item() / len(down) * up @ down
