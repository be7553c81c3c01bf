"""Inputs of layers as rows: what is recorded, at which positions, and what layers share."""

from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import injection
from lora_core.adapters.weight_updates import LowRank
from merging.layer_inputs import (
    concept_positions,
    input_rows,
    recorded_ids,
    recorded_inputs,
    text_positions,
)
from tests.random_adapters import randn

EOS = 9
IDS = torch.tensor([[8, 1, 20, 21, EOS, EOS, EOS], [8, 1, 2, EOS, 0, 0, 0]])  # 8 is the first token


class Network(nn.Module):
    """Three layers that read one tensor, one that reads theirs, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4) for _ in range(3))
        self.last = nn.Linear(4, 3)
        self.conv = nn.Conv2d(2, 5, 3, padding=1, stride=2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv(x.reshape(x.shape[0], 2, -1, 3))
        total = self.q(x) + self.k(x) + self.v(x)
        return self.last(total.relu_())


def layers_of(network: nn.Module) -> dict[tuple[str, str], nn.Module]:
    return {("unet", name): layer for name, layer in network.named_children()}


def test_every_input_of_all_calls_is_recorded_once() -> None:
    network, x = Network(), randn(2, 4, 6, dtype=torch.float32)
    with torch.no_grad(), recorded_inputs(layers_of(network)) as record:
        network(x)
        network(2 * x)
    network(x)  # no longer recorded
    assert ("unet", "unused") not in record
    keys = record["unet", "q"]
    assert keys is record["unet", "k"] is record["unet", "v"]
    assert record["unet", "last"] is not keys and keys.count == 16
    rows = torch.cat([x, 2 * x]).reshape(-1, 6).double()
    torch.testing.assert_close(keys.gram_matrix(), rows.T @ rows)
    assert record["unet", "conv"].gram_matrix().shape == (18, 18)


def test_equal_tensors_that_are_different_ones_are_not_shared() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    x = randn(5, 3, dtype=torch.float32)
    with torch.no_grad(), recorded_inputs(layers_of(layers)) as record:
        layers["a"](x)
        x.mul_(2)  # the same memory, another content
        layers["b"](x)
    assert record["unet", "a"] is not record["unet", "b"]
    ratio = record["unet", "b"].gram_matrix() / record["unet", "a"].gram_matrix()
    torch.testing.assert_close(ratio, torch.full((3, 3), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
@pytest.mark.parametrize("kernel", [1, 3, (3, 2)])
def test_patches_times_the_kernel_are_the_convolution(kernel: Any, settings: dict) -> None:
    conv = nn.Conv2d(3, 4, kernel, bias=False, dtype=torch.float64, **settings)
    x = randn(2, 3, 7, 6)
    out = conv(x)
    rows = input_rows(conv, x) @ conv.weight.flatten(1).T
    torch.testing.assert_close(rows, out.permute(0, 2, 3, 1).reshape(-1, 4), rtol=1e-12, atol=1e-12)


def test_convolutions_of_other_kinds_are_refused() -> None:
    kinds: list[dict[str, Any]] = [{"groups": 2}, {"padding": 1, "padding_mode": "reflect"}]
    for settings in kinds:
        with pytest.raises(ValueError, match="groups, or with padding"):
            input_rows(nn.Conv2d(4, 4, 3, **settings), torch.zeros(1, 4, 5, 5))


def test_an_adapted_layer_is_recorded_as_its_base_is() -> None:
    network, x = Network(), randn(2, 4, 6, dtype=torch.float32)
    factors = {
        "q": LowRank(torch.ones(1, 6), torch.ones(4, 1), 1.0),
        "conv": LowRank(torch.ones(1, 2, 3, 3), torch.ones(5, 1, 1, 1), 1.0),
    }
    with torch.no_grad(), recorded_inputs(layers_of(network)) as plain:
        network(x)
    injection.load_factors(network, factors)
    with torch.no_grad(), recorded_inputs(layers_of(network)) as adapted:
        network(x)
    for name in ("q", "conv"):
        found = adapted["unet", name].gram_matrix()
        assert torch.equal(found, plain["unet", name].gram_matrix())


def test_positions_of_a_text_are_chosen() -> None:
    layer = nn.Linear(4, 2)
    x = randn(2, 7, 4)
    places = text_positions(IDS, EOS)
    assert places.sum(1).tolist() == [5, 4]
    assert torch.equal(input_rows(layer, x, places), torch.cat([x[0, :5], x[1, :4]]))
    pooled = x[:, 0]
    assert torch.equal(input_rows(layer, pooled, places), pooled)


def test_a_concept_is_at_its_tokens_and_the_first_eos_or_at_all_words() -> None:
    places = concept_positions(IDS, [20, 21], EOS)
    assert places.nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2], [1, 3]]
    assert torch.equal(concept_positions(IDS, [], EOS)[1], places[1])


def test_token_ids_are_those_that_an_encoder_reads() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 3)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    encoder = Encoder()
    with recorded_ids({"text_encoder": encoder}) as found:
        encoder.table(IDS)
    assert torch.equal(found["text_encoder"], IDS)
