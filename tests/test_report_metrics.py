"""Charts of metrics and validation: every metric has one, changes and errors are those of numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_core.diffusion.validation import Score
from lora_core.runs.report_charts import COLORS, Line
from lora_core.runs.report_data import RunRecord, read_run
from lora_core.runs.report_metrics import (
    MOST_COLUMNS,
    RunStyle,
    bin_changes,
    change_table,
    common_marks,
    common_scores,
    mean_window,
    merge_equal_lines,
    training_figures,
    validation_figures,
    validation_of_runs,
)
from tests.report_runs import TIMES, write_run

STYLE = RunStyle("mine", COLORS[0])


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return read_run(write_run(tmp_path / "mine"))


def table_of(record: RunRecord, step: int) -> np.ndarray:
    """[images, timesteps] losses."""
    rows = {}
    for score in record.scores[step]:
        rows.setdefault(score.key, {})[score.t] = score.loss
    return np.array([[own[t] for t in TIMES] for own in rows.values()])


def test_changes_and_their_errors_are_paired_over_images(record: RunRecord) -> None:
    before, after = table_of(record, 0), table_of(record, 8)
    found = bin_changes(record.scores)
    assert [row.timestep for row in found] == ["125", "375", "625", "875", "all"]
    for i, row in enumerate(found):
        a, b = (before[:, i], after[:, i]) if i < 4 else (before.mean(1), after.mean(1))
        assert row.before == pytest.approx(a.mean()) and row.after == pytest.approx(b.mean())
        assert row.change == pytest.approx(b.mean() / a.mean() - 1)
        assert row.error == pytest.approx(np.std(b - a, ddof=1) / 3**0.5 / a.mean())


def test_every_metric_has_a_chart_also_a_losss_own(record: RunRecord) -> None:
    figures = training_figures([record], [STYLE])
    titles = [figure.title for figure in figures]
    assert titles == ["Training loss", "Gradient norm", "Learning rate", "Prodigy's d", "reading"]
    assert all("denoiser</text>" in figure.svg for figure in figures)  # the second stage
    assert [name for name, _, _ in figures[2].legend] == ["tokens", "denoiser"]
    both = training_figures([record, replace(record, name="b")], [STYLE, RunStyle("b", "#111111")])
    assert {"Learning rate: tokens", "Prodigy's d: denoiser", "reading"} <= {f.title for f in both}
    assert both[0].legend == (("mine = b", COLORS[0], ""),)  # the same curve
    assert both[0].note.endswith("The same in all 2 runs.")


def test_stages_are_marked_where_all_runs_have_the_same(record: RunRecord) -> None:
    assert common_marks([record, record]) == [(0, "tokens"), (3, "denoiser")]
    assert common_marks([record, replace(record, stages=record.stages[:1])]) == []
    assert common_marks([replace(record, stages=record.stages[:1])]) == []


def test_equal_lines_are_one_with_both_names() -> None:
    a, b = Line("a", [1, 2], [3, 4]), Line("b", [1, 2], [3, 4])
    c, none = Line("c", [1, 3], [3, 4]), Line("none", [], [])
    assert [line.name for line in merge_equal_lines([a, c, none, b])] == ["a = b", "c"]


def test_validations_of_other_images_are_compared_on_the_common_ones(record: RunRecord) -> None:
    extra = [Score("new", 0, 0, TIMES[0], 9.0)]
    scores, remark = common_scores(
        replace(record, scores={**record.scores, 8: record.scores[8] + extra})
    )
    assert scores == record.scores and remark == "Shown are the 3 images that all validations have."
    scores, remark = common_scores(replace(record, scores={0: record.scores[0], 8: extra}))
    assert scores == {8: extra} and "no image and timestep in common" in remark
    assert common_scores(record) == (record.scores, "")
    assert common_scores(replace(record, scores={})) == ({}, "")


def test_a_table_of_changes_has_few_columns_with_both_ends(record: RunRecord) -> None:
    many = {step: record.scores[8 * (step > 0)] for step in range(50)}
    table = change_table(many)
    assert len(table.steps) == MOST_COLUMNS and (table.steps[0], table.steps[-1]) == (0, 49)
    name, values = table.rows[-1]
    assert (
        name == "all"
        and values[0] == 0
        and values[-1] == pytest.approx(table_of(record, 8).mean() / table_of(record, 0).mean() - 1)
    )
    assert table.most == max(max(map(abs, row)) for _, row in table.rows)


def test_validation_has_bars_and_a_line_for_each_timestep(record: RunRecord) -> None:
    bars, lines = validation_figures(record)
    assert bars.svg.count("<rect") == 5 and "step 0 to 8" in bars.title
    assert [name for name, _, _ in lines.legend] == ["t 125", "t 375", "t 625", "t 875", "all"]
    ends = {step: record.scores[step] for step in (0, 8)}
    assert len(validation_figures(replace(record, scores=ends))) == 1
    assert validation_figures(replace(record, scores={0: record.scores[0]})) == []


def test_runs_without_validation_have_no_charts_of_it(record: RunRecord) -> None:
    bare = replace(record, scores={})
    assert validation_of_runs([bare, bare], [STYLE, STYLE]) == []
    over, bins = validation_of_runs([record, bare], [STYLE, RunStyle("b", "#111111")])
    assert over.title == "Held-out loss" and len(bins.legend) == 1


def test_a_running_mean_is_over_a_tenth_of_the_steps() -> None:
    assert [mean_window(n) for n in (3, 60, 400, 10_000)] == [5, 6, 40, 50]
