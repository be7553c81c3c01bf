"""Validation loss with the same images, timesteps and noise for every run, for comparison.

The training loss of one step depends mostly on the timestep that was drawn. Here every image is
scored at the midpoints of equal timestep bins with noise keyed by (seed, image, draw), by the plain
squared error of the network's output. The model before training is scored in the same way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.data.records import Record, without_mask
from lora_core.diffusion import noise
from lora_core.diffusion.noise import NoiseLevel, RandomKeys, Schedule
from lora_core.diffusion.prediction import PREDICTIONS
from lora_core.errors import UserError
from lora_core.json_files import INTEGER, NUMBER, TEXT, read_rows

# (x_t before c_in, level, indices of the examples [b]) -> raw output
RawDenoise = Callable[[Tensor, NoiseLevel, Tensor], Tensor]


class Score(NamedTuple):
    """The squared error of one image at one timestep under one noise draw."""

    key: str
    draw: int
    bin: int
    t: float
    loss: float


# Fields of a line of val.jsonl.
SCORE_FIELDS = {
    "step": INTEGER, "key": TEXT, "draw": INTEGER, "bin": INTEGER, "t": NUMBER, "loss": NUMBER
}  # fmt: skip


class ValidationSet(NamedTuple):
    """The images that a run is validated on."""

    records: list[Record]
    words: str  # the name of the loss on them in tables and plots
    sentence: str  # the line that is printed about them


def choose_images(
    training: Sequence[Record], held_out: Sequence[Record] | None, count: int
) -> ValidationSet:
    """At most `count` images (0: all), evenly chosen: those at i n / count of the n in order.

    They are held-out images or, without any, the training images. `training` may have an image
    several times, and its mask, which is ignored here. Held-out images that are also training
    images, by path or content, are counted and not called held-out.
    """
    given = training if held_out is None else held_out
    images = list({record.path.resolve(): record for record in given}.values())
    number = min(count, len(images)) if count else len(images)
    chosen = [without_mask(images[i * len(images) // number]) for i in range(number)]
    paths = {record.path.resolve() for record in training}
    contents = {record.key for record in training}
    seen = sum(record.path.resolve() in paths or record.key in contents for record in chosen)
    if not seen:
        kind, words, trained = "held-out", "held-out loss", ""
    elif seen == number:
        kind, words, trained = "training", "loss on the training images", ""
    else:
        words = f"loss on {seen} training image{'' if seen == 1 else 's'} and others"
        kind, trained = "given", f", {seen} of them trained on"
    if number == len(images):
        taken = f"{number} {kind} image{'' if number == 1 else 's'}{trained}"
    else:
        taken = f"{number} of {len(images)} {kind} images, evenly chosen{trained}"
        taken += "; --validation.count 0 takes all"
    return ValidationSet(chosen, words, f"validation: {taken}")


def bin_midpoints(schedule: Schedule, bins: int) -> Tensor:
    """[bins] the midpoints of equal intervals of the schedule's timesteps."""
    rows = ((torch.arange(bins, dtype=torch.float64) + 0.5) / bins * len(schedule)).long()
    return schedule.ts[rows.to(schedule.ts.device)]


@torch.no_grad()
def score_latents(
    denoise: RawDenoise,
    x0: Tensor,
    names: Sequence[str],
    schedule: Schedule,
    prediction: str,
    *,
    bins: int,
    draws: int,
    seed: int,
) -> list[Score]:
    """One Score for every latent of x0 [n, c, h, w], draw and bin.

    `denoise` is called once for each bin and draw; `names` are the examples' keys.
    """
    scores = []
    for draw in range(draws):
        keys = RandomKeys(seed, tuple(names), (draw,) * len(names))
        eps = keys.normal("validation", tuple(x0.shape[1:])).to(x0)
        for i, t in enumerate(bin_midpoints(schedule, bins).tolist()):
            level = schedule.level(torch.full((len(names),), t, dtype=torch.float32)).to(x0.device)
            out = denoise(noise.add_noise(x0, eps, level), level, torch.arange(len(names)))
            target = PREDICTIONS[prediction].target(x0, eps, level)
            errors = (out.double() - target.double()).square().flatten(1).mean(1).tolist()
            scores += [Score(name, draw, i, t, error) for name, error in zip(names, errors)]
    return scores


