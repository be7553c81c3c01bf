"""Compression and distillation against the dense SVD, which is optimal by Eckart and Young."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.adapters.weight_updates import delta_weight, scaled_product
from lora_core.errors import UserError
from merging import factor_sums, svd
from merging.svd import compress_adapter, distill_update, singular_values
from merging.truncation import ApproximationReport, Keep
from tests.random_adapters import SHAPES, adapter, randn


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_compression_is_the_eckart_young_optimum(shape, groups, scale):
    lr = adapter(shape, 6, groups, scale)
    dense = scaled_product(lr).reshape(groups, shape[0] // groups, -1)
    sigma = torch.linalg.svdvals(dense)
    torch.testing.assert_close(singular_values(lr), sigma[:, : 6 // groups], rtol=1e-11, atol=1e-12)
    for steps in range(1, 6 // groups + 1):
        small, report = compress_adapter(lr, Keep(rank=steps * groups))
        best = float(sigma[:, steps:].norm())
        error = float((scaled_product(small) - scaled_product(lr)).norm())
        assert small.rank == report.rank == groups * min(steps, sigma.shape[1]) and report.full == 6
        assert small.down.shape[1:] == lr.down.shape[1:] and small.scale == 1.0
        assert error == pytest.approx(best, rel=1e-10, abs=1e-12)
        assert report.lost == pytest.approx(best, rel=1e-10, abs=1e-12)
        assert report.norm == pytest.approx(float(sigma.norm()), rel=1e-12)
        balance = small.up.reshape(groups, shape[0] // groups, -1).norm(dim=1) / small.down.flatten(
            1
        ).norm(dim=1).reshape(groups, -1)
        torch.testing.assert_close(balance, torch.ones_like(balance), rtol=1e-9, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99)
)
def test_compression_of_any_shape(out, fan_in, rank, kept, seed):
    lr = adapter((out, fan_in), rank, seed=seed)
    small, report = compress_adapter(lr, Keep(rank=kept))
    sigma = torch.linalg.svdvals(scaled_product(lr))
    assert float((scaled_product(small) - scaled_product(lr)).norm()) == pytest.approx(
        float(sigma[kept:].norm()), rel=1e-9, abs=1e-12 * float(sigma.norm())
    )
    assert report.rank == min(kept, out, fan_in, rank)


def test_svd_rebuilds_the_update_with_orthonormal_factors():
    lr = adapter((12, 4, 3, 2), 6, 3)
    u, sigma, vh = svd.factor_svd(lr)
    torch.testing.assert_close(
        u @ (sigma[..., None] * vh), scaled_product(lr).reshape(3, 4, 24), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        u.mT @ u, torch.eye(2, dtype=torch.float64).expand(3, 2, 2), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        vh @ vh.mT, torch.eye(2, dtype=torch.float64).expand(3, 2, 2), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shape, groups", [*SHAPES, ((40, 6), 1), ((6, 40), 1)])
def test_more_columns_than_the_layer_is_wide_are_decomposed_in_its_width(
    shape, groups, monkeypatch
):
    seen = []
    qr = torch.linalg.qr
    monkeypatch.setattr(
        torch.linalg, "qr", lambda a, mode="reduced": seen.append(a.shape) or qr(a, mode)
    )
    for rank in (60 * groups, 120 * groups):
        lr = adapter(shape, rank, groups)
        dense = scaled_product(lr).reshape(groups, shape[0] // groups, -1)
        u, sigma, vh = svd.factor_svd(lr)
        torch.testing.assert_close(u @ (sigma[..., None] * vh), dense, rtol=0, atol=1e-11)
        torch.testing.assert_close(sigma, torch.linalg.svdvals(dense), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(singular_values(lr), sigma, rtol=1e-11, atol=1e-12)
    assert len(seen) == 4 and len(set(seen)) == 1  # one of each call, whatever the rank


def test_single_precision_stays_at_the_optimum_and_half_factors_are_read_as_they_are():
    lr = adapter((96, 80), 32, dtype=torch.float16)
    small, report = compress_adapter(lr, Keep(rank=8))
    exact = lr.scale * lr.up.double() @ lr.down.double()
    best = float(torch.linalg.svdvals(exact)[8:].norm())
    assert small.down.dtype == torch.float32
    assert float((small.up.double() @ small.down.double() - exact).norm()) / best - 1 < 1e-10
    assert report.lost == pytest.approx(best, rel=1e-6)


def test_smallest_rank_for_an_error_or_an_energy():
    lr = adapter((13, 11), 9)
    sigma = torch.linalg.svdvals(scaled_product(lr))[:9]
    tails = torch.tensor([float(sigma[k:].norm() / sigma.norm()) for k in range(10)])
    for allowed in (0.5, 0.1, 0.02, 1e-9):
        small, report = compress_adapter(lr, Keep(max_error=allowed))
        assert tails[small.rank] <= allowed < tails[small.rank - 1]
        assert report.error == pytest.approx(float(tails[small.rank]), rel=1e-5, abs=1e-9)
    small, report = compress_adapter(lr, Keep(energy=0.99))
    assert report.energy >= 0.99 and 1 - tails[small.rank - 1] ** 2 < 0.99
    assert compress_adapter(lr, Keep(max_error=1.0))[0].rank == 1  # a file cannot hold rank 0


def test_rank_beyond_the_update_keeps_all_and_zero_stays_zero():
    lr = adapter((5, 4), 6)
    small, report = compress_adapter(lr, Keep(rank=50))
    assert small.rank == report.rank == 4 and report.lost == 0
    torch.testing.assert_close(scaled_product(small), scaled_product(lr), rtol=0, atol=1e-12)
    nothing, report = compress_adapter(lr._replace(up=torch.zeros(5, 6)), Keep(max_error=0.1))
    assert (
        report == ApproximationReport(1, 6, 0.0, 0.0)
        and report.error == 0
        and report.energy == 1
        and not scaled_product(nothing).any()
    )


def test_groups_share_a_rank_evenly_or_not_at_all():
    with pytest.raises(ValueError, match="rank 4 cannot be shared by the 3 groups"):
        compress_adapter(adapter((12, 4, 3, 2), 6, 3), Keep(rank=4))


def test_decompositions_leave_the_thread_count_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compress_adapter(adapter((5, 4), 2), Keep(rank=1))
        singular_values(adapter((5, 4), 2))
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), factor_sums.one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_dora_is_refused():
    lr = adapter((5, 4), 2)._replace(magnitude=torch.ones(5))
    for refused in (lambda: compress_adapter(lr, Keep(rank=1)), lambda: singular_values(lr)):
        with pytest.raises(UserError, match="give the base model"):
            refused()


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("randomised", [False, True])
def test_distillation_at_sufficient_rank_is_exact(shape, groups, randomised):
    lr = adapter(shape, 2 * groups if groups < 6 else groups, groups, dtype=torch.float32)
    base = randn(*shape, seed=9, dtype=torch.float32)
    wished = delta_weight(lr)
    found, report = distill_update(
        wished,
        Keep(rank=lr.rank),
        groups=groups,
        generator=torch.Generator().manual_seed(0) if randomised else None,
    )
    assert float((scaled_product(found) - wished).norm() / wished.norm()) < 1e-6
    assert (
        report.error < 1e-6
        and found.rank == lr.rank
        and found.down.shape == lr.down.shape
        and found.up.shape == lr.up.shape
    )
    tuned, _ = distill_update((base + wished) - base, Keep(rank=lr.rank), groups=groups)
    assert float((scaled_product(tuned) - wished).norm() / wished.norm()) < 1e-5


SPECTRA = {
    "flat": torch.ones(96),
    "slow": torch.arange(1, 97) ** -0.5,
    "power": torch.arange(1, 97) ** -1.0,
    "geometric": 0.9 ** torch.arange(96),
    "spikes": torch.cat(
        [
            torch.full((5,), 10.0),
            torch.rand(91, generator=torch.Generator().manual_seed(1)).sort(descending=True).values
            + 0.2,
        ]
    ),
    "signal in noise": torch.cat([torch.full((3,), 1e3), torch.linspace(1, 0, 93)]),
    "numerically exact": torch.cat([torch.linspace(3, 1, 12), torch.full((84,), 1e-9)]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [4, 12])
def test_randomised_svd_is_near_the_optimum_and_its_estimate_covers_the_truth(name, rank):
    sigma = SPECTRA[name].double()
    u, v = torch.linalg.qr(randn(96, 96)).Q, torch.linalg.qr(randn(120, 96, seed=1)).Q
    matrix = u @ torch.diag(sigma) @ v.T
    best = float(sigma[rank:].norm())
    found, report = distill_update(
        matrix, Keep(rank=rank), generator=torch.Generator().manual_seed(3)
    )
    error = float((scaled_product(found) - matrix).norm())
    assert found.rank == rank
    if best / float(sigma.norm()) < 1e-6:
        assert error / float(sigma.norm()) < 1e-6 and report.error < 1e-6
        return
    assert error <= best * (1 + svd.EXCESS)
    assert error / best - 1 <= report.excess + 1e-9
    assert report.lost == pytest.approx(error, rel=1e-9) and report.norm == pytest.approx(
        float(sigma.norm()), rel=1e-12
    )


def test_randomised_svd_of_noise_which_has_no_gap_at_all():
    matrix = randn(300, 200)
    best = float(torch.linalg.svdvals(matrix)[10:].norm())
    found, report = distill_update(
        matrix, Keep(rank=10), generator=torch.Generator().manual_seed(0)
    )
    error = float((scaled_product(found) - matrix).norm()) / best - 1
    assert 0 <= error <= report.excess < svd.EXCESS


def test_randomised_svd_that_does_not_converge_gives_way_to_the_exact_one(monkeypatch):
    monkeypatch.setattr(svd, "ITERATIONS", 2)
    matrix = randn(30, 20)
    found, report = distill_update(matrix, Keep(rank=3), generator=torch.Generator().manual_seed(0))
    assert report.excess == 0
    assert float((scaled_product(found) - matrix).norm()) == pytest.approx(
        float(torch.linalg.svdvals(matrix)[3:].norm()), rel=1e-10
    )


def test_randomised_svd_needs_a_rank():
    with pytest.raises(ValueError, match="needs a rank"):
        distill_update(randn(4, 4), Keep(max_error=0.1), generator=torch.Generator())


def test_distillation_finds_the_rank_for_an_error_and_clamps_nothing():
    matrix = randn(30, 20)
    matrix[3, 4] = 1e3  # the entry a 99 % clamp would cut first
    found, report = distill_update(matrix, Keep(max_error=0.01))
    assert (
        float((scaled_product(found) - matrix).norm() / matrix.norm())
        == pytest.approx(report.error, rel=1e-9)
        and report.error <= 0.01
    )
    assert math.isclose(float(scaled_product(found)[3, 4]), 1e3, rel_tol=1e-3)


@pytest.mark.parametrize("wished", [1e-4, 1e-5, 1e-6])
def test_small_errors_are_kept_and_reported_for_updates_in_fp32(wished):
    # singular values from 1 down to 1e-7, where those of an SVD in fp32 are nothing but rounding
    matrix = (randn(320, 320) * torch.logspace(0, -7, 320, dtype=torch.float64)).float()
    found, report = distill_update(matrix, Keep(max_error=wished))
    error = float((scaled_product(double(found)) - matrix).norm() / matrix.double().norm())
    assert report.error <= wished
    assert error == pytest.approx(report.error, abs=2e-7)  # what fp32 factors add


def test_small_errors_take_no_more_than_the_rank_of_an_update_in_fp32():
    matrix = (randn(320, 8) @ randn(8, 320, seed=1)).float()
    assert distill_update(matrix, Keep(max_error=5e-7))[0].rank == 8


def double(lr):
    return lr._replace(down=lr.down.double(), up=lr.up.double())
