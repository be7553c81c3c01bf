"""The comparison of finished runs that `train.py --compare` prints and plots."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from glob import glob
from itertools import chain
from pathlib import Path

from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line
from lora_core.runs import pictures
from lora_core.runs.comparison import (
    Comparison,
    Measured,
    compare_runs,
    describe_result,
    describe_sides,
    read_sides,
)
from lora_core.runs.run_folder import is_run
from lora_core.text import print_escaped
from training.comparisons import measures
from training.comparisons.compare_options import COMPARE_EXAMPLE, CompareRuns
from training.step import Step


def compare_finished_runs(words: Sequence[str], step: Step) -> None:
    """Print and plot the comparison that the words of the command line ask for; `step` is
    train.training_step, by which measures of a network call it.
    """
    options = parse_command_line(
        CompareRuns, words, prog="train.py --compare", example=COMPARE_EXAMPLE, takes_file=False
    )
    a, b, metrics = (
        list(chain.from_iterable(given))
        for given in (options.compare, options.against, options.metric)
    )
    is_pair = not b and len(a) == 2
    if not is_pair and not (a and b):
        raise UserError(f"--compare takes two runs, or runs and --against: {COMPARE_EXAMPLE}")
    if is_pair:
        sides = [Path(a[0])], [Path(a[1])]
    else:
        sides = find_runs(a, "--compare"), find_runs(b, "--against")
    read_sides(*sides)
    wanted = measures.find_measures(metrics or [measures.RECORDED], options.metric_arg)
    found = measures.measure_runs([*sides[0], *sides[1]], wanted, step)
    show_comparisons(sides, found, options.plot, draws_apart=is_pair)


def find_runs(words: Sequence[str], option: str) -> list[Path]:
    """The run folders that words name: a run, a folder that holds runs, or a pattern of either.

    Raises UserError for a word without any.
    """
    found: list[Path] = []
    for word in words:
        folders = [Path(word)] if Path(word).exists() else [Path(path) for path in glob(word)]
        runs: list[Path] = []
        for folder in sorted(folders):
            runs += [folder] if _holds_run(folder) else sorted(filter(_holds_run, _below(folder)))
        if not runs:
            raise UserError(
                f"{option} {word} names no run; expected the folder of a finished run, a folder "
                "that holds runs, or a pattern of such names in quotes"
            )
        found += runs
    return list(dict.fromkeys(found))


def _holds_run(folder: Path) -> bool:
    return folder.is_dir() and (is_run(folder) or (folder / "val.jsonl").is_file())


def _below(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def show_comparisons(
    sides: Sequence[Sequence[Path]], measured: Sequence[Measured], plot: str, *, draws_apart: bool
) -> list[Comparison]:
    """Print the differences of the configs, and the table and the verdict by each measure, and
    write a plot for each: to `plot`, else into the first folder of side B.
    """
    found = []
    for own in measured:
        found.append(compare_runs(*sides, measured=own, draws_apart=draws_apart))
    print_escaped(describe_sides(found[0]))
    for comparison in found:
        path = plot_path(comparison, plot, several=len(found) > 1)
        print_escaped(f"\n{describe_result(comparison)}")
        print_escaped(f"plot: {plot_comparison(comparison, path)}")
    return found


def plot_path(comparison: Comparison, plot: str = "", *, several: bool = False) -> Path:
    """The file `plot`, else compare_A.png in the first folder of side B, with A's name; with the
    name of the measure if that is not the loss, or one of several in `plot`.
    """
    path = Path(plot or comparison.folders[1][0] / f"compare_{comparison.names[0]}.png")
    stem = path.stem
    if several if plot else comparison.measure != "loss":
        stem += f"_{Path(comparison.measure).name}"
    plain = re.sub(r"[^\w.-]+", "_", stem)
    return path.with_name(f"{plain}{path.suffix or '.png'}")


def plot_comparison(comparison: Comparison, path: Path) -> Path:
    """A plot of the differences with their standard errors and a line at 0, over the timesteps; of
    a measure without timesteps over the seeds.
    """
    name = f"{comparison.names[1]} - {comparison.names[0]}"
    title = f"{name}, paired on the same images and noise"
    label = f"{comparison.measure} difference (std. error)"
    rows, whole = comparison.bins, comparison.overall
    if not rows:
        label = f"{Path(comparison.measure).name} difference"
        pictures.plot_seed_differences(
            comparison.by_seed, (whole.mean, whole.error), path, label=label, title=title
        )
        return path
    pictures.plot_lines(
        {name: ([row.t for row in rows], [row.mean for row in rows])},
        path,
        axes=("timestep", label),
        title=title,
        errors={name: [0 if math.isnan(row.error) else row.error for row in rows]},
    )
    return path
