"""What kinds of adapter share: dtypes, dropout's keys, plain layers, initial generators."""

import pytest
import torch
from torch import nn

from lora_core.adapters.adapter_module import (
    DroppingAdapter,
    LayerSpec,
    apply_layer,
    convolution_groups,
    initial_generator,
    is_plain_layer,
)
from lora_core.errors import UserError


def test_initial_tensors_depend_on_seed_path_and_purpose():
    def draw(path="a", seed=0, purpose=""):
        generator = initial_generator(LayerSpec(path, 1, 1.0, seed=seed), purpose)
        return torch.randn(4, generator=generator)

    assert torch.equal(draw(), draw())
    for other in ({"path": "b"}, {"seed": 1}, {"purpose": "w1"}):
        assert not torch.equal(draw(), draw(**other))


def test_a_layer_with_hooks_or_a_forward_of_its_own_is_not_plain():
    layer = nn.Linear(2, 2)
    assert is_plain_layer(layer)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not is_plain_layer(layer)
    handle.remove()
    layer.forward = lambda x: x
    assert not is_plain_layer(layer) and not is_plain_layer(nn.Embedding(2, 2))


def test_a_layers_operation_takes_another_weight():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular")
    x, weight = torch.randn(2, 4, 5, 5), torch.randn_like(conv.weight)
    expected = torch.func.functional_call(conv, {"weight": weight}, x)
    assert torch.equal(apply_layer(conv, x, weight, conv.bias), expected)
    assert convolution_groups(conv) == 2 and convolution_groups(nn.Linear(2, 2)) == 1


def test_dropout_without_keys_is_refused():
    adapter = DroppingAdapter(LayerSpec("a", 1, 1.0, dropout=0.5)).train()
    with pytest.raises(UserError, match=r"call injection.set_dropout_keys before"):
        adapter._input_dropout(torch.ones(2, 2))
