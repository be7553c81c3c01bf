"""The options of `train.py --compare`. Needs no torch, so that --help is answered at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tyro

from lora_core.flags.command_line import is_given

COMPARE_EXAMPLE = 'python train.py --compare "runs/mse_*" --against "runs/huber_*"'
# Words after a flag that may be there several times.
Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class CompareRuns:
    """Compare finished runs: B - A on the same images, timesteps and noise, over seeds."""

    compare: Words = ()
    """Runs of side A, which differ in their seed alone: folders of runs, folders that hold runs, or
    patterns in quotes. Two runs without --against are A and B. Empty: no comparison."""
    against: Words = ()
    """Runs of side B; with the same seeds as A they are paired by seed. Empty: two runs of
    --compare."""
    metric: Words = ()
    """What is compared: loss (recorded by the runs; also without this flag), x0 (squared error of
    the predicted latents), the name of a loss, FILE.py:FUNCTION of the kind of a loss or, with the
    attribute reads_samples = True, of (images, prompts), or clip:MODEL (folder or hub id of a CLIP
    model: likeness of drawn images to prompts and training images); one or several. Empty: the
    recorded loss."""
    metric_arg: dict[str, Any] = field(default_factory=dict)
    """Arguments of the one metric, e.g. delta=0.2. Empty: its own defaults."""
    plot: str = ""
    """PNG file of the plot; empty: compare_A.png in the first folder of side B."""


def asks_for_comparison(words: Sequence[str]) -> bool:
    """Whether the words of a command line compare runs; --against alone lacks the other side."""
    return is_given("compare", words) or is_given("against", words)
