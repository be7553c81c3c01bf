"""Every declared cost against the launches and bytes of the kernel that it describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.counting import Counter, touched_bytes, traffic_bytes
from lora_core import kernels
from lora_core.kernels import OPS, norms, reference
from lora_core.kernels.reference import Drop
from lora_core.memory.cuda_operators import as_cuda


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


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
    ours = set(_watch("fused", "dora_norm", _trained_norm(11)).names)
    for title in CASES:
        ours |= set(_watch("triton", *_arguments(title, "meta")).names)
    assert set(kernels.COSTS) <= ours
