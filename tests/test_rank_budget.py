"""Budgets of ranks and parameters, against brute force over all choices."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.adapters.weight_updates import scaled_product
from lora_core.errors import UserError
from merging.adapter_sums import Term, collect_layers, mix_layers
from merging.rank_budget import RankSteps, allot_ranks, rank_steps
from merging.truncation import Keep, total_report
from tests.random_adapters import random_unet


def test_steps_price_what_a_rank_costs():
    found = rank_steps([Term(random_unet("ac", 3)), Term(random_unet("cd", 3, 1))])
    assert {
        path: (row.ranks, row.parameters, len(row.squares)) for (_, path), row in found.items()
    } == {"a": (1, 8 + 6, 3), "c": (1, 6 + 4 * 9, 6), "d": (3, 6 + 3 * 2 * 9, 1)}
    lr = random_unet("d", 3, 1).components["unet"]["d"]
    assert float(found["unet", "d"].squares.sum()) == pytest.approx(
        float(scaled_product(lr).square().sum()), rel=1e-10
    )
    assert found["unet", "d"].parameters * 1 == lr.up.numel() + lr.down.numel()


def saved(steps, ranks):
    return sum(float(row.squares[: ranks[key] // row.ranks].sum()) for key, row in steps.items())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(0, 9),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
)
def test_budgets_against_brute_force(squares, budget, costs):
    steps = {
        ("unet", str(i)): RankSteps(torch.tensor(sorted(row, reverse=True)), 1, costs[i])
        for i, row in enumerate(squares)
    }
    choices = [
        dict(zip(steps, ranks))
        for ranks in itertools.product(*(range(len(row.squares) + 1) for row in steps.values()))
    ]
    found = allot_ranks(steps, total=budget)
    assert sum(found.values()) <= budget
    assert saved(steps, found) == pytest.approx(
        max(saved(steps, ranks) for ranks in choices if sum(ranks.values()) <= budget), abs=1e-4
    )

    def price(ranks):
        return sum(rank * steps[key].parameters for key, rank in ranks.items())

    found = allot_ranks(steps, total=budget, unit="parameters")
    best = max(saved(steps, ranks) for ranks in choices if price(ranks) <= budget)
    left_out = max(
        (
            float(row.squares[found[key]])
            for key, row in steps.items()
            if found[key] < len(row.squares)
        ),
        default=0.0,
    )
    assert price(found) <= budget and best - left_out - 1e-4 <= saved(steps, found) <= best + 1e-4
    everything = sum(float(row.squares.double().sum()) for row in steps.values())
    found = allot_ranks(steps, max_error=0.5)
    enough = [
        sum(ranks.values())
        for ranks in choices
        if everything - saved(steps, ranks) <= 0.25 * everything * (1 + 1e-6)
    ]
    assert everything - saved(steps, found) <= 0.25 * everything + 1e-4 and sum(
        found.values()
    ) >= min(enough)
    assert sum(found.values()) - min(enough) <= 1


def test_budget_is_what_the_merge_then_loses():
    terms = [Term(random_unet("abc")), Term(random_unet("bcd", seed=1))]
    steps = rank_steps(terms)
    ranks = allot_ranks(steps, total=10)
    assert sum(ranks.values()) == 10 or sum(ranks.values()) >= 8  # a step of d is three ranks
    _, reports = collect_layers(mix_layers(terms, ranks))
    lost = sum(float(row.squares[ranks[key] // row.ranks :].sum()) for key, row in steps.items())
    assert total_report(reports.values()).lost ** 2 == pytest.approx(lost, rel=1e-8)
    uniform = total_report(
        collect_layers(
            mix_layers([Term(random_unet("abc")), Term(random_unet("bc", seed=1))], Keep(rank=2))
        )[1].values()
    )
    budgeted = total_report(
        collect_layers(
            mix_layers(
                plain := [Term(random_unet("abc")), Term(random_unet("bc", seed=1))],
                allot_ranks(rank_steps(plain), total=6),
            )
        )[1].values()
    )
    assert budgeted.rank == uniform.rank == 6 and budgeted.lost < uniform.lost


def test_budgets_that_cannot_be():
    steps = rank_steps([Term(random_unet("abc"))])
    assert set(allot_ranks(steps, total=3, at_least=1).values()) == {1}
    with pytest.raises(
        UserError, match="a budget of 2 ranks is too small for 1 of each of the 3 layers"
    ):
        allot_ranks(steps, total=2, at_least=1)
    assert set(allot_ranks(steps, max_error=1.0, at_least=2).values()) == {2}
    assert set(allot_ranks(steps, max_error=0.0).values()) == {3}
    for wrong in ({}, {"total": 3, "max_error": 0.1}):
        with pytest.raises(UserError, match="either"):
            allot_ranks(steps, **wrong)
