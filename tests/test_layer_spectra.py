"""Singular values of an adapter's layers, against those of the dense updates."""

import pytest
import torch

from lora_core.adapters.weight_updates import scaled_product
from merging.layer_spectra import layer_spectra
from tests.random_adapters import random_unet


def test_a_spectrum_is_that_of_the_dense_update():
    state = random_unet("abc")
    for layer in layer_spectra(state, "x"):
        update = scaled_product(state.components["unet"][layer.key[1]])
        dense = torch.linalg.svdvals(update.flatten(1))[: layer.rank]
        torch.testing.assert_close(layer.sigma, dense, rtol=1e-9, atol=1e-12)
        assert layer.norm == pytest.approx(float(update.norm()), rel=1e-10)
        assert layer.alpha == layer.rank * 0.5 and layer.is_conv == (update.ndim == 4)
        ranks = layer.ranks_of_energy(0.5, 0.99, 1.0)
        assert ranks == sorted(ranks) and ranks[-1] == 3
        assert 1 <= layer.effective_rank <= 3
