"""merge.py info: the norms of dense updates, tokens, a plot, and the networks of a model."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_core.byte_sizes import format_bytes
from tests.merge_commands import call, deltas


def test_info_tells_what_is_there(here, states, capsys):
    call("info", "a.safetensors", "--plot", "s.png", "--model", "base", "--top", "3")
    said = capsys.readouterr().out
    assert "a.safetensors: diffusers, sd (sd_v1), fp32" in said
    assert Path("s.png").stat().st_size > 1000
    squares = [float(value.square().sum()) for value in deltas(states["a"]).values()]
    assert re.search(rf"total +\d+ +\d+ +0 +2 +2 +{sum(squares) ** 0.5:.4g} ", said)
    call("info", "run", "--model", "base")
    assert "word TOK stands for <s1><s2>" in capsys.readouterr().out
    call("info", "base")
    assert "unet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "empty", "more"),
    [
        (3, 0, []),
        (100, 0, []),
        (5_000, 0, ["  and 4,900 more"]),
        (3, 14, ["  and 14 that are None"]),
        (0, 1, ["  and 1 that is None"]),
        (120, 14, ["  and 20 more and 14 that are None"]),
    ],
)
def test_the_entries_of_a_header_are_in_order_and_not_without_end(here, capsys, count, empty, more):
    names = [f"ss_{i:05d}" for i in range(count)]
    entries = {f"ss_0{i:03d}_unset": "None" for i in range(empty)} | dict.fromkeys(names, "x")
    save_file(load_file("a.safetensors"), "h.safetensors", metadata=entries)
    call("info", "h.safetensors", "--model", "base")
    listed = [f"  {name}  x" for name in names[:100]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("header:") + 1 :] == listed + more


def test_the_size_of_a_run_is_that_of_the_files_that_are_read(here, capsys):
    """Its LoRA is there a second time, under kohya's names, and is not read."""
    read = ("run/pytorch_lora_weights.safetensors", "run/run_emb.safetensors")
    size = format_bytes(sum(Path(name).stat().st_size for name in read))
    assert Path("run/run.safetensors").is_file()
    call("info", "run", "--model", "base")
    assert capsys.readouterr().out.splitlines()[0] == f"run: diffusers, sd (sd_v1), fp32, {size}"
