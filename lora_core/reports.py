"""Numbers of a run: rows of metrics.jsonl, TensorBoard or W&B beside them, plots at the end. Device values are read in bunches, not at every step."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_core import pictures
from lora_core.errors import UserError
from lora_core.run import Run


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
                row[name] = number
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
        raise UserError("--report tensorboard needs the package tensorboard: pip install 'lora_core[tensorboard]'") from None
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
        raise UserError("--report wandb needs the package wandb: pip install 'lora_core[wandb]'") from None
    wandb.init(project="lora_core", name=folder.name, dir=str(folder), config=config)
    return lambda step, values: wandb.log(values, step=step)


SINKS: dict[str, Any] = {"none": lambda folder, config: None, "tensorboard": _tensorboard, "wandb": _wandb}


def plot_metrics(folder: Path) -> list[Path]:
    """OUT/loss.png, OUT/val.png and, for an optimiser that estimates a distance, OUT/d.png, from the rows of metrics.jsonl and val.jsonl."""
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
        series = {"every step": (steps, loss), "mean of 50": (steps, pictures.smooth(loss, 50))}
        written.append(folder / "loss.png")
        pictures.plot(series, written[-1], axes=("step", "training loss"), title="training loss (mostly says which timesteps were drawn)")
    distances = {name: columns[name] for name in columns if name == "d" or name.startswith("d_")}
    if distances:
        written.append(folder / "d.png")
        pictures.plot(distances, written[-1], axes=("step", "d"), title="Prodigy's distance estimate", log=True)
    if len(columns["val_loss"][0]) > 1:
        written.append(folder / "val.png")
        pictures.plot({"held out": columns["val_loss"]}, written[-1], axes=("step", "loss"), title="loss at fixed timesteps and noise")
    return written
