"""A run's folder as it is read for a page: settings, stages, metrics, and what is damaged."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lora_core.config import Config, OptimizerConfig, Stage
from lora_core.errors import UserError
from lora_core.runs.report_data import (
    NO_DEFAULT,
    UNKNOWN,
    changed_settings,
    format_option,
    metric_columns,
    read_run,
    read_stages,
)
from lora_core.toml import to_table
from tests.report_runs import STEPS, write_run


def test_a_config_of_defaults_has_no_settings() -> None:
    assert changed_settings(to_table(replace(Config(), out="runs/mine", resume=True))) == []


def test_settings_are_those_that_differ_from_the_defaults() -> None:
    stages = (Stage(steps=5), Stage(groups=("tokens",), schedule="cosine"))
    optimizer = OptimizerConfig(lr={"tokens": 0.5})
    config = replace(Config(), model="m", stages=stages, optimizer=optimizer, compile=True)
    table = to_table(config)
    table["tokens"]["colour"] = 3
    assert changed_settings(table) == [
        ("model", "m", "empty"),
        ("compile", "true", "false"),
        ("tokens.colour", "3", UNKNOWN),
        ("optimizer.lr.tokens", "0.5", NO_DEFAULT),
        ("stages.0.steps", "5", "1000"),
        ("stages.1.groups", "tokens", "denoiser"),
        ("stages.1.schedule", "cosine", NO_DEFAULT),
    ]


def test_values_are_written_as_people_do() -> None:
    values = (True, 1e-4, ["a", 2.0], [], "", 7)
    assert [format_option(v) for v in values] == ["true", "0.0001", "a, 2", "none", "empty", "7"]


def test_stages_are_where_the_config_says() -> None:
    stages = [{"steps": 3, "groups": ["tokens"]}, {"steps": 4, "groups": ["denoiser", "tokens"]}]
    assert read_stages({"stages": stages}) == [(0, 3, "tokens"), (3, 7, "denoiser + tokens")]
    for other in ({}, {"stages": 3}, {"stages": [{"steps": "x"}]}, {"stages": ["x"]}):
        assert read_stages(other) == []


def test_metrics_are_the_finite_numbers_of_the_rows() -> None:
    rows = [{"step": 1, "loss": 0.5, "n": 3, "text": "x", "flag": True}]
    rows.append({"step": 2, "loss": math.nan, "n": 4})
    assert metric_columns(rows) == {"loss": ([1], [0.5]), "n": ([1, 2], [3.0, 4.0])}


def test_a_whole_run_has_no_notes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert run.notes == () and run.is_finished and run.scored == "held-out loss"
    assert (run.steps, run.steps_done) == (STEPS, STEPS)
    assert sorted(run.scores) == [0, 4, 8] and len(run.scores[0]) == 12
    assert set(run.metrics) >= {"loss", "grad_norm", "lr_tokens", "d_denoiser", "reading"}


def test_damage_is_a_sentence_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    with (folder / "val.jsonl").open("a") as file:
        file.write('{"step": 8}\n')
    (folder / "summary.json").write_text("[]")
    run = read_run(folder)
    assert len(run.scores[8]) == 12 and not run.is_finished
    assert len(run.notes) == 2 and all(note.endswith("shown.") for note in run.notes[:1])
    assert "summary.json is [], expected a JSON object" in run.notes[1]


def test_the_home_folder_is_in_no_setting_and_no_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    folder = write_run(tmp_path / "alice" / "a", {"model": str(tmp_path / "alice" / "base")})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{")
    run = read_run(folder)
    assert run.options["model"] == "~/base" and run.notes
    assert "alice" not in repr((run.settings, run.options, run.notes))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"photos holds no run: it has neither config\.toml"):
        read_run(tmp_path / "photos")
