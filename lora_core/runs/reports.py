"""Numbers of a run: rows of metrics.jsonl, TensorBoard or W&B beside them, plots at the end. Device values are read in bunches, not at every step."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_core.diffusion import losses, noise, validation
from lora_core.diffusion.noise import NoiseLevel, Schedule
from lora_core.errors import UserError
from lora_core.runs import pictures
from lora_core.runs.run_folder import Run


class Sink(Protocol):
    """Where scalars also go."""

    def __call__(self, step: int, values: dict[str, float]) -> None: ...


class LogBook:
    """Collects rows with values on the device and writes them out together, one host sync for all."""

    def __init__(self, run: Run, report: str, config: dict[str, Any]) -> None:
        self.run = run
        self.sink = SINKS[report](run.folder, config)
        self.waiting: list[dict[str, Any]] = []

    def add(self, step: int, **values: float | int | Tensor) -> None:
        self.waiting.append({"step": step, **values})

    def flush(self) -> list[dict[str, Any]]:
        """Writes the waiting rows to metrics.jsonl and returns them as plain numbers."""
        places = [(row, name) for row in self.waiting for name, value in row.items() if isinstance(value, Tensor)]
        if places:
            numbers = torch.stack([row[name].detach().double().reshape(()) for row, name in places]).tolist()
            for (row, name), number in zip(places, numbers):
                row[name] = number if row[name].is_floating_point() else int(number)  # a count
        rows, self.waiting = self.waiting, []
        for row in rows:
            self.run.log(row)
            if self.sink is not None:
                self.sink(row["step"], {name: value for name, value in row.items() if name != "step" and isinstance(value, float)})
        return rows


def _tensorboard(folder: Path, config: dict[str, Any]) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--report tensorboard needs the package tensorboard: pip install tensorboard") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(folder: Path, config: dict[str, Any]) -> Sink:
    try:
        import wandb
    except ImportError:
        raise UserError("--report wandb needs the package wandb: pip install wandb") from None
    wandb.init(project="lora_core", name=folder.name, dir=str(folder), config=config)
    return lambda step, values: wandb.log(values, step=step)


def check_login(report: str) -> None:
    """Imports what --report needs and, for W&B, logs in. Raises UserError in one sentence where that fails."""
    if report == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except Exception as error:  # a broken installation raises what it likes
            raise UserError(f"--report tensorboard cannot be imported ({error}): pip install tensorboard") from None
    if report == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        try:
            import wandb

            if not wandb.login():
                raise RuntimeError("there is no login")
        except Exception as error:  # UsageError, AuthenticationError, CommError ... by version
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--report wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline") from None


SINKS: dict[str, Any] = {"none": lambda folder, config: None, "tensorboard": _tensorboard, "wandb": _wandb}


def plot_metrics(folder: Path, scored: str = "loss") -> list[Path]:
    """OUT/loss.png, OUT/val.png and, for an optimiser that estimates a distance, OUT/d.png, from the rows of metrics.jsonl and val.jsonl.

    `scored` says in val.png's title which images the loss is on, e.g. "held-out loss".
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    columns: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, float) and math.isfinite(value):
                columns[name][0].append(row["step"])
                columns[name][1].append(value)
    written = []
    if "loss" in columns:
        steps, loss = columns["loss"]
        series = {"every step": (steps, loss), "mean of 50": (steps, pictures.running_mean(loss, 50))}
        written.append(folder / "loss.png")
        pictures.plot_lines(series, written[-1], axes=("step", "training loss"), title="training loss (mostly says which timesteps were drawn)")
    distances = {name: columns[name] for name in columns if name == "d" or name.startswith("d_")}
    if distances:
        written.append(folder / "d.png")
        pictures.plot_lines(distances, written[-1], axes=("step", "d"), title="Prodigy's distance estimate", log=True)
    if len(columns["val_loss"][0]) > 1:
        written.append(folder / "val.png")
        pictures.plot_lines({scored: columns["val_loss"]}, written[-1], axes=("step", "loss"), title=f"{scored}, at fixed timesteps and noise")
    return written


# ---------------------------------------------------------------- where on the schedule training happens

