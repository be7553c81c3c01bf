"""Laws of groups: outputs, gradients and keys are those of the model without them.

Layers that see one tensor take one lora_grouped, and no output waits after a forward.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core.adapters import groups, injection
from lora_core.adapters.adapted_layer import adaptable_layers
from lora_core.adapters.folded_weights import fold_adapter
from lora_core.adapters.injection import AdapterSpec, inject
from lora_core.adapters.kinds import KINDS, LoRA
from lora_core.kernels import OPS, use_kernels
from lora_core.kernels.reference import lora_grouped

WIDTH = 6


class Attention(nn.Module):
    """q, k and v of one tensor, or q of one and k and v of another."""

    def __init__(self, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.is_cross_attention = is_cross_attention
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(WIDTH, 5),
            nn.Linear(WIDTH, 5, bias=False),
            nn.Linear(WIDTH, 4),
        )
        self.between = None  # what happens between q and k

    def forward(self, x, context=None):
        context = x if context is None else context
        q = self.to_q(x)
        if self.between:
            self.between(x)
        return (q * self.to_k(context)).tanh().sum(-1, keepdim=True) * self.to_v(context)


class Single(nn.Module):
    """A block of one stream: the attention and the MLP see the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.proj_mlp = Attention(), nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = x.tanh()
        return self.proj_mlp(x) * self.attn(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross, self.single, self.out = (
            Attention(),
            Attention(True),
            Single(),
            nn.Linear(4, WIDTH),
        )
        self.recompute = False

    def block(self, x, context):
        x = x + self.out(self.own(x))
        x = x + self.out(self.cross(x, context))
        return x + self.out(self.single(x))

    def forward(self, x):
        context = x.flip(1)
        return (
            checkpoint(self.block, x, context, use_reentrant=False)
            if self.recompute
            else self.block(x, context)
        )


def net(kind="lora", settings=None, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().to(dtype).requires_grad_(False)
    inject(model, AdapterSpec(targets=("*",), kind=kind, **({"rank": 2} | (settings or {}))))
    shake(model)
    return model


def shake(model, name="default"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in injection.adapter_parameters(model, name):
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def noise(dtype=torch.float64):
    return torch.randn(
        2, 7, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)


def trained(model, x):
    """The output and every gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [
        y.detach(),
        *torch.autograd.grad(y.square().sum(), [x, *injection.adapter_parameters(model)]),
    ]


@pytest.fixture
def sizes(monkeypatch):
    """How many members each lora_grouped had, where it runs."""
    seen = []
    monkeypatch.setattr(groups, "may_group", lambda device_type: True)
    monkeypatch.setattr(groups, "pays", lambda x, members: True)

    def grouped(x, members):
        seen.append(len(members))
        return lora_grouped(x, members)

    monkeypatch.setitem(OPS, "lora_grouped", replace(OPS["lora_grouped"], reference=grouped))
    with use_kernels("reference"):
        yield seen


def alone(run):
    """The same without groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "pays", lambda x, members: False)
        return run()


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3}], ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_with_groups_is_the_one_without(sizes, kind, settings, recompute):
    model, x = net(kind, settings), noise()
    injection.set_dropout_keys(model, torch.tensor([5, 9]), 3)
    model.recompute = recompute
    results = [trained(model, x), alone(lambda: trained(model, x))]
    assert sizes == [3, 2, 4] * (1 + recompute)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert all(group.waiting is None and not group.is_open for group in found(model))


def found(model):
    return list(
        dict.fromkeys(
            layer.group
            for layer in adaptable_layers(model).values()
            if getattr(layer, "group", None)
        )
    )


def members(model):
    paths = {layer: path for path, layer in adaptable_layers(model).items()}
    return [[paths[layer] for layer in group.members] for group in found(model)]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_compiled_without_a_graph_break(sizes, kind):
    model, x = net(kind), noise()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        sizes.clear()
        whole = trained(model, x)
        assert sizes == [3, 2, 4]
        y = compiled(x.requires_grad_())
        assert sizes == [3, 2, 4] * 2
        grads = torch.autograd.grad(y.square().sum(), [x, *injection.adapter_parameters(model)])
        assert all(torch.equal(a, b) for a, b in zip([y, *grads], whole, strict=True))
        assert all(group.waiting is None and not group.is_open for group in found(model))


