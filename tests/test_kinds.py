"""Laws of a full update, of DoRA's norms, and of rank and module dropout (keyed, unbiased).

A full update: forward = fold to the bit, a step on delta = a step on the weight. DoRA's norms:
their gradient, and `cache_dora_norms`, which computes them once.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import Adapted, adaptable_layers
from lora_core.adapters.folded_weights import fold_adapter, merged_state_dict, unfold_adapter
from lora_core.adapters.injection import (
    AdapterSpec,
    adapter_factors,
    inject,
    load_factors,
    remove,
    set_dropout_keys,
    set_strength,
)
from lora_core.adapters.weight_updates import delta_weight
from lora_core.errors import UserError
from lora_core.kernels import OPS, use_kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KINDS = ["lora", "dora"]


class Net(nn.Module):
    """Convolutions with and without groups and bias, a norm, Linear on [b, n, d] and [b, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.to_q = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Linear(6, 5)])

    def forward(self, x):
        x = F.silu(self.norm(self.grouped(torch.tanh(self.conv(x)))))
        x = torch.tanh(self.to_q(x.flatten(2).transpose(1, 2)))
        return self.blocks[1](torch.tanh(self.blocks[0](x)).mean(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def net(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def injected(kind="full", dtype=torch.float64, **settings):
    model = net(dtype)
    rank = {} if kind == "full" else {"rank": 2, "alpha": 3.0}
    inject(model, AdapterSpec(**{"kind": kind, "targets": ("*",)} | rank | settings))
    return model


def shake(model, name="default", size=0.1, seed=5):
    generator = seeded(seed)
    with torch.no_grad():
        for p in injection.adapter_parameters(model, name):
            p.add_(
                size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            )


def adapted_layers(model):
    return [
        (path, layer)
        for path, layer in adaptable_layers(model).items()
        if isinstance(layer, Adapted)
    ]


# --- full: the weights themselves ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_update_starts_as_the_base_and_gets_wide_gradients(dtype):
    model, base, x = injected(dtype=dtype), net(dtype), noise(3, 4, 6, 5, dtype=dtype)
    out = model(x)
    assert torch.equal(out, base(x)) and out.dtype == dtype
    out.float().square().sum().backward()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    found = injection.adapter_parameters(model)
    assert [tuple(p.shape) for p in found] == [
        tuple(p.shape) for n, p in base.named_parameters() if "norm" not in n
    ]
    assert all(p.dtype == p.grad.dtype == wanted and p.grad.abs().max() > 0 for p in found)


@pytest.mark.parametrize(("dtype", "strength"), itertools.product(DTYPES, (1.0, 0.37, -1.5)))
def test_forward_is_fold_to_the_bit_and_unfold_restores_weights_and_biases(dtype, strength):
    model, x = injected(dtype=dtype), noise(3, 4, 6, 5, dtype=dtype)
    shake(model)
    set_strength(model, "default", strength)
    out, before = model(x), net(dtype).state_dict()
    assert not torch.equal(out, net(dtype)(x))
    fold_adapter(model, "default", strength)
    assert torch.equal(model(x), out) and not torch.equal(model.to_q.bias, before["to_q.bias"])
    unfold_adapter(model)
    assert torch.equal(model(x), out)
    remove(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_on_the_delta_is_adamw_on_the_weight(decay):
    """Exactly, without weight decay.

    With it the delta shrinks towards the base, where a plain fine-tune shrinks towards 0.
    """
    ours, plain, x = injected(), net(), noise(3, 4, 6, 5)
    for layer in plain.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.requires_grad_(False)
    optimizers = [
        torch.optim.AdamW(ps, lr=1e-2, weight_decay=decay)
        for ps in (
            injection.adapter_parameters(ours),
            [p for p in plain.parameters() if p.requires_grad],
        )
    ]
    for _ in range(3):
        for model, optimizer in zip((ours, plain), optimizers):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    found = merged_state_dict(ours)
    same = all(
        torch.allclose(found[k], v, rtol=0, atol=1e-13) for k, v in plain.state_dict().items()
    )
    assert same == (decay == 0)


def test_full_and_low_rank_updates_add():
    model, expected, x = injected(), net(), noise(3, 4, 6, 5)
    inject(model, AdapterSpec(kind="dora", rank=2, targets=("*",)), name="second")
    shake(model)
    shake(model, "second", seed=6)
    set_strength(model, "default", 0.4)
    with torch.no_grad():
        for path, layer in adaptable_layers(expected).items():
            full = dict(adapted_layers(model))[path].adapter("default")
            layer.weight += 0.4 * full.weight + delta_weight(
                adapter_factors(model, "second")[path], layer.weight.clone()
            )
            if layer.bias is not None:
                layer.bias += 0.4 * full.bias
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-12)
    fold_adapter(model, "default", 0.4)
    fold_adapter(model, "second")
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-12)
    unfold_adapter(model)
    unfold_adapter(model, "second")
    assert torch.equal(model.to_q.bias, net().to_q.bias)


def test_hooks_of_the_base_still_run():
    model, called, x = net(), [], noise(3, 4, 6, 5)
    model.to_q.register_forward_hook(lambda *args: called.append("hook"))
    inject(model, AdapterSpec(kind="full", targets=("*",)))
    plain = injected()
    shake(model)
    shake(plain)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-14)
    assert called == ["hook"]


def test_a_full_update_has_no_factors():
    model = injected()
    factors = adapter_factors(injected("lora"))
    for action in (lambda: adapter_factors(model), lambda: load_factors(model, factors)):
        with pytest.raises(
            UserError, match="no low-rank form; write the merged model, or distil it"
        ):
            action()
    with pytest.raises(UserError, match=r"of conv has no up and down.*--optimizer.lora-plus"):
        injection.up_parameters(model)
    with pytest.raises(UserError, match=r"as torch\.int8, which cannot take an update"):
        whole = nn.Sequential(nn.Linear(2, 2))
        whole[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
        inject(whole, AdapterSpec(kind="full", targets=("0",)))


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"rank": 8}, "rank is 8"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"rank_pattern": {"to_q": 2}}, "rank-pattern is"),
        ({"alpha_pattern": {"to_q": 2.0}}, "alpha-pattern is"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"rank_dropout": 0.1}, "rank-dropout is 0.1"),
        ({"module_dropout": 0.1}, "module-dropout is 0.1"),
        ({"rslora": True}, "rslora is True"),
        ({"init": "kaiming"}, "init is kaiming"),
    ],
)
def test_what_has_no_part_in_a_full_update_is_refused(settings, option):
    with pytest.raises(UserError, match=f"--adapter.{option}.*no effect on --adapter.kind full"):
        AdapterSpec(targets=("*",), kind="full", **settings)


