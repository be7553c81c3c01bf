"""The comparison on a page: groups over seeds with their errors, and what cannot be compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_core.diffusion.validation import mean_loss
from lora_core.runs.comparison import compare_runs
from lora_core.runs.report_charts import COLORS, DASHES
from lora_core.runs.report_comparison import compare_groups, group_records, style_runs
from lora_core.runs.report_data import read_run
from lora_core.runs.report_metrics import RunStyle
from tests.report_runs import write_run


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two losses, three seeds."""
    made = []
    for loss, scale in (("mse", 1.0), ("huber", 0.8)):
        for seed in range(3):
            run = tmp_path / f"{loss}_{seed}"
            made.append(write_run(run, {"loss": loss}, seed=seed, scale=scale))
    return made


def test_groups_have_the_mean_and_error_of_their_seeds(folders: list[Path]) -> None:
    records = [read_run(folder) for folder in folders]
    groups, notes = group_records(records)
    assert notes == [] and groups == {"mse": folders[:3], "huber": folders[3:]}
    part = compare_groups(records, groups)
    assert part is not None
    for row, own in zip(part.groups, (records[:3], records[3:]), strict=True):
        losses = [mean_loss(record.scores[8]) for record in own]
        assert float(row.mean) == pytest.approx(sum(losses) / 3, abs=1e-5)
        assert (
            float(row.error) == pytest.approx(np.std(losses, ddof=1) / 3**0.5, abs=1e-5)
            and row.seeds == 3
        )
    (verdict,) = part.verdicts
    assert verdict.title == "A = mse, B = huber" and verdict.changes == (
        "loss: 'mse' in A, 'huber' in B",
    )
    found = compare_runs(folders[:3], folders[3:])
    assert verdict.sentence.lower().rstrip(".") == found.verdict.lower().replace("+-", "\u00b1")
    assert not verdict.further  # the loss itself is the verdict already
    size = replace(found, measure="size")
    for other, is_shown in ((found, False), (size, True), (replace(size, folders=((), ())), False)):
        again = compare_groups(records, groups, [other])
        assert again is not None and bool(again.verdicts[0].further) == is_shown
    assert compare_groups(records, groups, [size]).verdicts[0].further[0].startswith("size: B ")
    assert [figure.title for figure in part.figures] == [
        "Differences by timestep",
        "Loss at the end",
    ]
    assert 'class="zero"' in part.figures[0].svg and part.figures[0].svg.count("<line ") == 4


def test_a_group_has_a_color_and_its_seeds_have_dashes(folders: list[Path]) -> None:
    records = [read_run(folder) for folder in folders]
    styles = style_runs(records, group_records(records)[0])
    assert styles[:2] == [
        RunStyle("mse_0", COLORS[0], DASHES[0]),
        RunStyle("mse_1", COLORS[0], DASHES[1]),
    ]
    assert styles[3] == RunStyle("huber_0", COLORS[1], DASHES[0])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    records = [read_run(write_run(tmp_path / x / "run", {"loss": x})) for x in ("mse", "huber")]
    names = [style.name for style in style_runs(records, group_records(records)[0])]
    assert names == ["mse/run", "huber/run"]


def test_what_cannot_be_compared_is_said(folders: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", {"model": "another"})
    records = [read_run(folder) for folder in (folders[0], other)]
    part = compare_groups(records, group_records(records)[0])
    assert part is not None and "No comparison: " in part.verdicts[0].sentence
    assert "mse_0 and other have different base models" in part.verdicts[0].sentence
    assert compare_groups(records[:1], {"mse": [folders[0]]}) is None
    (other / "config.toml").write_text("model = ")
    groups, notes = group_records(records)
    assert list(groups) == ["mse_0", "other"] and "not grouped by seed" in notes[0]
    assert str(tmp_path) not in notes[0] and "other/config.toml" in notes[0]
