"""LoKr and LoHa as adapters: laws of the forward, folding, sums, files, dropout and dtypes."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_core import formats, kernels
from lora_core.adapters import injection
from lora_core.adapters.adapter_module import LayerSpec
from lora_core.adapters.folded_weights import fold_adapter, unfold_adapter
from lora_core.adapters.injection import (
    AdapterSpec,
    adapter_parameters,
    adapter_updates,
    inject,
    load_factors,
    set_dropout_keys,
)
from lora_core.adapters.product_adapter import ProductAdapter
from lora_core.adapters.weight_updates import AdapterState, delta_weight
from lora_core.errors import UserError
from lora_core.formats import layout_of
from tests.injected_nets import TARGETS, image, injected, net, shake
from tests.product_examples import (
    LAYERS,
    PRODUCT_KINDS,
    layer_input,
    layer_with,
    run_with,
    written_out,
)

CASES = list(itertools.product(PRODUCT_KINDS, LAYERS))


@pytest.mark.parametrize(
    ("kind", "dtype"), itertools.product(PRODUCT_KINDS, (torch.float64, torch.bfloat16))
)
def test_a_new_adapter_changes_no_bit(kind, dtype):
    model, x = net(dtype), image(dtype)
    before = model(x)
    inject(model, AdapterSpec(TARGETS, kind=kind, rank=2))
    assert torch.equal(model(x), before)
    zero = [name for name, p in model.named_parameters() if "adapters" in name and not p.any()]
    assert len(zero) == len(adapter_updates(model))
    for p in adapter_parameters(model):
        assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_forward_is_the_written_out_update_of_the_weight(kind, name, rank):
    model, x = layer_with(kind, name, rank=rank), layer_input(name)
    (update,) = adapter_updates(model).values()
    base, delta = model[0].base, written_out(update)
    assert delta.any() and delta.shape == base.weight.shape
    torch.testing.assert_close(model[0].adapter("default").delta_weight(base), delta)
    for strength in (1.0, -0.3):
        injection.set_strength(model, "default", strength)
        expected = run_with(base, base.weight + strength * delta, x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_gradients_are_those_of_the_dense_weight(kind, name):
    model, x = layer_with(kind, name), layer_input(name).requires_grad_()
    base, adapter = model[0].base, model[0].adapter("default")
    parameters = [x, *adapter.parameters()]
    grads = torch.autograd.grad(model(x).square().sum(), parameters)
    delta = adapter.scale * adapter.product().reshape(base.weight.shape)
    y = torch.func.functional_call(base, {"weight": base.weight + delta}, x)
    for a, b in zip(grads, torch.autograd.grad(y.square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", PRODUCT_KINDS)
def test_folded_it_is_the_forward_and_unfolded_the_old_bits(kind):
    model, x = injected(kind), image()
    shake(model)
    weights = {name: p.clone() for name, p in model.named_parameters() if ".base." in name}
    expected = model(x)
    fold_adapter(model, strength=1.0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
    unfold_adapter(model)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in weights.items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("other", ["lora", "dora", "lokr", "loha", "full"])
@pytest.mark.parametrize("kind", PRODUCT_KINDS)
def test_several_adapters_add_their_updates_of_the_base_weight(kind, other):
    model, x = injected(kind), image()
    ranked = {} if other == "full" else {"rank": 2}
    inject(model, AdapterSpec(TARGETS, kind=other, **ranked), name="second")
    shake(model)
    shake(model, "second", seed=6)
    injection.set_strength(model, "second", -0.4)
    expected = net()
    for path, layer in injection.layers_with_adapter(model, None).items():
        plain = expected.get_submodule(path)
        with torch.no_grad():
            for name, strength in (("default", 1.0), ("second", -0.4)):
                adapter = layer.adapter(name)
                plain.weight += strength * adapter.delta_weight(layer.base)
                if other == "full" and name == "second" and plain.bias is not None:
                    plain.bias += strength * adapter.delta_bias(layer.base)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", PRODUCT_KINDS)
def test_a_file_gives_the_tensors_back_bit_for_bit(kind, tmp_path):
    model, x = injected(kind, torch.float32), image(torch.float32)
    shake(model)
    layout = layout_of({"unet": net()})
    state = AdapterState(dense={"unet": adapter_updates(model)})
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    found = formats.load(tmp_path / "a.safetensors", layout).updates()["unet"]
    for path, update in adapter_updates(model).items():
        assert found[path].tensors.keys() == update.tensors.keys()
        assert found[path].scale == pytest.approx(update.scale, rel=1e-7)
        for role, tensor in update.tensors.items():
            assert torch.equal(found[path].tensors[role], tensor)
    other, again = net(torch.float32), injected(kind, torch.float32)
    load_factors(other, found, "file")
    load_factors(again, found)  # into parameters that are there
    assert torch.equal(other(x), model(x)) and torch.equal(again(x), model(x))
    for loaded in (other.to_q.adapter("file"), again.to_q.adapter("default")):
        assert isinstance(loaded, ProductAdapter)


@pytest.mark.parametrize("kind", PRODUCT_KINDS)
def test_what_does_not_fit_an_adapter_is_refused(kind):
    other = "loha" if kind == "lokr" else "lokr"
    found = adapter_updates(injected(kind))
    for model in (injected(other), injected("lora"), injected(kind, rank=1)):
        with pytest.raises(UserError, match="remove it first or load under another name"):
            load_factors(model, found)
    with pytest.raises(UserError, match=r"is not a product of two factors; take adapter_updates"):
        injection.adapter_factors(injected(kind))
    wrong = {"to_q": replace(found["to_q"], shape=(9, 9))}
    with pytest.raises(UserError, match="is it for another model"):
        load_factors(net(), wrong)
    with pytest.raises(UserError, match="no up and down, to which LoRA"):
        injection.up_parameters(injected(kind))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": "kaiming"}, "--adapter.init is kaiming, which has no effect"),
        ({"rank_dropout": 0.1}, "--adapter.rank-dropout is 0.1, which has no effect"),
        ({"norm_grad": "full"}, "--adapter.norm-grad .* or use --adapter.kind dora"),
    ],
)
@pytest.mark.parametrize("kind", PRODUCT_KINDS)
def test_options_without_effect_are_refused(kind, settings, said):
    with pytest.raises(UserError, match=said):
        AdapterSpec(("0",), kind=kind, **settings)


@pytest.mark.parametrize("kind", ["dokr", "doha"])
def test_magnitudes_are_refused_by_name(kind):
    with pytest.raises(UserError, match=f"{kind}, .* with DoRA's magnitudes, is not trained here"):
        inject(net(), AdapterSpec(TARGETS, kind=kind))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_dropout_drops_elements_of_the_input_and_whole_examples(kind, name):
    x, keys = layer_input(name, b=64), torch.arange(64)
    plain = layer_with(kind, name)
    base, delta = plain[0].base, plain[0].adapter("default").delta_weight(plain[0].base)
    model = layer_with(kind, name, module_dropout=0.5).train()
    set_dropout_keys(model, keys, 3)
    y, y0 = model(x), base(x)
    dropped = torch.tensor([torch.equal(a, b) for a, b in zip(y, y0)])
    assert 16 <= int(dropped.sum()) <= 48
    torch.testing.assert_close(y[~dropped], plain(x)[~dropped], rtol=0, atol=1e-11)
    set_dropout_keys(model, keys[5:9], 3)  # the same examples in another batch
    torch.testing.assert_close(model(x[5:9]), y[5:9], rtol=0, atol=1e-11)
    model = layer_with(kind, name, dropout=0.5).train()
    set_dropout_keys(model, keys, 3)
    kept = kernels.call("keyed_dropout", x, *model[0].adapter("default")._input_dropout(x))
    expected = y0 + run_with(base, delta, kept) - run_with(base, 0 * delta, kept)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("kind", PRODUCT_KINDS)
def test_casting_the_model_leaves_the_tensors_fp32(kind):
    model = injected(kind, torch.float32)
    shake(model)
    x = image(torch.float32)
    expected = model(x)
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model))
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


def test_a_class_without_its_own_product_says_so():
    base = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError):
        ProductAdapter(base, LayerSpec("0", 1, 1.0))


@pytest.mark.parametrize("kind", PRODUCT_KINDS)
def test_alpha_and_rank_by_layer_give_the_scale(kind):
    model = net()
    spec = AdapterSpec(TARGETS, kind=kind, rank=1, alpha_pattern={"to_q": 3.0})
    inject(model, spec)
    updates = adapter_updates(model)
    assert updates["to_q"].scale == 3.0 and updates["conv_in"].scale == 1.0
    assert delta_weight(updates["to_q"]).shape == model.to_q.weight.shape
