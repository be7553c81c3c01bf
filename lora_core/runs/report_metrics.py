"""The charts of a page: training metrics and validation of one run, or of several in one chart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import NamedTuple

from lora_core.diffusion import validation
from lora_core.diffusion.validation import Score
from lora_core.runs.pictures import running_mean
from lora_core.runs.report_charts import (
    COLORS,
    DASHES,
    Bar,
    Line,
    Mark,
    bar_chart,
    line_chart,
    sequence_color,
)
from lora_core.runs.report_data import Column, RunRecord, StageSpan
from lora_core.runs.report_images import evenly_chosen
from lora_core.runs.standard_error import standard_error

VALIDATED = ("val_loss", "val_change")  # metrics that the section about validation shows
MOST_COLUMNS = 10  # steps of a table of changes
SMOOTHED = 60  # a metric with more points gets its running mean

TITLES = {  # metric -> (title of its chart, what there is to know about it)
    "loss": ("Training loss", "It depends mostly on the timesteps that were drawn."),
    "grad_norm": ("Gradient norm", "Before clipping, logarithmic."),
    "skipped": ("Skipped steps", "Steps so far whose loss or gradient was not finite."),
}
FAMILIES = {  # beginning of a metric's name -> the same of the metrics of all groups
    "lr_": ("Learning rate", "Of each group of parameters; Prodigy multiplies it by d."),
    "d_": ("Prodigy's d", "Its estimate of the distance to the solution, logarithmic."),
}
LOGARITHMIC = ("grad_norm", "d_")


@dataclass(frozen=True)
class Figure:
    """A chart with its title, a sentence, and a legend."""

    title: str
    svg: str
    note: str = ""
    legend: tuple[tuple[str, str, str], ...] = ()  # name, color, dash


@dataclass(frozen=True)
class RunStyle:
    """The name and look of a run in charts of several runs."""

    name: str
    color: str
    dash: str = ""


# ---------------------------------------------------------------- training


def training_figures(records: Sequence[RunRecord], styles: Sequence[RunStyle]) -> list[Figure]:
    """A chart for each metric of the runs; learning rates and d's of one run share a chart."""
    names = list(dict.fromkeys(chain.from_iterable(record.metrics for record in records)))
    names = [name for name in names if name not in VALIDATED]
    marks = common_marks(records)
    figures = []
    if len(records) > 1:
        for name in sorted(names, key=_metric_order):
            figures.append(_metric_of_runs(name, records, styles, marks))
    else:
        (metrics,) = (record.metrics for record in records)
        families = {start: [n for n in names if n.startswith(start)] for start in FAMILIES}
        together = set(chain(*families.values()))
        figures += [
            _metric_of_run(name, metrics[name], marks)
            for name in sorted(names, key=_metric_order)
            if name not in together
        ]
        places = min(2, len(figures))
        for start, members in reversed(families.items()):
            if members:
                figures.insert(places, _family_of_run(start, members, metrics, marks))
    return [figure for figure in figures if figure.svg]


def _metric_order(name: str) -> tuple[int, str]:
    """Loss, gradient norm, learning rates and d first, the losses' own readings after them."""
    known = ["loss", "grad_norm", "lr_", "d_", "skipped"]
    for place, start in enumerate(known):
        if name == start or (start.endswith("_") and name.startswith(start)):
            return place, name
    return len(known), name


def _metric_of_run(name: str, column: Column, marks: Sequence[Mark]) -> Figure:
    steps, values = column
    title, note = TITLES.get(name, (name, ""))
    lines = [Line(name, steps, values, COLORS[0])]
    legend: tuple[tuple[str, str, str], ...] = ()
    if len(values) > SMOOTHED or name in ("loss", "grad_norm"):
        window = mean_window(len(values))
        mean = running_mean(values, window)
        lines = [Line("each step", steps, values, COLORS[0], width=1, faint=True)]
        lines.append(Line(f"mean of {window}", steps, mean, COLORS[0]))
        legend = ((f"mean of {window} steps", COLORS[0], ""),)
    svg = line_chart(lines, axes=("step", name), log=name in LOGARITHMIC, marks=marks)
    return Figure(title, svg, note, legend)


def _family_of_run(
    start: str, names: Sequence[str], metrics: Mapping[str, Column], marks: Sequence[Mark]
) -> Figure:
    """The learning rates, or d's, of the groups of a run."""
    lines = []
    for i, name in enumerate(names):
        group = name.removeprefix(start)
        color, dash = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
        lines.append(Line(group, *metrics[name], color, dash, pauses=True))
    lines = merge_equal_lines(lines)
    title, note = FAMILIES[start]
    unit = start.rstrip("_")
    svg = line_chart(
        lines,
        axes=("step", unit),
        log=start in LOGARITHMIC,
        marks=marks,
        include_zero=start not in LOGARITHMIC,
    )
    return Figure(title, svg, note, legend_of(lines))


