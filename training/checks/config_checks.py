"""Checks of a config before data and model are read: ranges, options without effect, the run's
folder, and the machine: device, optimizer, CUDA graph. model_checks.py checks data and model.
"""

from __future__ import annotations

import importlib.util
import operator
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from lora_core import distributed, kernels
from lora_core.config import Config, Stage
from lora_core.diffusion import densities, losses, sampling
from lora_core.errors import UserError
from lora_core.optim import building
from lora_core.placeholders import has_placeholder
from lora_core.runs import card, destination, lock, trackers
from lora_core.runs.run_folder import Run
from lora_core.settings import CaptionSettings, check_options
from lora_core.stage_settings import GROUPS
from lora_core.text import check_unicode
from lora_core.toml import to_table
from training.checks.combination_checks import check_combinations
from training.checks.group_checks import check_groups, check_schedules, stage_schedules
from training.checks.optimizer_check import try_optimizer
from training.inputs.mask_files import parse_segmenter
from training.inputs.subsets import check_subsets, has_class_subset, list_image_folders
from training.inputs.training_images import check_data_options
from training.networks.base_weights import check_base_weights

# Options that name input files and folders, which the run must not overwrite.
INPUT_PATHS = (
    "model",
    "model_config",
    "vae",
    "data.images",
    "data.pairs",
    "data.cache",
    "validation.images",
    "prior.images",
)
# Options that may name a function or class in a file, file.py:name.
CODE = (
    "loss",
    "step",
    "weighting",
    "noise.density",
    "optimizer.name",
    "optimizer.schedule",
    "adapter.kind",
    "samples.sampler",
    "family",
)


# ---------------------------------------------------------------- options without effect


def _trains_adapters(c: Config) -> bool:
    return c.trains("denoiser", "text_encoder")


def _some_stage(test: Callable[[Config, Stage], bool]) -> Callable[[Config], bool]:
    return lambda c: any(test(c, stage) for stage in c.stages)


def _has_norm_target(c: Config, stage: Stage) -> bool:
    return "tokens" in stage.groups and (stage.norm or c.tokens.norm) in ("pull", "stop")


def _some_folder(test: Callable[[CaptionSettings], bool]) -> Callable[[Config], bool]:
    return lambda c: any(test(folder.tags) for folder in list_image_folders(c.data))


def _reads_caption_files(c: Config) -> bool:
    modes = {folder.captions for folder in list_image_folders(c.data)}
    return not c.data.streaming and not modes.isdisjoint(("auto", "txt"))


RANDOM_PIXELS = "a random crop, zoom, flip or jitter"
ADAPTERS = (_trains_adapters, "a stage that trains denoiser or text_encoder")
TOKENS = (lambda c: c.trains("tokens"), "a stage that trains tokens")
VALIDATION = (lambda c: c.validation.every >= 0, "--validation.every 0 or more")
BUCKETS = (lambda c: c.data.buckets, "--data.buckets")
LISTED_BUCKETS = (
    lambda c: c.data.buckets and c.data.bucket_upscale,
    "--data.buckets with --data.bucket-upscale",
)
CLASS_IMAGES = (lambda c: bool(c.prior.prompt), "--prior.prompt, the class prompt")
TAGS = (_some_folder(lambda tags: tags.orders_tags), "--data.shuffle-caption or --data.tag-dropout")
DATASET = (lambda c: bool(c.data.dataset), "--data.dataset")
LORA_FILE = (
    lambda c: _trains_adapters(c) and c.adapter.kind != "full",
    "a stage that trains denoiser or text_encoder, with adapters that LoRA files hold",
)
MASKED_LOSS = (lambda c: c.masks_loss, "masks that weight the loss (--data.masks)")

