"""Globs over the paths of layers, and the tables of what they choose."""

from __future__ import annotations

import pytest

from lora_core.adapters.targets import select_paths, target_summary, target_table
from lora_core.errors import UserError


def test_trap_11_suffixes_respect_the_dot():
    """endswith and substring search, the usual mistakes, hit single blocks, and "q" every to_q."""
    blocks = [f"transformer_blocks.{i}.attn.to_q" for i in (3, 13)]
    blocks += [f"single_{path}" for path in blocks]
    paths = [
        *blocks,
        "proj_out",
        "single_transformer_blocks.3.proj_out",
        "transformer_blocks.3.ff.net.2",
        "transformer_blocks.3.ff.net.12",
    ]
    expected = {
        "transformer_blocks.3.attn.to_q": ["transformer_blocks.3.attn.to_q"],
        "attn.to_q": blocks,  # the published lists mean both kinds of block
        "proj_out": ["proj_out", "single_transformer_blocks.3.proj_out"],  # and the head
        "single_*.proj_out": ["single_transformer_blocks.3.proj_out"],
        "ff.net.2": ["transformer_blocks.3.ff.net.2"],
        "net.?": ["transformer_blocks.3.ff.net.2"],
    }
    for pattern, chosen in expected.items():
        assert select_paths(paths, [pattern]) == chosen
    wrong = [path for path in paths if path.endswith("transformer_blocks.3.attn.to_q")]
    assert wrong == ["transformer_blocks.3.attn.to_q", "single_transformer_blocks.3.attn.to_q"]
    assert [path for path in paths if path.endswith("2")] == [
        "transformer_blocks.3.ff.net.2",
        "transformer_blocks.3.ff.net.12",
    ]
    with pytest.raises(UserError, match="'q' matches none of the 8"):
        select_paths(paths, ["q"])


def large_transformer():
    """Paths of 191 layers in 19 double and 38 single blocks."""
    double = ["attn.to_q", "attn.to_k", "ff.net.0.proj", "ff.net.2"]
    double += ["ff_context.net.0.proj", "ff_context.net.2"]
    paths = []
    for i in range(19):
        paths += [f"transformer_blocks.{i}.{name}" for name in double]
    for i in range(38):
        paths += [f"single_transformer_blocks.{i}.{name}" for name in ("attn.to_q", "proj_out")]
    return [*paths, "proj_out"]


def test_the_summary_of_targets_counts_every_layer_once():
    expected = "191 layers: attention 76, feed-forward 76, projections 39"
    assert target_summary(large_transformer()) == expected
    resnet = ["a.resnets.0.conv1", "a.resnets.0.time_emb_proj", "a.downsamplers.0.conv", "conv_in"]
    assert target_summary(resnet) == "4 layers: resnets 2, samplers 1, others 1"
    text = ["layers.0.self_attn.q_proj", "layers.0.self_attn.out_proj", "layers.0.mlp.fc1"]
    assert target_summary(text) == "3 layers: attention 2, feed-forward 1"
    assert target_summary(["norm1.linear"]) == "1 layer: norms 1"


def test_the_table_of_targets_counts_every_layer_once():
    """One line for each kind of block; the numbers are those of published target lists."""
    paths = large_transformer()
    assert target_table(paths).splitlines() == [
        "191 layers",
        "114 = 19 x 6  transformer_blocks.0-18: attn.{to_q,to_k}, {ff,ff_context}.net.{0.proj,2}",
        " 76 = 38 x 2  single_transformer_blocks.0-37: attn.to_q, proj_out",
        "  1           proj_out",
    ]
    some = [
        "mid.0.attn1.to_out.0",
        "up.1.a.0.to_q",
        "up.2.a.0.to_q",
        "up.2.a.1.to_q",
        "up.4.a.0.to_q",
        "conv_in",
    ]
    assert target_table(some).splitlines() == [
        "6 layers",
        "  2          mid.0.attn1.to_out.0, conv_in",
        "  4 = 4 x 1  up.1-2,4.a.0-1: to_q",
    ]
    assert target_table(["conv"]) == "1 layer\n  1  conv"


def test_a_long_table_sums_the_smallest_kinds():
    kinds = []
    for n, letter in enumerate("abcdefghijklmnopqrst"):
        kinds += [f"{letter}.{i}.{letter}x" for i in range(2 + n)]
    lines = target_table(kinds).splitlines()
    assert len(lines) == 15 and lines[0].split() == [str(len(kinds)), "layers"]
    assert sum(int(line.split()[0]) for line in lines[1:]) == len(kinds)
    assert (
        lines[-1] == f" {sum(range(2, 9))} more, of 7 other kinds"
        and lines[1] == "  9 = 9 x 1   h.0-8: hx"
    )
