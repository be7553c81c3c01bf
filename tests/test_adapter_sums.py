"""Merges of whole files: every layer of every file counts, DoRA is exact or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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
from merging.rounding import add_updates
from merging.ties_dare import MERGES
from merging.truncation import Keep, total_report
from tests.random_adapters import NAMED_SHAPES, adapter, randn, random_dora, random_unet


def test_mix_is_the_sum_of_all_layers_of_all_files():
    first, second = random_unet("abd"), random_unet("bcd", 6, 1, scale=-2.0)
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
    first, second = random_unet("ab"), random_unet("ab", seed=1)
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
    terms = [Term(random_unet("abc")), Term(random_unet("abc", seed=1))]
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
        list(mix_layers([Term(random_unet("a")), Term(wrong)]))
    with pytest.raises(UserError, match=r"^unet\.a: "):
        list(
            mix_layers_dense(
                [Term(random_unet("a")), Term(wrong)],
                MERGES["ties"],
                Keep(rank=2),
                density=0.5,
                seed=0,
            )
        )
    with pytest.raises(UserError, match=r"^unet\.d: rank 4 cannot be shared"):
        list(mix_layers([Term(random_unet("d"))], Keep(rank=4)))


@pytest.mark.parametrize("path", ["a", "c", "d"])
def test_a_sum_with_dora_needs_the_base_weight(path):
    weight = randn(*NAMED_SHAPES[path][0], seed=8)
    tuned = AdapterState({"unet": {path: random_dora(path)}})
    terms = [Term(tuned, 0.6), Term(random_unet(path), 0.5)]
    with pytest.raises(UserError, match=r"give the base model, or fold"):
        list(mix_layers(terms, Keep(rank=3)))
    based = DenseOptions(base=lambda component, name: {("unet", path): weight}[component, name])
    with pytest.raises(UserError, match="give a rank or an error"):
        list(mix_layers(terms, None, based))
    wished = 0.6 * delta_weight(random_dora(path), weight) + 0.5 * delta_weight(
        random_unet(path).components["unet"][path]
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
        add_updates(
            weight, [(0.6, random_dora(path)), (0.5, random_unet(path).components["unet"][path])]
        ),
        weight + wished,
        rtol=0,
        atol=1e-12,
    )


def test_one_dora_alone_passes_untouched():
    tuned = AdapterState({"unet": {"a": random_dora("a")}})
    layer = next(mix_layers([Term(tuned)]))
    assert layer.adapter is tuned.components["unet"]["a"] and layer.report.error == 0
    with pytest.raises(UserError):
        next(mix_layers([Term(tuned, 0.5)]))


@pytest.mark.parametrize("name", MERGES)
def test_dense_merges_depend_on_seed_and_layer_alone(name):
    terms = [Term(random_unet("abd"), 0.8), Term(random_unet("bd", seed=1))]
    both, _ = collect_layers(
        mix_layers_dense(terms, MERGES[name], Keep(rank=9), density=0.5, seed=4)
    )
    alone, _ = collect_layers(
        mix_layers_dense(
            [Term(random_unet("b"), 0.8), Term(random_unet("b", seed=1))],
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
    terms = [Term(random_unet("abd"), 0.8), Term(random_unet("bd", seed=1), -0.5)]
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
    first, second = random_unet("ab"), random_unet("bc", seed=1)
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
        list(mix_layers_slerp(first, AdapterState({"unet": {"a": random_dora("a")}}), 0.5))


def test_lpl_of_states():
    first, second = random_unet("ab"), random_unet("ab", seed=1)
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
        lpl_layers(first, random_unet("abc"))
    with pytest.raises(
        UserError, match=r"^unet\.a: lpl adds factors of equal rank .* mix takes any ranks"
    ):
        lpl_layers(first, random_unet("ab", rank=2))
