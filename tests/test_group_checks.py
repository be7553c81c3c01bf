"""Schedules of groups that do not train, or that no stage reads, are refused."""

from dataclasses import replace
from typing import Any

import pytest

from lora_core.config import Config, Stage
from lora_core.errors import UserError
from training import config_checks


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
