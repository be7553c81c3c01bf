"""Log and plot the metrics of a run; preview its noise levels.

Values on the device are read many steps at a time, not at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lora_core.diffusion import losses, noise, validation
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.diffusion.step_output import is_own_metric
from lora_core.json_files import read_rows
from lora_core.runs import pictures
from lora_core.runs.pictures import TrainingLook
from lora_core.runs.report_charts import Line
from lora_core.runs.report_data import STEP_FIELDS, Column, RunRecord, metric_columns, read_run
from lora_core.runs.report_metrics import (
    bin_changes,
    common_scores,
    mean_window,
    merge_equal_lines,
    relative_changes,
    stage_marks,
)
from lora_core.runs.run_folder import Run
from lora_core.runs.trackers import SINKS, Sink


class LogBook:
    """Collects metrics, also as tensors on the device, and writes them with one host sync."""

    def __init__(self, run: Run, report: str, config: dict[str, Any]) -> None:
        self.run = run
        self.sink: Sink | None = SINKS[report](run.folder, config)
        self.waiting: list[dict[str, Any]] = []

    def add(self, step: int, **values: float | int | Tensor) -> None:
        """Metrics of one step, written at the next `flush`."""
        self.waiting.append({"step": step, **values})

    def read(self) -> list[dict[str, Any]]:
        """The waiting metrics as plain numbers, in one transfer from the device."""
        _read_tensors(self.waiting)
        return self.waiting

    def flush(self) -> list[dict[str, Any]]:
        """Writes the waiting metrics to metrics.jsonl and returns them as plain numbers.

        NaN and infinity, which JSON has not, are written as null.
        """
        entries = self.read()
        self.waiting = []
        for entry in entries:
            self.run.log({name: _finite_or_none(value) for name, value in entry.items()})
            if self.sink is not None:
                self.sink.add_scalars(entry["step"], _floats(entry))
        return entries

    def add_images(
        self, step: int, name: str, captions: Sequence[str], images: Sequence[Image.Image]
    ) -> None:
        """Give images to TensorBoard or W&B, after the metrics of the steps before them: W&B takes
        no earlier step afterwards.
        """
        if self.sink is not None and images:
            self.flush()
            self.sink.add_images(step, name, captions, images)

    def finish(self, results: Mapping[str, float]) -> None:
        """Give the results of the run to TensorBoard or W&B, beside its hyper-parameters."""
        self.flush()
        if self.sink is not None:
            self.sink.finish(results)


def _read_tensors(entries: list[dict[str, Any]]) -> None:
    """Replaces the tensors in `entries` by numbers, in one transfer from the device."""
    places = []
    for entry in entries:
        places += [(entry, name) for name, value in entry.items() if isinstance(value, Tensor)]
    if not places:
        return
    tensors = [entry[name].detach().double().reshape(()) for entry, name in places]
    for (entry, name), number in zip(places, torch.stack(tensors).tolist()):
        is_count = not entry[name].is_floating_point()
        entry[name] = int(number) if is_count else number


def _finite_or_none(value: Any) -> Any:
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if is_finite else None


def _floats(entry: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in entry.items() if k != "step" and isinstance(v, float)}


# ---------------------------------------------------------------- plots


MOST_STAGE_NAMES = 3  # that have room above a plot


def plot_metrics(folder: Path, scored: str = "loss") -> list[Path]:
    """Plots the logs of a run as OUT/loss.png and OUT/val.png; returns the files that were written.

    An optimizer that estimates a distance, such as Prodigy, gets OUT/distance.png too, and a loss
    that logs values of its own OUT/logged_values.png. `scored` names the validation loss in the
    title of val.png, e.g. "held-out loss".
    """
    columns = metric_columns(
        read_rows(folder / "metrics.jsonl", "a run writes it; remove the line", STEP_FIELDS)
    )
    record = read_run(folder)
    marks = _stage_texts(record)
    written = []
    if "loss" in columns:
        steps, loss = columns["loss"]
        written.append(folder / "loss.png")
        window = mean_window(len(loss))
        mean = pictures.running_mean(loss, window)
        pictures.plot_training(
            {"every step": (steps, loss), f"mean of {window}": (steps, mean)},
            written[-1],
            axes=("step", "training loss"),
            title="training loss (depends mostly on the sampled timesteps)",
            look=TrainingLook(marks=marks, faint="every step"),
        )
    distances = {name: xy for name, xy in columns.items() if name == "d" or name[:2] == "d_"}
    if distances:
        written.append(folder / "distance.png")
        lines = merge_equal_lines(Line(name, *xy) for name, xy in distances.items())
        pictures.plot_training(
            {line.name: (line.x, line.y) for line in lines},
            written[-1],
            axes=("step", "d"),
            title="Prodigy's distance estimate",
            look=TrainingLook(log=True, marks=marks),
        )
    logged = {name: xy for name, xy in columns.items() if not is_own_metric(name)}
    if logged:
        written.append(folder / "logged_values.png")
        window = mean_window(max(len(x) for x, _ in logged.values()))
        pictures.plot_logged_values(logged, written[-1], marks=marks, window=window)
    if len(columns.get("val_loss", ([], []))[0]) > 1:
        written.append(folder / "val.png")
        _plot_validation(record, columns["val_loss"], written[-1], scored)
    return written


def _plot_validation(record: RunRecord, means: Column, path: Path, scored: str) -> None:
    """The validation loss of each timestep; without val.jsonl, as in older runs, the mean."""
    title = f"{scored}, at fixed timesteps and noise"
    scores, _ = common_scores(record)
    if len(scores) < 2:
        pictures.plot_lines({scored: means}, path, axes=("step", "loss"), title=title)
        return
    changes = {}
    for name, values in relative_changes(scores).items():
        changes[name] = (sorted(scores), [100 * value for value in values])
    pairs = {row.timestep: (row.before, row.after) for row in bin_changes(scores)}
    pictures.plot_validation(changes, pairs, path, title=scored, marks=_stage_texts(record))


def _stage_texts(record: RunRecord) -> list[tuple[float, str]]:
    """(first step, groups) of each stage; numbers where there are too many for their names."""
    marks = stage_marks(record.stages)
    if len(marks) > MOST_STAGE_NAMES:
        return [(mark.x, str(number)) for number, mark in enumerate(marks, start=1)]
    return [(mark.x, mark.text) for mark in marks]


# ---------------------------------------------------------------- preview of the noise levels

BINS = 50  # of the plot; 5 of them are one line of the table
DRAWS = 100_000  # enough to be exact to 1e-5 of all draws


@dataclass(frozen=True)
class Objective:
    """The settings that determine the sampling and the loss weight of noise levels."""

    schedule: Schedule
    prediction: str  # a key of PREDICTIONS
    density: Callable[[Tensor], Tensor] | None = None  # of densities.bind_density; None: uniform
    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0
    space: str = "model"  # of prediction.to_loss_space
    loss: str = "mse"  # only for the title
    weighting: str = "none"
    args: Mapping[str, float] = field(default_factory=dict)  # of the weighting

    def weigh(self, level: NoiseLevel) -> Tensor:
        """[b] the weight of the loss at each level, float64."""
        return losses.loss_weights(
            self.weighting, level, self.prediction, space=self.space, **self.args
        ).double()


class TimestepBins(NamedTuple):
    """Equal intervals of the timesteps, from clean to pure noise; [n] each, float64."""

    t: Tensor  # the middle
    level: NoiseLevel  # at the middle
    share: Tensor  # of the draws; sums to 1
    weight: Tensor  # at the middle
    product: Tensor  # share of the sum of the weights of all draws; sums to 1


def timestep_bins(objective: Objective, count: int) -> TimestepBins:
    """The distribution of draws and weights over `count` equal intervals of the timesteps.

    Computed from evenly spaced quantiles instead of random numbers.
    """
    o = objective
    schedule = objective.schedule.to("cpu")
    low, high = 0.0, schedule.t_max
    if high is None:
        low, high = schedule.ts[0].item(), schedule.ts[-1].item()
    # A row of a vp table is the timesteps t ... t + 1; of a flow table those just below its sigma.
    half = {"vp": 0.5, "flow": -0.5 / len(schedule), "edm": 0.0}[schedule.kind]
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    drawn = noise.levels_at_quantiles(
        schedule, u, low=o.low, high=o.high, density=o.density, shift=o.shift
    )
    place = ((drawn.t.double() + half - low) / (high - low) * count).long().clamp(0, count - 1)
    middles = low + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (high - low)
    level = schedule.level(middles.clamp(max=schedule.ts[-1].item()))
    product = torch.zeros(count, dtype=torch.float64).index_add(0, place, o.weigh(drawn))
    share = torch.bincount(place, minlength=count).double() / DRAWS
    return TimestepBins(middles, level, share, o.weigh(level), product / product.sum())


def preview_table(objective: Objective) -> str:
    """A table of ten timestep intervals: noise level, draws, loss weight, and draws x weight."""
    b = timestep_bins(objective, 10)
    titles = f"{'timestep':>9} {'sigma':>8} {'log snr':>8} {'draws':>7} {'weight':>10}"
    lines = [f"{titles} {'draws x weight':>15}   from clean to pure noise"]
    columns = (b.t, b.level.sigma, b.level.snr, b.share, b.weight, b.product)
    for t, sigma, snr, share, weight, product in zip(*columns):
        level = f"{validation.format_timestep(t.item()):>9} {sigma:8.4f} {snr.log():+8.2f}"
        lines.append(f"{level} {share:7.1%} {weight:10.4g} {product:15.1%}")
    return "\n".join(lines)


def preview_density(objective: Objective, path: Path) -> Path:
    """Prints `preview_table`, plots draws, weight and their product to `path`; returns `path`."""
    o = objective
    b = timestep_bins(objective, BINS)
    words = losses.describe_loss(o.weighting, o.prediction, o.space, loss=o.loss, **o.args)
    print(f"{words}\n{preview_table(o)}")
    t, weights = b.t.tolist(), b.weight.tolist()
    units = {"vp": "timestep", "flow": "timestep = sigma", "edm": "timestep = ln(sigma) / 4"}
    left, right = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
    x = f"clean   {left}   {units[o.schedule.kind]}   {right}   pure noise"
    pictures.plot_steps_and_lines(
        {
            "draws": (t, (b.share * BINS).tolist()),
            "draws x weight": (t, (b.product * BINS).tolist()),
        },
        {"weight": (t, weights)},
        path,
        axes=(x, "share of the steps (uniform = 1)", "weight"),
        title=words,
        log=max(weights) > 20 * min(weights) > 0,
    )
    return path
