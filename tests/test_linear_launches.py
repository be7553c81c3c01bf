"""Sums that a launch splits over programs: the same bits in whichever order the programs end."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lora_core.kernels import linear, linear_launches
from tests.linear_cases import CASES, given, outcome

pytestmark = pytest.mark.usefixtures("patched_once")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="reverses the interpreter's order of programs"
)
@pytest.mark.parametrize("name", ["DoRA", "features in parts", "dropout"])
def test_the_bits_do_not_depend_on_who_arrives_last(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    builder, case = interpreter.interpreter_builder, CASES[name]
    data, place = given(case, torch.float32), builder.set_grid_idx
    parts: list[int] = []
    cut_sum = linear_launches.cut_sum

    def count_parts(*sizes: int) -> tuple[int, int]:
        parts.append(cut_sum(*sizes)[0])
        return cut_sum(*sizes)

    monkeypatch.setattr(linear_launches, "cut_sum", count_parts)
    first = outcome(linear.lora_grouped, case, torch.float32, data)
    monkeypatch.setattr(
        builder,
        "set_grid_idx",
        lambda *at: place(*(n - 1 - i for n, i in zip(builder.grid_dim, at))),
    )
    again = outcome(linear.lora_grouped, case, torch.float32, data)
    assert max(parts) >= 3
    assert all(torch.equal(first[key], again[key]) for key in first)
    counters = linear_launches._counters.values()
    assert all(not count.any() for count in counters if count.device.type == "cpu")
