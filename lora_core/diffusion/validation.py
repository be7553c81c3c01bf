"""A loss that can be compared: the same images, the same timesteps, the same noise, whoever trained
for however long.

The training loss of one step says mostly which timestep was drawn. Here every image is scored at
the midpoints of equal timestep bins with noise keyed by (seed, image, draw), by the plain squared
error of the network's output, and next to the score of the model before training.
"""

from __future__ import annotations

import json
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

RawDenoise = Callable[
    [Tensor, NoiseLevel, Tensor], Tensor
]  # (x_t before c_in, level, rows of the examples [b]) -> raw output


class Score(NamedTuple):
    """The squared error of one image at one timestep under one noise draw."""

    key: str
    draw: int
    bin: int
    t: float
    loss: float


class ValidationSet(NamedTuple):
    """The images that a run is validated on."""

    records: list[Record]
    words: str  # what the loss on them is called in tables and plots
    sentence: str


def choose_images(
    training: Sequence[Record], held_out: Sequence[Record] | None, count: int
) -> ValidationSet:
    """At most `count` images (0: all), those at i n / count of the n in order, and what they are:
    held-out ones, or those that are trained on.

    `training` may hold an image several times, and with its mask, which does not count here.
    Held-out images that are trained on as well, by path or content, are counted and not called
    held-out.
    """
    given = training if held_out is None else held_out
    images = list({record.path.resolve(): record for record in given}.values())
    number = min(count, len(images)) if count else len(images)
    chosen = [without_mask(images[i * len(images) // number]) for i in range(number)]
    paths, contents = (
        {record.path.resolve() for record in training},
        {record.key for record in training},
    )
    seen = sum(record.path.resolve() in paths or record.key in contents for record in chosen)
    kind = "held-out" if not seen else "training" if seen == number else "given"
    mixed = f"loss on {seen} training image{'' if seen == 1 else 's'} and others"
    words = {
        "held-out": "held-out loss",
        "training": "loss on the training images",
        "given": mixed,
    }[kind]
    share = (
        f"{number} {kind} image{'' if number == 1 else 's'}"
        if number == len(images)
        else f"{number} of {len(images)} {kind} images, evenly chosen"
    )
    trained = f", {seen} of them trained on" if kind == "given" else ""
    more = "" if number == len(images) else "; --validation.count 0 takes all"
    return ValidationSet(chosen, words, f"validation: {share}{trained}{more}")


def bin_midpoints(schedule: Schedule, bins: int) -> Tensor:
    """[bins] the timesteps in the middle of equal stretches of the schedule."""
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
    """One Score for every latent of x0 [n, c, h, w], draw and bin, one call of `denoise` for each
    bin and draw. `names` are the examples' keys.
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
    for s in scores:
        groups[s.t].append(s.loss)
    return {t: sum(v) / len(v) for t, v in sorted(groups.items())}


def mean_loss(scores: Sequence[Score]) -> float:
    return sum(s.loss for s in scores) / len(scores)


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
    for line in file.read_text().splitlines():
        row = json.loads(line)
        steps[row["step"]].append(Score(*(row[name] for name in Score._fields)))
    return steps


class PairedDifference(NamedTuple):
    """Mean of B - A over pairs of scores of the same image, draw and timestep, and its standard
    error.
    """

    t: float
    a: float
    b: float
    mean: float
    error: float
    pairs: int


def compare_scores(run_a: Path, run_b: Path) -> list[PairedDifference]:
    """The paired difference per timestep of the last validations of two runs; the last row (t =
    nan) is over all timesteps.

    The pairs of one image at one timestep share their noise, so what differs is the model; the
    standard error is taken over images and draws (for the total: over the images' means). Raises
    UserError when the runs were not scored on the same images, timesteps and draws.
    """
    last = [steps[max(steps)] for steps in (read_scores(run_a), read_scores(run_b))]
    a, b = ({(s.key, s.draw, s.t): s.loss for s in scores} for scores in last)
    if a.keys() != b.keys():
        raise UserError(
            f"{run_a} and {run_b} were validated on different images, timesteps or draws; "
            "give both the same [validation] and data"
        )
    rows = []
    for t in sorted({t for _, _, t in a}):
        rows.append(_difference(t, [(a[k], b[k]) for k in sorted(a) if k[2] == t]))
    whole = [[(a[k], b[k]) for k in a if k[:2] == pair] for pair in sorted({k[:2] for k in a})]
    rows.append(
        _difference(
            math.nan,
            [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in whole],
        )
    )
    return rows


def _difference(t: float, pairs: Sequence[tuple[float, float]]) -> PairedDifference:
    n = len(pairs)
    changes = [y - x for x, y in pairs]
    centre = sum(changes) / n
    error = math.sqrt(sum((c - centre) ** 2 for c in changes) / (n - 1) / n) if n > 1 else math.nan
    return PairedDifference(
        t, sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n, centre, error, n
    )


def comparison_table(rows: Sequence[PairedDifference], names: tuple[str, str]) -> str:
    """The comparison as text."""
    head = (
        f"{'timestep':>9} {names[0][-14:]:>14} {names[1][-14:]:>14} {'B - A':>11} "
        f"{'std. error':>11} {'pairs':>6}"
    )
    lines = [
        f"{format_timestep(r.t):>9} {r.a:14.6f} {r.b:14.6f} {r.mean:+11.6f} {r.error:11.6f} "
        f"{r.pairs:6d}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def format_timestep(t: float) -> str:
    """A timestep for people: 625 of a vp schedule, 0.625 of a flow, -0.625 of edm (whose t ends
    near 1.1), all for nan.
    """
    return "all" if math.isnan(t) else f"{t:.0f}" if t > 2 else f"{t:.3f}"
