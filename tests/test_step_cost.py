"""The counter against graphs counted by hand, the costs of a step, and every declared cost.

A declared cost is compared with the launches and bytes of the kernel that it describes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks import published_networks, step_cost
from benchmarks.counting import (
    Counter,
    as_cuda,
    operator_class,
    saved_activations,
    touched_bytes,
    traffic_bytes,
)
from benchmarks.step_cost import NetworkStep, count_cost
from lora_core import kernels
from lora_core.kernels import OPS, norms, reference
from lora_core.kernels.reference import Drop
from tests import tiny_sdxl


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------- the counter


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def test_a_graph_counted_by_hand() -> None:
    x, weight = meta(4, 8), meta(16, 8)
    with Counter() as counter:
        y = F.linear(
            x, weight
        )  # a view of the weight and mm: reads 4 x 8 and 16 x 8, writes 4 x 16
        z = (y + 1).relu_()  # reads and writes 4 x 16, twice
        z.sum()  # reads 4 x 16, writes one
    tally = counter.tally
    assert {name: (row.ops, row.bytes) for name, row in tally.operators.items()} == {
        "mm": (1, 4 * (32 + 128 + 64)),
        "add": (1, 4 * 128),
        "relu_": (1, 4 * 128),
        "sum": (1, 4 * 65),
    }  # fmt: skip
    assert (tally.ops, tally.elementwise, tally.bytes) == (4, 4 * 321, 4 * (321 + 224))
    assert tally.classes["product"].ops == 1


def test_backward_is_counted_too() -> None:
    x, weight = meta(4, 8, grad=True), meta(16, 8)
    with Counter() as counter:
        F.linear(x, weight).backward(meta(4, 16))
    assert counter.tally.operators["mm"].ops == 2 and counter.tally.ops == 2


@pytest.mark.parametrize(
    ("run", "size"),
    [
        (lambda x: x + x, 2 * 32),  # the same tensor is read once
        (lambda x: x + x[:1].expand(4, 8), 32 + 8 + 32),  # what broadcasting repeats, once
        (
            lambda x: torch.empty(4, 8, device="meta").copy_(x),
            2 * 32,
        ),  # copies do not read their target
        (lambda x: x.zero_(), 32),
        (lambda x: torch.zeros_like(x), 32),
        (lambda x: x.to(torch.bfloat16), 32 + 16),
        (lambda x: torch.add(x, x, out=torch.empty(4, 8, device="meta")), 2 * 32),
        (lambda x: x.add_(1), 2 * 32),
        (lambda x: x.t().contiguous(), 2 * 32),
    ],
)
def test_bytes(run: Any, size: int) -> None:
    with Counter() as counter:
        run(meta(4, 8))
    assert (counter.tally.ops, counter.tally.bytes) == (1, 4 * size)


def test_what_is_free() -> None:
    x = meta(4, 8)
    with Counter() as counter:
        x.view(8, 4).t()[1:].expand(3, 3, 8).detach().split(1)
        x.unflatten(1, (2, 4)).permute(2, 0, 1).chunk(2)
        torch.empty_like(x).new_empty(3)
        x[:0] + 1
    assert counter.tally.ops == 0 and not counter.tally.operators


def test_a_wait_for_the_device_is_no_op() -> None:
    with Counter() as counter:
        assert meta().item() == 1
        torch.ones(()).item()  # on the CPU nobody waits
    assert (counter.tally.syncs, counter.tally.ops) == (1, 1)


@torch.library.custom_op("lora_core::only_in_a_test", mutates_args=())
def _only_in_a_test(x: Tensor) -> Tensor:
    return x.sin().cos()


def test_a_custom_op_costs_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LookupError, match="only_in_a_test declares no cost"), Counter():
        _only_in_a_test(torch.ones(3))
    monkeypatch.setitem(
        kernels.COSTS, "lora_core::only_in_a_test", lambda x: kernels.Cost(2, 10 * len(x))
    )
    x = torch.ones(3)
    with Counter() as counter:
        _only_in_a_test(x)
    assert (counter.tally.ops, counter.tally.bytes, counter.tally.elementwise) == (2, 30, 30)
    monkeypatch.setitem(
        kernels.COSTS, "lora_core::only_in_a_test", lambda x: kernels.Cost(1, 10, True)
    )
    with Counter() as counter:
        _only_in_a_test(x)
    assert (counter.tally.ops, counter.tally.bytes, counter.tally.elementwise) == (1, 10, 0)


def test_saved_storages() -> None:
    weight, x = meta(8, grad=True), meta(4, 8)
    with saved_activations([weight], {"x": x}) as kept:
        y = x * weight  # keeps x, an input
        z = y.exp()  # keeps its output
        loss = (z[:, :4] * z[:, 4:]).sum()  # keeps two views of that same output
        (y.cos()).sum()  # keeps y in a graph that nothing holds
    assert loss.requires_grad and kept.bytes == 4 * 32
    loss.backward()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sin())
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def test_a_function_of_ours_is_seen_saving() -> None:
    x = meta(4, 8, grad=True)
    with saved_activations([x]) as kept:
        y = _Doubled.apply(x)
    assert y.requires_grad and kept.bytes == 4 * 32


def test_attention_and_norm_are_one_op_each_way() -> None:
    q = meta(1, 2, 16, 8, dtype=torch.bfloat16, grad=True)
    with as_cuda(), Counter() as counter:
        F.scaled_dot_product_attention(q, q.detach(), q.detach()).backward(q.detach())
        norm = nn.RMSNorm(8, device="meta", dtype=torch.bfloat16).requires_grad_(False)
        with Counter():
            pass
        before = counter.tally.ops
        norm(q).backward(q.detach())
    assert (
        counter.tally.classes["attention"].ops == before - 1 == 2
    )  # and the fill of the norm's weight
    assert counter.tally.ops - before == 3  # the gradient is added to the one that is there


def test_rms_norm_is_torchs() -> None:
    torch.manual_seed(0)
    x, dy, weight = (
        torch.randn(3, 5, 8, dtype=torch.float64).float().requires_grad_(),
        torch.randn(3, 5, 8),
        torch.randn(8),
    )
    expected = F.rms_norm(x, (8,), weight, 1e-6)
    (gradient,) = torch.autograd.grad(expected, x, dy)
    with as_cuda():
        y = F.rms_norm(x, (8,), weight, 1e-6)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], gradient)


# ---------------------------------------------------------------- a small network


def tiny() -> NetworkStep:
    """Two blocks of SDXL's kind, 6 transformer blocks in 5 places."""
    with torch.device("meta"):
        model = tiny_sdxl.unet().to(torch.bfloat16).requires_grad_(False).train()
        added = {"text_embeds": torch.empty(2, tiny_sdxl.POOLED), "time_ids": torch.empty(2, 6)}
        inputs = {
            "sample": torch.empty(2, 4, 8, 8),
            "encoder_hidden_states": torch.empty(2, 16, sum(tiny_sdxl.WIDTHS)),
        }
    wide = {key: value.to(torch.bfloat16) for key, value in inputs.items()}
    cond = {key: value.to(torch.bfloat16) for key, value in added.items()}
    paths = tuple(
        name
        for name, _ in model.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    )
    return NetworkStep(
        model,
        {
            **wide,
            "timestep": torch.empty(2, device="meta"),
            "added_cond_kwargs": cond,
            "return_dict": False,
        },
        paths,
    )


