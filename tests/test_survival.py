"""What is left of each input in a sum: held to dense projections, printed by the command."""

import re

import pytest
import torch
from safetensors.torch import save_file

from lora_core.adapters.weight_updates import LowRank, scaled_product
from merging.factor_sums import concat_factors
from merging.survival import (
    SurvivalTally,
    energies_of_dense,
    energies_of_factors,
    energies_of_one,
    rounding_shares,
)
from merging.svd import compress_adapter, compress_sum
from merging.truncation import Keep
from tests.merge_commands import SQUARE, call


def adapter(out, fan, rank, seed, size=1.0):
    noise = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, fan, generator=noise)
    return LowRank(down, torch.randn(out, rank, generator=noise) * size, 0.5, None)


def dense_loss(weighted, rank):
    """[|U_c^T D_i V_c|^2 / |D_i|^2] by the SVD of the dense sum, and the lost part's parts."""
    updates = [weight * scaled_product(lr).double() for weight, lr in weighted]
    u, sigma, vh = torch.linalg.svd(torch.stack(updates).sum(0))
    full = int((sigma > 1e-9 * sigma[0]).sum())
    u, vh = u[:, rank:full], vh[rank:full]
    parts = [u @ (u.mT @ update @ vh.mT) @ vh for update in updates]
    return [float(p.square().sum() / d.square().sum()) for p, d in zip(parts, updates)], parts


MORE_THAN_WIDE = ((12, 1.0), (9, 0.05))  # columns, of a layer of 23 x 19