BINS, DRAWS = 50, 100_000  # of the plot; 5 bins are one row of the table, and so many draws are exact to 1e-5 of all


@dataclass(frozen=True)
class Objective:
    """What decides how often a noise level is trained on and how much it counts."""

    schedule: Schedule
    prediction: str  # a row of PREDICTIONS
    density: Callable[[Tensor], Tensor] | None = None  # as noise.bind_density returns it; None: uniform
    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0
    space: str = "model"  # of prediction.to_loss_space
    loss: str = "mse"  # only named
    weighting: str = "none"
    args: Mapping[str, float] = field(default_factory=dict)  # of the weighting


class TimestepBins(NamedTuple):
    """Equal stretches of the timesteps, from clean to pure noise; [n] each, float64."""

    t: Tensor  # the middle
    level: NoiseLevel  # at the middle
    share: Tensor  # of the draws; sums to 1
    weight: Tensor  # at the middle
    product: Tensor  # share of the sum of the weights of all draws; sums to 1


def timestep_bins(objective: Objective, count: int) -> TimestepBins:
    """How draws and weights are spread over `count` equal stretches of the timesteps; evenly spaced numbers stand for random ones."""
    o, schedule = objective, objective.schedule.to("cpu")
    low, high = (schedule.ts[0].item(), schedule.ts[-1].item()) if schedule.t_max is None else (0.0, schedule.t_max)
    half = {"vp": 0.5, "flow": -0.5 / len(schedule), "edm": 0.0}[schedule.kind]  # row t stands for t ... t + 1; row sigma for what is just below
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    drawn = noise.levels_at_quantiles(schedule, u, low=o.low, high=o.high, density=o.density, shift=o.shift)
    place = ((drawn.t.double() + half - low) / (high - low) * count).long().clamp(0, count - 1)

    def weigh(level: NoiseLevel) -> Tensor:
        return losses.loss_weights(o.weighting, level, o.prediction, space=o.space, **o.args).double()

    middles = low + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (high - low)
    level = schedule.level(middles.clamp(max=schedule.ts[-1].item()))
    product = torch.zeros(count, dtype=torch.float64).index_add(0, place, weigh(drawn))
    share = torch.bincount(place, minlength=count).double() / DRAWS
    return TimestepBins(middles, level, share, weigh(level), product / product.sum())


def preview_table(objective: Objective) -> str:
    """Ten stretches of the timesteps with their noise level, the share of the draws, the weight, and the share of draws x weight."""
    b = timestep_bins(objective, 10)
    lines = [f"{'timestep':>9} {'sigma':>8} {'log snr':>8} {'draws':>7} {'weight':>10} {'draws x weight':>15}   from clean to pure noise"]
    for t, sigma, snr, share, weight, product in zip(b.t, b.level.sigma, b.level.snr, b.share, b.weight, b.product):
        shown = validation.format_timestep(t.item())
        lines.append(f"{shown:>9} {sigma:8.4f} {snr.log():+8.2f} {share:7.1%} {weight:10.4g} {product:15.1%}")
    return "\n".join(lines)


def preview_density(objective: Objective, path: Path) -> Path:
    """Prints `preview_table` and writes the same as a plot to `path`: draws, weight, and draws x weight over the timesteps. Returns `path`."""
    b, o = timestep_bins(objective, BINS), objective
    words, t, weights = losses.describe_loss(o.weighting, o.prediction, o.space, loss=o.loss, **o.args), b.t.tolist(), b.weight.tolist()
    print(f"{words}\n{preview_table(o)}")
    unit = {"vp": "timestep", "flow": "timestep = sigma", "edm": "timestep = ln(sigma) / 4"}[o.schedule.kind]
    pictures.plot_steps_and_lines(
        {"draws": (t, (b.share * BINS).tolist()), "draws x weight": (t, (b.product * BINS).tolist())},
        {"weight": (t, weights)},
        path,
        axes=(f"clean   \N{LEFTWARDS ARROW}   {unit}   \N{RIGHTWARDS ARROW}   pure noise", "share of the steps (uniform = 1)", "weight"),
        title=words,
        log=max(weights) > 20 * min(weights) > 0,
    )
    return path
