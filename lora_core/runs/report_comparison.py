"""The comparison of several runs on a page: groups over seeds, verdicts, loss by timestep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from lora_core.diffusion import validation
from lora_core.errors import UserError
from lora_core.runs.comparison import Comparison, compare_runs, group_runs
from lora_core.runs.report_charts import COLORS, DASHES, Line, Spread, line_chart, spread_chart
from lora_core.runs.report_data import RunRecord
from lora_core.runs.report_metrics import Figure, RunStyle, capitalize_first, legend_of
from lora_core.runs.standard_error import standard_error
from lora_core.text import hide_home


class GroupRow(NamedTuple):
    """A group of runs of one config with different seeds."""

    name: str
    color: str
    seeds: int  # number of its runs
    mean: str  # validation loss at the end
    error: str  # its standard error over the runs


class Verdict(NamedTuple):
    """The result of the comparison of a group with the first one."""

    title: str
    sentence: str
    changes: tuple[str, ...]  # options in which the configs differ
    further: tuple[str, ...] = ()  # the results by other measures than the loss


@dataclass(frozen=True)
class ComparisonPart:
    """The comparison as the template shows it."""

    groups: list[GroupRow]
    verdicts: list[Verdict]
    figures: list[Figure]


def group_records(records: Sequence[RunRecord]) -> tuple[dict[str, list[Path]], list[str]]:
    """(label -> folders of runs that differ in their seed alone, sentences about what failed)."""
    try:
        return group_runs([record.folder for record in records]), []
    except UserError as error:
        alone = {name: [r.folder] for name, r in zip(_unique_names(records), records)}
        words = _without_folders(error, records)
        return alone, [f"The runs are not grouped by seed: {words}."]


def _without_folders(error: UserError, records: Sequence[RunRecord]) -> str:
    """The sentence with the names of runs in the place of their folders, which a page does not
    show.
    """
    words = str(error)
    for record in sorted(records, key=lambda record: -len(str(record.folder))):
        words = words.replace(str(record.folder), record.name)
    return hide_home(words)


def style_runs(
    records: Sequence[RunRecord], groups: Mapping[str, Sequence[Path]]
) -> list[RunStyle]:
    """Names and looks of the runs: a color for each group, a dash for each seed in it. Where no
    group has two runs, a color for each run.
    """
    styles = []
    for record, name in zip(records, _unique_names(records)):
        for i, folders in enumerate(groups.values()):
            if record.folder in folders:
                place = list(folders).index(record.folder)
                color = COLORS[i % len(COLORS)]
                styles.append(RunStyle(name, color, DASHES[place % len(DASHES)]))
    return styles


def _unique_names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its folder's, with that of the folder above where two are the same."""
    counts = Counter(record.name for record in records)
    names = []
    for record in records:
        above = f"{record.folder.resolve().parent.name}/" if counts[record.name] > 1 else ""
        names.append(above + record.name)
    return names


def compare_groups(
    records: Sequence[RunRecord],
    groups: Mapping[str, Sequence[Path]],
    measured: Sequence[Comparison] = (),
) -> ComparisonPart | None:
    """The comparison of each group with the first one; None for a single group. `measured` are
    comparisons by other measures that were made already.
    """
    if len(groups) < 2:
        return None
    verdicts, lines = [], []
    first, *others = groups
    for i, name in enumerate(others, start=1):
        title = f"A = {first}, B = {name}"
        try:
            found = compare_runs(groups[first], groups[name])
        except UserError as error:
            words = f"No comparison: {_without_folders(error, records)}."
            verdicts.append(Verdict(title, words, ()))
            continue
        further = []
        for other in measured:
            if other.measure != found.measure and _has_same_runs(other, found):
                further.append(f"{other.measure}: {_sentence(other, is_start=False)}")
        verdicts.append(Verdict(title, _sentence(found), found.changes, tuple(further)))
        lines.append(_difference_line(found, name, i))
    spreads = [
        _group_spread(i, name, records, folders) for i, (name, folders) in enumerate(groups.items())
    ]
    rows = [_group_row(spread, len(groups[spread.name])) for spread in spreads]
    figures = [_difference_figure(first, lines), _spread_figure(spreads)]
    return ComparisonPart(rows, verdicts, [figure for figure in figures if figure.svg])


def _difference_figure(first: str, lines: Sequence[Line]) -> Figure:
    drawn = [line for line in lines if len(line.x)]
    svg = line_chart(drawn, axes=("timestep", "B - A"), include_zero=True)
    note = (
        f"Loss of each group minus that of {first}; below zero is better. The error bars are one "
        "standard error, over seeds and images."
    )
    return Figure("Differences by timestep", svg, note, legend_of(drawn))


def _spread_figure(spreads: Sequence[Spread]) -> Figure:
    known = [spread for spread in spreads if spread.values]
    note = "Each tick is a seed, the dot their mean with its standard error over the seeds."
    return Figure("Loss at the end", spread_chart(known, label="validation loss"), note)


def _has_same_runs(a: Comparison, b: Comparison) -> bool:
    """Whether two comparisons have the same runs on both sides."""
    for ours, theirs in zip(a.folders, b.folders):
        if {folder.resolve() for folder in ours} != {folder.resolve() for folder in theirs}:
            return False
    return True


def _sentence(found: Comparison, *, is_start: bool = True) -> str:
    verdict = found.verdict.replace(" +- ", " \N{PLUS-MINUS SIGN} ")
    return f"{capitalize_first(verdict) if is_start else verdict}."


def _difference_line(found: Comparison, name: str, place: int) -> Line:
    bins = sorted(found.bins, key=lambda row: row.t)
    return Line(
        name,
        [row.t for row in bins],
        [row.mean for row in bins],
        COLORS[place % len(COLORS)],
        errors=[row.error for row in bins],
    )


def _group_spread(
    place: int, name: str, records: Sequence[RunRecord], folders: Sequence[Path]
) -> Spread:
    """The last validation losses of a group's runs."""
    values = []
    for record in records:
        if record.folder in folders and record.scores:
            values.append(validation.mean_loss(record.scores[max(record.scores)]))
    mean = fmean(values) if values else math.nan
    return Spread(name, values, mean, standard_error(values), COLORS[place % len(COLORS)])


def _group_row(spread: Spread, count: int) -> GroupRow:
    mean = f"{spread.mean:.5f}" if spread.values else "none"
    error = "not known" if math.isnan(spread.error) else f"{spread.error:.5f}"
    return GroupRow(spread.name, spread.color, count, mean, error)
