"""What can be wrong with a config and is found before any heavy work: numbers out of range, names that do not exist, options without effect."""

from __future__ import annotations

import importlib.util
import math
import operator
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from lora_core import tokens
from lora_core.adapters import custom_files, injection, targets
from lora_core.adapters.injection import AdapterSpec
from lora_core.adapters.kinds import is_low_rank, kind_class
from lora_core.adapters.targets import matches_pattern, require_match
from lora_core.config import GROUPS, Config
from lora_core.data import dataset
from lora_core.diffusion import losses, noise
from lora_core.errors import UserError
from lora_core.optim import building, schedules
from lora_core.runs import card, destination, lock, reports
from lora_core.runs.run_folder import Run
from lora_core.text import check_unicode
from lora_core.toml import to_table
from models import Family, Layout
from training.optimizer_check import try_optimizer

AT_LEAST: dict[int, tuple[str, ...]] = {
    1: ("batch_size", "accumulation", "log_every", "keep", "data.resolution", "data.repeats", "adapter.rank", "prior.count",
        "samples.steps", "validation.bins", "validation.draws", "data.bucket_step"),
    -1: ("validation.every",),
    0: ("save_every", "threads", "data.workers", "data.variants", "adapter.alpha", "tokens.norm_target", "prior.weight", "prior.swap_weight",
        "optimizer.warmup", "optimizer.clip", "samples.every", "validation.count", "clip_skip", "max_sequence_length", "tokens.vectors"),
}  # fmt: skip
FRACTIONS = (
    "adapter.dropout",
    "adapter.rank_dropout",
    "adapter.module_dropout",
    "data.caption_dropout",
    "ema",
)  # [0, 1)
ARGUMENTS = (
    "args",
    "schedule_args",
    "density_args",
    "loss_arg",
    "weighting_arg",
)  # of functions, which may take infinity
RANDOM_PIXELS = "a random crop, zoom, flip or jitter"
TRAINS_TOKENS = "a stage that trains tokens"
VALIDATION = "--validation.every 0 or more"
CLASS_PROMPT = "--prior.prompt, the class prompt"
DATASET = "--data.dataset"
READS = (
    "model",
    "model_config",
    "vae",
    "data.images",
    "data.cache",
    "validation.images",
    "prior.images",
)  # files and folders that are not the run's
CODE = (
    "loss",
    "step",
    "optimizer.name",
    "optimizer.schedule",
    "adapter.kind",
)  # may name something of one's own, file.py:name


def _adapts(c: Config) -> bool:
    return c.trains("denoiser") or c.trains("text_encoder")


def _random(c: Config) -> bool:
    return c.data.crop == "random" or c.data.zoom > 1 or c.data.flip or c.data.jitter


