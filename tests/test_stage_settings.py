"""A stage's own settings win over those of the optimizer."""

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.settings import check_options
from lora_core.stage_settings import GROUPS, OptimizerConfig, Stage


def test_the_schedule_of_a_group_is_the_most_special_one() -> None:
    usual = OptimizerConfig(schedule="linear", schedules={"tokens": "constant"})
    plain, own = Stage(), Stage(schedule="cosine", schedules={"denoiser": "rex"})
    assert [plain.schedule_of(group, usual) for group in GROUPS] == ["linear", "linear", "constant"]
    assert [own.schedule_of(group, usual) for group in GROUPS] == ["rex", "cosine", "cosine"]


def test_a_warm_up_of_zero_is_not_that_of_the_optimizer() -> None:
    usual = OptimizerConfig(warmup=7)
    assert [Stage(warmup=own).warmup_of(usual) for own in (None, 0, 3)] == [7, 0, 3]


def test_the_numbers_have_ranges() -> None:
    with pytest.raises(UserError, match="mask-temperature is 0; expected a number above 0"):
        check_options(Stage(mask_temperature=0), "--stages.0.")
    check_options(Config().optimizer, "--optimizer.")
