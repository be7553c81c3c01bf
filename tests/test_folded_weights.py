"""Laws of folded adapters: fold = forward, unfold = the same bits, merged = fold."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lora_core.adapters import injection
from lora_core.adapters.folded_weights import (
    fold_adapter,
    folding_error,
    merged_state_dict,
    unfold_adapter,
)
from lora_core.adapters.injection import (
    AdapterSpec,
    adapter_factors,
    inject,
    load_factors,
    remove,
    set_strength,
)
from lora_core.adapters.weight_updates import delta_weight
from lora_core.errors import UserError
from tests.injected_nets import KINDS, TARGETS, adapted_layers, image, injected, net, seeded, shake


@pytest.mark.parametrize(("kind", "strength"), itertools.product(KINDS, (1.0, 0.37, -1.5)))
def test_fold_is_forward_and_unfold_restores_the_bits(kind, strength):
    model = injected(kind)
    shake(model)
    set_strength(model, "default", strength)
    before, out = copy.deepcopy(net().state_dict()), model(image())
    fold_adapter(model, "default", strength)
    torch.testing.assert_close(model(image()), out, rtol=1e-12, atol=1e-12)
    unfold_adapter(model)
    assert torch.equal(model(image()), out)
    remove(model)
    assert model.state_dict().keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 0.0), (torch.bfloat16, 1e-3)])
def test_the_error_of_a_fold_is_that_of_its_rounding(dtype, least):
    model = injected("lora", dtype)
    assert folding_error(model, merged_state_dict(model)) == 0
    shake(model, size=0.05)
    merged, lost, whole = merged_state_dict(model), [], []
    for path, adapted in adapted_layers(model):
        whole.append(delta_weight(adapter_factors(model)[path], adapted.weight.double()).flatten())
        moved = merged[f"{path}.weight"].double() - adapted.weight.double()
        lost.append(moved.flatten() - whole[-1])
    wanted = float(torch.cat(lost).norm() / torch.cat(whole).norm())
    error = folding_error(model, merged)
    assert error == pytest.approx(wanted, rel=1e-3, abs=1e-6) and least <= error < 1


@pytest.mark.parametrize(
    ("kind", "dtype"), itertools.product(KINDS, [torch.bfloat16, torch.float16])
)
def test_fold_into_half_weights_rounds_once(kind, dtype):
    model = injected(kind, dtype)
    shake(model, size=0.05)
    exact = {
        path: adapted.weight.double()
        + 0.8 * delta_weight(adapter_factors(model)[path], adapted.weight.double())
        for path, adapted in adapted_layers(model)
    }
    bits = {path: adapted.weight.clone() for path, adapted in adapted_layers(model)}
    fold_adapter(model, "default", 0.8)
    for path, adapted in adapted_layers(model):
        folded = adapted.weight.detach()
        ulp = 2.0 ** (
            torch.floor(torch.log2(exact[path].abs().clamp_min(1e-4)))
            - (7 if dtype == torch.bfloat16 else 10)
        )
        assert ((folded.double() - exact[path]).abs() <= 0.5001 * ulp).all()
    unfold_adapter(model)
    assert all(torch.equal(adapted.weight, bits[path]) for path, adapted in adapted_layers(model))


def test_folding_never_counts_twice():
    model = injected()
    shake(model)
    fold_adapter(model)
    weight = model.to_q.weight.clone()
    for action in (fold_adapter, remove):
        with pytest.raises(UserError, match="folded"):
            action(model)
    with pytest.raises(UserError, match="folded"):
        set_strength(model, "default", 0.5)
    with pytest.raises(UserError, match="folded"), injection.disable_adapters(model):
        pass
    with pytest.raises(UserError, match="folded"):
        load_factors(model, adapter_factors(model))
    with pytest.raises(UserError, match="folded"):
        inject(model, AdapterSpec(kind="dora", targets=("to_q",), rank=2), name="second")
    assert torch.equal(model.to_q.weight, weight)
    unfold_adapter(model)
    with pytest.raises(UserError, match="not folded"):
        unfold_adapter(model)


def test_fold_that_overflows_leaves_the_model_as_it_was():
    model = injected("lora", torch.float16)
    shake(model)
    before = [layer.weight.clone() for _, layer in adapted_layers(model)]
    with torch.no_grad():
        model.to_out[0].adapter("default").up.fill_(60000.0)
    with pytest.raises(UserError, match=r"to_out.0 overflows torch.float16"):
        fold_adapter(model)
    assert all(
        torch.equal(w, layer.weight) and not layer.folded
        for w, (_, layer) in zip(before, adapted_layers(model), strict=True)
    )


def test_a_shared_weight_is_not_folded():
    model = net()
    model.to_q.weight = nn.Parameter(torch.eye(8, dtype=torch.float64))
    model.tied = nn.Linear(8, 8)
    model.tied.weight = model.to_q.weight
    inject(model, AdapterSpec(targets=("to_q",), rank=2))
    with pytest.raises(UserError, match="to_q is shared"):
        fold_adapter(model)


@pytest.mark.parametrize(
    ("kind", "dtype", "strength"),
    itertools.product([*KINDS, "full"], [torch.float64, torch.bfloat16], [1.0, -0.6]),
)
def test_merged_is_fold_under_the_models_own_keys_and_leaves_the_model(kind, dtype, strength):
    model, plain = net(dtype), net(dtype)
    inject(
        model, AdapterSpec(kind=kind, targets=TARGETS, **({} if kind == "full" else {"rank": 2}))
    )
    shake(model, size=0.1)
    inject(model, AdapterSpec(targets=("to_q", "mid.0"), rank=1), name="other")
    x, before = image(dtype), {key: value.clone() for key, value in model.state_dict().items()}
    out = model(x)
    found = merged_state_dict(model, strength=strength)
    assert list(found) == list(plain.state_dict()) and all(
        value.dtype == dtype and not value.requires_grad for value in found.values()
    )
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    ) and torch.equal(model(x), out)
    untouched = {
        key
        for key, value in found.items()
        if value.data_ptr() in {p.data_ptr() for p in model.parameters()}
    }
    biases = {"conv_in.bias", "mid.0.bias", "to_q.bias", "to_out.0.bias"}
    assert untouched == {"norm.weight", "norm.bias"} | (set() if kind == "full" else biases)
    fold_adapter(model, strength=strength)
    for path, layer in adapted_layers(model):
        assert torch.equal(found[f"{path}.weight"], layer.weight) and (
            layer.bias is None or torch.equal(found[f"{path}.bias"], layer.bias)
        )
        assert not torch.equal(layer.weight, plain.get_submodule(path).weight)
    with pytest.raises(UserError, match="folded into the weights; unfold it before merging"):
        merged_state_dict(model, "other")
    plain.load_state_dict(found)
    set_strength(model, "other", 0.0)
    assert torch.equal(plain(x), model(x))


def test_merged_names_every_place_of_a_layer_and_refuses_what_fold_refuses():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"base": nn.Sequential(shared, nn.Sequential(shared))})
    keys = list(model.state_dict())
    inject(model, AdapterSpec(targets=("*",), rank=2))
    shake(model)
    found = merged_state_dict(model)
    assert list(found) == keys and found["base.0.weight"] is found["base.1.0.weight"]
    with pytest.raises(UserError, match="no adapter 'x'; it has default"):
        merged_state_dict(model, "x")
    with torch.no_grad():
        model["base"][0].adapter("default").up.fill_(float("inf"))
    with pytest.raises(UserError, match=r"base\.0 overflows"):
        merged_state_dict(model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].bias = tied[0].bias
    inject(tied, AdapterSpec(targets=("0",), rank=2))
    merged_state_dict(tied)  # a LoRA leaves the bias alone
    remove(tied)
    inject(tied, AdapterSpec(kind="full", targets=("0",)))
    with pytest.raises(UserError, match="0 is shared"):
        merged_state_dict(tied)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_convolutions_fold_exactly(kind):
    layers = {
        "grouped": nn.Conv2d(6, 9, 3, padding=2, dilation=2, groups=3),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4),
        "circular": nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
        "same": nn.Conv2d(4, 5, (1, 3), padding="same"),
        "large": nn.Conv2d(3, 5, 7, stride=4, padding=3),
    }
    model = nn.ModuleDict(layers).double()
    inject(model, AdapterSpec(kind=kind, rank=3, rank_pattern={"depthwise": 4}, targets=("*",)))
    shake(model)
    with torch.no_grad():
        x = {
            path: torch.randn(2, layer.in_channels, 9, 8, generator=seeded(), dtype=torch.float64)
            for path, layer in layers.items()
        }
        before = {path: model[path](x[path]) for path in layers}
        alone = {path: model[path](x[path][0]) for path in layers if path != "circular"}
        fold_adapter(model)
        for path in layers:
            torch.testing.assert_close(model[path](x[path]), before[path], rtol=0, atol=1e-12)
        for path, y in alone.items():
            torch.testing.assert_close(y, before[path][0], rtol=0, atol=1e-12)
