"""Options that lower the memory of a run: which, in which order, and no more than are needed."""

from dataclasses import replace
from typing import Any

import pytest

from lora_core.config import Config, DataConfig
from training.memory import plan_options
from training.memory.memory_plan import MemoryPlan, Phase
from training.memory.plan_options import Fit, find_fit, possible_savings

SIZES = {"precision": 0.5, "gradient_checkpointing": 0.5, "quantize": 0.5, "stream": 0.25}


def fake_plan(config: Config, functions: Any) -> MemoryPlan:
    """A run of 1000 bytes for each image, of which every option takes its share."""
    size = 1000.0 * config.batch_size * (config.data.resolution / 1024) ** 2
    for name, share in SIZES.items():
        if getattr(config, name) not in ("fp32", "none", False):
            size *= share
    if config.quantize == "int4":
        size *= 0.5
    return MemoryPlan(config, (Phase("step", {"everything": int(size)}),))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(plan_options, "plan_memory", fake_plan)
    return Config(batch_size=4, data=DataConfig(resolution=1024))


def words(found: Fit | MemoryPlan) -> str:
    assert isinstance(found, Fit)
    return " ".join(found.words)


def test_no_more_options_than_are_needed(config: Config) -> None:
    assert words(find_fit(config, None, 4000)) == ""
    assert words(find_fit(config, None, 2000)) == "--precision bf16"
    assert words(find_fit(config, None, 1000)) == (
        "--precision bf16 --gradient-checkpointing blocks"
    )
    # batch 1 takes three quarters: of the two before it one is left out again
    assert words(find_fit(config, None, 999)) == (
        "--precision bf16 --batch-size 1 --accumulation 4"
    )


def test_of_one_option_the_last_value_counts(config: Config) -> None:
    found = words(find_fit(config, None, 20))
    assert found.count("--quantize") == 1 and "int4" in found and "--stream" in found


def test_where_nothing_fits_the_least_is_told(config: Config) -> None:
    found = find_fit(config, None, 1)
    assert isinstance(found, MemoryPlan) and 1 < found.peak.total < 20


def test_options_can_be_left_out(config: Config) -> None:
    found = find_fit(config, None, 2000, without=[("--precision", "bf16")])
    assert words(found) == "--gradient-checkpointing blocks"


def test_an_option_that_is_set_is_not_proposed() -> None:
    config = Config(
        precision="bf16", gradient_checkpointing="all", quantize="int4", stream=True,
        vae_precision="bf16", data=DataConfig(resolution=300),
    )  # fmt: skip
    assert possible_savings(config) == []
    named = [own.words[0] for own in possible_savings(replace(config, stream=False, batch_size=2))]
    assert named == ["--batch-size", "--stream"]


def test_each_option_changes_the_config() -> None:
    config = Config(batch_size=2, data=DataConfig(resolution=1024))
    for saving in possible_savings(config):
        assert saving.change(config) != config
