"""Charts as SVG: values are where the axes say, ticks are round, extremes of long lines stay."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.runs import report_charts
from lora_core.runs.report_charts import (
    Bar,
    Line,
    Mark,
    Scale,
    Spread,
    axis_ticks,
    bar_chart,
    change_color,
    format_number,
    line_chart,
    sequence_color,
    shorten_text,
    spread_chart,
    thin_points,
    unbroken_parts,
)


def read_axis(text: str) -> tuple[float, float, float, float, bool]:
    low, high, start, stop, log = map(float, text.split())
    return low, high, start, stop, bool(log)


def value_at(place: float, text: str) -> float:
    """The value at a place of a chart, as the page's script reads it."""
    low, high, start, stop, log = read_axis(text)
    share = (place - start) / (stop - start)
    return low * (high / low) ** share if log else low + (high - low) * share


@pytest.mark.parametrize("log", [False, True])
def test_points_are_where_the_axes_say(log: bool) -> None:
    x, y = [0.0, 10.0, 25.0], [0.003, 40.0, 1.5]
    svg = ElementTree.fromstring(line_chart([Line("a", x, y)], axes=("step", "y"), log=log))
    (line,) = svg.findall("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    for (across, up), wanted_x, wanted_y in zip(places, x, y, strict=True):
        assert value_at(across, svg.attrib["data-x"]) == pytest.approx(wanted_x, abs=0.01)
        near = {"rel": 0.01} if log else {"abs": 0.02}  # places have one digit after the point
        assert value_at(up, svg.attrib["data-y"]) == pytest.approx(wanted_y, **near)
    assert max(y for _, y in places) < report_charts.HEIGHT - report_charts.BOTTOM + 0.1


def test_a_logarithmic_chart_leaves_out_what_has_no_logarithm() -> None:
    svg = line_chart([Line("a", [1, 2, 3], [0.0, 1.0, 10.0])], axes=("", ""), log=True)
    assert len(re.findall(r"[\d.]+,[\d.]+", svg)) == 2
    assert line_chart([Line("a", [1, 2], [0.0, -1.0])], axes=("", ""), log=True) == ""
    assert line_chart([Line("a", [], [])], axes=("", "")) == ""


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, size: float) -> None:
    axis = Scale(low, low + size, 0, 1)
    if not low + size > low:
        return
    ticks = axis_ticks(axis)
    room = 1e-6 * (size + abs(low))
    assert 1 <= len(ticks) <= report_charts.MOST_TICKS
    assert all(low - room <= tick <= low + size + room for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


def test_logarithmic_ticks_are_powers_of_ten() -> None:
    assert axis_ticks(Scale(2e-4, 30, 0, 1, log=True)) == pytest.approx(
        [1e-3, 1e-2, 1e-1, 1, 10], rel=1e-9
    )
    assert axis_ticks(Scale(1.5, 8, 0, 1, log=True)) == pytest.approx([2, 5])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.integers(6, 40))
def test_a_long_line_keeps_its_extremes_and_its_end(values: list[float], most: int) -> None:
    x = list(range(len(values)))
    points = thin_points(x, values, most)
    assert len(points) <= most and points[-1] == (x[-1], values[-1])
    kept = [y for _, y in points]
    assert min(kept) == min(values) and max(kept) == max(values)
    assert [p[0] for p in points] == sorted({p[0] for p in points})


def test_a_line_stops_where_steps_are_left_out() -> None:
    """A group that pauses for a stage."""
    x = [1, 2, 3, 8, 9, 10, 11]
    assert unbroken_parts(x) == [(0, 3), (3, 7)]
    assert unbroken_parts([0, 10, 20]) == [(0, 3)] and unbroken_parts([4]) == [(0, 1)]
    for pauses, count in ((True, 2), (False, 1)):
        svg = line_chart([Line("lr", x, x, pauses=pauses)], axes=("", ""))
        assert svg.count("<polyline") == count
        assert sum(len(points.split()) for points in re.findall(r'points="([^"]*)"', svg)) == 7


def bar_ends(svg: str) -> Sequence[tuple[float, float]]:
    found = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    return [(float(x), float(width)) for x, width in found]


def test_bars_are_as_long_as_their_values() -> None:
    svg = bar_chart([Bar("a", -2.0, 0.5, "-2"), Bar("b", 1.0), Bar("<c>", 0.0)], label="change")
    ElementTree.fromstring(svg)
    (a, wide), (b, narrow), (_, none) = bar_ends(svg)
    assert wide == pytest.approx(2 * narrow, abs=0.3) and none == 0
    assert a + wide == pytest.approx(b, abs=0.2)  # both begin at zero
    assert "&lt;c&gt;" in svg and svg.count('stroke="#1b1f24"') == 1
    assert bar_chart([], label="") == ""


def test_a_group_has_its_mean_its_values_and_its_error() -> None:
    groups = [Spread("a", [1.0, 3.0], 2.0, 1.0), Spread("one", [4.0], 4.0, math.nan)]
    svg = spread_chart(groups, label="loss")
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 2 and svg.count('opacity="0.5"') == 3
    places = [float(x) for x in re.findall(r'd="M([\d.]+) [\d.]+v14"', svg)]
    low, high = map(float, re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)"', svg)[0])
    assert (low, high) == (places[0], places[1])  # 2 - 1 and 2 + 1
    assert spread_chart([], label="") == ""


def test_marks_have_as_much_text_as_there_is_room() -> None:
    marks = [Mark(0, "tokens"), Mark(50, "denoiser + tokens"), Mark(55, "text_encoder"),
             Mark(200, "later")]  # fmt: skip
    svg = line_chart([Line("a", [0, 100], [0, 1])], axes=("", ""), marks=marks)
    assert svg.count('class="mark"') == 2 and "later" not in svg
    assert "tokens</text>" in svg and "denoiser + tokens" not in svg and "text_encoder" in svg


def test_names_are_escaped_and_errors_drawn() -> None:
    line = Line('<a "b">', [0, 1], [1, 2], errors=[0.5, math.nan])
    svg = line_chart([line], axes=("<x>", "y"))
    assert ElementTree.fromstring(svg).find("polyline").attrib["data-name"] == '<a "b">'
    assert svg.count("<line ") == 1


def test_long_texts_end_in_a_mark_of_what_is_left_out() -> None:
    assert [shorten_text("abcdef", most) for most in (7, 6, 5, 1)] == [
        "abcdef", "abcdef", "abcd\u2026", "\u2026"
    ]  # fmt: skip


def test_numbers_have_few_digits() -> None:
    values = (0, 0.5, -12.34567, 1234.5, 0.00012345, 2.5e7, 1e-20)
    texts = ["0", "0.5", "-12.35", "1234", "1.23e-4", "2.5e7", "1e-20"]
    assert [format_number(value) for value in values] == texts


def test_colors_run_from_one_end_to_the_other() -> None:
    assert sequence_color(0) == "#440154" and sequence_color(1) == sequence_color(9)
    assert change_color(0.0, 1.0) == "#ffffff" == change_color(0.0, 0.0)
    assert change_color(-2.0, 1.0) == change_color(-1.0, 1.0) != change_color(1.0, 1.0)
