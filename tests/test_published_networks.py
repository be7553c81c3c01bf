"""The denoisers of the published models: sizes, and finite random weights."""

from __future__ import annotations

import torch

from benchmarks import published_networks
from tests import tiny_sdxl


def test_the_published_sizes() -> None:
    assert [len(published_networks.adapted_paths(name)) for name in published_networks.NAMES] == [
        128,
        560,
        266,
        243,
        60,
    ]
    assert (
        len(published_networks.tensor_shapes("sdxl")) == 1120
        and len(published_networks.tensor_shapes("sd15", dora=True)) == 3 * 128
    )


def test_the_network_on_the_cpu_is_finite() -> None:
    model = tiny_sdxl.unet()
    published_networks._fill(model, torch.Generator().manual_seed(0))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool((model.conv_norm_out.weight == 1).all()) and not bool(model.conv_in.bias.any())


def test_positions_are_computed_where_weights_are_sampled(monkeypatch) -> None:
    """SD 3.5 has a table of positions that is no parameter; its blocks are left out here."""
    build, kind, part = published_networks.CLASSES["sd35"]
    config = {"num_layers": 0, "sample_size": 8, "pos_embed_max_size": 8, "num_attention_heads": 2}
    small = {kind: {f"{part}/config.json": config}}
    monkeypatch.setattr(published_networks, "MODEL_FILES", small)
    found = published_networks.build_network("sd35", "cpu", torch.float32)
    assert torch.equal(found.pos_embed.pos_embed, build(**config).pos_embed.pos_embed)