def test_casting_the_model_leaves_a_full_update_fp32():
    model = injected(dtype=torch.float32)
    shake(model)
    before = [p.detach().clone() for p in injection.adapter_parameters(model)]
    model.to(torch.bfloat16)
    assert model.to_q.weight.dtype == torch.bfloat16
    assert all(
        torch.equal(a, b) for a, b in zip(before, injection.adapter_parameters(model), strict=True)
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_trap_24_an_update_of_1e_4_on_a_bf16_base_is_kept(kind):
    """Half an ulp of bf16 at 0.05 is 1.2e-4, more than a step at a learning rate of 1e-4.

    A parameter kept in bf16 (peft's, on a bf16 base) never moves.
    """
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    inject(
        model, AdapterSpec(targets=("0",), **({"kind": "full"} if kind == "full" else {"rank": 2}))
    )
    ours = injection.adapter_parameters(model)[0]
    with torch.no_grad():
        ours.fill_(0.05)
    wrong = nn.Parameter(ours.detach().bfloat16())
    start = (ours.detach().clone(), wrong.detach().clone())
    optimizers = [torch.optim.AdamW([p], lr=1e-4, weight_decay=0.0) for p in (ours, wrong)]
    for _ in range(20):
        ours.grad, wrong.grad = torch.ones_like(ours), torch.ones_like(wrong)
        for optimizer in optimizers:
            optimizer.step()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(start[0] - ours, torch.full_like(ours, 20e-4), rtol=1e-3, atol=0)
    assert torch.equal(wrong, start[1])
    if kind == "full":  # and the base sees the sum of the small steps
        moved = merged_state_dict(model)["0.weight"].float() - model[0].base.weight.float()
        torch.testing.assert_close(moved, ours.detach(), rtol=0, atol=2.0**-9)


# --- DoRA: its norms ---


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
def computed_norms(monkeypatch):
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
def test_cached_norms_are_computed_once_and_change_no_bit(computed_norms, strength):
    model, x = injected("dora"), noise(3, 4, 6, 5)
    inject(model, AdapterSpec(targets=("to_q",), rank=1), name="lora")
    shake(model)
    set_strength(model, "default", strength)
    expected = model(x)
    assert len(computed_norms) == 5 + 5  # at injection and in the forward
    computed_norms.clear()
    with injection.cache_dora_norms(model):
        assert len(computed_norms) == 5
        with injection.cache_dora_norms(model):  # does nothing more
            y = model(x)
        assert torch.equal(model(x), y) and torch.equal(y, expected)
        y.sum().backward()
        with injection.disable_adapters(model):
            assert torch.equal(model(x), net()(x))
        assert torch.equal(model(x), y) and len(computed_norms) == 5
    model(x)
    assert len(computed_norms) == 10 and all(
        p.grad is not None for p in injection.adapter_parameters(model)
    )


def test_the_cache_ends_with_an_exception(computed_norms):
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
    computed_norms.clear()
    assert not torch.allclose(model(x), before) and len(computed_norms) == 5


def test_what_changes_inside_the_block_computes_its_own_norms(computed_norms):
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
    computed_norms.clear()
    with injection.cache_dora_norms(model):
        assert not computed_norms
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


# --- rank and module dropout ---


def masks(layer, settings, rows, step=3, seed=0, x=None):
    """layer(ones) for these row keys, with the identity as down and up and a base of zeros."""
    model = nn.Sequential(copy.deepcopy(layer)).double()
    inject(model, AdapterSpec(targets=("0",), rank=16, **settings), seed=seed)
    with torch.no_grad():
        for p in model[0].base.parameters():
            p.zero_()
        for p in injection.adapter_parameters(model):
            p.copy_(torch.eye(16).view(p.shape))
    set_dropout_keys(model, rows, step)
    return model(torch.ones(len(rows), *(x or (16,)), dtype=torch.float64))


LINEAR, CONV = nn.Linear(16, 16), nn.Conv2d(16, 16, 1)
ROWS = torch.arange(-1000, 1000) * 7919


@pytest.mark.parametrize(
    ("layer", "shape", "where"),
    [(LINEAR, (16,), ()), (LINEAR, (2, 3, 16), (0, 0)), (CONV, (16, 2, 3), None)],
)
def test_rank_dropout_takes_out_ranks_of_an_example_wherever_they_act(layer, shape, where):
    y = masks(layer, {"rank_dropout": 0.25}, ROWS[:50], x=shape)
    ranks = y[:, *where] if where is not None else y[:, :, 0, 0]
    assert set(ranks.unique().tolist()) == {0.0, 1 / 0.75}
    spread = (
        ranks[:, None, None]
        if shape == (2, 3, 16)
        else ranks[..., None, None]
        if where is None
        else ranks
    )
    assert torch.equal(y, spread.expand_as(y))
    assert torch.equal(ranks, masks(LINEAR, {"rank_dropout": 0.25}, ROWS[:50]))
    assert len(ranks.unique(dim=0)) > 40


@pytest.mark.parametrize(
    ("layer", "shape"), [(LINEAR, (16,)), (LINEAR, (2, 3, 16)), (CONV, (16, 2, 3))]
)
def test_module_dropout_takes_out_whole_examples_and_does_not_rescale(layer, shape):
    y = masks(layer, {"module_dropout": 0.25}, ROWS, x=shape)
    kept = y.flatten(1)[:, 0]
    assert torch.equal(y, kept.view(-1, *[1] * len(shape)).expand_as(y)) and set(
        kept.unique().tolist()
    ) == {0.0, 1.0}
    assert abs(float(kept.detach().mean()) - 0.75) < 5 * (0.75 * 0.25 / len(ROWS)) ** 0.5


def test_every_dropout_has_its_own_stream():
    """At p = 1/2 any two masks agree on half of the examples, as do two seeds, steps and layers.

    Within five standard errors.
    """
    found = [
        masks(LINEAR, {name: 0.5}, ROWS)[:, 0] != 0
        for name in ("dropout", "rank_dropout", "module_dropout")
    ]
    found += [
        masks(LINEAR, {"rank_dropout": 0.5}, ROWS, **other)[:, 0] != 0
        for other in ({"step": 4}, {"seed": 1})
    ]
    for a, b in itertools.combinations(found, 2):
        assert abs(float((a == b).double().mean()) - 0.5) < 2.5 / len(ROWS) ** 0.5
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    inject(model, AdapterSpec(targets=("*",), rank=8, module_dropout=0.5))
    with torch.no_grad():
        for layer in model:
            layer.adapter("default").up.fill_(1.0)
    set_dropout_keys(model, ROWS, 0)
    first, second = (
        layer(torch.ones(len(ROWS), 8).double()) != layer.base(torch.ones(len(ROWS), 8).double())
        for layer in model
    )
    assert abs(float((first[:, 0] == second[:, 0]).double().mean()) - 0.5) < 2.5 / len(ROWS) ** 0.5


@pytest.mark.parametrize(
    ("kind", "settings"),
    itertools.product(
        KINDS,
        [
            {"rank_dropout": 0.4},
            {"module_dropout": 0.4},
            {"dropout": 0.2, "rank_dropout": 0.3, "module_dropout": 0.3},
        ],
    ),
)
def test_masks_do_not_depend_on_the_batch(kind, settings):
    model = injected(kind, **settings).train()
    shake(model, size=0.3)
    x, rows = noise(6, 4, 6, 5), torch.tensor([5, 6, -7, 8, 9, 10])
    set_dropout_keys(model, rows, 11)
    whole = model(x)
    for part in ([3, 0], [5, 4, 1, 2], [2]):
        set_dropout_keys(model, rows[part], 11)
        torch.testing.assert_close(model(x[part]), whole[part], rtol=0, atol=1e-12)
    set_dropout_keys(model, rows, 12)
    assert not torch.allclose(model(x), whole)
    plain = injected(kind).eval()
    shake(plain, size=0.3)
    assert torch.equal(model.eval()(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_rank_dropout_is_unbiased_and_module_dropout_keeps_its_share(kind):
    for settings, share in (({"rank_dropout": 0.3}, 1.0), ({"module_dropout": 0.3}, 0.7)):
        model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64))
        with torch.no_grad():
            model[0].weight.copy_(noise(6, 6, seed=3))
        inject(model, AdapterSpec(targets=("0",), kind=kind, rank=3, **settings))
        shake(model, size=0.3)
        x, rows = noise(1, 6).expand(20_000, 6), torch.arange(20_000)
        set_dropout_keys(model, rows, 0)
        with torch.no_grad():
            y, base = model(x), model[0].base(x[:1])
            exact = model.eval()(x[:1])
        expected = base[0] + share * (exact - base)[0]
        assert ((y.mean(0) - expected).abs() < 5 * y.std(0) / len(y) ** 0.5).all()


def test_dropped_examples_are_the_base_to_the_bit_and_dropped_ranks_leave_doras_gain():
    """For a DoRA: y0 + (g - 1)(y0 - bias) + g s up(mask * down x).

    The mask is measured on another adapter of the same path.
    """
    x = noise(50, 16)
    for name in ("module_dropout", "rank_dropout"):
        model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float64))
        inject(model, AdapterSpec(targets=("0",), kind="dora", rank=16, **{name: 0.5}))
        shake(model, size=0.3)
        set_dropout_keys(model, ROWS[:50], 3)
        lr, base, mask = (
            adapter_factors(model)["0"],
            model[0].base,
            masks(LINEAR, {name: 0.5}, ROWS[:50]),
        )
        with torch.no_grad():
            y, y0 = model(x), base(x)
            if name == "module_dropout":
                gone = mask[:, 0] == 0
                assert 5 < gone.sum() < 45 and torch.equal(y[gone], y0[gone])
                torch.testing.assert_close(y[~gone], model.eval()(x)[~gone], rtol=0, atol=1e-13)
            else:
                gain = lr.magnitude / (base.weight + lr.up @ lr.down).norm(dim=1)
                expected = (
                    y0 + (gain - 1) * (y0 - base.bias) + gain * ((mask * (x @ lr.down.T)) @ lr.up.T)
                )
                torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_grouped_convolutions_drop_ranks_within_their_groups():
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, padding=1, groups=2)}).double()
    inject(model, AdapterSpec(targets=("conv",), rank=4, rank_dropout=0.5))
    shake(model, size=0.3)
    x, rows = noise(3, 4, 5, 4), torch.tensor([1, 2, 3])
    set_dropout_keys(model, rows, 0)
    lr, base = adapter_factors(model)["conv"], model["conv"].base
    mask = (model["conv"](x) - base(x)).detach()
    for i in range(3):
        hidden = F.conv2d(x[i : i + 1], lr.down, padding=1, groups=2)
        ranks = torch.cat(
            [
                F.conv2d(hidden * (torch.arange(4) == k).view(1, 4, 1, 1), lr.up, groups=2).reshape(
                    1, -1
                )
                for k in range(4)
            ]
        )
        weights = torch.linalg.lstsq(ranks.T, mask[i].reshape(-1, 1)).solution.flatten()
        assert all(min(abs(w), abs(w - 2)) < 1e-9 for w in weights.tolist()), weights


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_redraws_the_same_masks(kind):
    grads = []
    for recompute in (False, True):
        model = injected(kind, rank_dropout=0.3, module_dropout=0.3).train()
        shake(model)
        set_dropout_keys(model, torch.tensor([3, 1, 2]), 7)
        x = noise(3, 4, 6, 5)
        (
            checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        ).square().sum().backward()
        grads.append([p.grad for p in injection.adapter_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["rank_dropout", "module_dropout"])
def test_bad_dropouts_and_missing_row_keys_are_refused(name):
    with pytest.raises(
        UserError, match=rf"--adapter.{name.replace('_', '-')} is 1; expected a number in \[0, 1\)"
    ):
        AdapterSpec(targets=("*",), **{name: 1.0})
    model = injected("lora", **{name: 0.5})
    with pytest.raises(UserError, match=r"conv has dropout; call injection\.set_dropout_keys"):
        model(noise(3, 4, 6, 5))
