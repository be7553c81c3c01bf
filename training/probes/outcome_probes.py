"""Probes of what a run has written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lora_core.config import Config
from lora_core.diffusion.validation import Score
from lora_core.placeholders import has_placeholder
from lora_core.runs.pictures import CELLS
from training.inputs.training_images import LEFT_OUT
from training.log import Log
from training.samples import SampleImages
from training.scores import Scorer


class FinishedRun(NamedTuple):
    """A run whose files are written."""

    log: Log
    samples: SampleImages

    @property
    def config(self) -> Config:
        return self.log.config

    @property
    def folder(self) -> Path:
        return self.log.run.folder


Outcome = Callable[[FinishedRun], bool]  # whether an option has had its effect

# ---------------------------------------------------------------- files


def _due(run: FinishedRun, every: int) -> list[int]:
    """The steps of this process after which something was due."""
    steps = range(run.log.start + 1, run.config.steps + 1)
    return [i for i in steps if every > 0 and i % every == 0]


def has_grids(run: FinishedRun) -> bool:
    """--samples.every: whether the last grid that was due before the end is there."""
    due = [i for i in _due(run, run.config.samples.every) if i < run.config.steps][-1:]
    return all((run.folder / "samples" / f"step_{i:06d}.png").is_file() for i in due)


def _checkpoints(run: FinishedRun) -> list[Path]:
    """The folders of checkpoints, which are numbers: a file manager may put files beside them."""
    found = (run.folder / "checkpoints").iterdir()
    return [path for path in found if path.name.isdecimal() and path.is_dir()]


def has_checkpoints(run: FinishedRun) -> bool:
    """--save-every: whether as many checkpoints are there as are kept."""
    written = {*_due(run, run.config.save_every), run.config.steps}
    return len(_checkpoints(run)) >= min(run.config.keep, len(written))


def keeps_few(run: FinishedRun) -> bool:
    """--keep: whether no more checkpoints are there."""
    return len(_checkpoints(run)) <= run.config.keep


def lists_left_out(run: FinishedRun) -> bool:
    """--data.skip-bad: whether the files that are left out are listed, and none is trained on."""
    left_out = run.log.data.left_out
    used = {record.path for record in run.log.data.training.records}
    return (run.folder / LEFT_OUT).is_file() == bool(left_out) and not used & left_out.keys()


def logs_elsewhere(run: FinishedRun) -> bool:
    """--report: whether a logger got the rows."""
    return run.log.book.sink is not None


# ---------------------------------------------------------------- validation


def _newest_scores(run: FinishedRun) -> Sequence[Score]:
    scores = run.log.scores
    return scores[max(scores)] if scores else ()


def has_scores(run: FinishedRun) -> bool:
    """--validation.every: whether the last validation that was due is there, or none."""
    every, scores = run.config.validation.every, run.log.scores
    if every < 0:
        return not scores
    # the log keeps the first and the newest, which may be that of the end
    return max(scores, default=-1) >= max(_due(run, every), default=0)


def has_scored_images(run: FinishedRun) -> bool:
    """--validation.count: whether so many images are scored at most."""
    count, images = run.config.validation.count, run.log.data.scored.records
    scores = _newest_scores(run)
    keys = {image.key for image in images}  # copies of an image have the same
    are_as_many = not count or len(images) <= count
    return not scores or (are_as_many and {score.key for score in scores} == keys)


def has_bins(run: FinishedRun) -> bool:
    """--validation.bins: whether so many timesteps are scored."""
    scores = _newest_scores(run)
    return not scores or len({score.bin for score in scores}) == run.config.validation.bins


def has_draws(run: FinishedRun) -> bool:
    """--validation.draws: whether each has so many draws of noise."""
    scores = _newest_scores(run)
    return not scores or len({score.draw for score in scores}) == run.config.validation.draws


def draws_validation_noise(run: FinishedRun) -> bool:
    """--validation.seed: whether the first images have other losses than with the default seed."""
    log, scores = run.log, _newest_scores(run)
    if not scores or run.config.shard:  # all processes would have to do the same
        return True
    usual = replace(run.config.validation, seed=Config().validation.seed, draws=1)
    config, count = replace(run.config, validation=usual), len(log.data.validation)
    scorer = Scorer(config, log.data, log.model, run.samples.optimization)
    with log.model.evaluating(), run.samples.optimization.averaged():
        others = scorer.score_images(range(min(config.batch_size, count)))
    losses = {(score.key, score.bin): score.loss for score in scores if score.draw == 0}
    return any(losses.get((score.key, score.bin)) != score.loss for score in others)


# ---------------------------------------------------------------- images

SEED = re.compile(r", seed \d+$")  # the end of a caption of a prompt with several seeds


def _cells(run: FinishedRun, file: str, role: str) -> list[dict[str, Any]]:
    """What a sheet says of its images with this role: caption, strength ..."""
    with Image.open(run.folder / file) as sheet:
        sheet.load()
        facts = json.loads(sheet.info[CELLS])
    return [cell for cell in facts["cells"] if cell["role"] == role]


def _drawn_prompts(run: FinishedRun) -> list[str]:
    """The prompts of the images after training, without the seeds in their captions."""
    cells = _cells(run, "before_after.png", "after")
    return [SEED.sub("", cell["caption"]) for cell in cells]


def draws_prompts(run: FinishedRun) -> bool:
    """--samples.prompts: whether before_after.png has an image of each."""
    wanted = [SEED.sub("", prompt) for prompt in run.config.samples.prompts]
    return list(dict.fromkeys(_drawn_prompts(run))) == list(dict.fromkeys(wanted))


def draws_seeds(run: FinishedRun) -> bool:
    """--samples.seeds: whether it has as many images of each prompt."""
    counts = Counter(_drawn_prompts(run))
    return set(counts.values()) == {run.config.samples.seeds}


def draws_new_prompts(run: FinishedRun) -> bool:
    """--samples.new-prompts: whether it has an image of each, with other words where it has {}."""
    drawn = [cell["caption"] for cell in _cells(run, "before_after.png", "new")]
    wanted = run.config.samples.new_prompts
    if len(drawn) != len(wanted):
        return False
    for caption, text in zip(drawn, wanted):
        pattern = ".+".join(map(re.escape, text.split("{}")))
        if not re.fullmatch(pattern, caption):
            return False
    return True


def draws_strengths(run: FinishedRun) -> bool:
    """--samples.strengths: whether the last grid has images at each."""
    cells = _cells(run, f"samples/step_{run.config.steps:06d}.png", "sample")
    return {cell["strength"] for cell in cells} == set(run.config.samples.strengths)


def draws_base_word(run: FinishedRun) -> bool:
    """--samples.base-word: whether the captions of the base model's images have it in the place of
    a placeholder word, if there is one.
    """
    words = [placeholder.word for placeholder in run.log.model.placeholders]
    base_word = " ".join(run.config.samples.base_word.split())
    prompts = run.samples.shown_prompts
    cells = _cells(run, "before_after.png", "base")
    for prompt, cell in zip(prompts, cells, strict=True):
        has_word = any(has_placeholder(prompt, word) for word in words)
        if has_word and base_word not in cell["caption"]:
            return False
    return True


def shows_training_images(run: FinishedRun) -> bool:
    """--samples.show-data: whether before_after.png has any."""
    return bool(_cells(run, "before_after.png", "training"))
