"""Where the numbers of a run are logged."""

from dataclasses import replace

import pytest

import train
from lora_core.config import Config
from tests.conftest import rows


def test_tensorboard_gets_the_numbers(config: Config, quick: None) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train.train(replace(config, report="tensorboard"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in rows(run) if "loss" in row], rel=1e-6
    )
