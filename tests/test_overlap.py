"""Overlaps of files, against dense SVDs in float64: 1 for equal files, 0 for orthogonal ones."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank, scaled_product
from merging.adapter_sums import layers_by_key
from merging.compare import principal_angles
from merging.overlap import layer_spaces, pair_overlaps, space_overlap
from tests.merge_commands import call


def random_update(out: int, fan_in: int, rank: int, seed: int) -> LowRank:
    noise = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=noise)
    return LowRank(torch.randn(rank, fan_in, generator=noise), up, 0.7)


def dense_overlap(first: Tensor, second: Tensor) -> float:
    """The formula, from complete SVDs of the updates as matrices."""
    bases = []
    for delta in (first.double(), second.double()):
        u, sigma, _ = torch.linalg.svd(delta, full_matrices=False)
        bases.append(u[:, sigma > 1e-5 * sigma[0]])
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1])
    return float(cosines.square().mean())


@pytest.mark.parametrize("ranks", [(1, 1), (4, 4), (3, 7), (1, 5)])
@pytest.mark.parametrize("sizes", [(13, 29), (40, 8)])
def test_overlaps_are_those_of_dense_decompositions(
    ranks: tuple[int, int], sizes: tuple[int, int]
) -> None:
    first, second = (random_update(*sizes, rank, rank + i) for i, rank in enumerate(ranks))
    a, b = layer_spaces(first), layer_spaces(second)
    one, two = scaled_product(first).double(), scaled_product(second).double()
    assert space_overlap(a.outputs, b.outputs) == pytest.approx(dense_overlap(one, two), abs=1e-5)
    assert space_overlap(a.inputs, b.inputs) == pytest.approx(dense_overlap(one.T, two.T), abs=1e-5)
    assert a.norm == pytest.approx(float(one.norm()), rel=1e-5)
    angles = principal_angles(first, second)
    assert space_overlap(a.outputs, b.outputs) == pytest.approx(
        float(angles.outputs.cos().square().mean()), abs=1e-5
    )


def test_equal_files_have_1_and_orthogonal_ones_0() -> None:
    first = random_update(24, 32, 4, 0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    low, high = basis[:4], basis[4:8]
    out = torch.eye(24)
    one, two = LowRank(low, out[:, :4], 1.0), LowRank(high, out[:, 4:8], 2.0)
    states = [AdapterState({"unet": {"a": lr}}) for lr in (first, first._replace(scale=3.0))]
    norms, pairs = pair_overlaps(states)
    assert pairs[0, 1].mean("outputs") == pytest.approx(1, abs=1e-6)
    assert pairs[0, 1].mean("inputs") == pytest.approx(1, abs=1e-6)
    assert norms[1] / norms[0] == pytest.approx(3 / 0.7, rel=1e-6)
    _, pairs = pair_overlaps([AdapterState({"unet": {"a": lr}}) for lr in (one, two)])
    assert pairs[0, 1].mean("outputs") == pytest.approx(0, abs=1e-9)
    assert pairs[0, 1].mean("inputs") == pytest.approx(0, abs=1e-9)
    assert pairs[0, 1].mean("chance") == pytest.approx((4 / 24 + 4 / 32) / 2)


def test_a_rank_that_is_not_used_is_no_direction() -> None:
    first = random_update(24, 32, 4, 0)
    padded = LowRank(
        torch.cat([first.down, first.down]), torch.cat([first.up, 0 * first.up], 1), first.scale
    )
    other = random_update(24, 32, 4, 5)
    alike = [space_overlap(layer_spaces(lr).outputs, layer_spaces(other).outputs)
             for lr in (first, padded)]  # fmt: skip
    assert alike[0] == pytest.approx(alike[1], abs=1e-5)


def test_random_spaces_overlap_by_chance_on_average() -> None:
    states = []
    for seed in range(30):
        states.append(AdapterState({"unet": {"a": random_update(30, 50, 4, seed)}}))
    _, pairs = pair_overlaps(states)
    outputs = [pair.mean("outputs") for pair in pairs.values()]
    inputs = [pair.mean("inputs") for pair in pairs.values()]
    mean = (sum(outputs) + sum(inputs)) / (2 * len(pairs))
    assert mean == pytest.approx(pairs[0, 1].mean("chance"), rel=0.05)


def test_info_of_several_files_prints_norms_and_pairs(here, states, capsys) -> None:
    files = ["a.safetensors", "c.safetensors", "run", "d.safetensors"]
    call("info", *files, "--model", "base", "--top", "2")
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["1", "a.safetensors"],
        ["2", "c.safetensors"],
        ["3", "run"],
        ["4", "d.safetensors"],
    ]
    squares = [float(scaled_product(lr).double().square().sum())
               for lr in layers_by_key(states["a"]).values()]  # fmt: skip
    assert lines[1].split()[-1] == f"{sum(squares) ** 0.5:.4g}"
    place = next(i for i, line in enumerate(lines) if re.match(r" +1 +2 +3 +4$", line))
    matrix = [line.split()[1:] for line in lines[place + 1 : place + 5]]
    assert matrix[0][2] == matrix[2][0] == "1.000"  # the run is a
    total = weight = 0.0
    first, second = layers_by_key(states["a"]), layers_by_key(states["c"])
    for key in first.keys() & second.keys():
        one, two = (scaled_product(own[key]).double().flatten(1) for own in (first, second))
        total += float(one.norm() * two.norm()) * dense_overlap(one, two)
        weight += float(one.norm() * two.norm())
    assert float(matrix[0][1]) == pytest.approx(total / weight, abs=6e-4)
    assert "of a DoRA only the low-rank part" in said.err
    assert len(lines) - lines.index("the 2 layers that overlap most") == 4


def test_files_of_learned_tokens_are_left_out(here, capsys) -> None:
    rows = "run/run_emb.safetensors"
    call("info", "a.safetensors", rows, "b.safetensors", "--model", "base")
    said = capsys.readouterr()
    call("info", "a.safetensors", "b.safetensors", "--model", "base")
    assert said.out == capsys.readouterr().out
    assert said.err == (
        "note: files of learned tokens only are left out, as they have no layers: "
        "run/run_emb.safetensors\n"
    )
    call("info", rows, "a.safetensors", "--model", "base", status=2)
    assert capsys.readouterr().err == (
        "error: run/run_emb.safetensors holds learned tokens only, and overlaps are of layers; "
        "give two files with layers\n"
    )


def test_what_cannot_be_compared_is_refused(here, capsys) -> None:
    mistakes = [
        (["a.safetensors", "base"], "whole model"),
        (["a.safetensors", "none.safetensors"], "none.safetensors"),
        (["a.safetensors", "run", "--plot", "x.png"], "--plot is for the spectra of one file"),
    ]
    for words, sentence in mistakes:
        call("info", *words, "--model", "base", status=2)
        assert sentence in capsys.readouterr().err


def test_other_sizes_are_refused(states) -> None:
    other = replace(states["a"], components={"unet": {}})
    first = AdapterState({"unet": {"a": random_update(8, 9, 2, 0)}})
    second = AdapterState({"unet": {"a": random_update(8, 10, 2, 0)}})
    with pytest.raises(Exception, match="other sizes"):
        pair_overlaps([first, second])
    _, pairs = pair_overlaps([first, other])
    assert math.isnan(pairs[0, 1].mean("outputs"))  # no common layer
    assert list(itertools.chain(pairs)) == [(0, 1)]
