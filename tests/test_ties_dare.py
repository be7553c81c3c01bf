"""TIES, DARE and pruning against the papers' steps written out, and peft's."""

from __future__ import annotations

import pytest
import torch

from merging.ties_dare import (
    MERGES,
    dare,
    dare_ties,
    drop_and_rescale,
    elect_and_average,
    prune_by_magnitude,
    ties,
    trim_to_density,
)
from tests.random_adapters import randn


def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


def test_trimming_keeps_the_largest_share():
    update = randn(10, 10)
    kept = trim_to_density(update, 0.2)
    order = update.abs().flatten().sort(descending=True).values
    assert int((kept != 0).sum()) == 20 and float(kept[kept != 0].abs().min()) == float(order[19])
    assert torch.equal(kept[kept != 0], update[kept != 0])
    assert (
        torch.equal(trim_to_density(update, 1.0), update)
        and int((trim_to_density(update, 1e-9) != 0).sum()) == 1
    )


def test_dropping_is_unbiased_keyed_and_rescaled():
    update = randn(200, 200)
    once = drop_and_rescale(update, 0.25, keyed())
    stays = once != 0
    assert abs(float(stays.double().mean()) - 0.25) < 0.01
    torch.testing.assert_close(once[stays], 4 * update[stays], rtol=1e-12, atol=0)
    assert torch.equal(once, drop_and_rescale(update, 0.25, keyed())) and not torch.equal(
        once, drop_and_rescale(update, 0.25, keyed(1))
    )
    assert torch.equal(drop_and_rescale(update, 1.0, keyed()), update)
    mean = torch.stack(
        [drop_and_rescale(update[:10, :10], 0.5, keyed(i)) for i in range(2000)]
    ).mean(0)
    assert (
        float((mean - update[:10, :10]).abs().max())
        < 5 * float(update[:10, :10].abs().max()) / 2000**0.5
    )


def test_election_by_hand():
    rows = [
        torch.tensor([3.0, 1.0, -1.0, 0.0, 2.0]),
        torch.tensor([1.0, -2.0, -3.0, 4.0, -2.0]),
        torch.tensor([-1.0, -2.0, 0.0, 0.0, 0.0]),
    ]
    assert elect_and_average(rows).tolist() == [2.0, -2.0, -2.0, 4.0, 0.0]


def test_ties_is_pefts_for_equal_weights():
    from peft.utils.merge_utils import ties as peft_ties

    updates = [randn(12, 9, seed=i) for i in range(3)]
    theirs = peft_ties(updates, torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64), 0.4)
    torch.testing.assert_close(
        ties([0.5 * update for update in updates], 0.4, keyed()), theirs, rtol=0, atol=1e-15
    )


def test_magnitude_and_dare_are_pefts():
    from peft.utils.merge_utils import magnitude_prune

    updates = [randn(12, 9, seed=i) for i in range(2)]
    weights = torch.tensor([0.7, -0.4], dtype=torch.float64)
    weighted = [float(w) * update for w, update in zip(weights, updates)]
    torch.testing.assert_close(
        prune_by_magnitude(weighted, 0.3, keyed()),
        magnitude_prune(updates, weights, 0.3),
        rtol=0,
        atol=1e-15,
    )
    torch.testing.assert_close(dare(weighted, 1.0, keyed()), sum(weighted), rtol=0, atol=1e-15)
    generator = keyed()
    expected = elect_and_average([drop_and_rescale(update, 0.5, generator) for update in weighted])
    assert torch.equal(dare_ties(weighted, 0.5, keyed()), expected)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
def test_density_is_a_share(name, density):
    with pytest.raises(ValueError, match="density"):
        MERGES[name]([randn(3, 3)], density, keyed())