class Seen:
    """Calls of modules in one forward: how many, and how many whose input carries a gradient."""

    def __init__(self, step: NetworkStep, kinds: tuple[type, ...]) -> None:
        self.calls = self.carrying = 0
        self.of_adapted = 0
        adapted = {step.model.get_submodule(path) for path in step.paths}
        for module in step.model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda m, args, out: self.see(args[0], m in adapted))

    def see(self, x: Tensor, adapted: bool) -> None:
        self.calls += 1
        self.carrying += x.requires_grad
        self.of_adapted += adapted and x.requires_grad


def test_a_frozen_step_by_the_networks_layers() -> None:
    step = tiny()
    linear, conv = Seen(step, (nn.Linear,)), Seen(step, (nn.Conv2d,))
    classes = _classes(count_cost(step, "frozen", rank=2).operators)
    assert (
        classes["product"] == linear.calls + linear.carrying
    )  # x W^T, and dy W where a gradient flows on
    assert classes["convolution"] == conv.calls + conv.carrying
    assert classes["attention"] == 2 * len(step.paths) // 4


def test_pefts_step_by_the_networks_layers() -> None:
    step = tiny()
    frozen = count_cost(tiny(), "frozen", rank=2)
    seen = Seen(step, (nn.Linear,))
    lora = count_cost(step, "peft lora", rank=2)
    count, carrying = len(step.paths), seen.of_adapted
    extra = _classes(lora.operators)["product"] - _classes(frozen.operators)["product"]
    # forward: down, up; backward: d_up, d_down, dt, and dx of down where x carries a gradient.
    # The first three layers give the base's dx back.
    assert extra == 5 * count + carrying - 3
    assert 13 <= (lora.ops - frozen.ops) / count <= 15  # 13.8 on SD1.5
    assert 33 <= (count_cost(tiny(), "peft dora", rank=2).ops - frozen.ops) / count <= 38  # 35


