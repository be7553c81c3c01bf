"""Laws of injected adapters: identity at init, strengths, remove = the same modules.

Then peft with the same factors.
"""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import Adapted, adaptable_layers
from lora_core.adapters.folded_weights import fold_adapter, unfold_adapter
from lora_core.adapters.injection import (
    AdapterSpec,
    adapter_factors,
    inject,
    load_factors,
    remove,
    set_strength,
)
from lora_core.adapters.weight_updates import LowRank, delta_weight
from lora_core.errors import UserError
from lora_core.kernels import OPS, use_kernels
from tests.injected_nets import KINDS, TARGETS, adapted_layers, image, injected, net, seeded, shake

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# --- init, dtype, autocast ---


@pytest.mark.parametrize(("kind", "dtype"), itertools.product(KINDS, DTYPES))
def test_injecting_changes_no_bit(kind, dtype):
    model, base = injected(kind, dtype), net(dtype)
    x = image(dtype)
    assert torch.equal(model(x), base(x))
    set_strength(model, "default", 0.7)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize(("kind", "dtype"), itertools.product(KINDS, DTYPES))
def test_adapters_are_fp32_on_a_half_base_and_get_fp32_gradients(kind, dtype):
    model = injected(kind, dtype)
    shake(model)
    out = model(image(dtype))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for p in injection.adapter_parameters(model):
        assert p.dtype == p.grad.dtype == wanted
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_error_is_that_of_the_base(kind):
    """Error model: at most twice the error of the folded weights in that dtype, to float64."""
    double, low = injected(kind, torch.float64), injected(kind, torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(double.parameters(), low.parameters(), strict=True):
            a.copy_(b)
    shake(low, size=0.1)
    with torch.no_grad():
        for a, b in zip(
            injection.adapter_parameters(double), injection.adapter_parameters(low), strict=True
        ):
            a.copy_(b)
    x = image(torch.bfloat16)
    exact = double(x.double())
    error = (low(x).double() - exact).norm()
    fold_adapter(low)
    assert error < 2 * (low(x).double() - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_over_an_fp32_base(kind):
    model, base = injected(kind, torch.float32), net(torch.float32)
    x = image(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), base(x))
    shake(model, size=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
        low.float().sum().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(x), rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in injection.adapter_parameters(model))


def test_casting_the_model_leaves_adapters_fp32():
    model = injected("dora", torch.float32)
    shake(model)
    before = [p.detach().clone() for p in injection.adapter_parameters(model)]
    model.to(torch.bfloat16)
    assert model.to_q.weight.dtype == torch.bfloat16
    assert all(
        torch.equal(a, b) for a, b in zip(before, injection.adapter_parameters(model), strict=True)
    )
    assert model.double().to_q.adapter("default").down.dtype == torch.float64


def test_down_depends_on_seed_and_path_only_and_has_the_documented_spread():
    wide, narrow = injected(), injected(targets=("to_k",))
    assert torch.equal(adapter_factors(wide)["to_k"].down, adapter_factors(narrow)["to_k"].down)
    assert not torch.equal(adapter_factors(wide)["to_k"].down, adapter_factors(wide)["to_q"].down)
    big = nn.Sequential(nn.Linear(1000, 1000))
    inject(big, AdapterSpec(targets=("0",), rank=8), seed=1)
    assert abs(adapter_factors(big)["0"].down.std() * 8 - 1) < 0.05
    inject(big, AdapterSpec(targets=("0",), rank=8, init="kaiming"), name="other", seed=1)
    down = adapter_factors(big, "other")["0"].down
    assert down.abs().max() <= 1000**-0.5 and abs(down.std() * (3 * 1000) ** 0.5 - 1) < 0.05
    assert not adapter_factors(big)["0"].up.any()


# --- strength, several adapters ---


def two_adapters():
    model = injected("lora")
    inject(model, AdapterSpec(kind="dora", rank=3, targets=TARGETS), name="second")
    shake(model)
    shake(model, "second", seed=6)
    set_strength(model, "default", 0.4)
    set_strength(model, "second", -0.7)
    return model


def test_several_adapters_add_their_updates_of_the_base_weight():
    model, expected = two_adapters(), net()
    with torch.no_grad():
        for path, layer in adaptable_layers(expected).items():
            w = layer.weight.clone()
            layer.weight += 0.4 * delta_weight(
                adapter_factors(model)[path], w
            ) - 0.7 * delta_weight(adapter_factors(model, "second")[path], w)
    torch.testing.assert_close(model(image()), expected(image()), rtol=1e-11, atol=1e-11)
    fold_adapter(model, "second", -0.7)
    with pytest.raises(UserError, match="others are active"):
        model(image())
    fold_adapter(model, "default", 0.4)
    torch.testing.assert_close(model.to_q.weight, expected.to_q.weight, rtol=1e-13, atol=1e-13)
    unfold_adapter(model, "second")
    remove(model, "second")
    one = net()
    torch.testing.assert_close(
        model.to_q.weight,
        one.to_q.weight + 0.4 * delta_weight(adapter_factors(model)["to_q"]),
        rtol=0,
        atol=1e-14,
    )
    unfold_adapter(model)
    assert torch.equal(model.to_q.weight, one.to_q.weight)


def test_dora_strength_interpolates_the_weight():
    model = injected("dora")
    shake(model)
    set_strength(model, "default", 0.3)
    x = torch.randn(2, 7, 8, generator=seeded(), dtype=torch.float64)
    w, lr = model.to_q.weight, adapter_factors(model)["to_q"]
    bracket = w + lr.scale * lr.up @ lr.down
    tuned = lr.magnitude[:, None] / bracket.norm(dim=1, keepdim=True) * bracket
    torch.testing.assert_close(
        model.to_q(x), x @ (w + 0.3 * (tuned - w)).T + model.to_q.bias, rtol=0, atol=1e-13
    )


def test_disabled_and_zero_strength_are_the_base_and_nest():
    model, base = two_adapters(), net()
    tuned = model(image())
    with injection.disable_adapters(model):
        with injection.disable_adapters(model):
            pass
        assert torch.equal(model(image()), base(image()))
    assert torch.equal(model(image()), tuned)
    for name in ("default", "second"):
        set_strength(model, name, 0.0)
    assert torch.equal(model(image()), base(image()))


# --- the wrapper ---


def test_remove_gives_back_the_identical_modules():
    model = net()
    before = dict(model.named_modules())
    for kind, name in (("lora", "a"), ("dora", "b")):
        inject(model, AdapterSpec(kind=kind, rank=2, targets=TARGETS), name=name)
    assert isinstance(model.mid[0], Adapted) and isinstance(model.to_out[0], Adapted)
    remove(model, "a")
    assert isinstance(model.mid[0], Adapted) and list(model.mid[0].adapters) == ["b"]
    remove(model)
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    with pytest.raises(UserError, match="no adapter; it has none"):
        remove(model)


def test_the_base_stays_visible():
    model, base = injected(), net()
    assert (
        model.to_q.in_features == 8
        and model.mid[0].stride == (2, 1)
        and model.mid[0].kernel_size == (3, 2)
    )
    assert (
        torch.equal(model.to_q.weight, base.to_q.weight)
        and torch.equal(model.to_q.bias, base.to_q.bias)
        and model.to_k.bias is None
    )
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.to_q.no_such
    twin = copy.deepcopy(model)
    shake(model)
    assert torch.equal(twin(image()), base(image()))


# --- the resolved forward ---


def pair(kind="lora", dtype=torch.float32, **settings):
    """(an adapted linear, x) after a first forward, so that its forward is resolved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    inject(model, AdapterSpec(kind=kind, rank=2, targets=("0",), **settings))
    shake(model)
    x = torch.randn(3, 8, generator=seeded(2)).to(dtype)
    model.eval()(x)
    return model, x


def expected(model, x, strength=1.0):
    """The output by the definition, from the layer's tensors of now."""
    layer = model[0]
    lr = layer.adapter("default").state()
    with torch.no_grad():
        weight = layer.weight + strength * delta_weight(lr, layer.weight)
        return torch.nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolved_forward_follows_strengths_factors_and_weights(kind):
    model, x = pair(kind)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for strength in (0.5, 1.0, -2.0):
        set_strength(model, "default", strength)
        torch.testing.assert_close(model(x), expected(model, x, strength), **close)
    set_strength(model, "default", 1.0)
    factors = adapter_factors(model)["0"]
    load_factors(model, {"0": factors._replace(scale=3.0)})
    torch.testing.assert_close(model(x), expected(model, x), **close)
    model[0].base.weight = nn.Parameter(torch.eye(6, 8))
    torch.testing.assert_close(model(x), expected(model, x), **close)
    model.double()
    torch.testing.assert_close(model(x.double()), expected(model, x.double()))
    with torch.no_grad():
        model[0].adapter("default").down.mul_(2)
    torch.testing.assert_close(model(x.double()), expected(model, x.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolved_forward_follows_hooks_and_patched_forwards(kind):
    model, x = pair(kind)
    y, called = model(x), []
    layer = model[0]
    handles = [
        layer.base.register_forward_hook(lambda *_: called.append("base")),
        layer.adapter("default").register_forward_hook(lambda *_: called.append("adapter")),
    ]
    torch.testing.assert_close(model(x), y)
    assert called == ["base", "adapter"]
    for handle in handles:
        handle.remove()
    layer.base.forward = lambda x: torch.zeros(len(x), 6)
    assert not torch.allclose(model(x), y)
    del layer.base.forward
    assert torch.equal(model(x), y) and called == ["base", "adapter"]


def test_a_resolved_forward_follows_the_kernels(monkeypatch):
    model, x = pair()
    y, seen = model(x), []

    def own(*args):
        seen.append(args[0].shape)
        return OPS["lora_linear"].reference(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPS, "lora_linear", replace(OPS["lora_linear"], fused=own))
        with use_kernels("fused"):
            torch.testing.assert_close(model(x), y)
            model(x[:1])
    assert seen == [(3, 8), (1, 8)]
    assert torch.equal(model(x), y) and len(seen) == 2
    with use_kernels("reference"):
        torch.testing.assert_close(model(x), y)
    with injection.disable_adapters(model), use_kernels("fused"):
        assert torch.equal(model(x), model[0].base(x))  # resolved while no adapter acts
    assert torch.equal(model(x), y)


def test_a_resolved_forward_follows_the_training_mode():
    model, x = pair(dropout=0.5)
    injection.set_dropout_keys(model, torch.tensor([4, 5, 6]), 1)
    training, evaluation = model.train()(x), model.eval()(x)
    assert not torch.equal(training, evaluation) and torch.equal(model.train()(x), training)
    torch.testing.assert_close(evaluation, expected(model, x), rtol=1e-5, atol=1e-6)


def test_copies_resolve_forwards_of_their_own():
    model, x = pair()
    y = model(x)
    replica = model[0]._replicate_for_data_parallel()  # as torch.nn.parallel.replicate does
    replica._modules["base"] = nn.Linear(8, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shake(twin, seed=8)
        assert not torch.equal(twin(x), y) and torch.equal(model(x), y)
    assert not torch.equal(replica(x), y)


def test_a_removed_adapter_is_freed_at_once():
    model, x = pair()
    watched = weakref.ref(model[0].adapter("default"))
    model(x)
    gc.disable()
    try:
        remove(model)
        assert watched() is None
    finally:
        gc.enable()


def test_a_copy_is_compiled_before_its_first_forward():
    model, x = pair("dora")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_module_in_two_places_is_wrapped_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(shared))
    assert inject(model, AdapterSpec(targets=("*",), rank=2)) == ["0"]
    assert isinstance(model[0], Adapted) and model[0] is model[1][0]
    remove(model)
    assert model[0] is shared and model[1][0] is shared


def test_hooks_and_own_forwards_of_the_base_still_run():
    model, called = net(), []
    model.to_q.register_forward_hook(lambda *args: called.append("hook"))
    inject(model, AdapterSpec(targets=TARGETS, rank=2, alpha=3.0))
    shake(model)
    out = model(image())
    assert called == ["hook"]
    plain = injected()
    shake(plain)
    torch.testing.assert_close(out, plain(image()), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_of_the_host(kind):
    grads = []
    for recompute in (False, True):
        model = injected(kind, dropout=0.25)
        shake(model)
        model.train().recompute = recompute
        injection.set_dropout_keys(model, torch.tensor([3, 1, 2]), 7)
        model(image()).square().sum().backward()
        grads.append([p.grad for p in injection.adapter_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- dropout ---


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_does_not_depend_on_the_batch_size(kind):
    model = injected(kind, dropout=0.5)
    shake(model)
    model.train()
    x, rows = image(b=4), torch.tensor([5, 6, -7, 8])
    step = torch.tensor(11)
    injection.set_dropout_keys(model, rows, step)
    whole = model(x)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        injection.set_dropout_keys(model, rows[part], step)
        halves.append(model(x[part]))
    torch.testing.assert_close(whole, torch.cat(halves), rtol=1e-13, atol=1e-13)
    injection.set_dropout_keys(model, rows, 12)
    assert not torch.allclose(model(x), whole)
    model.eval()
    plain = injected(kind).eval()
    shake(plain)
    assert torch.equal(model(x), plain(x))


def test_dropout_differs_between_layers_and_seeds():
    outs = []
    for seed in (0, 1):
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        inject(model, AdapterSpec(targets=("*",), rank=64, alpha=64, dropout=0.5), seed=seed)
        injection.set_dropout_keys(model, torch.tensor([3]), 0)
        with torch.no_grad():
            for layer in model:
                layer.weight.zero_()
                layer.adapter("default").down.copy_(torch.eye(64))
                layer.adapter("default").up.copy_(torch.eye(64))
            outs += [layer(torch.ones(1, 64)) for layer in model]
    assert all(set(out.unique().tolist()) == {0.0, 2.0} for out in outs)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


def test_dropout_is_unbiased_in_training():
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64))
    inject(model, AdapterSpec(targets=("0",), rank=2, dropout=0.3))
    shake(model)
    x = torch.randn(1, 6, generator=seeded(), dtype=torch.float64).expand(20_000, 6)
    injection.set_dropout_keys(model, torch.arange(20_000), 0)
    with torch.no_grad():
        y = model(x)
        exact = model.eval()(x[:1])
    assert ((y.mean(0) - exact[0]).abs() < 5 * y.std(0) / 20_000**0.5).all()


def test_dropout_refuses_missing_or_wrong_row_keys():
    model = injected(dropout=0.5)
    with pytest.raises(UserError, match=r"conv_in has dropout; call injection.set_dropout_keys"):
        model(image())
    injection.set_dropout_keys(model, torch.tensor([1, 2]), 0)
    with pytest.raises(UserError, match="3 rows for 2 row keys"):
        model(image())
    with pytest.raises(ValueError, match=r"expected \[b\] int64"):
        injection.set_dropout_keys(model, torch.zeros(2), 0)


# --- parameters ---


@pytest.mark.parametrize("kind", KINDS)
def test_ups_are_the_ups_among_the_parameters(kind):
    model = injected(kind)
    ups = injection.up_parameters(model)
    assert [id(p) for p in ups] == [
        id(layer.adapter("default").up) for _, layer in adapted_layers(model)
    ]
    assert {id(p) for p in ups} < {id(p) for p in injection.adapter_parameters(model)} and not any(
        p.any() for p in ups
    )


# --- spec, targets, bad input ---


def test_rank_and_alpha_per_glob():
    model = net()
    inject(
        model,
        AdapterSpec(
            targets=TARGETS,
            rank=4,
            rank_pattern={"mid.*": 2, "mid.1": 3},
            alpha_pattern={"to_q": 8.0},
        ),
    )
    found = adapter_factors(model)
    assert {path: lr.rank for path, lr in found.items()} == {
        "conv_in": 4,
        "mid.0": 2,
        "mid.1": 3,
        "to_q": 4,
        "to_k": 4,
        "to_out.0": 4,
    }
    assert found["to_q"].scale == 2 and found["to_k"].scale == 1 and found["mid.1"].scale == 1
    assert adapter_factors(injected(rank=4, alpha=2.0, rslora=True))["to_q"].scale == 1.0
    assert adapter_factors(injected(rank=4, alpha=2.0))["to_q"].scale == 0.5
    with pytest.raises(UserError, match=r"rank-pattern: 'nid.1' matches none.*mid.1"):
        inject(net(), AdapterSpec(targets=TARGETS, rank_pattern={"nid.1": 3}))


def test_globs_respect_the_dot_and_exclude():
    model = nn.ModuleDict(
        {
            f"{p}blocks": nn.ModuleList(
                [nn.ModuleDict({"to_q": nn.Linear(2, 2), "proj": nn.Linear(2, 2)})]
            )
            for p in ("", "single_")
        }
    )
    assert injection.target_paths(model, ("blocks.0.to_q",)) == ["blocks.0.to_q"]
    assert injection.target_paths(model, ("to_?",)) == ["blocks.0.to_q", "single_blocks.0.to_q"]
    assert injection.target_paths(model, ("*",), ("proj", "single_*")) == ["blocks.0.to_q"]
    assert injection.target_paths(model, ("single_blocks.*",)) == [
        "single_blocks.0.to_q",
        "single_blocks.0.proj",
    ]
    with pytest.raises(UserError, match=r"'q' matches none of the 4 layers.*to_q"):
        injection.target_paths(model, ("to_q", "q"))
    with pytest.raises(UserError, match="exclude: 'proj' matches none of the 2"):
        injection.target_paths(model, ("to_q",), ("proj",))
    with pytest.raises(UserError, match="removes all 2"):
        injection.target_paths(model, ("to_q",), ("*",))
    with pytest.raises(
        UserError, match=r"'blocks' matches none.*nearest: blocks.0.to_q, blocks.0.proj"
    ):
        injection.target_paths(model, ("blocks",))


def refusals():
    depthwise = nn.ModuleDict({"dw": nn.Conv2d(4, 4, 3, groups=4)})
    yield (
        net(),
        {"rank": 9, "targets": ("to_q",)},
        r"rank 9 exceeds min\(in, out\) = 8 for to_q; lower --adapter.rank or narrow "
        r"--adapter.targets",
    )
    yield (
        net(),
        {"rank": 9, "targets": ("conv_in",)},
        r"rank 9 exceeds min\(in \* kh \* kw, out\) = 8 for conv_in",
    )
    yield (
        depthwise,
        {"rank": 6, "targets": ("dw",)},
        "rank 6 is not divisible by the 4 groups of dw",
    )
    yield net(), {"targets": ("norm",)}, "'norm' matches none of the 6 layers"
    yield net(), {"targets": ()}, "no target patterns"
    yield (
        net(),
        {"kind": "dorra", "rank": 1, "targets": ("to_q",)},
        "unknown adapter kind 'dorra', the nearest is 'dora'",
    )
    yield (
        net(),
        {"kind": "nowhere.py:X", "rank": 1, "targets": ("to_q",)},
        "nowhere.py:X names no Python file",
    )
    yield (
        nn.MultiheadAttention(4, 2),
        {"rank": 1, "targets": ("out_proj",)},
        "MultiheadAttention without being called",
    )
    zero = net()
    nn.init.zeros_(zero.to_q.weight[3])
    yield (
        zero,
        {"kind": "dora", "rank": 1, "targets": ("*",)},
        "row 3 of to_q's weight has norm 0.0",
    )


@pytest.mark.parametrize(("model", "settings", "message"), refusals())
def test_bad_requests_are_refused_before_any_change(model, settings, message):
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        inject(model, AdapterSpec(**settings))
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": 2.5},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"init": "normal"},
        {"rank_pattern": {"a": 0}},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError):
        AdapterSpec(targets=("to_q",), **settings)


def test_names_are_checked():
    model = injected()
    with pytest.raises(UserError, match="'default' is already on 6 layers"):
        inject(model, AdapterSpec(targets=("to_q",), rank=2))
    for name in ("", "a.b", "keys"):
        with pytest.raises(UserError, match="cannot be named"):
            inject(model, AdapterSpec(targets=("to_q",), rank=2), name=name)
    for action in (
        lambda: set_strength(model, "other", 1.0),
        lambda: fold_adapter(model, "other"),
        lambda: adapter_factors(model, "other"),
    ):
        with pytest.raises(UserError, match="no adapter 'other'; it has default"):
            action()
    with pytest.raises(UserError, match="strength is nan"):
        set_strength(model, "default", float("nan"))


def test_a_kind_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lora_core.adapters.kinds import LoRA\nclass Twice(LoRA):\n    pass\n"
    )
    model, base = net(), net()
    inject(model, AdapterSpec(kind=f"{tmp_path}/mine.py:Twice", rank=2, targets=("to_q",)))
    assert type(model.to_q.adapter("default")).__name__ == "Twice" and torch.equal(
        model(image()), base(image())
    )
    with pytest.raises(UserError, match="has no class 'Thrice'"):
        inject(
            model,
            AdapterSpec(kind=f"{tmp_path}/mine.py:Thrice", rank=2, targets=("to_q",)),
            name="b",
        )


# --- state ---


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip_into_a_fresh_and_into_the_same_model(kind):
    model, fresh = injected(kind, rank_pattern={"to_q": 5}), net()
    shake(model)
    saved = adapter_factors(model)
    load_factors(fresh, saved, "other", 1.0)
    assert torch.equal(fresh(image()), model(image()))
    trained = injection.adapter_parameters(model)
    out = model(image())
    shake(model, seed=9)
    load_factors(model, saved)
    assert torch.equal(model(image()), out) and all(
        a is b for a, b in zip(trained, injection.adapter_parameters(model), strict=True)
    )
    saved["to_q"].down.zero_()
    assert torch.equal(model(image()), out)


def test_load_state_accepts_both_spellings_of_a_1x1_and_any_rank():
    model = net()
    lr = LowRank(
        torch.randn(20, 12, generator=seeded()), torch.randn(8, 20, generator=seeded(1)), 0.1
    )
    load_factors(
        model, {"mid.1": lr, "to_q": LowRank(torch.ones(1, 8, 1, 1), torch.ones(8, 1, 1, 1), 1.0)}
    )
    assert model.mid[1].adapter("default").down.shape == (20, 12, 1, 1) and model.to_q.adapter(
        "default"
    ).up.shape == (8, 1)


def test_load_state_refuses_what_does_not_fit_before_any_change():
    good = adapter_factors(injected())
    wrong = LowRank(torch.zeros(2, 7), torch.zeros(8, 2), 1.0)
    for factors, message in [
        ({}, "no factors"),
        (good | {"to_w": good["to_q"]}, "no layer 'to_w'; nearest: to_"),
        (
            good | {"to_q": wrong},
            r"factors of to_q do not fit its weight \[8, 8\]: got down \[2, 7\]",
        ),
        (good | {"to_q": good["to_q"]._replace(magnitude=torch.ones(7))}, r"magnitude \[7\]"),
    ]:
        model = net()
        with pytest.raises(UserError, match=message):
            load_factors(model, factors)
        assert not adapted_layers(model)
    model = injected()
    with pytest.raises(UserError, match=r"on 5 layers without factors, e.g. conv_in"):
        load_factors(model, {"to_q": good["to_q"]})
    lora = "rank 2 lora and the factors are"
    for other, told in (
        (injected(rank=1), f"{lora} rank 1 lora"),
        (injected("dora"), f"{lora} rank 2 dora"),
    ):
        with pytest.raises(UserError, match=told):
            load_factors(model, adapter_factors(other))


def test_dense_up_of_a_grouped_convolution_is_refused():
    """cloneofsimo's grouped form: up over all groups, with the shape of a groups = 1 update.

    It means another map.
    """
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    with pytest.raises(UserError, match=r"expected down \[2, 2, 3, 3\], up \[6, 1, 1, 1\]"):
        load_factors(
            model, {"conv": LowRank(torch.zeros(2, 2, 3, 3), torch.zeros(6, 2, 1, 1), 1.0)}
        )


# --- peft as the oracle ---


def peft_twin(model, kind, dtype):
    """The same base and factors in peft: (network, pairs of our parameter and peft's)."""
    from peft import LoraConfig, inject_adapter_in_model

    other = net(dtype)
    config = LoraConfig(
        r=2,
        lora_alpha=3.0,
        use_dora=kind == "dora",
        target_modules=["conv_in", "mid.0", "mid.1", "to_q", "to_k", "to_out.0"],
    )
    inject_adapter_in_model(config, other)
    pairs = []
    for path, adapted in adapted_layers(model):
        ours, theirs = adapted.adapter("default"), other.get_submodule(path)
        pairs += [
            (ours.down, theirs.lora_A["default"].weight),
            (ours.up, theirs.lora_B["default"].weight),
        ]
        if kind == "dora":
            pairs.append((ours.magnitude, theirs.lora_magnitude_vector["default"].weight))
    if kind == "dora":
        for ours, theirs in pairs[2::3]:
            torch.testing.assert_close(ours, theirs.flatten(), rtol=1e-6, atol=0)
    shake(model)
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours.view_as(theirs))
    return other, pairs


@pytest.mark.parametrize(
    ("kind", "dtype"), itertools.product(KINDS, [torch.float64, torch.float32])
)
def test_forward_gradients_and_folded_weights_equal_peft(kind, dtype):
    model = injected(kind, dtype)
    other, pairs = peft_twin(model, kind, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    outs = []
    for network in (model, other):
        x = image(dtype).requires_grad_()
        with use_kernels("reference"):  # the fused twins' own rounding is held in test_fused.py
            y = network(x)
        (y - 1).square().mean().backward()
        outs.append((y.detach(), x.grad))
    for ours, theirs in zip(*outs, strict=True):
        assert relative(ours, theirs) < tolerance
    for ours, theirs in pairs:
        assert relative(ours.grad, theirs.grad.view_as(ours)) < tolerance
    fold_adapter(model)
    for path, adapted in adapted_layers(model):
        layer = other.get_submodule(path)
        layer.merge()
        assert relative(adapted.weight.detach(), layer.get_base_layer().weight.detach()) < tolerance


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_convolution_equals_pefts_with_a_block_down(kind):
    """peft's down sees all inputs; with zeros outside each group's block its network is ours.

    For LoRA; it cannot build the DoRA.
    """
    from peft import LoraConfig, inject_adapter_in_model

    ours, theirs = (
        nn.ModuleDict({"conv": nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)}).double()
        for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    inject(ours, AdapterSpec(kind=kind, rank=4, alpha=2.0, targets=("conv",)))
    shake(ours)
    x = torch.randn(2, 6, 7, 5, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        if kind == "dora":
            lr, conv = adapter_factors(ours)["conv"], ours["conv"]
            tuned = conv.weight + delta_weight(lr, conv.weight)
            expected = torch.nn.functional.conv2d(x, tuned, conv.bias, 2, 1, groups=2)
        else:
            with pytest.warns(UserWarning, match="groups > 1"):
                inject_adapter_in_model(
                    LoraConfig(r=4, lora_alpha=2.0, target_modules=["conv"]), theirs
                )
            down = theirs["conv"].lora_A["default"].weight.zero_()
            own = ours["conv"].adapter("default")
            down[:2, :3], down[2:, 3:] = own.down[:2], own.down[2:]
            theirs["conv"].lora_B["default"].weight.copy_(own.up)
            expected = theirs["conv"](x)
        torch.testing.assert_close(ours["conv"](x), expected, rtol=0, atol=1e-12)