def test_who_shares_an_input():
    model = net()
    everyone = [
        ["own.to_q", "own.to_k", "own.to_v"], ["cross.to_k", "cross.to_v"],
        ["single.proj_mlp", "single.attn.to_q", "single.attn.to_k", "single.attn.to_v"],
    ]  # fmt: skip
    assert sorted(members(model)) == sorted(everyone)
    some = Net()
    inject(some, AdapterSpec(targets=("*.to_q", "cross.to_k", "single.attn.to_v"), rank=2))
    assert members(some) == [["single.attn.to_q", "single.attn.to_v"]]
    joint = nn.Module()
    joint.attn = nn.Module()
    for name in ("add_q_proj", "add_k_proj", "add_v_proj", "q_proj", "k_proj"):
        joint.attn.add_module(name, nn.Linear(4, 4))
    joint.attn.v_proj = nn.Linear(3, 4)
    inject(joint, AdapterSpec(targets=("*",), rank=2))
    assert members(joint) == [
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        ["attn.q_proj", "attn.k_proj"],
    ]


def test_groups_follow_what_is_put_on_and_taken_off(sizes):
    model = Net().double()
    before, x = list(model.state_dict()), noise()
    inject(model, AdapterSpec(targets=("own.to_q",), rank=2), name="a")
    assert not found(model) and not model.own._forward_hooks
    inject(model, AdapterSpec(targets=("own.to_v", "own.to_k"), rank=2), name="b")
    assert members(model) == [["own.to_q", "own.to_k", "own.to_v"]]
    keys = set(model.state_dict())
    model(x)
    assert sizes == [3] and set(model.state_dict()) == keys
    injection.remove(model, "a")
    assert members(model) == [["own.to_k", "own.to_v"]]
    model(x)
    assert sizes == [3, 2]
    injection.remove(model, "b")
    assert not found(model) and not hooks_of(model) and list(model.state_dict()) == before
    injection.load_factors(model, injection.adapter_factors(net()))
    assert len(found(model)) == 3


def hooks_of(model):
    """Every forward hook below a model."""
    hooks = []
    for module in model.modules():
        hooks += [*module._forward_hooks, *module._forward_pre_hooks]
        hooks += module._forward_hooks_always_called
    return hooks


def mix_kinds(model):
    """A DoRA on q and LoRAs on k and v."""
    injection.remove(model)
    inject(model, AdapterSpec(targets=("own.to_q",), kind="dora", rank=2))
    inject(model, AdapterSpec(targets=("own.to_[kv]",), rank=2), name="b")


class Twice(LoRA):
    def forward(self, base, x, strength):
        return base(x) + 2 * self.update(base, x, None, strength)


def disturbed():
    """What makes a layer more than one plain adapter of the group's kind."""
    yield "strength of a DoRA", "dora", lambda m: injection.set_strength(m, "default", 0.5)
    yield "strength 0", "lora", lambda m: m.own.to_k.set_strength("default", 0.0)
    yield (
        "a second adapter",
        "lora",
        lambda m: inject(m, AdapterSpec(targets=("own.to_q",), rank=1), name="b"),
    )
    yield "another kind", "lora", mix_kinds
    yield "hook", "lora", lambda m: m.own.to_v.base.register_forward_hook(lambda *_: None)
    yield "folded", "lora", fold_adapter
    yield (
        "rank dropout",
        {"rank_dropout": 0.5},
        lambda m: injection.set_dropout_keys(m, torch.tensor([1, 2]), 0),
    )
    yield (
        "module dropout",
        {"module_dropout": 0.5},
        lambda m: injection.set_dropout_keys(m, torch.tensor([1, 2]), 0),
    )
    yield "a kind of one's own", "twice", lambda m: None


@pytest.mark.parametrize(
    ("kind", "change"), [row[1:] for row in disturbed()], ids=[row[0] for row in disturbed()]
)
def test_layers_that_are_more_are_computed_alone(sizes, kind, change, monkeypatch):
    monkeypatch.setitem(KINDS, "twice", Twice)
    model = net(kind) if isinstance(kind, str) else net("lora", kind)
    change(model)
    y = model.own(noise())
    assert not sizes
    assert torch.equal(y, alone(lambda: model.own(noise())))


def test_any_strength_of_a_lora_is_grouped_and_disabled_is_the_base(sizes):
    model, x = net(), noise()
    injection.set_strength(model, "default", -0.3)
    y = model.own(x)
    assert sizes == [3] and torch.equal(y, alone(lambda: model.own(x)))
    with injection.disable_adapters(model):
        assert not torch.equal(model.own(x), y)
    assert sizes == [3]


