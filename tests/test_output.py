"""Outputs: a full disk and a dry run leave every file as it was."""

import errno
import re

import pytest

from lora_core.runs import run_folder
from tests.merge_commands import call, snapshot


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "a.safetensors", "--out", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "run", "--overwrite"),
        ("add", "c.safetensors", "c.safetensors", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "o.ckpt"),
    ],
)
def test_a_full_disk_leaves_everything_as_it_was(spoiled, words, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(spoiled)
    monkeypatch.setattr(run_folder.os, "fsync", full)
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
