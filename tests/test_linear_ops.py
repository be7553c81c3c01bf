"""The ops of an adapted layer: how many launches, what each declares, and torch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from lora_core.kernels import COSTS, linear
from lora_core.kernels import linear_ops as ops
from lora_core.kernels.reference import Drop, Member
from tests.linear_cases import Case, given, one

pytestmark = pytest.mark.usefixtures("patched_once")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that the interpreter runs, in order."""
    from triton.runtime import interpreter

    seen: list[str] = []
    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *a, **k: (seen.append(self.fn.__name__), run(self, *a, **k))[1],
    )
    return seen


class Seen(TorchDispatchMode):
    """The ops that run, but for views and empty allocations, and the launches that ours declare."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.declared = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.name().split(".")[0]
        if name in COSTS:
            cost = COSTS[name](*args, **(kwargs or {}))
            assert cost.bytes > 0
            self.declared += cost.launches
        if not any(word in name for word in ("view", "::t", "empty", "detach", "unbind", "alias")):
            self.ops.append(name.split("::")[1])
        return out


def grouped_ops(device: str, gain: str, drop: float, needs_x: bool) -> Seen:
    case = Case((2, 16, 64), ((48, 4), (32, 16), (48, 16)), gain, drop=drop)
    x, members, dys = given(case, torch.bfloat16)
    place = {"weight": torch.bfloat16, "bias": torch.bfloat16}

    def leaf(name: str, value: Any) -> Any:
        return (
            value.to(device, place.get(name, torch.float32)).requires_grad_(name not in place)
            if isinstance(value, Tensor)
            else value
        )

    leaves = [Member(*(leaf(*item) for item in m._asdict().items())) for m in members]
    if drop:
        step, rows = (
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )
        leaves = [m._replace(drop=Drop(drop, 1, i, step, rows)) for i, m in enumerate(leaves)]
    x, dys = (
        x.to(device, torch.bfloat16).requires_grad_(needs_x),
        [dy.to(device, torch.bfloat16) for dy in dys],
    )
    with Seen() as seen:
        torch.autograd.backward(linear.lora_grouped(x, tuple(leaves)), dys)
    return seen


@pytest.mark.parametrize(("gain", "drop"), [("", 0.0), ("full", 0.0), ("", 0.3), ("full", 0.3)])
def test_four_launches_with_the_frozen_products_and_nothing_else(
    gain: str, drop: float, launches: list[str]
) -> None:
    product = "mm" if gain else "addmm"
    forward, backward = (
        ["shrink", *[product] * 3, "expand_", "back_up"],
        ["mm", "addmm_", "addmm_", "back_down_"],
    )
    for device in ("meta", "cpu"):
        assert grouped_ops(device, gain, drop, True).ops == [*forward, *backward]
        launches.clear()
        seen = grouped_ops(device, gain, drop, False)
        assert seen.ops == [*forward, "back_down_"]
        assert seen.declared == 4
    if not torch.cuda.is_available():
        assert launches == ["shrink_kernel", "expand_kernel", "back_up_kernel", "back_down_kernel"]


def test_the_ops_pass_torchs_own_checks() -> None:
    x, m = one()
    down, up, t, y, vector = (
        m.down.detach(),
        m.up.detach(),
        torch.randn(12, 5),
        torch.randn(12, 20),
        torch.rand(20) + 1,
    )
    drop = ([torch.tensor(3), torch.arange(12)], [7, 9], [0.5])
    given: dict[Any, tuple[Any, ...]] = {
        ops.shrink: (x, [down], *drop),
        ops.expand_: ([y], t, [up], [0.5], [vector], [vector], [vector], False),
        ops.back_up: ([y], t, [0], [up], [0.5], [y.clone()], [vector], [vector], [], 0.0, True),
        ops.back_down_: (x.clone(), [torch.empty_like(down)], t, x, [down], *drop, False),
    }
    for op, args in given.items():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_a_pointwise_convolution_is_four_launches_in_any_layout() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (
            torch.randn(2, 7, 4, 4, device="meta", dtype=torch.bfloat16)
            .to(memory_format=layout)
            .requires_grad_()
        )
        down, up = (
            torch.randn(5, 7, 1, 1, device="meta", requires_grad=True),
            torch.randn(12, 5, 1, 1, device="meta", requires_grad=True),
        )
        weight, dy = (
            x.new_empty(12, 7, 1, 1),
            torch.empty(2, 12, 4, 4, device="meta", dtype=torch.bfloat16).to(memory_format=layout),
        )
        with Seen() as seen:
            linear.lora_conv(x, weight, None, down, up, 0.5, (1, 1), (0, 0), (1, 1), 1).backward(dy)
        assert seen.ops == [
            "shrink",
            "convolution",
            "expand_",
            "back_up",
            "convolution_backward",
            "back_down_",
        ]
