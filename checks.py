"""What can be wrong with a config and is found before any heavy work: numbers out of range, names that do not exist, options without effect."""

from __future__ import annotations

import importlib.util
import operator
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from lora_core import data, losses, noise, tokens
from lora_core.config import GROUPS, Config, to_table
from lora_core.errors import UserError

AT_LEAST: dict[int, tuple[str, ...]] = {
    1: ("batch_size", "accumulation", "log_every", "keep", "data.resolution", "data.repeats", "adapter.rank", "tokens.vectors", "prior.count",
        "samples.steps", "validation.bins", "validation.draws"),
    0: ("save_every", "threads", "data.workers", "data.variants", "adapter.alpha", "adapter.dropout", "tokens.norm_target", "prior.weight",
        "optimizer.warmup", "optimizer.clip", "samples.every", "validation.every"),
}  # fmt: skip
RANDOM_PIXELS = "a random crop, zoom, flip or jitter"
TRAINS_TOKENS = "a stage that trains tokens"


def _adapts(c: Config) -> bool:
    return c.trains("denoiser") or c.trains("text_encoder")


def _random(c: Config) -> bool:
    return c.data.crop == "random" or c.data.zoom > 1 or c.data.flip or c.data.jitter


# section or option -> (whether anything reads it, what it needs to be read)
READ: dict[str, tuple[Callable[[Config], bool], str]] = {
    "adapter": (_adapts, "a stage that trains denoiser or text_encoder"),
    "adapter.targets": (lambda c: c.trains("denoiser"), "a stage that trains denoiser"),
    "adapter.text_targets": (lambda c: c.trains("text_encoder"), "a stage that trains text_encoder"),
    "tokens": (lambda c: c.trains("tokens"), TRAINS_TOKENS),
    "tokens.norm_target": (lambda c: any("tokens" in s.groups and (s.norm or c.tokens.norm) == "pull" for s in c.stages), "--tokens.norm pull"),
    "samples.base_word": (lambda c: c.trains("tokens"), TRAINS_TOKENS),
    "samples.negative": (lambda c: c.samples.guidance != 1, "a --samples.guidance other than 1"),
    "prior": (lambda c: bool(c.prior.prompt), "--prior.prompt, the class prompt"),
    "noise.multires_discount": (lambda c: c.noise.multires_levels > 0, "--noise.multires-levels"),
    "data.variants": (_random, RANDOM_PIXELS),
    "data.cache": (lambda c: c.data.variants > 0 or not _random(c), f"--data.variants when there is {RANDOM_PIXELS}"),
    "optimizer.schedule_args": (lambda c: any(s.schedule in (None, c.optimizer.schedule) for s in c.stages), "a stage with that schedule"),
}


def config(c: Config) -> None:
    """Raises UserError for what is wrong with the config alone."""
    if not c.data.images:
        raise UserError("no training images; name their folder with --data.images")
    if not c.stages or any(stage.steps < 1 for stage in c.stages):
        raise UserError("a run needs at least one stage, and every stage at least one step (--stages.0.steps)")
    for least, names in AT_LEAST.items():
        for name in names:
            value: Any = reduce(getattr, name.split("."), c)
            if value < least:
                raise UserError(f"{_flag(name)} is {value}; expected at least {least}")
    if c.adapter.dropout >= 1:
        raise UserError(f"--adapter.dropout is {c.adapter.dropout:g}; expected a probability below 1")
    _stages(c)
    _effects(c)
    losses.resolve(c.weighting, losses.WEIGHTINGS, c.weighting_arg)
    noise.NoiseSettings(c.noise.offset, c.noise.multires_levels, c.noise.multires_discount, c.noise.perturbation)
    if c.report != "none" and importlib.util.find_spec(c.report) is None:
        raise UserError(f"--report {c.report} needs the package {c.report}: pip install 'lora_core[{c.report}]'")


def _stages(c: Config) -> None:
    for i, stage in enumerate(c.stages):
        if not stage.groups or len(set(stage.groups)) != len(stage.groups):
            raise UserError(f"stages.{i}.groups is {list(stage.groups)}; name one or more of {', '.join(GROUPS)}, each once")
        for table, option in ((stage.lr, "lr"), (stage.weight_decay, "weight-decay")):
            if unknown := set(table) - set(stage.groups):
                raise UserError(f"--stages.{i}.{option} names {_list(unknown)}, which this stage does not train ({', '.join(stage.groups)})")
            _positive(table, f"--stages.{i}.{option}")
        if stage.mask_temperature != 1 and c.data.masks == "none":
            raise UserError(f"--stages.{i}.mask-temperature has no effect without masks; add --data.masks file or alpha")
        if stage.mask_temperature <= 0:
            raise UserError(f"--stages.{i}.mask-temperature is {stage.mask_temperature:g}; expected a number above 0")
        if stage.norm is not None and "tokens" not in stage.groups:
            raise UserError(f"--stages.{i}.norm has no effect: this stage trains no tokens ({', '.join(stage.groups)})")
        low, high = c.noise.low if stage.low is None else stage.low, c.noise.high if stage.high is None else stage.high
        if not 0 <= low < high <= 1:
            raise UserError(f"stage {i} trains on the timesteps {low:g} to {high:g} of the schedule; expected fractions with 0 <= low < high <= 1")
    o = c.optimizer
    for values, option in ((o.lr, "lr"), (o.weight_decay, "weight-decay"), (o.betas, "betas")):
        if unknown := set(values) - {group for group in GROUPS if c.trains(group)}:
            raise UserError(f"--optimizer.{option} names {_list(unknown)}, which no stage trains")
        if option != "betas":
            _positive(values, f"--optimizer.{option}")


def _positive(table: dict[str, Any], option: str) -> None:
    for group, value in table.items():
        if not value >= 0:
            raise UserError(f"{option} {group}={value:g}; expected a number of at least 0")


def _effects(c: Config) -> None:
    """Raises UserError for the first option that differs from its default and that nothing reads."""
    given, default = to_table(c), to_table(Config())
    for name, (is_read, needs) in READ.items():
        ours, theirs = (reduce(operator.getitem, name.split("."), table) for table in (given, default))
        if ours != theirs and not is_read(c):
            option = next((f"{name}.{key}" for key in ours if ours[key] != theirs[key]), name) if name in ("adapter", "tokens", "prior") else name
            raise UserError(f"{_flag(option)} has no effect without {needs}; add that or leave the option out")


def initializers(c: Config) -> dict[str, str]:
    """Placeholder word -> its initializer. Raises UserError for a word given twice, or as many initializers as fit neither one nor all."""
    words, inits = c.tokens.words, c.tokens.init
    if len(set(words)) != len(words):
        raise UserError(f"--tokens.words has a word twice: {' '.join(words)}")
    if len(inits) not in (1, len(words)):
        raise UserError(f"--tokens.init has {len(inits)} entries for {len(words)} words; give one for all or one each")
    return dict(zip(words, inits if len(inits) == len(words) else inits * len(words)))


def placeholder(records: Sequence[data.Record], word: str) -> None:
    """Raises UserError when no caption has the placeholder word; prints a warning with the count when some lack it."""
    if not any(tokens.has_word(caption, word) for record in records for caption in record.captions):
        raise UserError(
            f"no caption has the placeholder word {word}, so its tokens would learn nothing; write it into the captions or set --tokens.words"
        )
    if lacking := data.missing_word(records, word):
        total = len({record.path for record in records})
        first = lacking[0].name
        print(f"warning: {len(lacking)} of {total} images have captions without the placeholder word {word}, first {first}", file=sys.stderr)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
