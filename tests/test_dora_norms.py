"""DoRA's row norms in a layer: their gradient, and `cache_dora_norms`, which computes them once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_core.adapters import injection
from lora_core.adapters.folded_weights import fold_adapter, unfold_adapter
from lora_core.adapters.injection import (
    AdapterSpec,
    adapter_factors,
    inject,
    load_factors,
    remove,
    set_strength,
)
from lora_core.errors import UserError
from lora_core.kernels import OPS, use_kernels
from tests.test_kinds import adapted_layers, injected, net, noise, shake


def dense_gradients(model, x, detach):
    """Of every parameter, for layers W' = m / n (W + s up down) written out."""
    plain, leaves, wanted = net(), {}, []
    for path, layer in adapted_layers(model):
        own = layer.adapter("default")
        down, up, m = (
            p.detach().clone().requires_grad_() for p in (own.down, own.up, own.magnitude)
        )
        groups = getattr(layer.base, "groups", 1)
        blocks = [
            own.scale * u.flatten(1) @ d.flatten(1)
            for u, d in zip(up.chunk(groups), down.chunk(groups), strict=True)
        ]
        bracket = layer.weight.detach() + torch.cat(blocks).view(layer.weight.shape)
        norm = bracket.flatten(1).norm(dim=1)
        leaves[f"{path}.weight"] = bracket * (m / (norm.detach() if detach else norm)).view(
            -1, *[1] * (bracket.ndim - 1)
        )
        wanted += [down, up, m]
    return torch.autograd.grad(
        torch.func.functional_call(plain, leaves, (x,)).square().sum(), wanted
    )


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("norm_grad", ["detach", "full"])
def test_the_gradient_stops_at_doras_norms_or_flows_through_them(norm_grad, strength):
    """Strength 1/2 takes the general path; its gradients are those of W + (W' - W) / 2."""
    model, x = injected("dora", norm_grad=norm_grad), noise(3, 4, 6, 5)
    shake(model)
    found = injection.adapter_parameters(model)
    if strength == 1:
        grads = torch.autograd.grad(model(x).square().sum(), found)
        for a, b in zip(grads, dense_gradients(model, x, norm_grad == "detach"), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        other = dense_gradients(model, x, norm_grad != "detach")
        assert not any(
            torch.allclose(a, b) for a, b in list(zip(grads, other, strict=True))[1::3]
        )  # every up
    else:
        set_strength(model, "default", strength)
        layer, x = model.to_q, noise(2, 8)
        own = layer.adapter("default")
        bracket = layer.base.weight.detach() + own.scale * own.up @ own.down
        norm = bracket.norm(dim=1)
        tuned = (
            bracket * (own.magnitude / (norm.detach() if norm_grad == "detach" else norm))[:, None]
        )
        expected = torch.autograd.grad(
            (x @ (layer.base.weight.detach() + tuned).T / 2).sum(), list(own.parameters())
        )
        for a, b in zip(
            torch.autograd.grad(layer(x).sum(), list(own.parameters())), expected, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_norm_grad_is_doras_and_one_of_two():
    with pytest.raises(UserError, match="norm-grad is 'half'; expected one of detach, full"):
        AdapterSpec(targets=("*",), kind="dora", norm_grad="half")
    with pytest.raises(
        UserError, match=r"norm-grad is full, which has no effect on --adapter\.kind lora"
    ):
        AdapterSpec(targets=("*",), norm_grad="full")
    with pytest.raises(
        UserError, match=r"norm-grad is full, which has no effect on --adapter\.kind full"
    ):
        AdapterSpec(targets=("*",), kind="full", norm_grad="full")


@pytest.fixture
def norms(monkeypatch):
    """The weights whose row norms were computed."""
    seen = []

    def counted(name, op):
        def run(*args):
            seen.extend(layer[0] for layer in (args[0] if name == "dora_norms" else [args]))
            return op.reference(*args)

        return run

    for name in ("dora_norm", "dora_norms"):
        monkeypatch.setitem(OPS, name, replace(OPS[name], reference=counted(name, OPS[name])))
    with use_kernels("reference"):
        yield seen


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_cached_norms_are_computed_once_and_change_no_bit(norms, strength):
    model, x = injected("dora"), noise(3, 4, 6, 5)
    inject(model, AdapterSpec(targets=("to_q",), rank=1), name="lora")
    shake(model)
    set_strength(model, "default", strength)
    expected = model(x)
    assert len(norms) == 5 + 5  # at injection and in the forward
    norms.clear()
    with injection.cache_dora_norms(model):
        assert len(norms) == 5
        with injection.cache_dora_norms(model):  # does nothing more
            y = model(x)
        assert torch.equal(model(x), y) and torch.equal(y, expected)
        y.sum().backward()
        with injection.disable_adapters(model):
            assert torch.equal(model(x), net()(x))
        assert torch.equal(model(x), y) and len(norms) == 5
    model(x)
    assert len(norms) == 10 and all(p.grad is not None for p in injection.adapter_parameters(model))


def test_the_cache_ends_with_an_exception(norms):
    model, x = injected("dora"), noise(3, 4, 6, 5)
    with pytest.raises(RuntimeError, match="stop"), injection.cache_dora_norms(model):
        raise RuntimeError("stop")
    with injection.cache_dora_norms(model):
        remove(model)
    with injection.cache_dora_norms(model):
        assert torch.equal(model(x), net()(x))
    model = injected("dora")
    shake(model)
    before = model(x)
    shake(model, size=0.5)
    norms.clear()
    assert not torch.allclose(model(x), before) and len(norms) == 5


def test_what_changes_inside_the_block_computes_its_own_norms(norms):
    model, x = injected("dora"), noise(3, 4, 6, 5)
    shake(model)
    factors = adapter_factors(model)
    expected = model(x)
    shake(model, size=0.5)
    with injection.cache_dora_norms(model):
        load_factors(model, factors)
        assert torch.equal(model(x), expected)
    with injection.cache_dora_norms(model):
        model.float()
        y = model(x.float())
    assert torch.equal(model(x.float()), y)
    model = injected("dora", norm_grad="full")
    shake(model)
    norms.clear()
    with injection.cache_dora_norms(model):
        assert not norms
        grads = torch.autograd.grad(model(x).square().sum(), injection.adapter_parameters(model))
    for a, b in zip(grads, dense_gradients(model, x, False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    model = injected("dora")
    shake(model)
    expected = model(x)
    fold_adapter(model)
    with injection.cache_dora_norms(model):  # norms of a folded weight would be wrong
        unfold_adapter(model)
        assert torch.equal(model(x), expected)