# section or option -> (whether this config uses it, the setting that it needs to have an effect)
EFFECTS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "adapter": ADAPTERS,
    "adapter.targets": (lambda c: c.trains("denoiser"), "a stage that trains denoiser"),
    "adapter.text_targets": (
        lambda c: c.trains("text_encoder"),
        "a stage that trains text_encoder",
    ),
    "tokens": TOKENS,
    "tokens.norm_target": (_some_stage(_has_norm_target), "--tokens.norm pull or stop"),
    "samples.base_word": TOKENS,
    "samples.strengths": ADAPTERS,
    "samples.negative": (lambda c: c.samples.guidance != 1, "a --samples.guidance other than 1"),
    "tokens.norm": (
        _some_stage(lambda c, s: "tokens" in s.groups and s.norm is None),
        "a stage of tokens that has no norm of its own",
    ),
    "noise.low": (_some_stage(lambda c, s: s.low is None), "a stage that has no low of its own"),
    "noise.high": (_some_stage(lambda c, s: s.high is None), "a stage that has no high of its own"),
    "optimizer.schedule": (
        _some_stage(lambda c, s: c.optimizer.schedule in stage_schedules(c, s)),
        "a group in a stage that has no schedule of its own",
    ),
    "validation.images": VALIDATION,
    "validation.count": VALIDATION,
    "validation.bins": VALIDATION,
    "validation.draws": VALIDATION,
    "validation.seed": VALIDATION,
    "data.dropped": (lambda c: c.data.caption_dropout > 0, "--data.caption-dropout"),
    "prior.images": CLASS_IMAGES,
    "prior.count": CLASS_IMAGES,
    "prior.weight": (
        lambda c: bool(c.prior.prompt) or has_class_subset(c),
        "--prior.prompt, the class prompt, or a subset with prior = true",
    ),
    "data.caption_extension": (
        _reads_caption_files,
        "--data.captions auto or txt from a folder of images",
    ),
    "data.keep_tokens": TAGS,
    "data.keep_tokens_separator": TAGS,
    "data.tag_separator": (
        _some_folder(lambda tags: tags.orders_tags or bool(tags.secondary_separator)),
        "--data.shuffle-caption, --data.tag-dropout or --data.secondary-separator",
    ),
    "data.mask_use": (lambda c: c.data.masks != "none", "--data.masks"),
    "prior.outside_mask": MASKED_LOSS,
    "mask_scale": MASKED_LOSS,
    "prior.swap_weight": (lambda c: bool(c.prior.swap), "--prior.swap"),
    "adapter.norm_grad": (lambda c: c.adapter.kind == "dora", "--adapter.kind dora"),
    "autocast": (
        lambda c: c.precision == "fp32",
        "--precision fp32, weights that are not in bf16 already",
    ),
    "weighting_arg": (lambda c: c.weighting != "none", "--weighting"),
    "noise.density_args": (lambda c: c.noise.density != "uniform", "--noise.density"),
    "data.streaming": DATASET,
    "data.split": DATASET,
    "data.image_column": DATASET,
    "data.caption_column": (
        lambda c: bool(c.data.dataset) or c.data.captions in ("auto", "metadata"),
        "captions from a dataset or metadata",
    ),
    "from_lora_rank": (lambda c: bool(c.from_lora), "--from-lora"),
    "resume_anyway": (lambda c: c.resume, "--resume"),
    "data.bucket_step": BUCKETS,
    "data.bucket_upscale": BUCKETS,
    "data.bucket_min": LISTED_BUCKETS,
    "data.bucket_max": LISTED_BUCKETS,
    "optimizer.lora_plus": ADAPTERS,
    "optimizer.lr_pattern": ADAPTERS,
    "optimizer.max_update_norm": ADAPTERS,
    "noise.adaptive_offset": (lambda c: c.noise.offset > 0, "--noise.offset above 0"),
    "files.precision": LORA_FILE,
    "files.thumbnail": LORA_FILE,
    "files.sidecars": LORA_FILE,
    "files.public": (lambda c: bool(c.push_to_hub), "--push-to-hub"),
    "noise.multires_discount": (lambda c: c.noise.multires_levels > 0, "--noise.multires-levels"),
    "data.variants": (lambda c: c.data.is_random, RANDOM_PIXELS),
    "data.cache": (
        lambda c: c.data.variants > 0 or not c.data.is_random,
        f"--data.variants when there is {RANDOM_PIXELS}",
    ),
    "optimizer.schedule_args": (
        _some_stage(lambda c, s: c.optimizer.schedule in stage_schedules(c, s)),
        "a stage with that schedule",
    ),
}