def test_outputs_are_handed_out_for_the_same_tensor_only(sizes):
    """Another tensor of the same numbers, a change in place or of the gradient mode: once more."""
    model, x = net(), noise()
    other = x.clone()
    y = alone(lambda: model.own(x))
    assert torch.equal(model.own(x, other), y) and sizes == [
        3,
        3,
    ]  # k is not there for `other`: the group is computed again, and waits for v

    def double(x):
        x.mul_(2)

    model.own.between = double
    expected = alone(lambda: model.own(x.clone()))
    assert not torch.equal(expected, y) and torch.equal(model.own(x.clone()), expected)
    model.own.between = lambda x: torch.set_grad_enabled(True)
    with torch.no_grad():
        y = model.own(x)
    y.sum().backward()
    assert model.own.to_k.adapter("default").up.grad.abs().sum() > 0


def test_layers_called_by_themselves_and_inference_tensors_are_computed_alone(sizes):
    model, x = net(), noise()
    model.own.to_q(x)
    with torch.inference_mode():
        model(noise())
    assert not sizes and model.own.to_q.group.waiting is None
    with torch.no_grad():
        model(x)
    assert sizes == [3, 2, 4]


@pytest.mark.parametrize("where", ["between", "grouped", "k"])
def test_nothing_waits_after_an_exception(sizes, where, monkeypatch):
    model, x = net(), noise()

    def fail(*_):
        raise RuntimeError("stop")

    if where == "between":
        model.own.between = fail
    elif where == "grouped":
        monkeypatch.setitem(OPS, "lora_grouped", replace(OPS["lora_grouped"], reference=fail))
    else:
        model.own.to_k.register_forward_pre_hook(fail)
    watched = weakref.ref(x)
    with pytest.raises(RuntimeError, match="stop"):
        model.own(x)
    assert not model.own.to_q.group.is_open and model.own.to_q.group.waiting is None
    del x
    gc.collect()
    assert watched() is None


def test_recomputation_that_stops_early_leaves_nothing(sizes):
    """Checkpointing ends the recomputation by an exception once it has what it saved.

    Here that is inside the attention, with outputs still waiting.
    """

    class Half(Attention):
        def forward(self, x):
            return self.to_q(x).exp() + self.to_k(x)  # the last that is saved is exp's

    model = nn.ModuleDict({"own": Half()}).double().requires_grad_(False)
    inject(model, AdapterSpec(targets=("*",), rank=2))
    x = noise().requires_grad_()
    checkpoint(model["own"], x, use_reentrant=False).sum().backward()
    assert sizes == [3, 3] and model["own"].to_q.group.waiting is None and x.grad is not None


def test_copies_and_pickles_have_groups_of_their_own(sizes):
    model, x = net(), noise()
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shared = {id(group) for group in found(twin)} & {id(group) for group in found(model)}
        assert not shared and members(twin) == members(model)
        sizes.clear()
        assert torch.equal(twin(x), y) and sizes == [3, 2, 4]
        shake(twin)
        assert not torch.equal(twin(x), y) and torch.equal(model(x), y)
        injection.remove(twin)
        assert not twin.own._forward_hooks and model.own._forward_hooks and len(found(model)) == 3


def test_a_copy_inside_a_forward_is_closed(sizes):
    model, copies = net(), []
    model.own.between = lambda x: copies.append(copy.deepcopy(model.own.to_k))
    model.own(noise().requires_grad_())
    assert copies[0].group.waiting is None and not copies[0].group.is_open and sizes == [3]


def test_groups_act_on_devices_with_kernels_only():
    """On a CPU no module has hooks; on another device, or in Triton's mode, their parents do."""
    model, x = net(), noise()
    count = 3 * 3  # a hook before and two entries after the forward, on three modules
    assert not hooks_of(model) and not any(group.acts for group in found(model))
    model.own.to_k.to("meta")
    assert not hooks_of(model)
    model.to("meta")
    assert len(hooks_of(model)) == count and all(group.acts for group in found(model))
    model.to_empty(device="cpu")
    assert not hooks_of(model)
    with use_kernels("triton"):
        model.own.to_q.resolve()
        assert len(hooks_of(model)) == count // 3
    model(x)
    assert not hooks_of(model)


def test_the_cpu_has_no_groups_by_itself():
    model, x = net(), noise()
    members = model.own.to_q.group.grouped_arguments(x)
    assert members is None
    with use_kernels("triton"):
        assert len(model.own.to_q.group.grouped_arguments(x)) == 3
    for mode in ("reference", "fused"):
        with use_kernels(mode):
            assert model.own.to_q.group.grouped_arguments(x) is None