# section or option -> (whether anything reads it, what it needs to be read)
READ: dict[str, tuple[Callable[[Config], bool], str]] = {
    "adapter": (_adapts, "a stage that trains denoiser or text_encoder"),
    "adapter.targets": (lambda c: c.trains("denoiser"), "a stage that trains denoiser"),
    "adapter.text_targets": (
        lambda c: c.trains("text_encoder"),
        "a stage that trains text_encoder",
    ),
    "tokens": (lambda c: c.trains("tokens"), TRAINS_TOKENS),
    "tokens.norm_target": (
        lambda c: any(
            "tokens" in s.groups and (s.norm or c.tokens.norm) == "pull" for s in c.stages
        ),
        "--tokens.norm pull",
    ),
    "samples.base_word": (lambda c: c.trains("tokens"), TRAINS_TOKENS),
    "samples.negative": (lambda c: c.samples.guidance != 1, "a --samples.guidance other than 1"),
    "tokens.norm": (
        lambda c: any("tokens" in s.groups and s.norm is None for s in c.stages),
        "a stage of tokens that has no norm of its own",
    ),
    "noise.low": (
        lambda c: any(s.low is None for s in c.stages),
        "a stage that has no low of its own",
    ),
    "noise.high": (
        lambda c: any(s.high is None for s in c.stages),
        "a stage that has no high of its own",
    ),
    "optimizer.schedule": (
        lambda c: any(s.schedule is None for s in c.stages),
        "a stage that has no schedule of its own",
    ),
    **{
        f"validation.{name}": (lambda c: c.validation.every >= 0, VALIDATION)
        for name in ("images", "count", "bins", "draws", "seed")
    },
    "data.dropped": (lambda c: c.data.caption_dropout > 0, "--data.caption-dropout"),
    "prior.images": (lambda c: bool(c.prior.prompt), CLASS_PROMPT),
    "prior.count": (lambda c: bool(c.prior.prompt), CLASS_PROMPT),
    "prior.weight": (lambda c: bool(c.prior.prompt), CLASS_PROMPT),
    "prior.swap_weight": (lambda c: bool(c.prior.swap), "--prior.swap"),
    "adapter.norm_grad": (lambda c: c.adapter.kind == "dora", "--adapter.kind dora"),
    "autocast": (
        lambda c: c.precision == "fp32",
        "--precision fp32, weights that are not in bf16 already",
    ),
    "weighting_arg": (lambda c: c.weighting != "none", "--weighting"),
    "noise.density_args": (lambda c: c.noise.density != "uniform", "--noise.density"),
    "data.split": (lambda c: bool(c.data.dataset), DATASET),
    "data.image_column": (lambda c: bool(c.data.dataset), DATASET),
    "data.caption_column": (
        lambda c: bool(c.data.dataset) or c.data.captions in ("auto", "metadata"),
        "captions from a dataset or metadata",
    ),
    "resume_anyway": (lambda c: c.resume, "--resume"),
    "data.bucket_step": (lambda c: c.data.buckets, "--data.buckets"),
    "optimizer.lora_plus": (_adapts, "a stage that trains denoiser or text_encoder"),
    "noise.multires_discount": (lambda c: c.noise.multires_levels > 0, "--noise.multires-levels"),
    "data.variants": (_random, RANDOM_PIXELS),
    "data.cache": (
        lambda c: c.data.variants > 0 or not _random(c),
        f"--data.variants when there is {RANDOM_PIXELS}",
    ),
    "optimizer.schedule_args": (
        lambda c: any(s.schedule in (None, c.optimizer.schedule) for s in c.stages),
        "a stage with that schedule",
    ),
}


def check_startup(c: Config) -> None:
    """Raises UserError for what is known to be wrong before data and weights are read: ranks, the config, the run's folder, logins."""
    lock.check_single_process(os.environ)
    check_config(c)
    check_run_folder(c)
    check_services(c)


def check_config(c: Config, *, data: bool = True) -> None:
    """Raises UserError for what is wrong with the config alone; without `data` it may lack images."""
    if dataset and bool(c.data.images) == bool(c.data.dataset):
        raise UserError("give either a folder with --data.images or a dataset with --data.dataset")
    if not c.stages or any(stage.steps < 1 for stage in c.stages):
        raise UserError(
            "a run needs at least one stage, and every stage at least one step (--stages.0.steps)"
        )
    for least, names in AT_LEAST.items():
        for name in names:
            value: Any = reduce(getattr, name.split("."), c)
            if value < least:
                raise UserError(f"{_flag(name)} is {value}; expected at least {least}")
    for name in FRACTIONS:
        value = reduce(getattr, name.split("."), c)
        if not 0 <= value < 1:
            raise UserError(f"{_flag(name)} is {value:g}; expected a number in [0, 1)")
    if not c.optimizer.lora_plus > 0 or not c.noise.shift > 0:
        raise UserError(
            f"--optimizer.lora-plus and --noise.shift are factors above 0, got {c.optimizer.lora_plus:g} and {c.noise.shift:g}"
        )
    if c.noise.dynamic_shift and c.noise.shift != 1:
        raise UserError(
            f"--noise.dynamic-shift takes its shift from the model, --noise.shift {c.noise.shift:g} gives another; choose one of the two"
        )
    check_unicode(to_table(c), "")
    _stages(c)
    _finite(c, "--")
    _effects(c)
    _placeholders(c)
    _schedules(c)
    losses.check_weighting(c.weighting, c.weighting_arg)
    noise.NoiseSettings(
        c.noise.offset, c.noise.multires_levels, c.noise.multires_discount, c.noise.perturbation
    )
    if c.report != "none" and importlib.util.find_spec(c.report) is None:
        raise UserError(f"--report {c.report} needs the package {c.report}: pip install {c.report}")


def check_run_folder(c: Config) -> None:
    """Raises UserError where the run cannot be written to OUT, or where that would touch what is not the run's; changes nothing."""
    given: dict[str, Any] = {_flag(name): reduce(getattr, name.split("."), c) for name in READS}
    for name in CODE if c.overwrite else ():
        named: Any = reduce(getattr, name.split("."), c)
        given[_flag(name)] = named.rpartition(":")[0]
    destination.check_writable(c.out)
    destination.check_file_names(c.out)
    for option in ("--data.cache", "--prior.images"):
        if given[option]:
            destination.check_path_lengths(option, [Path(given[option]) / "0"])
    if not c.resume:
        destination.check_apart_from_inputs(c.out, given, overwrite=c.overwrite)
    out, _ = Run.check(c.out, resume=c.resume, overwrite=c.overwrite)
    if c.overwrite:
        destination.check_overwritten(out)
    lock.check_lock_free(out)