def mean_by_timestep(scores: Iterable[Score]) -> dict[float, float]:
    """Mean loss per timestep, ascending."""
    groups: dict[float, list[float]] = defaultdict(list)
    for score in scores:
        groups[score.t].append(score.loss)
    return {t: sum(losses) / len(losses) for t, losses in sorted(groups.items())}


def mean_loss(scores: Sequence[Score]) -> float:
    """The mean over images, timesteps and draws."""
    return sum(score.loss for score in scores) / len(scores)


def read_scores(run: Path) -> dict[int, list[Score]]:
    """Step -> scores, from val.jsonl of a run folder. Raises UserError when there is none."""
    file = run / "val.jsonl"
    if not file.is_file() and (run / "summary.json").is_file():
        raise UserError(
            f"{run} was trained without validation (--validation.every -1), so there is no loss to "
            "compare; train it with validation"
        )
    if not file.is_file():
        raise UserError(f"{run} has no val.jsonl; is it the folder of a finished run?")
    steps: dict[int, list[Score]] = defaultdict(list)
    for row in read_rows(file, "a run writes it; remove the line or train again", SCORE_FIELDS):
        steps[row["step"]].append(Score(*(row[name] for name in Score._fields)))
    return steps


class PairedDifference(NamedTuple):
    """Mean of B - A over pairs of scores of the same image, draw and timestep."""

    t: float  # nan: over all timesteps
    a: float
    b: float
    mean: float
    error: float  # standard error of the mean
    pairs: int


def compare_scores(run_a: Path, run_b: Path) -> list[PairedDifference]:
    """The paired difference of two runs' last validations, per timestep and over all of them.

    The last entry is over all timesteps. Both scores of a pair have the same noise, so only the
    models differ; the standard error is over images and draws (for the total: over the images'
    means). Raises UserError when the runs were not scored on the same images,
    timesteps and draws.
    """
    a, b = _last_losses(run_a), _last_losses(run_b)
    if a.keys() != b.keys():
        raise UserError(
            f"{run_a} and {run_b} were validated on different images, timesteps or draws; "
            "give both the same [validation] and data"
        )
    by_timestep: dict[float, list[tuple[float, float]]] = defaultdict(list)
    by_image: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for key, draw, t in sorted(a):
        pair = (a[key, draw, t], b[key, draw, t])
        by_timestep[t].append(pair)
        by_image[key, draw].append(pair)
    differences = [_difference(t, by_timestep[t]) for t in sorted(by_timestep)]
    means = []
    for image in sorted(by_image):
        own = by_image[image]
        mean_a, mean_b = (sum(losses) / len(own) for losses in zip(*own))
        means.append((mean_a, mean_b))
    differences.append(_difference(math.nan, means))
    return differences


def _last_losses(run: Path) -> dict[tuple[str, int, float], float]:
    """(key, draw, t) -> loss of a run's last validation."""
    steps = read_scores(run)
    if not steps:
        raise UserError(
            f"{run / 'val.jsonl'} is empty; was the run stopped before its first validation?"
        )
    return {(score.key, score.draw, score.t): score.loss for score in steps[max(steps)]}


def _difference(t: float, pairs: Sequence[tuple[float, float]]) -> PairedDifference:
    n = len(pairs)
    changes = [y - x for x, y in pairs]
    mean = sum(changes) / n
    error = math.nan
    if n > 1:
        error = math.sqrt(sum((change - mean) ** 2 for change in changes) / (n - 1) / n)
    mean_a, mean_b = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    return PairedDifference(t, mean_a, mean_b, mean, error, n)


def comparison_table(rows: Sequence[PairedDifference], names: tuple[str, str]) -> str:
    """The comparison as a text table; `names` are those of the runs A and B."""
    head = (
        f"{'timestep':>9} {names[0][-14:]:>14} {names[1][-14:]:>14} {'B - A':>11} "
        f"{'std. error':>11} {'pairs':>6}"
    )
    lines = [head]
    for row in rows:
        losses = f"{row.a:14.6f} {row.b:14.6f} {row.mean:+11.6f} {row.error:11.6f}"
        lines.append(f"{format_timestep(row.t):>9} {losses} {row.pairs:6d}")
    return "\n".join(lines)


def format_timestep(t: float) -> str:
    """A timestep as text: 625 of a vp schedule, 0.625 of a flow, -0.625 of edm, all for nan.

    The t of edm ends near 1.1.
    """
    if math.isnan(t):
        return "all"
    return f"{t:.0f}" if t > 2 else f"{t:.3f}"
