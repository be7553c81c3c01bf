"""Sums of adapters: the exact one against dense arithmetic and peft, the lossy ones against their
published formulas.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_core.adapters.weight_updates import LowRank, delta_weight, scaled_product
from lora_core.errors import UserError
from merging.factor_sums import LPL_WARNING, concat_factors, lpl, slerp
from merging.svd import compress_adapter
from merging.truncation import Keep
from tests.random_adapters import SHAPES, adapter, randn


@pytest.mark.parametrize("shape, groups", SHAPES)
def test_concat_is_the_exact_weighted_sum(shape, groups):
    terms = [
        (0.7, adapter(shape, 6, groups, 0.25, 1)),
        (-1.3, adapter(shape, 2 * groups, groups, -3.0, 5)),
        (2.0, adapter(shape, groups, groups, seed=8)),
    ]
    joined = concat_factors(terms)
    assert joined.rank == 6 + 3 * groups and joined.scale == 1.0
    wished = sum(weight * delta_weight(lr) for weight, lr in terms)
    torch.testing.assert_close(scaled_product(joined), wished, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-4, 4), st.integers(1, 5), st.floats(-8, 8), st.integers(0, 999)),
        min_size=1,
        max_size=4,
    )
)
def test_concat_of_any_ranks_scales_and_signs(rows):
    terms = [(weight, adapter((6, 9), rank, 1, scale, seed)) for weight, rank, scale, seed in rows]
    size = 1 + sum(abs(weight) * float(delta_weight(lr).norm()) for weight, lr in terms)
    assert (
        float(
            (
                scaled_product(concat_factors(terms))
                - sum(weight * delta_weight(lr) for weight, lr in terms)
            ).norm()
        )
        <= 1e-13 * size
    )


def test_concat_balances_by_powers_of_two_so_that_half_precision_holds_it():
    lopsided = LowRank(randn(3, 8) * 1e-6, randn(5, 3, seed=1) * 1e6, 1.0)
    joined = concat_factors([(1.0, lopsided)])
    assert 0.25 < float(joined.up.abs().max() / joined.down.abs().max()) < 4
    assert torch.equal(scaled_product(joined), scaled_product(lopsided))
    halved = LowRank(joined.down.half(), joined.up.half(), 1.0)
    torch.testing.assert_close(
        scaled_product(halved).double(),
        scaled_product(lopsided),
        rtol=0,
        atol=2e-3 * float(scaled_product(lopsided).abs().max()),
    )
    assert not scaled_product(
        concat_factors([(1.0, lopsided._replace(up=torch.zeros(5, 3)))])
    ).any()


def test_concat_refuses_dora_and_other_layers():
    with pytest.raises(UserError, match="give the base model or fold"):
        concat_factors(
            [(1.0, adapter((5, 4), 2)), (1.0, adapter((5, 4), 2)._replace(magnitude=torch.ones(5)))]
        )
    for other in ((5, 3), (6, 4), (5, 4, 1, 1)):
        with pytest.raises(UserError, match="different layers"):
            concat_factors([(1.0, adapter((5, 4), 2)), (1.0, adapter(other, 2))])


@pytest.mark.parametrize("shape, groups", SHAPES)
def test_lpl_of_a_file_with_itself_squares_the_strength(shape, groups):
    lr = adapter(shape, 6, groups)
    torch.testing.assert_close(
        scaled_product(lpl(lr, lr, 1, 1)), 4 * scaled_product(lr), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(scaled_product(lpl(lr, lr)), scaled_product(lr), rtol=0, atol=1e-12)
    assert "squares" in LPL_WARNING and "mix" in LPL_WARNING


def test_lpl_has_the_cross_terms_that_the_sum_has_not():
    a, b = adapter((6, 9), 3, scale=1.0), adapter((6, 9), 3, scale=1.0, seed=7)
    cross = a.up @ b.down + b.up @ a.down
    torch.testing.assert_close(
        scaled_product(lpl(a, b, 0.3, 0.8)),
        0.09 * delta_weight(a) + 0.64 * delta_weight(b) + 0.24 * cross,
        rtol=0,
        atol=1e-12,
    )
    wished = 0.3 * delta_weight(a) + 0.8 * delta_weight(b)
    assert float((scaled_product(lpl(a, b, 0.3, 0.8)) - wished).norm() / wished.norm()) > 0.1


def test_other_tools_formulas_are_not_ours():
    """kohya's merge_lora: one file at ratio 0.5 gives a quarter of it; its concat of two files
    keeps alpha, so half. Ours are what was asked for.
    """
    a, b = adapter((6, 9), 3, scale=1.0), adapter((6, 9), 3, scale=1.0, seed=7)
    kohya = (0.5 * a.up) @ (0.5 * a.down)
    torch.testing.assert_close(kohya, 0.25 * delta_weight(a), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        scaled_product(concat_factors([(0.5, a)])), 0.5 * delta_weight(a), rtol=0, atol=1e-12
    )
    half = 3 / 6 * torch.cat([a.up, b.up], 1) @ torch.cat([a.down, b.down])
    torch.testing.assert_close(
        2 * half, scaled_product(concat_factors([(1, a), (1, b)])), rtol=0, atol=1e-12
    )


def test_lpl_refuses_ranks_that_differ_and_names_mix():
    with pytest.raises(UserError, match="mix takes any ranks"):
        lpl(adapter((6, 9), 3), adapter((6, 9), 2))
    with pytest.raises(UserError, match="give the base model"):
        lpl(adapter((6, 9), 3), adapter((6, 9), 3)._replace(magnitude=torch.ones(6)))


@pytest.mark.parametrize("t", [0.0, 0.25, 0.6, 1.0])
def test_slerp_walks_the_great_circle(t):
    a, b = adapter((6, 9), 3), adapter((6, 9), 2, seed=7)
    b = b._replace(
        scale=b.scale * float(scaled_product(a).norm() / scaled_product(b).norm())
    )  # of equal norm, so it stays on the sphere
    point, angle = (
        scaled_product(slerp(a, b, t)),
        math.acos(
            float(
                (scaled_product(a) * scaled_product(b)).sum()
                / scaled_product(a).norm()
                / scaled_product(b).norm()
            )
        ),
    )
    assert float(point.norm()) == pytest.approx(float(scaled_product(a).norm()), rel=1e-12)
    assert float((point * scaled_product(a)).sum() / point.norm() ** 2) == pytest.approx(
        math.cos(t * angle), abs=1e-12
    )


def test_slerp_of_parallel_updates_is_linear():
    a = adapter((6, 9), 3)
    torch.testing.assert_close(
        scaled_product(slerp(a, a._replace(scale=2 * a.scale), 0.25)),
        1.25 * scaled_product(a),
        rtol=1e-12,
        atol=1e-13,
    )
    torch.testing.assert_close(
        scaled_product(slerp(a, a._replace(scale=-a.scale), 0.25)),
        0.5 * scaled_product(a),
        rtol=1e-12,
        atol=1e-13,
    )
    torch.testing.assert_close(
        scaled_product(slerp(a, a._replace(scale=0.0), 0.25)),
        0.75 * scaled_product(a),
        rtol=1e-12,
        atol=1e-13,
    )


def in_peft(layer, adapters):
    """A peft model of one layer that holds these adapters as a0, a1, ..."""
    from peft import LoraConfig, get_peft_model

    model = None
    for i, lr in enumerate(adapters):
        config = LoraConfig(r=lr.rank, lora_alpha=lr.scale * lr.rank, target_modules=["layer"])
        if model is None:
            model = get_peft_model(nn.ModuleDict({"layer": layer}), config, adapter_name=f"a{i}")
        else:
            model.add_adapter(f"a{i}", config)
        wrapper = model.base_model.model["layer"]
        wrapper.lora_A[f"a{i}"].weight.data = lr.down.float().clone()
        wrapper.lora_B[f"a{i}"].weight.data = lr.up.float().clone()
    return model


@pytest.mark.parametrize("shape", [(24, 16), (24, 16, 3, 3)])
def test_sums_equal_pefts(shape):
    layer = nn.Linear(16, 24) if len(shape) == 2 else nn.Conv2d(16, 24, 3)
    adapters = [
        adapter(shape, 4, dtype=torch.float32),
        adapter(shape, 4, scale=2.0, seed=5, dtype=torch.float32),
    ]
    model = in_peft(layer, adapters)
    terms = [(0.7, adapters[0]), (-0.4, adapters[1])]
    for kind, ours in (
        ("cat", concat_factors(terms)),
        ("svd", compress_adapter(concat_factors(terms), Keep(rank=3))[0]),
    ):
        model.add_weighted_adapter(
            ["a0", "a1"], [0.7, -0.4], kind, combination_type=kind, svd_rank=3
        )
        theirs = model.base_model.model["layer"].get_delta_weight(kind)
        torch.testing.assert_close(scaled_product(ours), theirs, rtol=0, atol=2e-5)