def _classes(operators: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, ops in operators.items():
        found[operator_class(name)] = found.get(operator_class(name), 0) + ops
    return found


@pytest.mark.parametrize(("kind", "most"), [("lora", 4), ("dora", 6)])
def test_an_adapted_linear_adds_few_launches(kind: str, most: int) -> None:
    step = tiny()
    extra = (
        count_cost(step, f"triton {kind}", rank=2).ops - count_cost(tiny(), "frozen", rank=2).ops
    )
    assert extra <= most * len(step.paths)


# ---------------------------------------------------------------- SDXL


@pytest.fixture(scope="module")
def frozen_xl() -> step_cost.StepCost:
    return count_cost(step_cost.open_step("sdxl"), "frozen")


@pytest.mark.parametrize(
    ("kind", "ops", "elementwise", "kept"),
    [pytest.param("lora", 1.6, 1.05, 1.15, marks=pytest.mark.full), ("dora", 2.0, 1.3, 1.3)],
)
def test_a_step_of_sdxl(
    frozen_xl: step_cost.StepCost, kind: str, ops: float, elementwise: float, kept: float
) -> None:
    ours = count_cost(step_cost.open_step("sdxl"), f"triton {kind}")
    assert ours.ops <= ops * frozen_xl.ops
    assert ours.elementwise <= elementwise * frozen_xl.elementwise
    assert ours.saved <= kept * frozen_xl.saved


def test_pefts_step_of_sd15_is_the_published_one() -> None:
    """performance.md: 1,768 ops more than frozen and 4.3 GB of elementwise traffic.

    1.0 ms at 4.3 TB/s.
    """
    frozen, peft = (
        count_cost(step_cost.open_step("sd15"), variant) for variant in ("frozen", "peft lora")
    )
    assert peft.ops - frozen.ops == pytest.approx(1768, rel=0.01)
    assert peft.elementwise - frozen.elementwise == pytest.approx(4.3e9, rel=0.02)


def test_the_published_sizes() -> None:
    assert [len(published_networks.adapted_paths(name)) for name in published_networks.NAMES] == [
        128,
        560,
        266,
    ]
    assert (
        len(published_networks.tensor_shapes("sdxl")) == 1120
        and len(published_networks.tensor_shapes("sd15", dora=True)) == 3 * 128
    )


def test_the_network_on_the_cpu_is_finite() -> None:
    model = tiny_sdxl.unet()
    published_networks._fill(model, torch.Generator().manual_seed(0))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool((model.conv_norm_out.weight == 1).all()) and not bool(model.conv_in.bias.any())


def test_the_optimizers() -> None:
    found = step_cost.count_optimizer_steps([(2, 3), (4, 2)] * 5)
    assert (found["prodigyopt"].ops, found["prodigyopt"].syncs) == (
        13 * 10,
        2 * 10,
    )  # 14,560 and 2,240 for 1,120 tensors
    assert (found["ours Prodigy triton"].syncs, found["ours AdamW triton"].syncs) == (0, 0)
    assert 2 <= found["ours Prodigy triton"].ops <= 8 and 1 <= found["ours AdamW triton"].ops <= 8


def test_the_command(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.json"
    monkeypatch.setattr(step_cost, "open_step", lambda name, batch: tiny())
    monkeypatch.setattr(published_networks, "tensor_shapes", lambda name, rank: [(rank, 3)])
    monkeypatch.setattr(
        "sys.argv",
        [
            "step_cost",
            "--model",
            "sd15",
            "--variant",
            "peft lora",
            "--rank",
            "2",
            "--json",
            str(file),
        ],
    )
    step_cost.main()
    report = json.loads(file.read_text())["models"]["sd15"]
    assert set(report["step"]) == {"frozen", "peft lora"} and report["linears"] == 128
    assert {key: report["optimizer"]["prodigyopt"][key] for key in ("calls", "syncs")} == {
        "calls": 13,
        "syncs": 2,
    }
    assert f"{report['step']['peft lora']['ops']:,}" in capsys.readouterr().out


# ---------------------------------------------------------------- each declaration is what happens

REREADS = 2.0  # a kernel may read an argument twice (back_up's dy) and say so
OVERLOOKED = 0.05  # of the bytes: scalars, seeds, tables of addresses


class Watch(TorchDispatchMode):
    """Runs the implementation of every op of ours in the open.

    `inside` has (op, launches and torch calls inside it, declared cost, bytes of its tensors).
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[
            str
        ] = []  # of all calls but views, allocations and copies from the host, in order
        self.inside: list[tuple[str, int, kernels.Cost, tuple[int, int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = _tensors((args, kwargs))
        if not name.startswith("lora_core::"):
            counter = Counter()
            out = func(*args, **kwargs)
            counter.count(func, args, kwargs, out)
            from_host = len({t.device for t in _tensors((tensors, out))}) > 1
            self.names += [] if from_host else list(counter.tally.operators)
            return out
        self.names.append(name)
        if any(t.is_meta for t in tensors):
            return func(*args, **kwargs)
        declared, before = kernels.COSTS[name](*args, **kwargs), len(LAUNCHES)
        with Counter() as counter:
            out = OPDEFS[name]._init_fn(*args, **kwargs)
        given = {t: touched_bytes(t) for t in tensors}
        most = traffic_bytes(func, args, kwargs, out)
        mutated = set()
        for argument, value in zip(func._schema.arguments, args):
            if argument.is_write:
                mutated |= set(_tensors(value))
        least = most - sum(given[t] for t in mutated)  # what is written in place need not be read
        self.inside.append(
            (name, len(LAUNCHES) - before + counter.tally.ops, declared, (least, most))
        )
        return out


LAUNCHES: list[str] = []


@pytest.fixture
def counted_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of Triton's interpreter leaves its kernel's name in LAUNCHES.

    Calls by the interpreter itself are not counted.
    """
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        LAUNCHES.append(self.fn.__name__)
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)


def _member(
    example: tuple[Any, ...],
    *,
    dora: bool,
    bias: bool = True,
    drop: bool = False,
    plain: bool = False,
) -> tuple[Any, ...]:
    x, weight, offset, down, up, scale = example
    norm = reference.dora_norm(weight, down, up, scale) if dora else None
    magnitude = None if norm is None else (1.1 * norm).requires_grad_()
    rows = torch.arange(len(x), device=x.device)
    dropped = Drop(0.25, 3, 5, torch.tensor(2, device=x.device), rows) if drop else None
    return (
        x,
        None if plain else weight,
        offset if bias and not plain else None,
        down,
        up,
        scale,
        magnitude,
        norm,
        dropped,
    )


def _grouped(example: tuple[Any, ...], *, dora: bool) -> tuple[Any, ...]:
    x, members = example
    norms = [
        reference.dora_norm(m.weight, m.down, m.up, m.scale) if dora else None for m in members
    ]
    return x, tuple(
        m._replace(norm=n, magnitude=None if n is None else (1.1 * n).requires_grad_())
        for m, n in zip(members, norms)
    )


def _half(example: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, bias, *factors = example
    return x.bfloat16(), weight.bfloat16(), bias.bfloat16(), *factors


def _conv(device: str, side: int) -> tuple[Any, ...]:
    shapes = (2, 6, 7, 9), (4, 6, side, side), (4,), (3, 6, side, side), (4, 3, 1, 1)
    return (
        *(torch.ones(shape, device=device) for shape in shapes),
        0.5,
        (1, 1),
        (side // 2, side // 2),
        (1, 1),
        1,
    )


def _example(name: str) -> Callable[[str], tuple[Any, ...]]:
    return lambda device: OPS[name].example(0, torch.float32, device)


LINEAR, GROUPED = _example("lora_linear"), _example("lora_grouped")
CASES: dict[
    str, tuple[str, Callable[[str], tuple[Any, ...]]]
] = {  # title -> op, its arguments on a device
    **{name: (name, _example(name)) for name in OPS},
    "linear, no bias": (
        "lora_linear",
        lambda device: _member(LINEAR(device), dora=False, bias=False),
    ),
    "linear, dropout": (
        "lora_linear",
        lambda device: _member(LINEAR(device), dora=False, drop=True),
    ),
    "linear, update alone": (
        "lora_linear",
        lambda device: _member(LINEAR(device), dora=False, plain=True),
    ),
    "linear, DoRA": ("lora_linear", lambda device: _member(LINEAR(device), dora=True)),
    "linear, DoRA with dropout, no bias": (
        "lora_linear",
        lambda device: _member(LINEAR(device), dora=True, bias=False, drop=True),
    ),
    "linear, bf16": ("lora_linear", lambda device: _half(LINEAR(device))),
    "grouped, DoRA": ("lora_grouped", lambda device: _grouped(GROUPED(device), dora=True)),
    "conv, 3x3": ("lora_conv", lambda device: _conv(device, 3)),
    "conv, 1x1": ("lora_conv", lambda device: _conv(device, 1)),
}


FROZEN = {  # arguments that get no gradient
    "lora_linear": (1, 2, 7),
    "lora_conv": (1, 2),
    "dora_norm": (0, 1, 2),
    "dora_compose": (1,),
    "snr_weighted_mse": (1, 2, 3),
}


def _train(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of the arguments that get a gradient; none in ops that work in place."""
    if name.endswith("_step"):
        return []
    chosen = [
        arg
        for i, arg in enumerate(args)
        if i not in FROZEN.get(name, ()) and isinstance(arg, Tensor)
    ]
    if name == "lora_grouped":
        for m in args[1]:
            chosen += [tensor for tensor in (m.down, m.up, m.magnitude) if tensor is not None]
    return [tensor.requires_grad_() for tensor in chosen if tensor.is_floating_point()]


def _watch(mode: str, name: str, args: tuple[Any, ...]) -> Watch:
    """Forward and backward of an op, the second time, when tables and workspaces exist."""
    trained = _train(name, args)
    for _ in range(2):
        with kernels.use_kernels(mode), as_cuda(), Watch() as watch:
            out = kernels.call(name, *args)
            outs = [one for one in _tensors(out) if one.requires_grad]
            if outs and trained:
                torch.autograd.grad(
                    outs, trained, [one.detach() for one in outs], allow_unused=True
                )
    return watch


def _arguments(title: str, device: str) -> tuple[str, tuple[Any, ...]]:
    name, arguments = CASES[title]
    with as_cuda():
        return name, arguments(device)


@pytest.mark.parametrize("title", CASES)
def test_each_declaration_is_what_happens(title: str, counted_launches: None) -> None:
    name, args = _arguments(title, "cpu")
    op = OPS[name]
    if op.triton is None or (op.supports and op.supports(*args)):
        pytest.skip(f"no Triton kernel: {op.supports(*args) if op.supports else 'none'}")
    watch = _watch("triton", name, args)
    assert watch.inside
    for op_name, launches, declared, (least, most) in watch.inside:
        assert launches == declared.launches, op_name
        assert (1 - OVERLOOKED) * least <= declared.bytes <= REREADS * most, op_name
    assert _watch("triton", *_arguments(title, "meta")).names == watch.names


def test_the_factored_norm_declares_what_it_calls() -> None:
    for args in (_trained_norm(11), _trained_norm(2 * norms.BLOCK // 7)):
        ((_, launches, declared, _),) = _watch("fused", "dora_norm", args).inside
        assert launches == declared.launches


def _trained_norm(rows: int) -> tuple[Any, ...]:
    """Arguments of dora_norm with factors that train: a registered op only then."""
    weight, down, up = torch.ones(rows, 7), torch.ones(3, 7), torch.ones(rows, 3)
    return weight, down.requires_grad_(), up.requires_grad_(), 0.5


def test_every_declared_op_is_watched() -> None:
    ours = {"lora_core::only_in_a_test", *_watch("fused", "dora_norm", _trained_norm(11)).names}
    for title in CASES:
        ours |= set(_watch("triton", *_arguments(title, "meta")).names)
    assert set(kernels.COSTS) <= ours
