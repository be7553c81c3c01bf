"""The log of a run: rows of metrics.jsonl and val.jsonl, the progress bar, and the check that every
logged number is finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lora_core import distributed
from lora_core.config import Config, Stage
from lora_core.diffusion import validation
from lora_core.diffusion.validation import Score
from lora_core.prodigy import read_distance
from lora_core.progress import ProgressBar
from lora_core.runs.pictures import ImageRow
from lora_core.runs.reports import LogBook
from lora_core.runs.run_folder import Run
from lora_core.toml import to_table
from training import nonfinite
from training.inputs.step_inputs import StepInputs
from training.scores import Scorer, on_common_images, relative_change
from training.setup import Data, Model, Optimization
from training.shared_config import shared_config
from training.skipped_steps import StepExamples
from training.step import StepResult


class Log:
    """Log of a run. Rows stay on the device until `flush` reads them, every --log-every steps."""

    def __init__(
        self, run: Run, config: Config, data: Data, model: Model, optimization: Optimization
    ) -> None:
        self.run, self.config, self.data, self.model = run, config, data, model
        self.optimizer, self.scaler = optimization.optimizer, optimization.scaler
        report = config.report if run.writes else "none"
        self.book = LogBook(run, report, to_table(shared_config(config, run.folder)))
        # steps done -> the first and the newest validation, or all from before a resumption
        self.scores = distributed.read_once(partial(_known_scores, run.folder))
        self.validated = set(self.scores)  # steps done at every validation
        self.skipped = optimization.skipped
        if self.scaler is not None:
            self.skipped.overflows = int(self.scaler.skipped)
        self.inputs: Sequence[StepInputs] = ()  # of the newest step
        self.start = 0  # steps that earlier processes have done
        self.logged: set[str] = set()  # names of the values that the loss logged
        self.bar = ProgressBar("training", 0, "step")

    @contextmanager
    def progress(self, done: int) -> Iterator[None]:
        """The progress bar, from step `done` on; flushes the log when it ends."""
        self.start = done
        with ProgressBar("training", self.config.steps, "step", done) as self.bar:
            yield
        self.flush()

    def add_step(
        self, done: int, stage: Stage, result: StepResult, inputs: Sequence[StepInputs]
    ) -> None:
        """Add the row of a step: loss, gradient norm, values logged by the loss, learning rates,
        Prodigy's distances d.
        """
        self.inputs = inputs
        timesteps = [x.level.t for x in inputs]
        self.skipped.examples[done] = StepExamples([x.image_keys for x in inputs], timesteps)
        values: dict[str, Any] = {"loss": result.loss, "grad_norm": result.norm, **result.readings}
        self.logged.update(result.readings)
        groups = [g for g in self.optimizer.param_groups if g["name"] in stage.groups]
        for group in reversed(groups):  # the last one counts: with LoRA+ that of down
            values[f"lr_{group['name']}"] = group["rate"]
        for group in groups:
            d = read_distance(self.optimizer, group)
            if d is not None:
                values[f"d_{group['name']}"] = d
        if self.scaler is not None:
            values["skipped"] = self.scaler.skipped.clone()
        self.book.add(done, **values)
        self.bar.advance()
        if done % self.config.log_every == 0:
            self._show(self.flush())

    def validate_start(self, start: int, scorer: Scorer) -> None:
        """Score the validation images before the first step, of which a resumed run has scores."""
        if start == 0:
            self.validate(0, scorer)

    def validate(self, done: int, scorer: Scorer) -> None:
        """Score the validation images after `done` steps: rows of val.jsonl, and their mean loss,
        absolute and relative to the first validation, in metrics.jsonl.
        """
        if self.config.validation.every < 0 or done in self.validated:
            return
        scores = scorer.score()
        self.validated.add(done)
        first = min(self.scores, default=done)
        # The first and the newest one: a long run would keep thousands.
        self.scores = {first: self.scores.get(first, scores), done: scores}
        for score in scores:
            self.run.log({"step": done, **score._asdict()}, to="val")
        before, after = on_common_images(self.scores[first], scores)
        values = {"val_loss": validation.mean_loss(scores)}
        if after:  # none where the run was resumed with other images
            change = relative_change(validation.mean_loss(before), validation.mean_loss(after))
            values["val_change"] = change
        self.book.add(done, **values)
        self.flush()

    def flush(self) -> list[dict[str, Any]]:
        """Write and return the pending rows. Raises UserError after too many steps in a row that
        are not finite, and for such a validation.
        """
        average_readings(self.book.waiting, self.logged)
        rows = self.book.read()
        reason = nonfinite.count_skipped_steps(rows, self.skipped, self.data)
        self.book.flush()
        nonfinite.check_logged_values(rows, reason, self.inputs, self.model, self.config, self.run)
        return rows

    def add_samples(self, done: int, rows: Sequence[ImageRow]) -> None:
        """Give the images of a sheet of samples to TensorBoard or W&B."""
        has_strengths = len({row.strength for row in rows}) > 1
        for row in rows:
            name = f"samples at strength {row.strength:g}" if has_strengths else "samples"
            self.book.add_images(done, name, row.captions, row.images)

    def _show(self, rows: Sequence[dict[str, Any]]) -> None:
        distances = {}
        for name, value in rows[-1].items():
            if name.startswith("d_"):
                distances[name] = f"{value:.2e}"
        losses = [row["loss"] for row in rows if math.isfinite(row.get("loss", math.nan))]
        mean = sum(losses) / len(losses) if losses else math.nan
        self.bar.show(loss=f"{mean:.4f}", **distances)


def average_readings(rows: Sequence[dict[str, Any]], names: Collection[str]) -> None:
    """Replace the values that the loss logged under these names, which each process has of its own
    images, by the mean of the processes that have one.
    """
    if distributed.process_count() == 1:
        return
    own = [{name: float(row[name]) for name in names if name in row} for row in rows]
    for row, *found in zip(rows, *distributed.gather_values(own), strict=True):
        for name in dict.fromkeys(itertools.chain(*found)):
            values = [each[name] for each in found if name in each]
            row[name] = sum(values) / len(values)


def _known_scores(folder: Path) -> dict[int, list[Score]]:
    """Step -> scores of a run that goes on; none of a new one."""
    return validation.read_scores(folder) if (folder / "val.jsonl").is_file() else {}
