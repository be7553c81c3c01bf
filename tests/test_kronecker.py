"""LoKr: the division of sizes, the forms of its tensors, its start, equality with lycoris-lora."""

import copy
import math

import pytest
import torch
from torch import nn

from lora_core.adapters.adapter_module import LayerSpec
from lora_core.adapters.injection import AdapterSpec, adapter_updates, inject, load_factors
from lora_core.adapters.kronecker import LoKr, factorize
from lora_core.adapters.weight_updates import DenseUpdate, scaled_product
from lora_core.errors import UserError
from lora_core.formats import lycoris
from tests.product_examples import LAYERS, layer_input, layer_with, needs_lycoris

# the table in the docstring of LyCORIS' factorization, where its code gives the same
SIZES = {
    127: {-1: (1, 127), 2: (1, 127), 16: (1, 127)},
    128: {-1: (8, 16), 2: (2, 64), 4: (4, 32), 16: (8, 16)},
    250: {-1: (10, 25), 4: (2, 125), 8: (5, 50)},
    1024: {-1: (32, 32), 4: (4, 256), 16: (16, 64)},
}


def test_sizes_are_divided_as_in_lycoris():
    for size, expected in SIZES.items():
        assert {factor: factorize(size, factor) for factor in expected} == expected


@needs_lycoris
def test_any_size_is_divided_as_in_lycoris():
    from lycoris.functional import factorization

    for size in (*range(1, 200), 320, 640, 768, 1280, 3072, 12288):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 100):
            assert factorize(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize(
    ("layer", "rank", "factor", "shapes"),
    [
        (nn.Linear(12, 8), 1, -1, {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}),
        (nn.Linear(12, 8), 2, -1, {"lokr_w1": (2, 3), "lokr_w2": (4, 4)}),
        (nn.Linear(12, 8), 10_000, 2, {"lokr_w1": (2, 2), "lokr_w2": (4, 6)}),
        (nn.Conv2d(12, 8, 3), 1, 2, {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 54)}),
        (nn.Conv2d(12, 8, 3), 3, 2, {"lokr_w1": (2, 2), "lokr_w2": (4, 6, 3, 3)}),
    ],
)
def test_w2_is_whole_from_half_of_its_side_on(layer, rank, factor, shapes):
    model = nn.Sequential(layer)
    inject(model, AdapterSpec(("0",), kind="lokr", rank=rank, alpha=5.0, factor=factor))
    (update,) = adapter_updates(model).values()
    assert {role: tuple(t.shape) for role, t in update.tensors.items()} == shapes
    assert update.scale == (1.0 if "lokr_w2" in shapes else 5.0 / rank)


def test_it_starts_with_lycoris_distributions():
    base = nn.Linear(4096, 2048)
    adapter = LoKr(base, LayerSpec("a", 16, 1.0))
    for role, fan_in in (("lokr_w1", 64), ("lokr_w2_a", 16)):
        tensor = getattr(adapter, role).detach()
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < tensor.abs().max() <= bound
        assert abs(float(tensor.mean())) < 5 * bound / math.sqrt(3 * tensor.numel())
    assert not adapter.lokr_w2_b.any()
    assert not torch.equal(adapter.lokr_w1, LoKr(base, LayerSpec("b", 16, 1.0)).lokr_w1)


def test_a_factor_of_zero_is_refused_and_so_is_one_of_another_kind():
    with pytest.raises(UserError, match=r"--adapter.factor is 0; expected"):
        AdapterSpec(("0",), kind="lokr", factor=0)
    with pytest.raises(UserError, match=r"factor is 4, .*kind loha; .*kind lokr"):
        AdapterSpec(("0",), kind="loha", factor=4)


FORMS = {
    "w1 split": ("linear", {"w1_a": (2, 2), "w1_b": (2, 3), "w2": (4, 4)}),
    "both split": ("linear", {"w1_a": (2, 2), "w1_b": (2, 3), "w2_a": (4, 2), "w2_b": (2, 4)}),
    "as a convolution": ("linear", {"w1": (2, 3), "w2": (4, 4, 1, 1)}),
    "core": ("conv", {"w1": (2, 2), "w2_a": (2, 2), "w2_b": (2, 3), "t2": (2, 2, 3, 2)}),
    "deep": ("conv", {"w1": (2, 2), "w2_a": (2, 2), "w2_b": (2, 3, 3, 2)}),
    "without a kernel": ("1x1", {"w1": (2, 2), "w2": (2, 3)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_files_acts_as_its_product(form):
    name, shapes = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"lokr_{role}": torch.randn(shape, generator=generator).double()
        for role, shape in shapes.items()
    }
    layer = copy.deepcopy(LAYERS[name]).double()
    update = DenseUpdate("LoKr", tuple(layer.weight.shape), tensors, 0.7)
    model, x = nn.Sequential(layer), layer_input(name)
    load_factors(model, {"0": update})
    weight = layer.weight + scaled_product(update)
    expected = torch.func.functional_call(layer, {"weight": weight}, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
    assert isinstance(model[0].adapter("default"), LoKr)
    again = model[0].adapter("default").state()
    assert all(torch.equal(again.tensors[role], own) for role, own in tensors.items())


@needs_lycoris
@pytest.mark.parametrize("name", ["linear", "prime", "conv", "1x1"])
@pytest.mark.parametrize("rank", [1, 2, 16])
@pytest.mark.parametrize("factor", [-1, 2])
def test_it_is_lycoris_module_with_the_same_tensors(name, rank, factor):
    from lycoris.modules.lokr import LokrModule

    model = layer_with("lokr", name, torch.float32, rank=rank, alpha=3.0, factor=factor)
    base, x = model[0].base, layer_input(name, torch.float32)
    (update,) = adapter_updates(model).values()
    stored = lycoris.tensors_to_store(update)
    theirs = LokrModule("x", base, 1.0, rank, 3.0, factor=factor)
    assert theirs.state_dict().keys() == stored.keys()
    for role, tensor in theirs.state_dict().items():
        assert role == "alpha" or tensor.shape == stored[role].shape
    roles = [role for role in LokrModule.weight_list if role not in ("lokr_t1",)]
    with torch.no_grad():
        read = LokrModule.make_module_from_state_dict(
            "x", base, *(stored.get(role) for role in LokrModule.weight_list)
        )
    assert set(stored) <= set(roles)
    delta = scaled_product(update)
    size = float(delta.abs().max())
    torch.testing.assert_close(read.get_weight(base.weight.shape), delta, rtol=0, atol=1e-6 * size)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(read(x), y, rtol=0, atol=1e-6 * float(y.abs().max()))
    parts = {role: tensor.detach() for role, tensor in read.state_dict().items()}
    ours = lycoris.to_dense_update(parts, tuple(base.weight.shape), "x")
    torch.testing.assert_close(scaled_product(ours), delta, rtol=0, atol=1e-6 * size)
