"""A run that train.py trains in a process of its own, which another program starts, watches and
stops, as examples/web_demo.py does.

A process, not a thread: a signal ends it between two steps, with a checkpoint, and the GPU memory
that it had is free afterwards.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.json_files import read_rows
from lora_core.report import format_duration
from lora_core.runs.pictures import running_mean
from lora_core.runs.report_data import STEP_FIELDS, Column, metric_columns
from lora_core.toml import to_toml

SCRIPT = Path(__file__).parent.parent / "train.py"
AVERAGED = 20  # losses in a mean that is shown: that of one step depends mostly on its timestep
LONGEST_OUTPUT = 100_000  # bytes of what a run prints, the last ones, that are read
ENDS = ("error: ", "interrupted: ")  # the beginning of a sentence that a run ends with


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    sentence: str  # step, loss and time left; or how it ended
    step: int  # steps that are done, as far as they are logged
    losses: Column  # steps, and the means of the losses of AVERAGED steps, without NaN
    images: Path | None  # the newest sheet of samples; at the end before_after.png
    output: str  # what it printed
    is_running: bool


class RunProcess:
    """A process of train.py with `words` as its command line, which is a run of `config`.

    What it prints goes to the file `output`. Raises OSError where that cannot be written.
    """

    def __init__(self, config: Config, words: Sequence[str], output: Path) -> None:
        self.folder, self.steps, self.output = Path(config.out), config.steps, output
        self.began = time.monotonic()
        self.first_look: tuple[float, int] | None = None  # (time, steps done) at the first step
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(SCRIPT), *words],  # -u: each line is written at once
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @classmethod
    def start(cls, config: Config, folder: Path) -> RunProcess:
        """Start a run. FOLDER/train.toml gets its config, FOLDER/output.txt what it prints."""
        file = folder / "train.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        return cls(config, [str(file)], folder / "output.txt")

    @classmethod
    def resume(cls, config: Config, folder: Path) -> RunProcess:
        """Go on with a run from its newest checkpoint. FOLDER is that of `start`."""
        words = [str(Path(config.out) / "config.toml"), "--resume"]
        return cls(config, words, folder / "output.txt")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask the run to end after its current step, with a checkpoint, as Ctrl-C does.

        The signal is SIGTERM, at which a run ends in the same way: processes of a program that was
        started in the background ignore that of Ctrl-C.
        """
        if self.is_running:
            self.process.terminate()

    def progress(self) -> Progress:
        """How far the run is, by its files."""
        status = self.process.poll()  # first, so that all that it wrote is read when it has ended
        rows: list[dict[str, Any]] = []
        with suppress(UserError):  # no log yet, or a last line that is being written
            rows.extend(read_rows(self.folder / "metrics.jsonl", "", STEP_FIELDS))
        steps, values = metric_columns(rows).get("loss", ([], []))
        losses = steps, running_mean(values, AVERAGED)
        step = max((row["step"] for row in rows), default=0)
        output = self.output.read_bytes()[-LONGEST_OUTPUT:].decode("utf-8", "replace")
        sheets = sorted(self.folder.glob("samples/step_*.png"))
        if status == 0:
            sheets.append(self.folder / "before_after.png")
        if status is None:
            sentence = self._describe_step(step, losses[1])
        else:
            sentence = self._describe_end(status, output)
        newest = sheets[-1] if sheets else None
        return Progress(sentence, step, losses, newest, output, status is None)

    def _describe_step(self, step: int, losses: Sequence[float]) -> str:
        now = time.monotonic()
        if not step:
            return f"preparing the model and the images, {format_duration(now - self.began)}"
        if step >= self.steps:
            return f"all {self.steps} steps are done; drawing the last images"
        if self.first_look is None:
            self.first_look = now, step
        since, before = self.first_look
        parts = [f"step {step} of {self.steps}"]
        if losses:
            parts.append(f"loss {losses[-1]:.4f}")
        if step > before:
            left = (now - since) / (step - before) * (self.steps - step)
            parts.append(f"about {format_duration(left)} left")
        return ", ".join(parts)

    def _describe_end(self, status: int, output: str) -> str:
        if status == 0:
            return f"finished in {format_duration(time.monotonic() - self.began)}: {self.folder}"
        said = [line for line in output.splitlines() if line.startswith(ENDS)]
        if said:
            return said[-1]
        if status < 0:
            return f"ended by signal {-status} before the first step; nothing was saved"
        return f"ended with status {status}; what it printed says why"
