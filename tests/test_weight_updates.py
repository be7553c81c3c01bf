"""LowRank -> weight update: shapes, groups, DoRA rows."""

from __future__ import annotations

import pytest
import torch

from lora_core.adapters.weight_updates import (
    LowRank,
    delta_weight,
    factor_blocks,
    from_blocks,
    scaled_product,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_product_of_a_linear():
    lr = LowRank(randn(3, 7), randn(5, 3), 0.5)
    torch.testing.assert_close(scaled_product(lr), 0.5 * lr.up @ lr.down, rtol=0, atol=1e-15)
    assert lr.rank == 3


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_product_of_a_convolution_acts_as_its_two_convolutions(groups):
    lr = LowRank(randn(4, 8 // groups, 3, 2), randn(12, 4 // groups, 1, 1, seed=1), 0.25)
    x = randn(2, 8, 6, 7, seed=2)
    two = 0.25 * torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(x, lr.down, groups=groups), lr.up, groups=groups
    )
    torch.testing.assert_close(
        torch.nn.functional.conv2d(x, scaled_product(lr), groups=groups), two, rtol=0, atol=1e-12
    )


def test_product_is_fp32_for_half_factors_and_refuses_factors_that_do_not_fit():
    low = LowRank(randn(3, 7).half(), randn(5, 3).half(), 1.0)
    assert scaled_product(low).dtype == torch.float32
    torch.testing.assert_close(
        scaled_product(low).double(), low.up.double() @ low.down.double(), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"up \[5, 2\] does not fit down \[3, 7\]"):
        scaled_product(LowRank(randn(3, 7), randn(5, 2), 1.0))


@pytest.mark.parametrize("shape", [(6, 6), (6, 3, 3, 3)])
def test_delta_of_a_dora_gives_rows_of_the_magnitude(shape):
    weight = randn(*shape, seed=3)
    lr = LowRank(
        randn(2, *shape[1:]),
        randn(6, 2, *[1] * (len(shape) - 2), seed=1),
        0.5,
        randn(6, seed=2).abs(),
    )
    tuned = weight + delta_weight(lr, weight)
    bracket = weight + scaled_product(lr)
    torch.testing.assert_close(tuned.flatten(1).norm(dim=1), lr.magnitude, rtol=1e-12, atol=0)
    cosine = torch.nn.functional.cosine_similarity(tuned.flatten(1), bracket.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0)


def test_delta_checks_the_weight():
    lr = LowRank(randn(2, 7), randn(5, 2), 1.0)
    torch.testing.assert_close(delta_weight(lr), delta_weight(lr, randn(5, 7)), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"shape \[5, 7\], the base weight \[5, 8\]"):
        delta_weight(lr, randn(5, 8))
    with pytest.raises(ValueError, match="depends on the base weight"):
        delta_weight(lr._replace(magnitude=randn(5)))


@pytest.mark.parametrize("shape, groups", [((5, 7), 1), ((12, 4, 3, 2), 1), ((12, 2, 3, 2), 4)])
def test_blocks_and_their_assembly(shape, groups):
    ones = [1] * (len(shape) - 2)
    lr = LowRank(randn(4, *shape[1:]), randn(shape[0], 4 // groups, *ones, seed=1), 0.5)
    up, down = factor_blocks(lr)
    assert up.shape == (groups, shape[0] // groups, 4 // groups) and down.shape[:2] == (
        groups,
        4 // groups,
    )
    again = from_blocks(up, down, tuple(shape[2:]), scale=0.5)
    assert torch.equal(again.down, lr.down) and torch.equal(again.up, lr.up) and again.scale == 0.5
