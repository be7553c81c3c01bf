"""Schedules of groups that do not train, or that no stage reads, are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line
from lora_core.toml import read_toml, to_toml
from training.checks import config_checks


@pytest.mark.parametrize(
    ("schedules", "stage", "said"),
    [
        ({"text_encoder": "rex"}, {}, "--optimizer.schedules names text_encoder, which no stage"),
        ({}, {"schedules": {"tokens": "rex"}}, "--stages.0.schedules names tokens, which this"),
        ({"denoiser": "rexx"}, {}, "unknown schedule 'rexx', the nearest is 'rex'"),
        ({"denoiser": "rex"}, {"schedule": "linear"}, "schedules denoiser=rex has no effect"),
    ],
)
def test_schedules_of_groups_that_do_not_train_are_refused(
    config: Config, schedules: dict[str, Any], stage: dict[str, Any], said: str
) -> None:
    optimizer = replace(config.optimizer, schedules=schedules)
    with pytest.raises(UserError, match=said):
        config_checks.check_config(
            replace(config, optimizer=optimizer, stages=(Stage(2, **stage),))
        )
    idle = replace(config.optimizer, schedule="cosine", schedules={"denoiser": "rex"})
    with pytest.raises(UserError, match=r"--optimizer\.schedule has no effect without a group"):
        config_checks.check_config(replace(config, optimizer=idle))


def test_schedules_of_groups_are_a_flag_and_a_table(tmp_path: Path) -> None:
    words = ["--optimizer.schedules", "denoiser=cosine", "tokens=mine.py:fn"]
    config = parse_command_line(Config, words, prog="train.py", example="")
    assert config.optimizer.schedules == {"denoiser": "cosine", "tokens": "mine.py:fn"}
    staged = replace(config, stages=(Stage(3, schedules={"denoiser": "rex"}),))
    (tmp_path / "c.toml").write_text(to_toml(staged))
    assert read_toml(tmp_path / "c.toml") == staged


def test_a_schedule_is_called_for_every_step_before_a_run(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def gap(step, steps): return 1 / (step - 2)**2\ndef none(*_): return 0")
    for name, said in (
        ("gap", r"ZeroDivisionError: .* \(.*mine.py, line 1\)"),
        ("none", "is 0 in all 5 steps of stage 0, which would train nothing"),
    ):
        stage = Stage(5, schedule=f"{file}:{name}")
        with pytest.raises(UserError, match=said):
            config_checks.check_config(replace(config, stages=(stage,)))