def check_services(c: Config) -> None:
    """Raises UserError where --report or --push-to-hub would fail at the end, after all the work."""
    reports.check_login(c.report)
    if c.push_to_hub:
        card.check_push_target(c.push_to_hub)


def _schedules(c: Config) -> None:
    """Raises UserError for a learning rate that a stage never reaches or that its schedule does not give."""
    o = c.optimizer
    for i, stage in enumerate(c.stages):
        if o.warmup > stage.steps:
            raise UserError(
                f"--optimizer.warmup is {o.warmup} steps, longer than stage {i} of {stage.steps}, which would end before its learning rate is "
                f"reached; lower it or raise --stages.{i}.steps"
            )
        name = stage.schedule or o.schedule
        multiplier = schedules.resolve_schedule(
            name, **(o.schedule_args if name == o.schedule else {})
        )
        for step in (0, stage.steps - 1):
            multiplier(step, stage.steps, o.warmup)


def check_optimizer(c: Config, device: torch.device) -> None:
    """Raises UserError for an optimiser that this run could not step, steer or keep; prints a warning for one that it could not resume."""
    o = c.optimizer
    groups = [group for group in GROUPS if c.trains(group)]
    settings = building.group_settings(
        o.name, groups, lr=o.lr, decay=o.weight_decay, betas=o.betas
    )
    for i, stage in enumerate(c.stages):
        if stage.weight_decay and "weight_decay" not in building.optimizer_arguments(o.name):
            raise UserError(
                f"--stages.{i}.weight-decay has no effect: {o.name} takes no weight_decay; leave it out"
            )
    if c.ema and building.is_schedule_free(building.resolve_optimizer(o.name)):
        raise UserError(f"--ema averages what {o.name} averages itself; leave out one of the two")
    for sentence in try_optimizer(o.name, settings, o.args, device):
        print(f"warning: {sentence}", file=sys.stderr)


def report_adapters(
    c: Config, trained: Mapping[str, torch.nn.Module], paths: Mapping[str, Sequence[str]]
) -> bool:
    """Whether the adapters have a low-rank form; prints where they are, and which files are written where they have none.

    Raises UserError for those that could not be written in any form.
    """
    has_factors = all(custom_files.has_factors(module) for module in trained.values())
    rank = f", rank {c.adapter.rank}" if has_factors else ""
    for name, module in trained.items():
        count = sum(p.numel() for p in injection.adapter_parameters(module))
        print(
            f"{name}: {c.adapter.kind}{rank}, {count:,} parameters on {targets.target_table(paths[name])}"
        )
    if not has_factors:
        custom_files.check_custom_kind(trained, c.adapter.kind, Path(c.out).resolve().name)
    return has_factors


def drops_to_zeros(c: Config, family: Family) -> bool:
    """Whether zeros stand for the captions that are dropped."""
    return c.data.caption_dropout > 0 and bool(family.zeros) and c.data.dropped != "empty"


def rerun_reason(c: Config) -> str:
    """Why a config alone does not repeat its run; empty where it does."""
    options = [
        option for option, value in (("loss", c.loss), ("step", c.step)) if value.startswith("<")
    ]
    if not options:
        return ""
    return f"the run's settings; its {' and '.join(options)} came from Python and no file gives them back: train(config, {options[0]}=...)"


