"""Sums that are larger than memory: the same bytes, their size said before, nothing left behind."""

import os
import re
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lora_core.adapters.weight_updates import LowRank
from merging import large_results
from merging.adapter_sums import MergedLayer
from merging.large_results import keep_on_disk
from merging.truncation import ApproximationReport
from tests.merge_commands import call

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def copies(here, capsys):
    """Twelve files of one LoRA in the folder loras."""
    Path("loras").mkdir()
    for number in range(12):
        shutil.copy("a.safetensors", f"loras/{number}.safetensors")
    return here


def test_the_size_of_a_sum_of_many_files_is_said_before_it_is_written(copies, capsys):
    call("mix", "0.1*loras/*.safetensors", "--out", "m.safetensors", "--model", "base")
    said = capsys.readouterr().err
    assert "the sum has 12 files" in said
    found = re.search(
        r"m.safetensors holds the whole of 12 files: rank 24 .* about ([\d.]+) kB", said
    )
    factors = os.path.getsize("m.safetensors") - int.from_bytes(
        Path("m.safetensors").read_bytes()[:8], "little"
    )
    assert found and float(found[1]) * 1e3 == pytest.approx(factors, rel=0.05)


def test_layers_that_are_kept_on_the_disk_give_the_same_bytes(copies, monkeypatch):
    words = ("0.1*loras/*.safetensors", "--model", "base")
    one, other = Path("one/m.safetensors"), Path("other/m.safetensors")  # the title is the name
    for file in (one, other):
        file.parent.mkdir()
    call("mix", *words, "--out", str(one))
    monkeypatch.setattr(large_results, "LARGE", 0)
    before = os.listdir()
    call("mix", *words, "--out", str(other))
    assert one.read_bytes() == other.read_bytes()
    assert sorted(os.listdir()) == sorted(before) and os.listdir("other") == [other.name]


def test_a_disk_without_room_is_said_before_anything_is_written(copies, monkeypatch, capsys):
    monkeypatch.setattr(large_results.shutil, "disk_usage", lambda place: Usage(9, 9, 1000))
    call("mix", "0.1*loras/*.safetensors", "--out", "m.safetensors", "--model", "base", status=2)
    said = capsys.readouterr().err
    assert "the sum of 12 files would take" in said and "has 1 kB" in said
    assert not Path("m.safetensors").exists()


def test_a_layer_on_the_disk_is_the_same_layer_and_has_no_file(tmp_path):
    lr = LowRank(torch.randn(3, 5), torch.randn(7, 3).half(), 1.0)
    layer = MergedLayer("unet", "a", lr, ApproximationReport(3, 3, 1.0, 0.0))
    (kept,) = keep_on_disk([layer], str(tmp_path / "o.safetensors"))
    assert torch.equal(kept.adapter.down, lr.down) and torch.equal(kept.adapter.up, lr.up)
    assert kept.adapter.up.dtype == torch.float16 and os.listdir(tmp_path) == []


def test_many_files_are_not_open_at_once(here):
    """The limit of open files is 256 on some machines."""
    Path("loras").mkdir()
    for number in range(60):
        shutil.copy("a.safetensors", f"loras/{number}.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        call("mix", "mean(loras/*.safetensors)", "--out", "m.safetensors", "--model", "base")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert Path("m.safetensors").is_file()


def test_many_inputs_of_which_little_is_left_are_a_few_lines(copies, capsys):
    for number in range(12):
        source = "b.safetensors" if number % 2 else "a.safetensors"
        shutil.copy(source, f"loras/{number}.safetensors")
    capsys.readouterr()
    call(
        "mix", "0.1*loras/*.safetensors", "--out", "m.safetensors", "--rank", "1", "--model", "base"
    )
    said = capsys.readouterr()
    assert "the 10 of 12 inputs of which the least is kept" in said.out
    assert len(re.findall(r"^0.1\*loras", said.out, re.MULTILINE)) == 10
    assert "is left of 12 of 12 files in the result" in said.err and said.err.count("warning") == 1
