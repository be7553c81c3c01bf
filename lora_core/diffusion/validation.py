"""Validation loss with the same images, timesteps and noise for every run, for comparison.

The training loss of one step depends mostly on the timestep that was drawn. Here every image is
scored at the midpoints of equal timestep bins with noise keyed by (seed, image, draw), by the plain
squared error of the network's output. The model before training is scored in the same way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class NoisedPoint(NamedTuple):
    """One draw of noise for each of some images, at one timestep."""

    draw: int
    bin: int
    t: float
    eps: Tensor  # [n, c, h, w]
    level: NoiseLevel  # [n] each


def noise_points(
    x0: Tensor, names: Sequence[str], schedule: Schedule, *, bins: int, draws: int, seed: int
) -> Iterator[NoisedPoint]:
    """The noise and levels at which latents x0 [n, c, h, w] of the images `names` are validated."""
    for draw in range(draws):
        keys = RandomKeys(seed, tuple(names), (draw,) * len(names))
        eps = keys.normal("validation", tuple(x0.shape[1:])).to(x0)
        for i, t in enumerate(bin_midpoints(schedule, bins).tolist()):
            level = schedule.level(torch.full((len(names),), t, dtype=torch.float32)).to(x0.device)
            yield NoisedPoint(draw, i, t, eps, level)


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
    for at in noise_points(x0, names, schedule, bins=bins, draws=draws, seed=seed):
        x_t = noise.add_noise(x0, at.eps, at.level)
        out = denoise(x_t, at.level, torch.arange(len(names)))
        target = PREDICTIONS[prediction].target(x0, at.eps, at.level)
        errors = (out.double() - target.double()).square().flatten(1).mean(1).tolist()
        scores += [Score(name, at.draw, at.bin, at.t, error) for name, error in zip(names, errors)]
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


def format_timestep(t: float) -> str:
    """A timestep as text: 625 of a vp schedule, 0.625 of a flow, -0.625 of edm, all for nan.

    The t of edm ends near 1.1.
    """
    if math.isnan(t):
        return "all"
    return f"{t:.0f}" if t > 2 else f"{t:.3f}"
