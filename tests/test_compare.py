"""Inner products, angles and fits against the same quantities of dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from lora_core.adapters.weight_updates import LowRank, scaled_product
from merging.compare import fit_coefficients, gram_sums, inner_product_with_dense, principal_angles
from merging.factor_sums import cosine_similarity, frobenius_norm, inner_product
from tests.random_adapters import SHAPES, adapter, randn


@pytest.mark.parametrize("shape, groups", SHAPES)
def test_inner_products_are_those_of_the_dense_updates(shape, groups):
    a, b = adapter(shape, 6, groups, -0.5), adapter(shape, 2 * groups, groups, 3.0, 5)
    dense_a, dense_b = scaled_product(a), scaled_product(b)
    assert inner_product(a, b) == pytest.approx(
        float((dense_a * dense_b).sum()), rel=1e-11, abs=1e-11
    )
    assert inner_product_with_dense(dense_a, b) == pytest.approx(
        inner_product(a, b), rel=1e-11, abs=1e-11
    )
    assert frobenius_norm(a) == pytest.approx(float(dense_a.norm()), rel=1e-12)
    assert cosine_similarity(a, b) == pytest.approx(
        float((dense_a * dense_b).sum() / dense_a.norm() / dense_b.norm()), rel=1e-11
    )
    assert (
        cosine_similarity(a, a._replace(scale=-7.0)) == pytest.approx(1.0)
        and cosine_similarity(a, a._replace(scale=0.0)) == 0.0
    )


def test_principal_angles_are_those_of_the_projections():
    a, b = adapter((14, 11), 4), adapter((14, 11), 3, seed=5)
    found = principal_angles(a, b)
    for ours, left, right in ((found.outputs, a.up, b.up), (found.inputs, a.down.T, b.down.T)):
        onto = [matrix @ torch.linalg.pinv(matrix) for matrix in (left, right)]
        squares = torch.linalg.eigvalsh(onto[0] @ onto[1] @ onto[0]).flip(0)[:3]  # cosines squared
        torch.testing.assert_close(ours, squares.sqrt().acos(), rtol=1e-9, atol=1e-12)


def test_principal_angles_at_both_ends_and_in_deficient_spaces():
    a = adapter((14, 11), 4)
    mixed = LowRank(
        randn(4, 4, seed=3) @ a.down, a.up @ randn(4, 4, seed=4), 2.0
    )  # the same spaces under another basis
    assert all(
        len(angles) == 4 and float(angles.max()) < 1e-10 for angles in principal_angles(a, mixed)
    )
    tilt = 1e-9
    one, other = (
        LowRank(torch.ones(1, 3), torch.tensor([[1.0], [t], [0.0]], dtype=torch.float64), 1.0)
        for t in (0.0, tilt)
    )
    assert float(principal_angles(one, other).outputs) == pytest.approx(
        tilt, rel=1e-6
    )  # a cosine would be 1
    apart = principal_angles(
        one, LowRank(torch.ones(1, 3), torch.tensor([[0.0], [0.0], [1.0]]), 1.0)
    )
    assert float(apart.outputs) == pytest.approx(math.pi / 2) and float(apart.inputs) < 1e-7
    deficient = LowRank(torch.cat([a.down, a.down]), torch.cat([a.up, a.up], 1), 1.0)
    assert len(principal_angles(deficient, adapter((14, 11), 6, seed=5)).outputs) == 4
    assert len(principal_angles(a._replace(up=torch.zeros(14, 4)), a).outputs) == 0
    assert (
        len(
            principal_angles(
                adapter((12, 4, 3, 2), 6, 3), adapter((12, 4, 3, 2), 3, 3, seed=5)
            ).outputs
        )
        == 3
    )


def test_fit_finds_the_coefficients_and_what_they_leave():
    files = [
        [adapter((8, 6), 2, seed=10 * i + j) for j in range(3)] for i in range(2)
    ]  # two layers, three files
    rest = [randn(8, 6, seed=90 + i) for i in range(2)]
    wished = torch.tensor([0.71, -0.4, 0.0], dtype=torch.float64)
    exact = fit_coefficients(
        gram_sums(sum(c * scaled_product(lr) for c, lr in zip(wished, layer)), layer)
        for layer in files
    )
    torch.testing.assert_close(exact.coefficients, wished, rtol=0, atol=1e-12)
    assert exact.unexplained < 1e-6
    deltas = [
        sum(c * scaled_product(lr) for c, lr in zip(wished, layer)) + extra
        for layer, extra in zip(files, rest)
    ]
    found = fit_coefficients(gram_sums(d, layer) for d, layer in zip(deltas, files))
    design = torch.stack(
        [torch.cat([scaled_product(layer[j]).flatten() for layer in files]) for j in range(3)], 1
    )
    target = torch.cat([d.flatten() for d in deltas])
    expected = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(found.coefficients, expected, rtol=1e-10, atol=1e-12)
    assert found.unexplained == pytest.approx(
        float((design @ expected - target).norm() / target.norm()), rel=1e-10
    )


def test_fit_of_equal_files_absent_layers_and_nothing():
    a, weak = adapter((8, 6), 2), adapter((8, 6), 2, scale=1e-9, seed=3)
    twice = fit_coefficients([gram_sums(scaled_product(a), [a, a])])
    torch.testing.assert_close(
        twice.coefficients, torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-9, atol=0
    )
    parts = fit_coefficients(
        [gram_sums(scaled_product(a), [a, None]), gram_sums(scaled_product(weak), [None, weak])]
    )
    torch.testing.assert_close(
        parts.coefficients, torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert fit_coefficients([gram_sums(torch.zeros(8, 6), [a])]).unexplained == 0
    with pytest.raises(ValueError, match="no layer"):
        fit_coefficients([])