def _check_effects(c: Config) -> None:
    """Raises UserError for the first option that is not at its default and has no effect.

    Prints a warning for an interval that is longer than the run.
    """
    given, default = to_table(c), to_table(Config())
    for name, (is_read, needed) in EFFECTS.items():
        value, usual = _look_up(given, name), _look_up(default, name)
        if value == usual or is_read(c):
            continue
        option = name
        if name in ("adapter", "tokens"):  # a section
            option = next(f"{name}.{key}" for key in value if value[key] != usual[key])
        raise UserError(
            f"{_flag(option)} has no effect without {needed}; add that or leave the option out"
        )
    for name in ("samples.every", "validation.every", "save_every"):
        every = _look_up(given, name)
        if every > c.steps:
            message = f"{_flag(name)} {every} has no effect in a run of {c.steps} steps"
            print(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------- the config alone


def check_startup(c: Config) -> None:
    """All checks that need neither data nor weights: options, the run's folder, logins. Raises
    UserError.
    """
    check_config(c)
    check_run_folder(c)
    check_services(c)


def check_config(c: Config, *, needs_images: bool = True) -> None:
    """Raises UserError for options that are out of range, contradict each other or do nothing."""
    check_subsets(c)
    has_folder = bool(c.data.images or c.data.subsets)
    if needs_images and has_folder == bool(c.data.dataset):
        raise UserError("give either a folder with --data.images or a dataset with --data.dataset")
    if not c.stages or any(stage.steps < 1 for stage in c.stages):
        raise UserError(
            "a run needs at least one stage, and every stage at least one step (--stages.0.steps)"
        )
    _check_ranges(c)
    parse_segmenter(c.data.masks)  # raises for an unknown source
    if c.noise.dynamic_shift and c.noise.shift != 1:
        raise UserError(
            "--noise.dynamic-shift takes its shift from the model, "
            f"--noise.shift {c.noise.shift:g} gives another; choose one of the two"
        )
    if not c.samples.strengths:
        raise UserError("--samples.strengths has no strength, so no sample could be drawn; give 1")
    check_unicode(to_table(c), "")
    for i, stage in enumerate(c.stages):
        _check_stage(c, stage, i)
    check_groups(c)
    check_combinations(c)
    check_base_weights(c)
    _check_effects(c)
    c.data.check_combination()
    c.adapter.check_combination()
    _check_known_words(c)
    check_data_options(c)
    check_schedules(c)
    losses.check_weighting(c.weighting, c.weighting_arg)
    densities.bind_density(c.noise.density, **c.noise.density_args)  # raises for a wrong argument
    sampling.find_sampler(c.samples.sampler, c.samples.sampler_args)
    if c.report != "none" and importlib.util.find_spec(c.report) is None:
        raise UserError(f"--report {c.report} needs the package {c.report}: pip install {c.report}")


def _check_ranges(c: Config) -> None:
    """Raises UserError for the first number outside its option's range (declared in config.py)."""
    check_options(c, "--")
    for name, section in vars(c).items():
        if is_dataclass(section):
            check_options(section, f"--{name}.")
    for i, subset in enumerate(c.data.subsets):
        check_options(subset, f"--data.subsets.{i}.")
    for i, stage in enumerate(c.stages):
        check_options(stage, f"--stages.{i}.")


def _check_stage(c: Config, stage: Stage, i: int) -> None:
    """Raises UserError for options of a stage that do not fit its groups, the masks or the
    schedule.
    """
    groups = ", ".join(stage.groups)
    if not stage.groups or len(set(stage.groups)) != len(stage.groups):
        raise UserError(
            f"stages.{i}.groups is {list(stage.groups)}; "
            f"name one or more of {', '.join(GROUPS)}, each once"
        )
    tables: dict[str, Mapping[str, Any]] = {
        "lr": stage.lr,
        "weight-decay": stage.weight_decay,
        "schedules": stage.schedules,
    }
    for option, table in tables.items():
        if unknown := set(table) - set(stage.groups):
            names = ", ".join(sorted(unknown))
            raise UserError(
                f"--stages.{i}.{option} names {names}, which this stage does not train ({groups})"
            )
    if stage.mask_temperature != 1 and not c.masks_loss:
        raise UserError(
            f"--stages.{i}.mask-temperature has no effect without masks that weight the loss; "
            "add --data.masks file, alpha, auto or any"
        )
    if stage.norm is not None and "tokens" not in stage.groups:
        raise UserError(f"--stages.{i}.norm has no effect: this stage trains no tokens ({groups})")
    low = c.noise.low if stage.low is None else stage.low
    high = c.noise.high if stage.high is None else stage.high
    if not 0 <= low < high <= 1:
        raise UserError(
            f"stage {i} trains on the timesteps {low:g} to {high:g} of the schedule; "
            "expected fractions with 0 <= low < high <= 1"
        )


def _check_known_words(c: Config) -> None:
    """Raises UserError for a placeholder word in a prompt for the base model, which has not learned
    it.
    """
    placeholders = [*(c.tokens.words if c.trains("tokens") else ()), *c.prior.swap]
    texts = {"--prior.prompt": c.prior.prompt, "--samples.base-word": c.samples.base_word}
    texts |= {f"--prior.swap {word}": name for word, name in c.prior.swap.items()}
    if c.trains("tokens"):
        texts["--tokens.init"] = " ".join(c.tokens.init)
    for option, text in texts.items():
        for word in filter(None, placeholders):
            if has_placeholder(text, word):
                raise UserError(
                    f"{option} is {text!r} and holds the placeholder word {word}, "
                    "which is still to be learned; write an ordinary word there"
                )


def _look_up(tree: Any, name: str) -> Any:
    """The value of a dotted name in nested tables, e.g. "data.images"."""
    return reduce(operator.getitem, name.split("."), tree)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- where it runs


def check_run_folder(c: Config) -> None:
    """Raises UserError where the run cannot be written to OUT, or where writing would change files
    that do not belong to a run; changes nothing itself. Only the first process of a run writes.
    """
    if not distributed.is_main_process():
        return
    table = to_table(c)
    given = {_flag(name): _look_up(table, name) for name in INPUT_PATHS}
    for i, subset in enumerate(c.data.subsets):
        given[f"--data.subsets.{i}.images"] = subset.images
    if c.overwrite:
        given |= {_flag(name): _look_up(table, name).rpartition(":")[0] for name in CODE}
    destination.check_writable(c.out)
    destination.check_file_names(c.out)
    for option in ("--data.cache", "--prior.images"):
        if given[option]:
            destination.check_path_lengths(option, [Path(given[option]) / "0"])
    if not c.resume:
        destination.check_apart_from_inputs(c.out, given, overwrite=c.overwrite)
    out, _ = Run.check_folder(c.out, resume=c.resume, overwrite=c.overwrite)
    if c.overwrite:
        destination.check_overwritten(out)
    lock.check_lock_free(out)


def check_services(c: Config) -> None:
    """Raises UserError where --report or --push-to-hub could not log in."""
    trackers.check_login(c.report)
    if c.push_to_hub:
        card.check_push_target(c.push_to_hub, public=c.files.public)


def check_device(c: Config, device: torch.device) -> None:
    """Raises UserError for options that this machine cannot carry out; prints the device."""
    kernels.current_mode()  # raises for LORA_KERNELS and LORA_CANDIDATE
    if c.cuda_graph and device.type != "cuda":
        raise UserError(
            f"--cuda-graph needs an NVIDIA GPU, and this run is on {device.type}; leave it out"
        )
    if c.cuda_graph and c.optimizer.name not in ("adamw", "prodigy"):
        raise UserError(
            "--cuda-graph captures the optimizers adamw and prodigy, "
            f"not {c.optimizer.name}; choose one of them or leave it out"
        )
    if c.compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError(
            "--compile on a CPU needs a C++ compiler (g++ or clang++); install one or leave it out"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name += f", {threads} thread{'s' if threads > 1 else ''}"
    products = ", products in bf16" if c.autocast else ""
    print(f"device: {name}, weights in {c.precision}{products}")


def check_optimizer(c: Config, device: torch.device) -> None:
    """Raises UserError for an optimizer that this run could not step, control by groups, or save.

    Prints a warning for one that it could not resume.
    """
    o = c.optimizer
    groups = [group for group in GROUPS if c.trains(group)]
    settings = building.group_settings(o.name, groups, lr=o.lr, decay=o.weight_decay, betas=o.betas)
    for i, stage in enumerate(c.stages):
        if stage.weight_decay and "weight_decay" not in building.optimizer_arguments(o.name):
            raise UserError(
                f"--stages.{i}.weight-decay has no effect: "
                f"{o.name} takes no weight_decay; leave it out"
            )
    if c.ema and building.is_schedule_free(building.resolve_optimizer(o.name)):
        raise UserError(f"--ema averages what {o.name} averages itself; leave out one of the two")
    for sentence in try_optimizer(o.name, settings, o.args, device):
        print(f"warning: {sentence}", file=sys.stderr)


def check_capturable(loss: Callable[..., Any], name: str, step: Callable[..., Any] | None) -> None:
    """Raises UserError for a loss or step function that is not declared safe to capture in a CUDA
    graph, which replays the operations of one call. `step` is the caller's own, if there is one.
    """
    if not losses.is_capturable(loss):
        raise UserError(
            f"--cuda-graph replays what the loss {name} did at the capture; if it does the same in "
            f"each step and reads nothing back, say so: {name}.capturable = True"
        )
    if step is not None and not getattr(step, "capturable", False):
        raise UserError(
            "--cuda-graph replays what the step did at the capture; "
            "if it does the same in each step, say so: step.capturable = True"
        )


def check_declared_needs(c: Config, loss: Callable[..., Any], name: str) -> None:
    """Raises UserError for options that contradict what a loss or step function says of itself: its
    attributes `weighting` and `whole_batch`.
    """
    own = getattr(loss, "weighting", None)
    if own not in (None, "none"):
        raise UserError(
            f'{name}.weighting is {own!r}; expected "none", for a loss that is not to be weighted '
            "by noise level"
        )
    if own == "none" and c.weighting != "none":
        raise UserError(
            f"--weighting {c.weighting} would weight the loss {name} by noise level, which says of "
            f'itself {name}.weighting = "none"; give --weighting none'
        )
    if getattr(loss, "whole_batch", False) and c.passes_per_step > 1:
        several = f"--accumulation {c.accumulation} gives it"
        if c.processes > 1:
            several = f"{c.processes} processes have"
        raise UserError(
            f"{name} compares the images of a whole batch ({name}.whole_batch = True), and "
            f"{several} a part at a time; use one process, --accumulation 1 and "
            f"--batch-size {c.images_per_step}"
        )


def rerun_reason(c: Config) -> str:
    """Why config.toml alone cannot repeat its run, as a sentence; empty where it can."""
    functions = {"loss": c.loss, "step": c.step}
    options = [option for option, value in functions.items() if value.startswith("<")]
    if not options:
        return ""
    return (
        f"the run's settings; its {' and '.join(options)} came from Python "
        f"and no file gives them back: train(config, {options[0]}=...)"
    )