def _metric_of_runs(
    name: str, records: Sequence[RunRecord], styles: Sequence[RunStyle], marks: Sequence[Mark]
) -> Figure:
    lines = []
    for record, style in zip(records, styles):
        steps, values = record.metrics.get(name, ([], []))
        if len(values) > SMOOTHED or name in ("loss", "grad_norm"):
            values = running_mean(values, mean_window(len(values)))
        pauses = name.startswith(tuple(FAMILIES))
        lines.append(Line(style.name, steps, values, style.color, style.dash, pauses=pauses))
    count = sum(bool(len(line.x)) for line in lines)
    lines = merge_equal_lines(lines)
    title, note = TITLES.get(name, (name, ""))
    family = next((start for start in FAMILIES if name.startswith(start)), "")
    if family:
        title, note = f"{FAMILIES[family][0]}: {name.removeprefix(family)}", ""
    if name in ("loss", "grad_norm"):
        note = f"Running mean. {note}"
    if len(lines) == 1 < count:
        note = f"{note} The same in all {count} runs.".strip()
    log = name in LOGARITHMIC or family in LOGARITHMIC
    svg = line_chart(lines, axes=("step", family.rstrip("_") or name), log=log, marks=marks)
    return Figure(title, svg, note, legend_of(lines))


def common_marks(records: Sequence[RunRecord]) -> list[Mark]:
    """The beginnings of the stages, where all runs have the same ones and more than one."""
    stages = {record.stages for record in records}
    return stage_marks(stages.pop()) if len(stages) == 1 else []


def stage_marks(stages: Sequence[StageSpan]) -> list[Mark]:
    """The beginnings of the stages, with the groups that train in them; none of a single stage."""
    if len(stages) < 2:
        return []
    return [Mark(stage.first, stage.groups) for stage in stages]


