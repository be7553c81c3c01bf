"""Comparison of finished runs, B with A, over seeds and images: paired differences with standard
errors, the verdict in a sentence, and the options in which the two configs differ.

The standard error is that of `standard_error`: seeds and images are both taken as random.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.diffusion.validation import Score, format_timestep, read_scores
from lora_core.errors import UserError
from lora_core.json_files import LONGEST_JSON, parse_object
from lora_core.runs.run_folder import Run
from lora_core.runs.shared_options import MODEL_PATHS
from lora_core.runs.standard_error import Estimate, paired_estimate, unpaired_estimate
from lora_core.text import read_text, shorten_value
from lora_core.toml import flatten_table, read_toml, to_table

# Options on which the result of a run does not depend: where it is written, when and how it is
# observed, the threads and files that compute it.
NO_EFFECT = (
    "out", "report", "push_to_hub", "resume", "resume_anyway", "overwrite", "save_every", "keep",
    "log_every", "list_targets", "samples", "files", "validation.every", "validation.images",
    "validation.count", "data.workers", "data.cache", "threads", "offload",
)  # fmt: skip
# Options that determine what a validation measures, besides its images, timesteps and draws.
MEASURED_BY = (
    "data.resolution",
    "data.interpolation",
    "validation.seed",
    "noise.prediction",
    "noise.zero_terminal_snr",
)
CASTS = ("precision", "vae_precision")  # change the numbers of the same weights
NOT_SET = "not set"
NO_TIME = -1e9  # the t of scores of a measure without timesteps
SHOWN = 3  # names in a sentence
LONGEST_LABEL = 30  # characters of a side's name in a table


class Measured(NamedTuple):
    """What runs are compared by, with its value for each image of each run."""

    name: str
    higher_is_better: bool
    scores: Mapping[Path, Sequence[Score]]  # run -> values, as the `loss` of each Score


class RecordedRun(NamedTuple):
    """A finished run as its folder records it."""

    folder: Path
    settings: Mapping[str, Any]  # dotted option -> value; empty without config.toml
    weights: Mapping[str, str]  # part of the base model -> hash; empty where it is not recorded

    @property
    def seed(self) -> int | None:
        """The training seed, if it is known."""
        return self.settings.get("seed")

    @property
    def steps(self) -> int:
        """Steps of all stages of its config; 0 without a config."""
        found = [v for name, v in self.settings.items() if _is_stage_length(name)]
        return sum(found)


class PairedDifference(NamedTuple):
    """Mean of B - A over pairs of values of the same image and timestep."""

    t: float  # nan: over all timesteps
    a: float
    b: float
    mean: float
    error: float  # standard error of the mean; nan where nothing repeats
    pairs: int
    freedom: float = math.nan  # degrees of freedom of the error

    @property
    def estimate(self) -> Estimate:
        """The mean with its error, for confidence intervals."""
        return Estimate(self.mean, self.error, self.freedom)


@dataclass(frozen=True)
class Comparison:
    """The differences B - A of two groups of runs."""

    names: tuple[str, str]
    folders: tuple[tuple[Path, ...], tuple[Path, ...]]
    bins: tuple[PairedDifference, ...]  # one for each timestep; none for a measure without
    overall: PairedDifference
    images: int
    draws: int  # noise draws that count as images of their own; 1: they are averaged
    is_paired: bool  # by seed: both sides have the same ones
    by_seed: Mapping[int, float]  # seed -> its mean difference; empty if unpaired
    changes: tuple[str, ...]  # options in which the configs differ
    measure: str = "loss"
    higher_is_better: bool = False

    @property
    def verdict(self) -> str:
        """The result in one sentence: the difference with its standard error, or that none can be
        told because 0 is inside the 95 % confidence interval.
        """
        own = self.overall
        mean, error = round_together(abs(own.mean), own.error)
        if own.estimate.is_significant:
            way = "higher" if own.mean > 0 else "lower"
            worth = "better" if (own.mean > 0) == self.higher_is_better else "worse"
            words = f"B {way} by {mean} +- {error} over {self._counts}, which is {worth}"
        elif math.isnan(own.error):
            words = f"no difference can be told from {self._counts}"
        else:
            sign = "-" if own.mean < 0 else "+"
            words = f"no difference can be told: {sign}{mean} +- {error} over {self._counts}"
        return "; ".join([words, *self.notes])

    @property
    def _counts(self) -> str:
        numbers = [len(folders) for folders in self.folders]
        words = _count(numbers[0], "seed")
        if not self.is_paired and max(numbers) > 1:
            words = f"{numbers[0]} and {_count(numbers[1], 'seed')}"
        words += f", {_count(self.images, 'image')}"
        return words + (f" x {self.draws} noise draws" if self.draws > 1 else "")

    @property
    def notes(self) -> list[str]:
        """The limits of the standard error, as phrases."""
        numbers = [len(folders) for folders in self.folders]
        what = "images and draws" if self.draws > 1 else "images"
        found = []
        if max(numbers) == 1:
            found.append(f"one seed: the error is over {what} only")
        elif not self.is_paired:
            found.append("the sides have different seeds, so they are paired by image only")
            if min(numbers) == 1:
                found.append(f"{'AB'[numbers.index(1)]} has one seed, whose spread is not counted")
        if self.images == 1 and max(numbers) > 1:
            found.append("one image: the error is over seeds only")
        return found


# ---------------------------------------------------------------- reading


def read_recorded_run(folder: Path) -> RecordedRun:
    """The settings of a run and the hashes of its base model's weights, as far as the folder has
    them. Raises UserError for a config that cannot be read.
    """
    file = folder / "config.toml"
    settings = flatten_table(to_table(read_toml(file))) if file.is_file() else {}
    return RecordedRun(folder, settings, _read_weights(folder))


def _read_weights(folder: Path) -> dict[str, str]:
    """Part of the base model -> hash of its weights, from the newest checkpoint."""
    step = Run(folder, keep=None).newest_step()
    file = folder / "checkpoints" / str(step) / "state.json"
    if not file.is_file():
        return {}
    try:
        state: Any = parse_object(read_text(file, LONGEST_JSON), str(file), "")
    except UserError:  # a damaged checkpoint; the config's model path is compared
        return {}
    for name in ("meta", "identity", "model"):
        state = state.get(name) if isinstance(state, dict) else None
    return state if isinstance(state, dict) else {}


def _is_stage_length(option: str) -> bool:
    return option.startswith("stages.") and option.endswith(".steps")


def _has_effect(option: str) -> bool:
    return option not in NO_EFFECT and option.split(".")[0] not in NO_EFFECT


def recorded_losses(run: RecordedRun) -> list[Score]:
    """The scores of a run's last validation. Raises UserError for a run without any, and for one
    that ended before its last step.
    """
    steps = read_scores(run.folder)
    if not steps:
        raise UserError(
            f"{run.folder / 'val.jsonl'} is empty; was the run stopped before its first validation?"
        )
    if max(steps) < run.steps:
        raise UserError(
            f"{run.folder} was last validated after {max(steps)} of {run.steps} steps; finish it "
            "with --resume before it is compared"
        )
    return steps[max(steps)]


# ---------------------------------------------------------------- groups and differences of configs


def group_runs(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Label -> runs that differ in their seed, and in options without effect, alone.

    The label is what the names of a group's folders have in common, numbered where groups share it.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for folder in runs:
        settings = read_recorded_run(folder).settings
        kept = {n: v for n, v in settings.items() if n != "seed" and _has_effect(n)}
        groups[repr(sorted(kept.items()))].append(folder)
    found: dict[str, list[Path]] = {}
    for group in groups.values():
        label, number = label_runs(group), 2
        while label in found:
            label, number = f"{label_runs(group)} ({number})", number + 1
        found[label] = group
    return found


def label_runs(runs: Sequence[Path]) -> str:
    """A name for a group of runs: that of the one, or the beginning that their names share."""
    names = [folder.name for folder in runs]
    shared = names[0]
    if len(names) > 1:
        first, last = min(names), max(names)  # what they share, all names share
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
        shared = "".join(letter for letter, _ in alike)
        shared = shared.removesuffix("seed").rstrip("0123456789").rstrip("_-. ")
        shared = shared.removesuffix("seed").rstrip("_-. ")
    return shared or runs[0].parent.name or "runs"


def config_changes(a: RecordedRun, b: RecordedRun) -> list[str]:
    """Options with an effect in which two runs differ, with both values; the seed is none."""
    if not a.settings or not b.settings:
        missing = a if not a.settings else b
        return [f"unknown: {missing.folder} has no config.toml"]
    found = []
    for name in dict.fromkeys([*a.settings, *b.settings]):
        values = [run.settings.get(name, NOT_SET) for run in (a, b)]
        if name != "seed" and _has_effect(name) and values[0] != values[1]:
            shown = [_show_value(value) for value in values]
            found.append(f"{name}: {shown[0]} in A, {shown[1]} in B")
    return found


def _show_value(value: Any) -> str:
    if value is NOT_SET:
        return NOT_SET
    if value == "":
        return "empty"
    return shorten_value(value) if isinstance(value, str) else str(value)


def _check_one_config(runs: Sequence[RecordedRun], side: str) -> None:
    """Raises UserError unless the runs of a side differ in their seed alone, and each seed is
    there once.
    """
    for run in runs[1:]:
        if changes := config_changes(runs[0], run):
            first, other = runs[0].folder, run.folder
            found = "; ".join(changes[:SHOWN]).replace(" in A, ", f" in {first.name}, ")
            found = found.replace(" in B", f" in {other.name}")
            raise UserError(
                f"{first} and {other} on side {side} have different configs ({found}); a side has "
                "runs of one config with different seeds"
            )
    known: dict[int | None, Path] = {}
    for run in runs:
        if run.seed is not None and run.seed in known:
            raise UserError(
                f"{known[run.seed]} and {run.folder} on side {side} both have seed {run.seed}; "
                "give each seed of a config once"
            )
        known[run.seed] = run.folder


def _check_same_measurement(a: RecordedRun, b: RecordedRun) -> None:
    """Raises UserError where two runs have another base model, or were validated otherwise."""
    if not a.settings or not b.settings:
        return
    for name in MEASURED_BY:
        values = [run.settings.get(name, NOT_SET) for run in (a, b)]
        if values[0] != values[1]:
            raise UserError(
                f"{a.folder} was validated with {name} {values[0]}, {b.folder} with {values[1]}; "
                "their losses measure different things: train both with the same value"
            )
    is_cast = any(a.settings.get(name) != b.settings.get(name) for name in CASTS)
    if a.weights and b.weights and not is_cast:
        parts = [name for name in a.weights if a.weights[name] != b.weights.get(name)]
    else:
        parts = [name for name in MODEL_PATHS if a.settings.get(name) != b.settings.get(name)]
    if parts:
        raise UserError(
            f"{a.folder} and {b.folder} have different base models ({', '.join(parts)}); compare "
            "runs of the same model"
        )


# ---------------------------------------------------------------- comparing


def read_sides(a: Sequence[Path], b: Sequence[Path]) -> list[list[RecordedRun]]:
    """The recorded runs of both sides. Reads no weights, so that it can be called before the runs
    are measured. Raises UserError for runs of different base models or validations, of mixed
    configs on one side, and for a run on both sides.
    """
    if not a or not b:
        raise UserError("there is no run to compare; name the folders of finished runs")
    others = {folder.resolve() for folder in b}
    if both := [folder for folder in a if folder.resolve() in others]:
        raise UserError(f"{both[0]} is on both sides; compare it with other runs")
    sides = [[read_recorded_run(folder) for folder in side] for side in (a, b)]
    for runs, side in zip(sides, "AB"):
        _check_one_config(runs, side)
    for run in (*sides[0], *sides[1]):
        _check_same_measurement(sides[0][0], run)
    return sides


def compare_runs(
    a: Sequence[Path],
    b: Sequence[Path],
    *,
    measured: Measured | None = None,
    draws_apart: bool = False,
) -> Comparison:
    """The differences B - A of two groups of runs, each of one config with different seeds.

    By the losses of their last validations, or by what was `measured` on them. Both values of a
    difference have the same image, timestep and noise, and the same seed where the groups have the
    same seeds. The timesteps and noise draws of an image are averaged; with `draws_apart` each
    image and draw is an image of its own. Raises UserError as `read_sides` does, and for unfinished
    runs.
    """
    sides = read_sides(a, b)
    if measured is None:
        found = {run.folder: recorded_losses(run) for run in (*sides[0], *sides[1])}
        measured = Measured("loss", False, found)
    seeds = [[run.seed for run in runs] for runs in sides]
    is_paired = None not in seeds[0] and set(seeds[0]) == set(seeds[1])
    if is_paired:  # in the same order on both sides
        sides = [sorted(runs, key=lambda run: run.seed or 0) for runs in sides]
    table = _tabulate([*sides[0], *sides[1]], measured, draws_apart=draws_apart)
    bins = []
    for t, values in table.by_time.items():
        bins.append(_difference(t, values[: len(a)], values[len(a) :], is_paired=is_paired))
    whole = table.whole[: len(a)], table.whole[len(a) :]
    by_seed = {}
    if is_paired:
        means = (whole[1] - whole[0]).mean(1).tolist()
        by_seed = {run.seed or 0: mean for run, mean in zip(sides[0], means)}
    folders = [tuple(run.folder for run in runs) for runs in sides]
    names = label_runs(folders[0]), label_runs(folders[1])
    return Comparison(
        names=names if names[0] != names[1] else ("A", "B"),
        folders=(folders[0], folders[1]),
        bins=tuple(bins),
        overall=_difference(math.nan, whole[0], whole[1], is_paired=is_paired),
        images=table.images,
        draws=table.whole.shape[1] // table.images,
        is_paired=is_paired,
        by_seed=by_seed,
        changes=tuple(config_changes(sides[0][0], sides[1][0])),
        measure=measured.name,
        higher_is_better=measured.higher_is_better,
    )


class _Table(NamedTuple):
    """Values of all runs, float64. An image, with `draws_apart` an image and draw, is a column."""

    images: int
    by_time: Mapping[float, Tensor]  # timestep -> [runs, columns]; none for a measure without them
    whole: Tensor  # [runs, columns] means over the timesteps


def _tabulate(runs: Sequence[RecordedRun], measured: Measured, *, draws_apart: bool) -> _Table:
    """The values of each run. Raises UserError where runs have other images, timesteps or draws
    than the first one.
    """
    rows = []
    for run in runs:
        scores = measured.scores[run.folder]
        rows.append({(score.key, score.draw, score.t): score.loss for score in scores})
    places = sorted(rows[0])
    for run, row in zip(runs, rows):
        if row.keys() != rows[0].keys():
            raise UserError(
                f"{runs[0].folder} and {run.folder} were validated on different images, timesteps "
                "or draws; give both the same [validation] and data"
            )
    every = [[row[place] for place in places] for row in rows]
    values = torch.tensor(every, dtype=torch.float64)
    columns = [(key, draw if draws_apart else 0) for key, draw, _ in places]
    indices: dict[float, list[int]] = defaultdict(list)
    for i, (_, _, t) in enumerate(places):
        indices[t].append(i)
    by_time = {}
    for t in sorted(indices):
        if t != NO_TIME:
            by_time[t] = _column_means(values[:, indices[t]], [columns[i] for i in indices[t]])
    images = len({key for key, _, _ in places})
    return _Table(images, by_time, _column_means(values, columns))


def _column_means(values: Tensor, columns: Sequence[Hashable]) -> Tensor:
    """[runs, distinct columns] means of the values [runs, n] of each column, in their order."""
    numbers = {column: i for i, column in enumerate(dict.fromkeys(columns))}
    index = torch.tensor([numbers[column] for column in columns])
    sums = values.new_zeros(len(values), len(numbers)).index_add(1, index, values)
    return sums / index.bincount()


def _difference(t: float, a: Tensor, b: Tensor, *, is_paired: bool) -> PairedDifference:
    """The difference of values [seeds, images]."""
    found = paired_estimate(b - a) if is_paired else unpaired_estimate(a, b)
    pairs = a.numel() if is_paired else a.shape[1]
    means = a.mean().item(), b.mean().item()
    return PairedDifference(t, *means, found.mean, found.error, pairs, found.freedom)


# ---------------------------------------------------------------- text


def describe_sides(comparison: Comparison) -> str:
    """The runs of both sides, and the options in which their configs differ, as lines."""
    lines = []
    for side, name, folders in zip("AB", comparison.names, comparison.folders):
        listed = " ".join(map(str, folders))
        lines.append(f"{side} = {listed if len(folders) == 1 else f'{name}: {listed}'}")
    changes = comparison.changes or ("none but the seed",)
    return "\n".join([*lines, "differences of the configs:", *(f"  {own}" for own in changes)])


def describe_result(comparison: Comparison) -> str:
    """The table and the verdict, as lines."""
    lines = [comparison_table(comparison)]
    if len(comparison.by_seed) > 1:
        seeds = [f"{seed}: {mean:+.6f}" for seed, mean in comparison.by_seed.items()]
        lines.append(f"each seed: {', '.join(seeds)}")
    return "\n".join([*lines, f"{comparison.measure}: {comparison.verdict}"])


def comparison_table(comparison: Comparison) -> str:
    """A line for each timestep, and one for all of them."""
    width = min(LONGEST_LABEL, max(14, *map(len, comparison.names)))
    names = [f"{name[:width]:>{width}}" for name in comparison.names]
    head = f"{'timestep':>9} {names[0]} {names[1]} {'B - A':>11} {'std. error':>11} {'pairs':>6}"
    lines = [head]
    for row in (*comparison.bins, comparison.overall):
        values = f"{row.a:{width}.6f} {row.b:{width}.6f} {row.mean:+11.6f} {row.error:11.6f}"
        lines.append(f"{format_timestep(row.t):>9} {values} {row.pairs:6d}")
    return "\n".join(lines)


def round_together(value: float, error: float) -> tuple[str, str]:
    """A value and its error, both to the error's second digit."""
    if not 0 < error < math.inf:
        return f"{value:.4g}", f"{error:.4g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f}", f"{error:.{places}f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
