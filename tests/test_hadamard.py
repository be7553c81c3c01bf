"""LoHa: its start, the two ways of its forward, equality with lycoris-lora."""

import copy
import math

import pytest
import torch
from torch import nn

from lora_core.adapters.adapter_module import LayerSpec
from lora_core.adapters.hadamard import LoHa
from lora_core.adapters.injection import AdapterSpec, adapter_updates, inject, load_factors
from lora_core.adapters.weight_updates import DenseUpdate, scaled_product
from lora_core.errors import UserError
from lora_core.formats import lycoris
from tests.product_examples import LAYERS, layer_input, layer_with, needs_lycoris


def test_it_starts_with_lycoris_distributions():
    adapter = LoHa(nn.Linear(512, 256), LayerSpec("a", 16, 1.0))
    for role, spread in (("hada_w1_a", 0.1), ("hada_w1_b", 1.0), ("hada_w2_b", 1.0)):
        tensor = getattr(adapter, role).detach()
        error = spread / math.sqrt(tensor.numel())
        assert abs(float(tensor.mean())) < 5 * error
        assert abs(float(tensor.std()) - spread) < 5 * error
    assert not adapter.hada_w2_a.any()
    assert not torch.equal(adapter.hada_w1_b, adapter.hada_w2_b)


@pytest.mark.parametrize("layer", [nn.Linear(40, 30), nn.Conv2d(10, 30, 2, stride=2)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_small_and_dense_forward_are_the_same(layer, rank):
    model = nn.Sequential(layer).double()
    inject(model, AdapterSpec(("0",), kind="loha", rank=rank))
    adapter = model[0].adapter("default")
    with torch.no_grad():
        adapter.hada_w2_a.normal_()
    assert adapter._is_small(layer) == (rank * rank * (40 + 30) < 40 * 30)
    x = torch.randn(2, 40 if isinstance(layer, nn.Linear) else 10, 6, 6).double()
    x = x[..., 0, 0] if isinstance(layer, nn.Linear) else x
    y = model(x)
    adapter._is_small = lambda base: False
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-11)


def test_a_rank_beyond_the_layer_is_refused():
    with pytest.raises(UserError, match=r"rank 9 exceeds min\(out, in\) = 8 for 0; lower"):
        inject(nn.Sequential(nn.Linear(12, 8)), AdapterSpec(("0",), kind="loha", rank=9))


@pytest.mark.parametrize("name", ["conv", "1x1"])
def test_cores_in_files_act_as_their_product(name):
    layer = copy.deepcopy(LAYERS[name]).double()
    out, inner, *kernel = layer.weight.shape
    tensors = {}
    for i in "12":
        shapes = {f"w{i}_a": (2, out), f"w{i}_b": (2, inner), f"t{i}": (2, 2, *kernel)}
        tensors |= {f"hada_{role}": torch.randn(shape).double() for role, shape in shapes.items()}
    update = DenseUpdate("LoHa", tuple(layer.weight.shape), tensors, 0.7)
    model, x = nn.Sequential(layer), layer_input(name)
    load_factors(model, {"0": update})
    weight = layer.weight + scaled_product(update)
    expected = torch.func.functional_call(layer, {"weight": weight}, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
    assert isinstance(model[0].adapter("default"), LoHa)


@needs_lycoris
@pytest.mark.parametrize("name", ["linear", "prime", "conv", "1x1"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_lycoris_module_with_the_same_tensors(name, rank):
    from lycoris.modules.loha import LohaModule

    model = layer_with("loha", name, torch.float32, rank=rank, alpha=3.0)
    base, x = model[0].base, layer_input(name, torch.float32)
    (update,) = adapter_updates(model).values()
    stored = lycoris.tensors_to_store(update)
    theirs = LohaModule("x", base, 1.0, rank, 3.0)
    assert theirs.state_dict().keys() == stored.keys()
    for role, tensor in theirs.state_dict().items():
        assert tensor.shape == stored[role].shape
    with torch.no_grad():
        read = LohaModule.make_module_from_state_dict(
            "x", base, *(stored.get(role) for role in LohaModule.weight_list)
        )
    delta = scaled_product(update)
    size = float(delta.abs().max())
    torch.testing.assert_close(read.get_weight(base.weight.shape), delta, rtol=0, atol=1e-6 * size)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(read(x), y, rtol=0, atol=1e-6 * float(y.abs().max()))
    parts = {role: tensor.detach() for role, tensor in read.state_dict().items()}
    ours = lycoris.to_dense_update(parts, tuple(base.weight.shape), "x")
    torch.testing.assert_close(scaled_product(ours), delta, rtol=0, atol=1e-6 * size)
