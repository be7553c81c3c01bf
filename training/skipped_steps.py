"""Steps that changed nothing, since their loss or gradient was not finite: how many, and which
images they had.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lora_core import distributed
from lora_core.data.records import Record, every_image
from lora_core.diffusion.validation import format_timestep

# Steps in a row whose loss or gradient is NaN or infinite that end a run.
MAX_NONFINITE_IN_A_ROW = 5
MOST_WARNINGS = 3  # of one process; the count stands in metrics.jsonl
MOST_NAMED = 16  # images of a step
STORED = ("overflows", "overflows_in_a_row", "nonfinite", "nonfinite_in_a_row")


class StepExamples(NamedTuple):
    """The images of a step: a part for each micro-batch."""

    keys: Sequence[tuple[str, ...]]  # of their records
    timesteps: Sequence[Tensor]  # [b] each, on the device

    def describe(self, names: Mapping[str, str]) -> str:
        """ "a.png at timestep 512, b.png at 17"; `names`: key of a record -> file name."""
        words: list[str] = []
        for keys, timesteps in zip(self.keys, self.timesteps):
            for key, t in zip(keys, timesteps.tolist()):
                unit = "" if words else "timestep "
                words.append(f"{names.get(key, key)} at {unit}{format_timestep(t)}")
        if len(words) > MOST_NAMED:
            words = [*words[:MOST_NAMED], f"and {len(words) - MOST_NAMED} more"]
        return ", ".join(words)


@dataclass
class SkippedSteps:
    """Counts of the steps that were skipped, up to the last row of the log.

    Those that overflowed in fp16, after which the loss scale falls, and those whose loss, or whose
    gradient under a finite loss, is NaN or infinite.
    """

    overflows: int = 0
    overflows_in_a_row: int = 0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    warned: int = 0  # lines that this process printed
    examples: dict[int, StepExamples] = field(default_factory=dict)  # by step, the newest ones

    @property
    def total(self) -> int:
        return self.overflows + self.nonfinite

    def count(self, row: dict[str, Any]) -> str:
        """Count the step of a row of the log, and write the total into the row; returns what is not
        finite: "loss", "gradient" or "". `row["skipped"]`, in fp16: overflows so far.
        """
        if "loss" not in row:  # of a validation
            return ""
        what = "" if math.isfinite(row["loss"]) else "loss"
        overflows = row.get("skipped", self.overflows)
        has_overflowed = overflows > self.overflows
        if not (what or has_overflowed or math.isfinite(row["grad_norm"])):
            what = "gradient"
        self.overflows_in_a_row = self.overflows_in_a_row + 1 if has_overflowed else 0
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if what else 0
        self.overflows = overflows
        self.nonfinite += bool(what)
        if self.total or "skipped" in row:
            row["skipped"] = self.total
        return what

    def forget_examples(self, done: int) -> None:
        """Keep the examples of the steps that an error can still name."""
        for step in [step for step in self.examples if step <= done - MAX_NONFINITE_IN_A_ROW]:
            del self.examples[step]

    def describe_examples(self, steps: Iterable[int], records: Iterable[Record]) -> dict[int, str]:
        """Step -> its images and timesteps, those of all processes; of the steps that were taken
        since the run was last resumed. All processes must call it with the same steps.
        """
        names = {record.key: record.path.name for record in every_image(records)}
        taken = [step for step in steps if step in self.examples]
        own = {step: self.examples[step].describe(names) for step in taken}
        every = distributed.gather_values(own)
        return {step: ", ".join(part[step] for part in every) for step in own}

    def warn(self, step: int, what: str, records: Iterable[Record]) -> None:
        """Print a line about a step that was skipped, for the first few."""
        self.warned += 1
        if self.warned > MOST_WARNINGS:
            return
        images = self.describe_examples([step], records)[step]
        also = "; further ones are only counted" if self.warned == MOST_WARNINGS else ""
        print(
            f"warning: step {step} is skipped, for its {what} is not finite ({images}){also}",
            file=sys.stderr,
        )

    def reasons(self) -> list[tuple[int, str]]:
        """(steps, why they were skipped) of each reason that there was."""
        found = [
            (self.overflows, "their gradients overflowed in fp16"),
            (self.nonfinite, "their loss or gradient was not finite"),
        ]
        return [(count, why) for count, why in found if count]

    def state_dict(self) -> dict[str, int]:
        """The counts, as a checkpoint stores them."""
        return {name: getattr(self, name) for name in STORED}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the counts; those that an older checkpoint lacks stay."""
        for name in STORED:
            setattr(self, name, state.get(name, getattr(self, name)))
