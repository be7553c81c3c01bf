"""Merges of whole files: every layer of every file counts, budgets are optimal, DoRA is exact or
refused.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.adapters.weight_updates import AdapterState, delta_weight, scaled_product
from lora_core.errors import UserError
from merging.adapter_sums import (
    DenseOptions,
    Term,
    collect_layers,
    lpl_layers,
    mix_layers,
    mix_layers_dense,
    mix_layers_slerp,
    weighted_layers,
)
from merging.factor_sums import slerp
from merging.rank_budget import RankSteps, allot_ranks, rank_steps
from merging.rounding import Rounding, add_updates, round_weight
from merging.ties_dare import MERGES
from merging.truncation import Keep, total_report
from tests.test_svd import adapter, randn

SHAPES = {"a": ((8, 6), 1), "b": ((5, 9), 1), "c": ((6, 4, 3, 3), 1), "d": ((6, 2, 3, 3), 3)}


def state(paths, rank=3, seed=0, **kwargs):
    rows = {
        path: adapter(SHAPES[path][0], rank, SHAPES[path][1], seed=10 * ord(path) + seed, **kwargs)
        for path in paths
    }
    return AdapterState({"unet": rows})


def test_mix_is_the_sum_of_all_layers_of_all_files():
    first, second = state("abd"), state("bcd", 6, 1, scale=-2.0)
    first.components["text_encoder"] = {"a": adapter((8, 6), 2)}
    merged, reports = collect_layers(mix_layers([Term(first, 0.7), Term(second, -0.3)]))
    assert (
        set(reports) == {("unet", path) for path in "abcd"} | {("text_encoder", "a")}
        and total_report(reports.values()).error == 0
    )
    wished = {
        "a": 0.7 * delta_weight(first.components["unet"]["a"]),
        "b": 0.7 * delta_weight(first.components["unet"]["b"])
        - 0.3 * delta_weight(second.components["unet"]["b"]),
        "c": -0.3 * delta_weight(second.components["unet"]["c"]),
        "d": 0.7 * delta_weight(first.components["unet"]["d"])
        - 0.3 * delta_weight(second.components["unet"]["d"]),
    }
    for path, expected in wished.items():
        torch.testing.assert_close(
            scaled_product(merged.components["unet"][path]), expected, rtol=0, atol=1e-12
        )
        assert reports["unet", path].norm == pytest.approx(float(expected.norm()), rel=1e-10)
    assert merged.components["unet"]["d"].rank == 9
    torch.testing.assert_close(
        scaled_product(merged.components["text_encoder"]["a"]),
        0.7 * delta_weight(first.components["text_encoder"]["a"]),
        rtol=0,
        atol=1e-12,
    )


def test_a_share_weighs_layers_and_zero_leaves_them_out():
    first, second = state("ab"), state("ab", seed=1)
    terms = [
        Term(first, 2.0, lambda component, path: 0.0 if path == "a" else 0.5),
        Term(second, 0.0),
    ]
    assert list(weighted_layers(terms)) == [("unet", "b")]
    torch.testing.assert_close(
        scaled_product(next(mix_layers(terms)).adapter),
        scaled_product(first.components["unet"]["b"]),
        rtol=0,
        atol=1e-12,
    )


def test_mix_cuts_each_layer_by_error_or_by_its_own_rank():
    terms = [Term(state("abc")), Term(state("abc", seed=1))]
    _, reports = collect_layers(mix_layers(terms, Keep(max_error=0.1)))
    assert (
        all(0 < report.error <= 0.1 for report in reports.values())
        and total_report(reports.values()).error <= 0.1
    )
    ranks = {("unet", "a"): 2, ("unet", "b"): 0, ("unet", "c"): 4}
    merged, reports = collect_layers(mix_layers(terms, ranks))
    assert {path: lr.rank for path, lr in merged.components["unet"].items()} == {"a": 2, "c": 4}
    assert reports["unet", "b"].rank == 0 and reports["unet", "b"].error == 1.0


def test_errors_name_the_layer():
    wrong = AdapterState({"unet": {"a": adapter((8, 7), 3)}})
    with pytest.raises(UserError, match=r"^unet\.a: adapters of different layers"):
        list(mix_layers([Term(state("a")), Term(wrong)]))
    with pytest.raises(UserError, match=r"^unet\.a: "):
        list(
            mix_layers_dense(
                [Term(state("a")), Term(wrong)], MERGES["ties"], Keep(rank=2), density=0.5, seed=0
            )
        )
    with pytest.raises(UserError, match=r"^unet\.d: rank 4 cannot be shared"):
        list(mix_layers([Term(state("d"))], Keep(rank=4)))


def dora(path, seed=3):
    lr = adapter(SHAPES[path][0], 3, SHAPES[path][1], seed=seed)
    return lr._replace(magnitude=randn(SHAPES[path][0][0], seed=seed).abs() + 0.5)


@pytest.mark.parametrize("path", ["a", "c", "d"])
def test_a_sum_with_dora_needs_the_base_weight(path):
    weight = randn(*SHAPES[path][0], seed=8)
    tuned = AdapterState({"unet": {path: dora(path)}})
    terms = [Term(tuned, 0.6), Term(state(path), 0.5)]
    with pytest.raises(UserError, match=r"give the base model, or fold"):
        list(mix_layers(terms, Keep(rank=3)))
    based = DenseOptions(base=lambda component, name: {("unet", path): weight}[component, name])
    with pytest.raises(UserError, match="give a rank or an error"):
        list(mix_layers(terms, None, based))
    wished = 0.6 * delta_weight(dora(path), weight) + 0.5 * delta_weight(
        state(path).components["unet"][path]
    )
    for dense in (based, replace(based, sketch=1)):
        merged, reports = collect_layers(
            mix_layers(terms, Keep(rank=18), dense)
        )  # as many as there can be
        torch.testing.assert_close(
            scaled_product(merged.components["unet"][path]), wished, rtol=0, atol=1e-10
        )
        assert total_report(reports.values()).error < 1e-6
    torch.testing.assert_close(
        add_updates(weight, [(0.6, dora(path)), (0.5, state(path).components["unet"][path])]),
        weight + wished,
        rtol=0,
        atol=1e-12,
    )


def test_one_dora_alone_passes_untouched():
    tuned = AdapterState({"unet": {"a": dora("a")}})
    layer = next(mix_layers([Term(tuned)]))
    assert layer.adapter is tuned.components["unet"]["a"] and layer.report.error == 0
    with pytest.raises(UserError):
        next(mix_layers([Term(tuned, 0.5)]))


def test_fold_of_a_dora_at_strength_one_has_rows_of_its_magnitude():
    weight = randn(8, 6, seed=8)
    torch.testing.assert_close(
        add_updates(weight, [(1.0, dora("a"))]).norm(dim=1), dora("a").magnitude, rtol=1e-12, atol=0
    )


def test_fold_rounds_nothing_and_leaves_the_weight_alone():
    weight = randn(8, 6).half()
    before = weight.clone()
    lr = state("a", dtype=torch.float32).components["unet"]["a"]
    folded = add_updates(weight, [(1.0, lr)])
    assert folded.dtype == torch.float32 and torch.equal(weight, before)
    torch.testing.assert_close(folded, weight.float() + delta_weight(lr), rtol=0, atol=1e-6)
    assert add_updates(weight, []) is not weight


def test_rounding_says_how_much_of_an_update_survives():
    weight = (randn(400, 300) / 17).bfloat16()
    for strength, low, high in ((1e-2, 0.9, 1.1), (1e-6, 0.0, 0.2)):
        update = strength * randn(400, 300, seed=1) / 17
        result, row = round_weight(weight, weight.double() + update, torch.bfloat16)
        assert result.dtype == torch.bfloat16 and low <= row.kept <= high
        effective = result.double() - weight.double()
        assert row.kept == pytest.approx(
            float((effective * update).sum() / update.square().sum()), rel=1e-9
        )
        assert row.cosine == pytest.approx(
            float((effective * update).sum() / update.norm() / effective.norm()), rel=1e-9
        )
    assert (
        round_weight(weight, weight.double(), torch.bfloat16)[1].kept
        == 1.0
        == Rounding(0.0, 0.0, 0.0).cosine
    )
    assert Rounding(1.0, 0.0, 0.0).cosine == 0.0


@pytest.mark.parametrize("name", MERGES)
def test_dense_merges_depend_on_seed_and_layer_alone(name):
    terms = [Term(state("abd"), 0.8), Term(state("bd", seed=1))]
    both, _ = collect_layers(
        mix_layers_dense(terms, MERGES[name], Keep(rank=9), density=0.5, seed=4)
    )
    alone, _ = collect_layers(
        mix_layers_dense(
            [Term(state("b"), 0.8), Term(state("b", seed=1))],
            MERGES[name],
            Keep(rank=9),
            density=0.5,
            seed=4,
        )
    )
    torch.testing.assert_close(
        scaled_product(both.components["unet"]["b"]),
        scaled_product(alone.components["unet"]["b"]),
        rtol=0,
        atol=0,
    )
    assert set(both.components["unet"]) == set("abd")
    if "dare" in name:
        other, _ = collect_layers(
            mix_layers_dense(terms, MERGES[name], Keep(rank=9), density=0.5, seed=5)
        )
        assert not torch.equal(
            scaled_product(both.components["unet"]["b"]),
            scaled_product(other.components["unet"]["b"]),
        )
        lr = adapter((8, 6), 3)
        twins, _ = collect_layers(
            mix_layers_dense(
                [Term(AdapterState({"unet": {"x": lr, "y": lr}}))],
                MERGES[name],
                Keep(rank=6),
                density=0.5,
                seed=4,
            )
        )
        assert not torch.equal(
            scaled_product(twins.components["unet"]["x"]),
            scaled_product(twins.components["unet"]["y"]),
        )


@pytest.mark.parametrize("name", ["dare", "magnitude"])
def test_dense_sums_of_density_one_are_the_sum(name):
    terms = [Term(state("abd"), 0.8), Term(state("bd", seed=1), -0.5)]
    dense, _ = collect_layers(
        mix_layers_dense(terms, MERGES[name], Keep(rank=9), density=1.0, seed=4)
    )
    exact, _ = collect_layers(mix_layers(terms))
    for path in "abd":
        torch.testing.assert_close(
            scaled_product(dense.components["unet"][path]),
            scaled_product(exact.components["unet"][path]),
            rtol=0,
            atol=1e-10,
        )


def test_slerp_of_states():
    first, second = state("ab"), state("bc", seed=1)
    found, _ = collect_layers(mix_layers_slerp(first, second, 0.25))
    rows, wished = (
        found.components["unet"],
        slerp(first.components["unet"]["b"], second.components["unet"]["b"], 0.25),
    )
    torch.testing.assert_close(
        scaled_product(rows["a"]),
        0.75 * scaled_product(first.components["unet"]["a"]),
        rtol=0,
        atol=1e-12,
    )
    torch.testing.assert_close(
        scaled_product(rows["c"]),
        0.25 * scaled_product(second.components["unet"]["c"]),
        rtol=0,
        atol=1e-12,
    )
    torch.testing.assert_close(
        scaled_product(rows["b"]), scaled_product(wished), rtol=0, atol=1e-12
    )
    assert all(
        lr.rank == 2
        for lr in collect_layers(mix_layers_slerp(first, second, 0.25, Keep(rank=2)))[0]
        .components["unet"]
        .values()
    )
    with pytest.raises(UserError, match=r"^unet\.a: a DoRA"):
        list(mix_layers_slerp(first, AdapterState({"unet": {"a": dora("a")}}), 0.5))


def test_lpl_of_states():
    first, second = state("ab"), state("ab", seed=1)
    first.tokens, first.token_names = {"clip_l": torch.ones(1, 4)}, ("<s1>",)
    own = lpl_layers(first, first, 1, 1)
    for path in "ab":
        torch.testing.assert_close(
            scaled_product(own.components["unet"][path]),
            4 * scaled_product(first.components["unet"][path]),
            rtol=0,
            atol=1e-12,
        )
    assert own.token_names == ("<s1>",) and torch.equal(own.tokens["clip_l"], torch.ones(1, 4))
    assert set(lpl_layers(first, second).components["unet"]) == set("ab")
    with pytest.raises(UserError, match=r"1 are in one only, such as unet\.c; mix keeps them all"):
        lpl_layers(first, state("abc"))
    with pytest.raises(
        UserError, match=r"^unet\.a: lpl adds factors of equal rank .* mix takes any ranks"
    ):
        lpl_layers(first, state("ab", rank=2))


def test_steps_price_what_a_rank_costs():
    found = rank_steps([Term(state("ac", 3)), Term(state("cd", 3, 1))])
    assert {
        path: (row.ranks, row.parameters, len(row.squares)) for (_, path), row in found.items()
    } == {"a": (1, 8 + 6, 3), "c": (1, 6 + 4 * 9, 6), "d": (3, 6 + 3 * 2 * 9, 1)}
    lr = state("d", 3, 1).components["unet"]["d"]
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
    terms = [Term(state("abc")), Term(state("bcd", seed=1))]
    steps = rank_steps(terms)
    ranks = allot_ranks(steps, total=10)
    assert sum(ranks.values()) == 10 or sum(ranks.values()) >= 8  # a step of d is three ranks
    _, reports = collect_layers(mix_layers(terms, ranks))
    lost = sum(float(row.squares[ranks[key] // row.ranks :].sum()) for key, row in steps.items())
    assert total_report(reports.values()).lost ** 2 == pytest.approx(lost, rel=1e-8)
    uniform = total_report(
        collect_layers(mix_layers([Term(state("abc")), Term(state("bc", seed=1))], Keep(rank=2)))[
            1
        ].values()
    )
    budgeted = total_report(
        collect_layers(
            mix_layers(
                plain := [Term(state("abc")), Term(state("bc", seed=1))],
                allot_ranks(rank_steps(plain), total=6),
            )
        )[1].values()
    )
    assert budgeted.rank == uniform.rank == 6 and budgeted.lost < uniform.lost


def test_budgets_that_cannot_be():
    steps = rank_steps([Term(state("abc"))])
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
