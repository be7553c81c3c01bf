"""Finished runs, opened again with the model as it was trained."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.runs.run_folder import Run
from lora_core.toml import read_toml
from models import use_device
from training import setup
from training.checkpoints import Checkpoints
from training.samples import SampleImages
from training.scores import Scorer
from training.setup import Data, Model, Optimization


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its data, and its model with the trained adapters and tokens.

    With a moving average or a schedule-free optimizer, `optimization.averaged()` has the parameters
    that the run's files hold.
    """

    folder: Path
    config: Config
    data: Data
    model: Model
    optimization: Optimization

    @property
    def scorer(self) -> Scorer:
        """Scores of the validation images."""
        return Scorer(self.config, self.data, self.model, self.optimization)

    @property
    def samples(self) -> SampleImages:
        """Images that the model draws, with the sampler of the config."""
        return SampleImages(self.config, self.data, self.model, self.optimization)


def open_trained_run(folder: Path) -> TrainedRun:
    """The run in a folder, from its config.toml and its newest checkpoint; prints nothing.

    Images and base model are looked for where the config has them. Raises UserError for a run that
    is not finished, and where they are not those that it was trained with.
    """
    config = find_trained_run(folder)
    try:
        return _open_run(folder, config)
    except UserError as error:
        raise UserError(
            f"{folder} cannot be opened with its config.toml, in which paths can be corrected: "
            f"{error}"
        ) from error


def find_trained_run(folder: Path) -> Config:
    """The config of the finished run in a folder, to open it with. Raises UserError for a folder
    without one, and for a run that has not done all its steps.
    """
    file, done = folder / "config.toml", Run(folder, keep=None).newest_step()
    if not file.is_file() or done is None:
        missing = "checkpoint" if file.is_file() else "config.toml"
        raise UserError(f"{folder} has no {missing}; expected the folder of a finished run")
    config: Config = replace(read_toml(file), resume=True, out=str(folder))
    if done < config.steps:
        raise UserError(
            f"{folder} has done {done} of {config.steps} steps; finish it with --resume first"
        )
    return config


def _open_run(folder: Path, config: Config) -> TrainedRun:
    use_device(config.device)
    with redirect_stdout(io.StringIO()):  # what a run prints about its data and model
        data = setup.open_data(config)
        model = setup.open_model(config)
        optimization = setup.open_optimizer(config, model.groups, model.rate_ratios)
        run = Run(folder, keep=None)
        checkpoints = Checkpoints(run, config, data, model, optimization)
        checkpoints.advice = "put back what it was trained with"
        checkpoints.restore(0.0)
    return TrainedRun(folder, config, data, model, optimization)