def mean_window(count: int) -> int:
    """Values that a running mean is over: a tenth of them, between 5 and 50."""
    return min(50, max(5, count // 10))


def merge_equal_lines(lines: Iterable[Line]) -> list[Line]:
    """The lines with points; those that are equal are one, named "a = b"."""
    found: dict[tuple[tuple[float, ...], ...], Line] = {}
    for line in lines:
        if not len(line.x):
            continue
        key = tuple(line.x), tuple(line.y)
        if key in found:
            line = replace(found[key], name=f"{found[key].name} = {line.name}")
        found[key] = line
    return list(found.values())


def legend_of(lines: Sequence[Line]) -> tuple[tuple[str, str, str], ...]:
    """The entries of a chart's legend."""
    return tuple((line.name, line.color, line.dash) for line in lines if not line.faint)


# ---------------------------------------------------------------- validation


class BinChange(NamedTuple):
    """The validation loss of a timestep bin before and after a run."""

    timestep: str
    before: float
    after: float
    change: float  # relative
    error: float  # standard error of the change over images; nan for one image


class ChangeTable(NamedTuple):
    """Relative changes of the loss since the first validation: bins x steps."""

    steps: list[int]
    rows: list[tuple[str, list[float]]]  # timestep, changes
    most: float  # the largest change without its sign


def common_scores(record: RunRecord) -> tuple[dict[int, list[Score]], str]:
    """(step -> scores on the images and timesteps that all validations have, a remark).

    A run can be resumed with other images. Without a common image only the last validation stays.
    """
    places = [{(s.key, s.draw, s.t) for s in scores} for scores in record.scores.values()]
    if not places:
        return {}, ""
    both = set.intersection(*places)
    if not both:
        last = max(record.scores)
        return {last: record.scores[last]}, (
            "The validations have no image and timestep in common, so that only the last one is "
            "shown."
        )
    kept = {}
    for step, scores in record.scores.items():
        kept[step] = [s for s in scores if (s.key, s.draw, s.t) in both]
    if all(len(own) == len(both) for own in places):
        return kept, ""
    images = len({key for key, _, _ in both})
    return kept, f"Shown are the {images} images that all validations have."


def bin_changes(scores: Mapping[int, Sequence[Score]]) -> list[BinChange]:
    """The loss before and after, for each timestep and over all of them."""
    first, last = scores[min(scores)], scores[max(scores)]
    found = []
    for t in [*validation.mean_by_timestep(first), math.nan]:
        before, after = _image_means(first, t), _image_means(last, t)
        start, end = fmean(before.values()), fmean(after.values())
        changes = [after[key] - before[key] for key in before]
        error = standard_error(changes) / start if start else math.nan
        change = end / start - 1 if start else math.nan
        found.append(BinChange(validation.format_timestep(t), start, end, change, error))
    return found


def _image_means(scores: Iterable[Score], t: float) -> dict[str, float]:
    """Image -> its mean loss at a timestep, or over all of them for nan."""
    own: dict[str, list[float]] = {}
    for score in scores:
        if math.isnan(t) or score.t == t:
            own.setdefault(score.key, []).append(score.loss)
    return {key: fmean(losses) for key, losses in own.items()}


def change_table(scores: Mapping[int, Sequence[Score]]) -> ChangeTable:
    """The changes of each timestep, and of all, at up to MOST_COLUMNS validations."""
    changes = relative_changes(scores)
    steps = sorted(scores)
    places = evenly_chosen(range(len(steps)), MOST_COLUMNS)
    rows = [(name, [values[place] for place in places]) for name, values in changes.items()]
    most = max((abs(v) for v in chain(*(values for _, values in rows))), default=0.0)
    return ChangeTable([steps[place] for place in places], rows, most)


def relative_changes(scores: Mapping[int, Sequence[Score]]) -> dict[str, list[float]]:
    """Timestep, or all, -> the relative change of its loss at each validation."""
    first = validation.mean_by_timestep(scores[min(scores)])
    changes: dict[str, list[float]] = {}
    for step in sorted(scores):
        means = validation.mean_by_timestep(scores[step])
        for t, before in first.items():
            own = changes.setdefault(validation.format_timestep(t), [])
            own.append(means[t] / before - 1 if before else 0.0)
        before = validation.mean_loss(scores[min(scores)])
        change = validation.mean_loss(scores[step]) / before - 1 if before else 0.0
        changes.setdefault("all", []).append(change)
    return changes


def validation_figures(record: RunRecord) -> list[Figure]:
    """Charts of a run's validation: the change of each timestep bin, before to after, and the loss
    of each over steps. None without two validations.
    """
    scores, _ = common_scores(record)
    if len(scores) < 2:
        return []
    bars = []
    for change in bin_changes(scores):
        text = f"{change.change:+.1%}"
        name = "all" if change.timestep == "all" else f"t {change.timestep}"
        bars.append(Bar(name, 100 * change.change, 100 * change.error, text))
    first, last = min(scores), max(scores)
    label = "change of the loss in percent"
    figures = [
        Figure(
            f"Change of the {record.scored}, step {first} to {last}",
            bar_chart(bars, label=label),
            "By timestep, from clean (top) to noise. The bars of error are one standard error over "
            "the images.",
        )
    ]
    if len(scores) > 2:
        figures.append(_lines_of_bins(record, scores))
    return figures


def _lines_of_bins(record: RunRecord, scores: Mapping[int, Sequence[Score]]) -> Figure:
    changes = relative_changes(scores)
    lines = []
    steps = sorted(scores)
    for i, (name, values) in enumerate(changes.items()):
        percent = [100 * value for value in values]
        if name == "all":
            lines.append(Line("all", steps, percent, "#1b1f24", width=3))
        else:
            color = sequence_color(i / max(len(changes) - 2, 1))
            lines.append(Line(f"t {name}", steps, percent, color, width=1.6))
    svg = line_chart(
        lines, axes=("step", "change in %"), marks=stage_marks(record.stages), include_zero=True
    )
    note = f"Relative to step {steps[0]}; each line is a timestep, the thick one is all of them."
    return Figure(f"{capitalize_first(record.scored)} over steps", svg, note, legend_of(lines))


def validation_of_runs(records: Sequence[RunRecord], styles: Sequence[RunStyle]) -> list[Figure]:
    """Charts of several runs' validations: the mean loss over steps, and its change by timestep."""
    means, changes = [], []
    for record, style in zip(records, styles):
        scores, _ = common_scores(record)
        steps = sorted(scores)
        values = [validation.mean_loss(scores[step]) for step in steps]
        means.append(Line(style.name, steps, values, style.color, style.dash))
        if len(scores) > 1:
            first = validation.mean_by_timestep(scores[min(scores)])
            last = validation.mean_by_timestep(scores[max(scores)])
            percent = [100 * (last[t] / first[t] - 1) if first[t] else 0.0 for t in first]
            changes.append(Line(style.name, list(first), percent, style.color, style.dash))
    found = []
    lines = merge_equal_lines(means)
    svg = line_chart(lines, axes=("step", "loss"), marks=common_marks(records))
    note = "At fixed timesteps and noise, mean over all."
    found.append(Figure(_scored_words(records), svg, note, legend_of(lines)))
    lines = merge_equal_lines(changes)
    svg = line_chart(lines, axes=("timestep", "change in %"), include_zero=True)
    note = "Last validation relative to the first one of the run."
    found.append(Figure("Change by timestep", svg, note, legend_of(lines)))
    return [figure for figure in found if figure.svg]


def _scored_words(records: Sequence[RunRecord]) -> str:
    words = {record.scored for record in records}
    return capitalize_first(words.pop() if len(words) == 1 else "validation loss")


def capitalize_first(text: str) -> str:
    """The text with a capital at its beginning, and the rest as it is."""
    return text[:1].upper() + text[1:]
