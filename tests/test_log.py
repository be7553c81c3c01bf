"""Where the numbers of a run are logged."""

from dataclasses import replace

import pytest
from torch import Tensor

import train
from lora_core.config import Config
from lora_core.diffusion.losses import StepOutput, mse
from tests.conftest import rows
from tests.opened_run import open_parts


def logged(step: StepOutput) -> Tensor:
    found = mse(step)
    step.log("largest", found.detach().max())
    return found


def test_tensorboard_gets_the_numbers(config: Config, quick: None) -> None:
    """And those that a loss logs."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train.train(replace(config, report="tensorboard"), loss=logged)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("loss", "largest"):
        values = [row[name] for row in rows(run) if name in row]
        assert values and [e.value for e in events.Scalars(name)] == pytest.approx(values, rel=1e-6)


def test_the_first_and_the_newest_validation_are_kept(config: Config, quick: None) -> None:
    """A long run has thousands of them."""
    opened = open_parts(config)
    for done in (0, 2, 4, 6):
        opened.log.validate(done, opened.scorer)
    assert list(opened.log.scores) == [0, 6]
    found = [row["val_change"] for row in rows(opened.run.folder)]
    assert found == [0.0] * 4  # nothing was trained
    opened.log.validate(6, opened.scorer)
    assert len(rows(opened.run.folder)) == 4
