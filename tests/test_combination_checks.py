"""Options that do not go together with others are refused in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from training.checks import config_checks
from training.checks.combination_checks import check_combinations


def test_an_adaptive_offset_needs_an_offset_and_single_images(config: Config) -> None:
    adaptive = replace(config, noise=replace(config.noise, adaptive_offset=0.5))
    with pytest.raises(UserError, match="adaptive-offset has no effect without --noise"):
        config_checks.check_config(adaptive)
    both = replace(adaptive, noise=replace(adaptive.noise, offset=0.1))
    config_checks.check_config(both)
    paired = replace(both, data=replace(config.data, pairs="losers"))
    with pytest.raises(UserError, match="need the same; leave out one"):
        check_combinations(paired)