@pytest.mark.parametrize("shape", [(23, 19), (19, 23)])
@pytest.mark.parametrize("rank", [1, 4, 7, 11, 50])
@pytest.mark.parametrize(
    "sizes",
    [((4, 1.0), (4, 0.05)), ((5, 1.0), (3, 1.0), (4, 1e-3)), ((6, 2.0), (7, 1e-2)), MORE_THAN_WIDE],
)
def test_the_loss_of_each_input_is_its_part_of_what_is_cut(rank, sizes, shape):
    weighted = []
    for seed, (own, size) in enumerate(sizes):
        weighted.append((0.7 - 0.4 * seed, adapter(*shape, own, seed, size)))
    kept, _, inputs = compress_sum(weighted, Keep(rank=rank))
    expected, parts = dense_loss(weighted, rank)
    lost = inputs.lost / inputs.whole
    torch.testing.assert_close(lost, torch.tensor(expected).double(), rtol=1e-4, atol=1e-7)
    exact = [weight * scaled_product(lr).double() for weight, lr in weighted]
    whole = torch.stack([update.square().sum() for update in exact])
    torch.testing.assert_close(inputs.whole, whole, rtol=1e-5, atol=0)
    total = torch.stack(exact).sum(0)
    error = total - scaled_product(kept).double()
    assert float((torch.stack(parts).sum(0) - error).norm()) < 1e-5 * float(total.norm())
    if sum(own for own, _ in sizes) > min(shape):
        return  # directions that inputs cancel of each other, which the next counts as lost
    same = energies_of_dense([w * scaled_product(lr) for w, lr in weighted], kept)
    torch.testing.assert_close(same.lost, inputs.lost, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(same.along, inputs.along, rtol=1e-3, atol=1e-6)


def test_what_inputs_cancel_of_each_other_is_not_lost():
    both, small = adapter(12, 10, 3, 0), adapter(12, 10, 2, 1, 1e-2)
    weighted = [(1.0, both), (1.0, small), (-1.0, both)]
    _, _, inputs = compress_sum(weighted, Keep(rank=2))
    assert float((inputs.lost / inputs.whole).max()) < 1e-5


def test_shared_directions_are_not_lost_where_the_sum_is_kept():
    left = torch.randn(9, 1)
    first, second = [LowRank(torch.randn(1, 8), left * s, 1.0, None) for s in (1.0, 1e-2)]
    _, _, inputs = compress_sum([(1.0, first), (1.0, second)], Keep(rank=1))
    assert float((inputs.lost / inputs.whole).max()) < 1e-5


def test_an_input_alone_loses_what_the_layer_loses():
    lr = adapter(11, 13, 6, 2)
    kept, report = compress_adapter(concat_factors([(0.3, lr)]), Keep(rank=2))
    one, many = energies_of_one(report, kept), compress_sum([(0.3, lr)], Keep(rank=2))[2]
    for own, other in zip(one, many):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_the_error_of_each_inputs_own_columns(dtype):
    weighted = [(1.0, adapter(40, 30, 4, 0)), (1.0, adapter(40, 30, 5, 1, 1e-5))]
    total = concat_factors(weighted)
    cast = total._replace(down=total.down.to(dtype), up=total.up.to(dtype))
    norm, inputs = energies_of_factors(weighted, total)
    assert norm == pytest.approx(float(scaled_product(total).norm()), rel=1e-5)
    tally = SurvivalTally(2)
    tally.add_layer([0, 1], inputs, rounding_shares(total, cast))
    for place, columns in enumerate((slice(0, 4), slice(4, 9))):
        exact = total.up[:, columns].double() @ total.down[columns].double()
        error = exact - cast.up[:, columns].double() @ cast.down[columns].double()
        expected = float(error.square().sum() / exact.square().sum())
        assert 1 - tally.shares()[place] == pytest.approx(expected, rel=0.3)


# ---------------------------------------------------------------- through the command


def save_pair(quiet):
    """loud.safetensors and quiet.safetensors, rank 2 in one layer of 8 x 8."""
    noise = torch.Generator().manual_seed(3)
    for name, size in (("loud", 1.0), ("quiet", quiet)):
        q = torch.linalg.qr(torch.randn(8, 8, generator=noise)).Q
        p = torch.linalg.qr(torch.randn(8, 8, generator=noise)).Q
        tensors = {
            f"unet.{SQUARE}.lora_A.weight": q[:2].contiguous(),
            f"unet.{SQUARE}.lora_B.weight": (p[:, :2] * size).contiguous(),
        }
        save_file(tensors, f"{name}.safetensors")


@pytest.mark.parametrize(
    ("keep", "warned"), [(("--rank", "2"), True), (("--rank", "3"), True), (("--rank", "4"), False)]
)
def test_mix_says_how_much_of_each_input_is_left(here, keep, warned, capsys):
    save_pair(1e-3)
    text = "loud.safetensors + 0.5*quiet.safetensors"
    call("mix", text, "--out", "o.safetensors", "--model", "base", *keep)
    said = capsys.readouterr()
    assert float(re.search(r"total .* ([\d.]+) %", said.out)[1]) > 99.999
    shares = dict(re.findall(r"^\S+\*(\w+)\.safetensors +([\d.]+) %", said.out, re.MULTILINE))
    assert bool(re.search(r"only [\d.]+ % of quiet.safetensors is left", said.err)) == warned
    if not warned:
        assert not shares and "of each input" not in said.out
        return
    assert float(shares["loud"]) == pytest.approx(100, abs=1e-3)
    assert float(shares["quiet"]) < (65 if keep[1] == "2" else 90)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("mix", "a.safetensors + b.safetensors"), False),
        (("mix", "a.safetensors"), False),
        (("mix", "a.safetensors", "--rank", "1"), False),
        (("mix", "a.safetensors + b.safetensors", "--dtype", "bf16"), True),
        (("mix", "a.safetensors + b.safetensors", "--budget", "20"), True),
        (("mix", "a.safetensors + d.safetensors", "--rank", "2"), True),
        (("mix", "a.safetensors + b.safetensors", "--rank", "2", "--method", "ties"), False),
    ],
)
def test_exact_sums_and_single_files_have_no_such_lines(here, words, lines, capsys):
    call(*words, "--out", "o.safetensors", "--model", "base")
    assert ("of each input" in capsys.readouterr().out) == lines
