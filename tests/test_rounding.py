"""Updates added to a base weight, and how much of them survives rounding."""

from __future__ import annotations

import pytest
import torch

from lora_core.adapters.weight_updates import delta_weight
from merging.rounding import Rounding, add_updates, round_weight
from tests.random_adapters import randn, random_dora, random_unet


def test_fold_of_a_dora_at_strength_one_has_rows_of_its_magnitude():
    weight = randn(8, 6, seed=8)
    torch.testing.assert_close(
        add_updates(weight, [(1.0, random_dora("a"))]).norm(dim=1),
        random_dora("a").magnitude,
        rtol=1e-12,
        atol=0,
    )


def test_fold_rounds_nothing_and_leaves_the_weight_alone():
    weight = randn(8, 6).half()
    before = weight.clone()
    lr = random_unet("a", dtype=torch.float32).components["unet"]["a"]
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
