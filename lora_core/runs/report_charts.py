"""Line and bar charts as SVG text, which a page holds without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import chain, pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 440, 262  # units of the view box, about the pixels of a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 32, 34  # margins
HEAD = 8  # the upper margin of bars
CHARACTER = 5.6  # units of a mark's text
MOST_POINTS = 400  # of a line: an extreme pair for each two units
FEW_POINTS = 24  # that are drawn as dots too
MOST_TICKS = 6
LONGEST_NAME = 20  # characters of a group's name left of its row
COLORS = (
    "#1b5fa8", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285", "#c2255c", "#5c677d",
    "#3b3fa0", "#8a4b08",
)  # fmt: skip
DASHES = ("", "6 3", "2 2.5", "9 3 2 3", "12 4", "1 4")
SEQUENCE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (214, 190, 20))


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = COLORS[0]
    dash: str = ""
    width: float = 1.8
    faint: bool = False  # behind the others, and without an entry in the legend
    errors: Sequence[float] = ()  # standard errors, one for each point
    pauses: bool = False  # whether it stops where steps are left out: its group was frozen there


class Mark(NamedTuple):
    """A vertical line of a chart, such as the beginning of a stage."""

    x: float
    text: str


class Bar(NamedTuple):
    """A horizontal bar from zero, with an error bar."""

    name: str
    value: float
    error: float = math.nan
    text: str = ""  # right of the bar


class Spread(NamedTuple):
    """Values of a group, with their mean and its error."""

    name: str
    values: Sequence[float]
    mean: float
    error: float  # nan: not known
    color: str = COLORS[0]


class Scale(NamedTuple):
    """The range of an axis and the units that it is drawn on."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def to_units(self, value: float) -> float:
        """The value in units of the view box."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


# ---------------------------------------------------------------- lines


def line_chart(
    lines: Sequence[Line],
    *,
    axes: tuple[str, str],
    log: bool = False,
    marks: Sequence[Mark] = (),
    include_zero: bool = False,
) -> str:
    """An SVG of lines over steps; "" where no line has a point. `axes` names x and y.

    A logarithmic chart leaves out values that are not positive. Long lines keep the extremes of
    each of MOST_POINTS / 2 intervals.
    """
    kept = [_positive(line) if log else line for line in lines]
    kept = [line for line in kept if len(line.x)]
    if not kept:
        return ""
    log = log and max(chain(*(line.y for line in kept))) > 0
    across = _axis([*chain(*(line.x for line in kept))], LEFT, WIDTH - RIGHT, pad=0)
    values = [*chain.from_iterable(_extent(line) for line in kept), *[0.0] * include_zero]
    up = _axis(values, HEIGHT - BOTTOM, TOP, pad=0.05, log=log)
    parts = _grid(across, up, axes)
    if include_zero:
        parts.append(_zero_line(up.to_units(0), horizontal=True))
    parts += _draw_marks(marks, across)
    for line in sorted(kept, key=lambda line: not line.faint):
        parts += _draw_line(line, across, up)
    return _svg(parts, HEIGHT, f"{axes[1]} over {axes[0]}", scale=(across, up))


def _positive(line: Line) -> Line:
    kept = [(x, y) for x, y in zip(line.x, line.y) if y > 0]
    x, y = [x for x, _ in kept], [y for _, y in kept]
    return replace(line, x=x, y=y, errors=())


def _extent(line: Line) -> list[float]:
    """The values that a chart has to have room for."""
    if not line.errors:
        return list(line.y)
    spread = [_or_zero(error) for error in line.errors]
    low = [y - error for y, error in zip(line.y, spread)]
    return [*low, *(y + error for y, error in zip(line.y, spread))]


def _draw_line(line: Line, across: Scale, up: Scale) -> list[str]:
    parts = []
    for first, last in unbroken_parts(line.x) if line.pauses else [(0, len(line.x))]:
        points = thin_points(line.x[first:last], line.y[first:last], MOST_POINTS)
        places = [(across.to_units(x), up.to_units(y)) for x, y in points]
        parts += _draw_points(places, line)
    for x, y, error in zip(line.x, line.y, line.errors):
        if not math.isnan(error):
            at = across.to_units(x)
            ends = f'y1="{up.to_units(y - error):.1f}" y2="{up.to_units(y + error):.1f}"'
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" {ends} stroke="{line.color}"/>')
    return parts


def unbroken_parts(x: Sequence[float]) -> list[tuple[int, int]]:
    """(first, one after the last) of the parts of an ascending x between which there are gaps, of
    more than 1.5 times the smallest distance.
    """
    gaps = [after - before for before, after in pairwise(x)]
    most = 1.5 * min(gaps, default=0)
    ends = [i + 1 for i, gap in enumerate(gaps) if gap > most]
    return list(zip([0, *ends], [*ends, len(x)]))


def _draw_points(places: Sequence[tuple[float, float]], line: Line) -> list[str]:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    look = f'stroke="{line.color}" stroke-width="{line.width}"{dash}'
    if line.faint:
        look += ' opacity="0.3"'
    name = escape(line.name)
    kind = "faint" if line.faint else "line"
    parts = [f'<polyline class="{kind}" data-name="{name}" points="{text}" {look}/>']
    if not line.faint and len(places) <= FEW_POINTS:
        for x, y in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{line.color}"/>')
    return parts


def thin_points(x: Sequence[float], y: Sequence[float], most: int) -> list[tuple[float, float]]:
    """At most `most` points of a line: of equal runs of points those with the least and the largest
    value, in order, and the last point.
    """
    points = list(zip(x, y))
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2 - 1))
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        low, high = (pick(part, key=lambda point: point[1]) for pick in (min, max))
        kept += sorted({low, high})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


# ---------------------------------------------------------------- bars


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """An SVG of horizontal bars around a zero line, with error bars; "" without any bar.

    Bars below zero are green, as a lower loss is better, those above orange.
    """
    if not bars:
        return ""
    row = 24
    height = HEAD + row * len(bars) + BOTTOM
    ends: list[float] = [0.0]
    for bar in bars:
        error = _or_zero(bar.error)
        ends += [bar.value - error, bar.value + error]
    left, right = 64, 74 if any(bar.text for bar in bars) else RIGHT
    across = _axis(ends, left, WIDTH - right, pad=0.05)
    parts = _vertical_ticks(across, height, label)
    parts.append(_zero_line(across.to_units(0), horizontal=False, height=height))
    for i, bar in enumerate(bars):
        middle = HEAD + row * (i + 0.5)
        zero, end = across.to_units(0), across.to_units(bar.value)
        color = "#2b8a3e" if bar.value < 0 else "#d9480f"
        parts.append(
            f'<rect x="{min(zero, end):.1f}" y="{middle - 7:.1f}" '
            f'width="{abs(end - zero):.1f}" height="14" fill="{color}"/>'
        )
        if not math.isnan(bar.error):
            low, high = (across.to_units(bar.value + k * bar.error) for k in (-1, 1))
            parts.append(
                f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8'
                f'M{high:.1f} {middle - 4:.1f}v8" stroke="#1b1f24"/>'
            )
        parts.append(_text(left - 6, middle + 4, bar.name, anchor="end"))
        parts.append(_text(WIDTH - right + 8, middle + 4, bar.text))
    return _svg(parts, height, label)


def spread_chart(groups: Sequence[Spread], *, label: str) -> str:
    """An SVG with a row for each group: its mean with an error bar, and its values as ticks; ""
    without any group.
    """
    if not groups:
        return ""
    row, left = 30, 130
    height = HEAD + row * len(groups) + BOTTOM
    ends: list[float] = []
    for group in groups:
        error = _or_zero(group.error)
        ends += [*group.values, group.mean - error, group.mean + error]
    across = _axis(ends, left, WIDTH - RIGHT, pad=0.05)
    parts = _vertical_ticks(across, height, label)
    for i, group in enumerate(groups):
        middle = HEAD + row * (i + 0.5)
        look = f'stroke="{group.color}"'
        for value in group.values:
            x = across.to_units(value)
            parts.append(f'<path d="M{x:.1f} {middle - 7:.1f}v14" {look} opacity="0.5"/>')
        if not math.isnan(group.error):
            low, high = (across.to_units(group.mean + k * group.error) for k in (-1, 1))
            parts.append(f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" {look} stroke-width="2"/>')
        place = f'cx="{across.to_units(group.mean):.1f}" cy="{middle:.1f}"'
        parts.append(f'<circle {place} r="4" fill="{group.color}"/>')
        name = shorten_text(group.name, LONGEST_NAME)
        parts.append(_text(left - 8, middle + 4, name, anchor="end"))
    return _svg(parts, height, label)


# ---------------------------------------------------------------- axes


def _or_zero(error: float) -> float:
    """The room of an error bar: none where the error is not known."""
    return 0.0 if math.isnan(error) else error


def _axis(
    values: Sequence[float], start: float, stop: float, *, pad: float, log: bool = False
) -> Scale:
    """An axis with room for all values, and for `pad` of its length at both ends."""
    low, high = min(values), max(values)
    if log:
        ratio = max((high / low) ** pad, 1.15)
        return Scale(low / ratio, high * ratio, start, stop, log=True)
    room = (high - low) * pad or (0.0 if high > low else abs(high) * 0.1 or 1.0)
    if low >= 0 and pad and low - room < 0:
        return Scale(0.0, high + room, start, stop)
    return Scale(low - room, high + room, start, stop)


def axis_ticks(axis: Scale) -> list[float]:
    """At most MOST_TICKS round numbers in the range of an axis; of a logarithmic one powers of ten,
    and below two of them 2 and 5 times those.
    """
    if axis.log:
        first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
        powers = [10.0**n for n in range(first, last + 1)]
        inside = [p for p in powers if axis.low <= p <= axis.high]
        if len(inside) < 2:
            between = chain.from_iterable((p, 2 * p, 5 * p) for p in powers)
            inside = [value for value in between if axis.low <= value <= axis.high]
        if len(inside) >= 2:
            return inside[:: math.ceil(len(inside) / MOST_TICKS)]
    step = _round_step((axis.high - axis.low) / (MOST_TICKS - 1))
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= least * (1 - 1e-9))


def _grid(across: Scale, up: Scale, axes: tuple[str, str]) -> list[str]:
    parts = []
    for value in axis_ticks(up):
        y = up.to_units(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y + 4, format_number(value), anchor="end"))
    parts += _vertical_ticks(across, HEIGHT, axes[0], top=TOP)
    parts.append(_text(LEFT - 6, 10, axes[1], anchor="start", x_shift=-40))
    return parts


def _vertical_ticks(across: Scale, height: float, label: str, *, top: float = HEAD) -> list[str]:
    parts = []
    bottom = height - BOTTOM
    for value in axis_ticks(across):
        x = across.to_units(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(_text(x, bottom + 15, format_number(value), anchor="middle"))
    parts.append(_text((across.start + across.stop) / 2, height - 4, label, anchor="middle"))
    return parts


def _zero_line(place: float, *, horizontal: bool, height: float = HEIGHT) -> str:
    path = f"M{LEFT} {place:.1f}H{WIDTH - RIGHT}"
    if not horizontal:
        path = f"M{place:.1f} {HEAD}V{height - BOTTOM}"
    return f'<path class="zero" d="{path}"/>'


def _draw_marks(marks: Sequence[Mark], across: Scale) -> list[str]:
    """The lines of the marks inside the chart, each with as much of its text as has room before the
    next one; the text of a mark left of the chart stands at its edge.
    """
    parts = []
    inside = [mark for mark in marks if mark.x < across.high]
    places = [max(across.to_units(mark.x), across.start) for mark in inside]
    for mark, place, following in zip(inside, places, [*places[1:], across.stop]):
        if place > across.start:
            parts.append(f'<path class="mark" d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        room = int((following - place - 6) / CHARACTER)
        if room > 2:
            text = shorten_text(mark.text, room)
            parts.append(_text(place + 2, TOP - 5, text, extra=' class="mark-text"'))
    return parts


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", x_shift: float = 0, extra: str = ""
) -> str:
    return (
        f'<text x="{x + x_shift:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>'
        f"{escape(text)}</text>"
    )


def _svg(
    parts: Sequence[str], height: float, label: str, scale: tuple[Scale, Scale] | None = None
) -> str:
    """The SVG element. `scale`: the axes, from which the page's script reads values back."""
    facts = ""
    if scale is not None:
        for letter, axis in zip("xy", scale):
            ends = f"{axis.low!r} {axis.high!r} {axis.start!r} {axis.stop!r}"
            facts += f' data-{letter}="{ends} {int(axis.log)}"'
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}"{facts}>'
        + "".join(parts)
        + "</svg>"
    )


# ---------------------------------------------------------------- texts, numbers and colors


def shorten_text(text: str, most: int) -> str:
    """The text in at most `most` characters, the last of which says that its end is left out."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def format_number(value: float) -> str:
    """A number with at most four digits, 0.00012 as 1.2e-4."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def sequence_color(share: float) -> str:
    """A color of a sequence from dark (0) to bright (1)."""
    place = min(max(share, 0.0), 1.0) * (len(SEQUENCE) - 1)
    i = min(int(place), len(SEQUENCE) - 2)
    mix = [round(a + (b - a) * (place - i)) for a, b in zip(SEQUENCE[i], SEQUENCE[i + 1])]
    return "#{:02x}{:02x}{:02x}".format(*mix)


def change_color(change: float, most: float) -> str:
    """A background for a relative change: green below zero, orange above, white at zero."""
    share = min(abs(change) / most, 1.0) if most else 0.0
    full = (120, 190, 130) if change < 0 else (240, 160, 110)
    return "#{:02x}{:02x}{:02x}".format(*(round(255 + (c - 255) * share) for c in full))
