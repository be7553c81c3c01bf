"""Contenders take turns; ratios, means and tables of their times."""

from __future__ import annotations

import pytest

from benchmarks import timing


def test_contenders_take_turns_and_the_ratio_is_of_the_same_round():
    order: list[str] = []
    times = timing.alternate(
        {name: lambda name=name: order.append(name) for name in "abc"}, 4, floor=0.0
    )
    assert order[-12:] == list("abcbcacababc")
    assert {len(rows) for rows in [*times.values(), *times.processor.values()]} == {4}
    made = timing.Times()
    made.update({"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 2.0]})
    assert timing.median_ratio(made, "a", "b") == 1.5
    made.processor.update({"a": [1.0, 1.0, 1.0], "b": [4.0, 4.0, 4.0]})
    assert (
        timing.median_ratio(made, "a", "b") == 0.25
        and timing.median_ratio(made, "a", "b", clock=True) == 1.5
    )
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert (
        timing.text_table(["", "ms"], [["x", 1.25], ["long", None]])
        == "        ms\nx     1.25\nlong     -"
    )