def check_device(c: Config, device: torch.device) -> None:
    """Raises UserError for what this machine cannot do; prints on what the run computes."""
    if c.cuda_graph and device.type != "cuda":
        raise UserError(
            f"--cuda-graph needs an NVIDIA GPU, and this run is on {device.type}; leave it out"
        )
    if c.cuda_graph and c.optimizer.name not in ("adamw", "prodigy"):
        raise UserError(
            f"--cuda-graph captures the optimizers adamw and prodigy, not {c.optimizer.name}; choose one of them or leave it out"
        )
    if c.compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError(
            "--compile on a CPU needs a C++ compiler (g++ or clang++); install one or leave it out"
        )
    threads = (
        f", {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
        if device.type == "cpu"
        else ""
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(
        f"device: {name}{threads}, weights in {c.precision}{', products in bf16' if c.autocast else ''}"
    )


def check_capturable(loss: Callable[..., Any], name: str, step: Callable[..., Any] | None) -> None:
    """Raises UserError where a CUDA graph would repeat what the loss or the step did once. `step` is the caller's own, if it has one."""
    if not losses.is_capturable(loss):
        raise UserError(
            f"--cuda-graph replays what the loss {name} did at the capture; if it does the same in each step and reads nothing back, "
            f"say so: {name}.capturable = True"
        )
    if step is not None and not getattr(step, "capturable", False):
        raise UserError(
            "--cuda-graph replays what the step did at the capture; if it does the same in each step, say so: step.capturable = True"
        )


def _stages(c: Config) -> None:
    for i, stage in enumerate(c.stages):
        if not stage.groups or len(set(stage.groups)) != len(stage.groups):
            raise UserError(
                f"stages.{i}.groups is {list(stage.groups)}; name one or more of {', '.join(GROUPS)}, each once"
            )
        for table, option in ((stage.lr, "lr"), (stage.weight_decay, "weight-decay")):
            if unknown := set(table) - set(stage.groups):
                raise UserError(
                    f"--stages.{i}.{option} names {_list(unknown)}, which this stage does not train ({', '.join(stage.groups)})"
                )
            _positive(table, f"--stages.{i}.{option}")
        if stage.mask_temperature != 1 and c.data.masks == "none":
            raise UserError(
                f"--stages.{i}.mask-temperature has no effect without masks; add --data.masks file, alpha, auto or any"
            )
        if stage.mask_temperature <= 0:
            raise UserError(
                f"--stages.{i}.mask-temperature is {stage.mask_temperature:g}; expected a number above 0"
            )
        if stage.norm is not None and "tokens" not in stage.groups:
            raise UserError(
                f"--stages.{i}.norm has no effect: this stage trains no tokens ({', '.join(stage.groups)})"
            )
        low, high = (
            c.noise.low if stage.low is None else stage.low,
            c.noise.high if stage.high is None else stage.high,
        )
        if not 0 <= low < high <= 1:
            raise UserError(
                f"stage {i} trains on the timesteps {low:g} to {high:g} of the schedule; expected fractions with 0 <= low < high <= 1"
            )
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


def _finite(section: Any, flag: str) -> None:
    """Raises UserError for NaN and infinity, but for arguments of functions and a norm that is not to be clipped. `flag`: how its options begin."""
    for name in (field.name for field in fields(section)):
        value, option = getattr(section, name), flag + name.replace("_", "-")
        if is_dataclass(value):
            _finite(value, f"{option}.")
        for i, stage in enumerate(value if name == "stages" else ()):
            _finite(stage, f"{option}.{i}.")
        numbers = {f"{option} is ": value} if (name, value) != ("clip", math.inf) else {}
        numbers |= (
            {f"{option} {key}=": one for key, one in value.items()}
            if isinstance(value, dict) and name not in ARGUMENTS
            else {}
        )
        for told, number in numbers.items():
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{told}{number:g}; expected a finite number")


def _effects(c: Config) -> None:
    """Raises UserError for the first option that differs from its default and that nothing reads."""
    given, default = to_table(c), to_table(Config())
    for name, (is_read, needs) in READ.items():
        ours, theirs = (
            reduce(operator.getitem, name.split("."), table) for table in (given, default)
        )
        if ours != theirs and not is_read(c):
            option = (
                next((f"{name}.{key}" for key in ours if ours[key] != theirs[key]), name)
                if name in ("adapter", "tokens", "prior")
                else name
            )
            raise UserError(
                f"{_flag(option)} has no effect without {needs}; add that or leave the option out"
            )
    for name in ("samples.every", "validation.every", "save_every"):
        if (every := reduce(getattr, name.split("."), c)) > c.steps:  # type: ignore[operator]
            print(
                f"warning: {_flag(name)} {every} has no effect in a run of {c.steps} steps",
                file=sys.stderr,
            )


def _placeholders(c: Config) -> None:
    """Raises UserError for a learned word where a text stands for what is known already."""
    learned = [*(c.tokens.words if c.trains("tokens") else ()), *c.prior.swap]
    plain = {"--prior.prompt": c.prior.prompt, "--samples.base-word": c.samples.base_word}
    plain |= {f"--prior.swap {word}": name for word, name in c.prior.swap.items()}
    plain |= {"--tokens.init": " ".join(c.tokens.init)} if c.trains("tokens") else {}
    for option, text in plain.items():
        if word := next(
            (word for word in learned if word and tokens.has_placeholder(text, word)), ""
        ):
            raise UserError(
                f"{option} is {text!r} and holds the placeholder word {word}, which is still to be learned; write an ordinary word there"
            )


def plan_adapters(c: Config, layout: Layout) -> dict[str, AdapterSpec]:
    """Component -> its adapters, as far as the names of a model's layers tell; needs no weights.

    A pattern of [adapter] has to match in one of the components, not in all. Raises UserError for a target that matches nothing.
    """
    if broken := {glob: rank for glob, rank in c.adapter.rank_pattern.items() if rank % 1}:
        raise UserError(
            "; ".join(f"--adapter.rank-pattern {glob}={rank:g}" for glob, rank in broken.items())
            + "; expected a whole number"
        )
    a, text = c.adapter, [name for name in layout.presets if name in layout.encoders]
    has_rank = is_low_rank(kind_class(a.kind))
    wanted = (
        dict.fromkeys([name for name in layout.presets if name not in text], a.targets)
        if c.trains("denoiser")
        else {}
    )
    wanted |= dict.fromkeys(text, a.text_targets) if c.trains("text_encoder") else {}
    chosen = {component: _matched(layout, component, names) for component, names in wanted.items()}
    everywhere = [path for _, paths in chosen.values() for path in paths]
    for option, patterns in {
        "exclude": a.exclude,
        "rank-pattern": a.rank_pattern,
        "alpha-pattern": a.alpha_pattern,
    }.items():
        for pattern in patterns:
            require_match(pattern, everywhere, f"--adapter.{option}")
    specs = {}
    for component, (globs, paths) in chosen.items():
        here = [
            p
            for p in (*a.exclude, *a.rank_pattern, *a.alpha_pattern)
            if any(matches_pattern(path, p) for path in paths)
        ]
        specs[component] = AdapterSpec(
            globs, exclude=tuple(p for p in a.exclude if p in here), kind=a.kind, rank=a.rank, alpha=a.alpha or None,
            rank_pattern={p: int(rank) for p, rank in a.rank_pattern.items() if p in here},
            alpha_pattern={p: alpha for p, alpha in a.alpha_pattern.items() if p in here},
            dropout=a.dropout, rank_dropout=a.rank_dropout, module_dropout=a.module_dropout, rslora=a.rslora, init=a.init,
            norm_grad=a.norm_grad,
        )  # fmt: skip
        if not has_rank:
            specs[component].check_full()
    return specs


def _matched(
    layout: Layout, component: str, names: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    """(globs, layers) that the targets mean in a component."""
    presets, part = layout.presets[component], layout.component(component)
    paths = [path.removeprefix(part.module_prefix) for path in part.shapes]
    for name in names:
        if (
            name not in presets
            and re.fullmatch(r"[\w-]+", name)
            and not any(matches_pattern(path, name) for path in paths)
        ):
            raise UserError(
                f"{name!r} is no layer of {component} and none of its presets, which are {', '.join(presets)}"
            )
    globs = tuple(glob for name in names for glob in presets.get(name, (name,)))
    return globs, targets.select_paths(paths, globs)


def check_model(c: Config, family: Family) -> None:
    """Raises UserError for what is wrong with the config for this model."""
    if c.data.resolution % family.multiple or (
        c.data.buckets and c.data.bucket_step % family.multiple
    ):
        option = "resolution" if c.data.resolution % family.multiple else "bucket-step"
        value = c.data.resolution if option == "resolution" else c.data.bucket_step
        raise UserError(
            f"--data.{option} {value} is no multiple of {family.multiple}, which the sides of this model's images must be"
        )
    if c.noise.zero_terminal_snr and family.prediction == "epsilon":
        raise UserError(
            "--noise.zero-terminal-snr: at pure noise an epsilon says nothing about the image; add --noise.prediction v_prediction"
        )
    if family.schedule.kind != "flow" and (c.noise.dynamic_shift or c.noise.shift != 1):
        raise UserError(
            "--noise.shift and --noise.dynamic-shift have no effect on this model, which is no flow model; leave them out"
        )
    if c.noise.guidance != Config().noise.guidance and not family.distilled_guidance:
        raise UserError(
            "--noise.guidance has no effect on this model, which is told no guidance scale; leave it out"
        )
    if c.data.dropped != "model" and not family.zeros:
        raise UserError(
            f"--data.dropped {c.data.dropped} has no effect on this model, which samples an empty prompt with its encoding; leave it out"
        )
    if c.validation.every >= 0 and c.validation.bins > len(family.schedule):
        bins = f"--validation.bins is {c.validation.bins}"
        raise UserError(
            f"{bins}, more than the {len(family.schedule)} timesteps of this model, each of which is a bin of its own then; lower it"
        )
    if c.data.caption_dropout:
        print(
            f"dropped captions: {'zeros' if drops_to_zeros(c, family) else 'the encoding of the empty prompt'}"
        )
    if c.samples.negative and family.distilled_guidance:
        raise UserError(
            "--samples.negative has no effect on a guidance-distilled model; leave it out"
        )


def scheduler_changes(c: Config) -> dict[str, Any]:
    """Keys of the model's scheduler_config.json that the config replaces."""
    changes: dict[str, Any] = (
        {} if c.noise.prediction == "model" else {"prediction_type": c.noise.prediction}
    )
    return changes | (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if c.noise.zero_terminal_snr
        else {}
    )


def swap_words(caption: str, swap: Mapping[str, str]) -> str:
    """The caption with each placeholder word replaced by its class."""
    return tokens.bind_placeholders(
        caption, [tokens.Placeholder(word, (name,)) for word, name in swap.items()]
    )


def token_initializers(c: Config) -> dict[str, str]:
    """Placeholder word -> its initializer. Raises UserError for a word given twice, or as many initializers as fit neither one nor all."""
    words, inits = c.tokens.words, c.tokens.init
    if len(set(words)) != len(words):
        raise UserError(f"--tokens.words has a word twice: {' '.join(words)}")
    if len(inits) not in (1, len(words)):
        raise UserError(
            f"--tokens.init has {len(inits)} entries for {len(words)} words; give one for all or one each"
        )
    return dict(zip(words, inits if len(inits) == len(words) else inits * len(words)))


def check_placeholder(records: Sequence[dataset.Record], word: str) -> None:
    """Raises UserError when no caption has the placeholder word; prints a warning with the count when some lack it."""
    if not any(
        tokens.has_placeholder(caption, word) for record in records for caption in record.captions
    ):
        raise UserError(
            f"no caption has the placeholder word {word}, so its tokens would learn nothing; write it into the captions or set --tokens.words"
        )
    if lacking := dataset.images_missing_word(records, word):
        total = len({record.path for record in records})
        first = lacking[0].name
        print(
            f"warning: {len(lacking)} of {total} images have captions without the placeholder word {word}, first {first}",
            file=sys.stderr,
        )


def check_token_limit(
    family: Family,
    embeddings: Mapping[str, Any],
    abstractions: Sequence[tokens.Placeholder],
    records: Sequence[dataset.Record],
) -> None:
    """Raises UserError for a learned token that every caption loses to the text encoder's limit; prints a warning where some do."""
    captions = {caption: record.path.name for record in records for caption in record.captions}
    ids = [
        rows for rows in family.tokenize([""]).values() if rows.ndim == 2
    ]  # in the tokenizers' order
    limits = dict(zip(family.tokenizers, (rows.shape[1] for rows in ids), strict=True))
    for name in embeddings:
        found = {
            text: tokens.truncated_tokens(text, abstractions, family.tokenizers[name], limits[name])
            for text in captions
        }
        reader = f"the {limits[name]} tokens that {name} reads"
        cut = [text for text, words in found.items() if any(words.values())]
        for token in [t for a in abstractions for t in a.names]:
            lost = [words[token] for words in found.values() if token in words]
            if lost and all(lost):
                word = next(a.word for a in abstractions if token in a.names)
                raise UserError(
                    f"the token {token} of {word} lies beyond {reader} in every caption, first of {captions[cut[0]]}, so it would learn nothing; "
                    f"write {word} nearer the beginning or shorten the captions"
                )
        if cut:
            first = f"{len(cut)} of {len(captions)} captions lose learned tokens beyond {reader}, first of {captions[cut[0]]}"
            print(
                f"warning: {first}; write the placeholder word nearer the beginning",
                file=sys.stderr,
            )


def check_masks(c: Config, folder: dataset.ImageDataset) -> None:
    """Raises UserError where masks that may be absent are absent everywhere."""
    if c.data.masks in ("auto", "any") and not folder.has_masks:
        raise UserError(
            f"--data.masks {c.data.masks} finds no mask for any image; add NAME.mask.png beside NAME or leave --data.masks out"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
