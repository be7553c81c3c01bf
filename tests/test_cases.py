"""The layers that are measured are those of the published models."""

from __future__ import annotations

from benchmarks.cases import LAYERS


def test_the_adapted_layers_are_those_of_the_published_counts():
    assert {model: sum(row[-1] for row in parts["adapted"]) for model, parts in LAYERS.items()} == {
        "sd15": 128,
        "sdxl": 560,
        "flux": 266,
    }
    linears = {
        model: sum(row[-1] for row in parts["adapted"] + parts["linears"])
        for model, parts in LAYERS.items()
    }
    assert linears == {"sd15": 184, "sdxl": 743, "flux": 504}
