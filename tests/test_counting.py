"""The counter against graphs counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.counting import Counter
from lora_core import kernels
from lora_core.memory.cuda_operators import as_cuda


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
