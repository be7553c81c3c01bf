"""What shows that an option has an effect: a table of every option of a run, and the check of the
options that are not at their defaults, in the first step of each stage and at the end of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch

from lora_core.adapters import custom_files
from lora_core.config import Config, Stage
from lora_core.data.batches import Batch
from lora_core.errors import UserError
from lora_core.text import shorten_value
from training.inputs.step_inputs import InputSource, StepInputs
from training.log import Log
from training.probes import adapter_probes as adapters
from training.probes import caption_probes as captions
from training.probes import input_probes as inputs
from training.probes import model_probes as model
from training.probes import optimizer_probes as optimizer
from training.probes import outcome_probes as outcome
from training.probes import sampling_probes as sampling
from training.probes import step_probes as steps
from training.probes.first_step import FirstStep, Probe
from training.probes.outcome_probes import FinishedRun, Outcome
from training.samples import SampleImages
from training.setup import Optimization
from training.step import StepFunctions


class Shown(NamedTuple):
    """An option whose effect a probe sees in the first step of a stage."""

    probe: Probe
    without: str  # what is found where it has none
    always: bool = False  # at its default, too


class Refused(NamedTuple):
    """An option that a check refuses where it can have no effect, before the first step."""

    check: str  # module:function


class Written(NamedTuple):
    """An option whose effect is in files or lines of the run."""

    test: str  # file of the tests that hold it
    is_there: Outcome | None = None  # at the end of the run


class Place(NamedTuple):
    """The name of a file, folder, model or device, which the run reads or fails."""

    reader: str  # module:function


Effect = Shown | Refused | Written | Place

CHECKS = "training.checks.config_checks:check_config"
OPEN_DATA = "training.setup:open_data"
OPEN_MODEL = "training.setup:open_model"
SAMPLES = "tests/test_samples.py"
SAME_NOISE = "the noise is the same without it"
SAME_LEVELS = "the noise levels are the same without it"
SAME_LOSS = "the losses are the same without it"
SAME_PIXELS = "images have the same pixels without it"
LACKS = "the adapters do not have it"
OTHER_LAYERS = "other layers have adapters"
OTHER_SCALE = "the updates have another scale"


def _noise(option: str) -> Shown:
    return Shown(inputs.changes_noise(option), SAME_NOISE)


def _levels(option: str) -> Shown:
    return Shown(inputs.changes_levels(option), SAME_LEVELS)


def _pixels(option: str) -> Shown:
    return Shown(inputs.changes_pixels(option), SAME_PIXELS)


def _tags(option: str) -> Shown:
    return Shown(captions.changes_tags(option), "captions are the same without it")


def _sampling(option: str) -> Shown:
    return Shown(sampling.changes_sampling(option), "sampling is the same without it")


def _drops(option: str) -> Shown:
    return Shown(adapters.drops(option), "no adapter drops anything")


# ---------------------------------------------------------------- the table

# Every option: section.name, stages.name for those of a stage.
OPTION_EFFECTS: dict[str, Effect] = {
    # the model and the device
    "model": Place(OPEN_MODEL),
    "model_config": Place(OPEN_MODEL),
    "family": Place(OPEN_MODEL),
    "vae": Place(OPEN_MODEL),
    "clip_skip": Shown(model.skips_last_layers, "captions are encoded by all layers"),
    "max_token_length": Shown(model.has_token_length, "captions have other lengths"),
    "max_sequence_length": Shown(model.has_sequence_length, "captions have other lengths"),
    "device": Place("models:choose_device"),
    "offload": Shown(model.stays_on_device, "networks leave the device"),
    "threads": Shown(model.has_threads, "torch computes with another number"),
    "vae_precision": Shown(model.has_vae_precision, "the VAE has another"),
    "precision": Shown(model.has_precision, "the denoiser has another"),
    "autocast": Shown(model.multiplies_in_bf16, "the denoiser runs without it"),
    "compile": Shown(model.is_compiled, "no block is compiled"),
    "cuda_graph": Refused("training.checks.config_checks:check_device"),
    "gradient_checkpointing": Shown(model.recomputes, "no block is computed again"),
    # the run
    "out": Place("training.checks.config_checks:check_run_folder"),
    "seed": Shown(inputs.draws_from_seed, "the noise is another seed's"),
    "batch_size": Shown(steps.has_batch_size, "the step had another number of images"),
    "accumulation": Shown(steps.accumulates, "the step had another number of forward passes"),
    "processes": Shown(steps.has_batch_size, "the step had another number of images"),
    "shard": Shown(model.is_sharded, "each process has the whole denoiser"),
    "quantize": Shown(model.is_quantized, "the denoiser's weights have another form"),
    "stream": Shown(model.is_streamed, "all blocks are on the device"),
    "from_lora": Place("training.starting_lora:load_start"),
    "from_lora_rank": Refused(CHECKS),
    "loss": Shown(steps.differs_from_mse, "it gives the numbers of mse"),
    "loss_arg": Shown(steps.changes_loss, SAME_LOSS),
    "mask_scale": Shown(inputs.scales_masked_loss, "masks weight the loss as with mean"),
    "step": Place("train:resolve_functions"),
    "weighting": Shown(steps.weights_levels, "every noise level has the weight 1"),
    "weighting_arg": Shown(steps.changes_weights, "every weight is the same without it"),
    "ema": Shown(optimizer.averages, "the average does not follow the parameters"),
    "save_every": Written("tests/test_resume.py", outcome.has_checkpoints),
    "keep": Written("tests/test_run_folder.py", outcome.keeps_few),
    "log_every": Written("tests/test_log.py"),
    "list_targets": Written("tests/test_targets.py"),
    "report": Written("tests/test_reports.py", outcome.logs_elsewhere),
    "push_to_hub": Written("tests/test_card.py"),
    "resume": Written("tests/test_resume.py"),
    "resume_anyway": Refused(CHECKS),
    "overwrite": Written("tests/test_run_folder.py"),
    # data
    "data.resolution": Shown(inputs.has_resolution, "the batch has another", True),
    "data.crop": _pixels("crop"),
    "data.zoom": _pixels("zoom"),
    "data.flip": _pixels("flip"),
    "data.jitter": _pixels("jitter"),
    "data.variants": Shown(inputs.repeats_pixels, "pixels do not come again"),
    "data.buckets": Shown(inputs.has_buckets, "all images are cut to squares"),
    "data.bucket_step": Shown(inputs.has_bucket_step, "sides are no multiples of it"),
    "data.bucket_min": Shown(inputs.has_shortest_side, "a side is shorter"),
    "data.bucket_max": Shown(inputs.has_longest_side, "a side is longer"),
    "data.bucket_upscale": Shown(inputs.keeps_sizes, "a small image is enlarged"),
    "data.interpolation": _pixels("interpolation"),
    "data.images": Place(OPEN_DATA),
    "data.dataset": Place(OPEN_DATA),
    "data.split": Refused(CHECKS),
    "data.streaming": Shown(inputs.reads_shards, "images are read from copies"),
    "data.skip_bad": Written("tests/test_image_checks.py", outcome.lists_left_out),
    "data.image_column": Refused(CHECKS),
    "data.caption_column": Refused(CHECKS),
    "data.captions": Place(OPEN_DATA),
    "data.caption": Shown(inputs.uses_caption, "no image has it"),
    "data.caption_dropout": Shown(inputs.drops_captions, "no caption is dropped"),
    "data.dropped": Shown(inputs.drops_as_asked, "captions are dropped in the other way"),
    "data.pairs": Shown(inputs.has_losers, "the batch has no losers"),
    "data.caption_extension": Place(OPEN_DATA),
    "data.caption_lines": Shown(captions.reads_first_lines, "images have further captions"),
    "data.caption_prefix": Shown(captions.has_prefix, "captions begin without it"),
    "data.caption_suffix": Shown(captions.has_suffix, "captions end without it"),
    "data.wildcards": _tags("wildcards"),
    "data.shuffle_caption": _tags("shuffle_caption"),
    "data.keep_tokens": _tags("keep_tokens"),
    "data.keep_tokens_separator": _tags("keep_tokens_separator"),
    "data.tag_dropout": _tags("tag_dropout"),
    "data.tag_separator": _tags("tag_separator"),
    "data.secondary_separator": _tags("secondary_separator"),
    "data.subsets": Shown(captions.reads_subsets, "one of the folders has no image in it"),
    "data.repeats": Shown(inputs.has_repeats, "an epoch has some image less often"),
    "data.masks": Shown(inputs.weights_by_mask, "the loss weights all pixels alike"),
    "data.mask_use": Shown(inputs.uses_mask_as_hole, "the masks are used in another way"),
    "data.cache": Shown(inputs.fills_cache, "there are no files in the folder"),
    "data.workers": Written("tests/test_dataset.py"),
    # prior preservation
    "prior.prompt": Shown(inputs.has_class_images, "the batch has no class images"),
    "prior.images": Shown(inputs.reads_class_folder, "the class images are elsewhere"),
    "prior.count": Shown(inputs.has_enough_class_images, "there are fewer class images"),
    "prior.weight": Shown(inputs.weights_class_images, "class images count as with 1"),
    "prior.swap": Shown(steps.preserves, "the loss compares nothing with the base model"),
    "prior.swap_weight": Shown(steps.weights_preservation, "the loss has it with another weight"),
    "prior.outside_mask": Shown(steps.preserves, "the loss compares nothing with the base model"),
    # adapters
    "adapter.targets": Shown(adapters.adapts_denoiser, OTHER_LAYERS, True),
    "adapter.text_targets": Shown(adapters.adapts_text_encoders, OTHER_LAYERS, True),
    "adapter.exclude": Shown(adapters.excludes_layers, "one of these layers has an adapter"),
    "adapter.kind": Shown(adapters.has_kind, "the adapters are of another class"),
    "adapter.rank": Shown(adapters.has_rank, LACKS),
    "adapter.alpha": Shown(adapters.has_scale, OTHER_SCALE),
    "adapter.rank_pattern": Shown(adapters.has_pattern_ranks, LACKS),
    "adapter.alpha_pattern": Shown(adapters.has_pattern_scales, OTHER_SCALE),
    "adapter.dropout": _drops("dropout"),
    "adapter.rank_dropout": _drops("rank_dropout"),
    "adapter.module_dropout": _drops("module_dropout"),
    "adapter.rslora": Shown(adapters.has_scale, OTHER_SCALE),
    "adapter.norm_grad": Shown(adapters.reaches_adapters("norm_grad"), LACKS),
    "adapter.factor": Shown(adapters.reaches_adapters("factor"), LACKS),
    "adapter.init": Shown(adapters.reaches_adapters("init"), LACKS),
    # tokens
    "tokens.words": Shown(adapters.learns_words, "other words have tokens"),
    "tokens.encoders": Shown(adapters.learns_in_encoders, "other text encoders learn rows"),
    "tokens.vectors": Shown(adapters.has_vectors, "the words have another number of tokens"),
    "tokens.names": Shown(adapters.has_names, "the learned tokens have other names"),
    "tokens.per_layer": Shown(adapters.has_layers, "all layers have the same tokens"),
    "tokens.init": Shown(adapters.starts_as_asked, "the rows start at other values"),
    "tokens.norm": Shown(adapters.controls_usual_norms, "no row changes", True),
    "tokens.norm_target": Shown(adapters.aims_at_norm, "the rows have another target"),
    # noise
    "noise.offset": _noise("offset"),
    "noise.adaptive_offset": _noise("adaptive_offset"),
    "noise.multires_levels": _noise("multires_levels"),
    "noise.multires_discount": _noise("multires_discount"),
    "noise.perturbation": _noise("perturbation"),
    "noise.low": _levels("low"),
    "noise.high": _levels("high"),
    "noise.density": _levels("density"),
    "noise.density_args": Shown(inputs.changes_density, SAME_LEVELS),
    "noise.shift": _levels("shift"),
    "noise.dynamic_shift": _levels("dynamic_shift"),
    "noise.space": Shown(steps.changes_space, SAME_LOSS),
    "noise.guidance": Shown(steps.reads_guidance, SAME_LOSS),
    "noise.prediction": Shown(steps.has_prediction, "the targets are of another kind"),
    "noise.zero_terminal_snr": Shown(inputs.ends_in_noise, "the last level is not noise alone"),
    # the optimizer
    "optimizer.name": Shown(optimizer.has_optimizer, "the optimizer is another"),
    "optimizer.lr": Shown(optimizer.has_rates, "the learning rates are others"),
    "optimizer.weight_decay": Shown(
        optimizer.has_setting("weight_decay"), "the groups have another"
    ),
    "optimizer.betas": Shown(optimizer.has_setting("betas"), "the groups have others"),
    "optimizer.args": Shown(optimizer.has_arguments, "the optimizer has other settings"),
    "optimizer.schedule": Shown(optimizer.moves_rate, "the learning rate stays the same"),
    "optimizer.schedule_args": Shown(optimizer.shapes_schedule, "rates are the same without them"),
    "optimizer.schedules": Shown(optimizer.moves_rate, "the learning rate stays the same"),
    "optimizer.warmup": Shown(optimizer.warms_up, "the first rate is not lower"),
    "optimizer.lr_pattern": Shown(optimizer.has_layer_rates, "the layers have another rate"),
    "optimizer.lora_plus": Shown(optimizer.has_two_rates, "all parameters have one learning rate"),
    "optimizer.clip": Shown(optimizer.clips, "the gradient is longer after it", True),
    "optimizer.max_update_norm": Shown(optimizer.limits_updates, "an update has a larger norm"),
    # stages
    "stages.steps": Written("tests/test_stages.py"),
    "stages.groups": Shown(optimizer.reaches_parameters, "a parameter gets no gradient", True),
    "stages.lr": Shown(optimizer.has_rates, "the learning rates are others"),
    "stages.weight_decay": Shown(optimizer.has_setting("weight_decay"), "the groups have another"),
    "stages.schedule": Shown(optimizer.moves_rate, "the learning rate stays the same"),
    "stages.schedules": Shown(optimizer.moves_rate, "the learning rate stays the same"),
    "stages.warmup": Shown(optimizer.warms_up, "the first rate is not lower"),
    "stages.low": _levels("stages.low"),
    "stages.high": _levels("stages.high"),
    "stages.norm": Shown(adapters.controls_norms, "no row changes"),
    "stages.mask_temperature": Shown(inputs.sharpens_mask, "masks weight the loss as at 1"),
    # samples and validation
    "samples.sampler": _sampling("sampler"),
    "samples.steps": _sampling("steps"),
    "samples.guidance": _sampling("guidance"),
    "samples.negative": _sampling("negative"),
    "samples.sampler_args": _sampling("sampler_args"),
    "samples.prompts": Written(SAMPLES, outcome.draws_prompts),
    "samples.every": Written(SAMPLES, outcome.has_grids),
    "samples.strengths": Written(SAMPLES, outcome.draws_strengths),
    "samples.base_word": Written(SAMPLES, outcome.draws_base_word),
    "samples.new_prompts": Written(SAMPLES, outcome.draws_new_prompts),
    "samples.show_data": Written(SAMPLES, outcome.shows_training_images),
    "validation.images": Place(OPEN_DATA),
    "validation.count": Written("tests/test_scores.py", outcome.has_scored_images),
    "validation.every": Written("tests/test_scores.py", outcome.has_scores),
    "validation.bins": Written("tests/test_scores.py", outcome.has_bins),
    "validation.draws": Written("tests/test_scores.py", outcome.has_draws),
    "validation.seed": Written("tests/test_scores.py", outcome.draws_validation_noise),
}


# ---------------------------------------------------------------- the check


def option_names(settings: Any = Config, path: str = "") -> Iterator[str]:
    """The names of all options, as in the table: those of a stage without its number."""
    for own in fields(settings):
        if own.name == "stages":
            yield from option_names(Stage, "stages.")
        elif is_dataclass(own.default):
            yield from option_names(type(own.default), f"{path}{own.name}.")
        else:
            yield path + own.name


def check_step(
    source: InputSource,
    functions: StepFunctions,
    optimization: Optimization,
    stage: Stage,
    batch: Batch,
    inputs: Sequence[StepInputs],
) -> None:
    """Raises UserError for the first option that is not at its default and had no effect in this
    step, after its update. Looks at the first step of a stage only.
    Waits for the device; costs a forward pass of one micro-batch for each option that only the loss
    shows. Changes nothing.
    """
    if not inputs[0].is_checked:
        return
    first = FirstStep(source, functions, optimization, stage, batch, inputs)
    device = first.model.device
    buffers = custom_files.adapter_buffers(first.model.adapted)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name, effect in OPTION_EFFECTS.items():
            if isinstance(effect, Shown):
                _check_option(first, name, effect)
    custom_files.load_buffers(first.model.adapted, before)


def _check_option(first: FirstStep, name: str, effect: Shown) -> None:
    of_stage = name.startswith("stages.")
    own: Any = first.stage if of_stage else first.config
    value, usual = _value(own, name), _value(Stage() if of_stage else Config(), name)
    if (value == usual and not effect.always) or effect.probe(first) is not False:
        return
    number = first.config.stages.index(first.stage)
    option = _describe_option(name.replace("stages.", f"stages.{number}."), value)
    raise UserError(
        f"{option} had no effect in step {first.inputs[0].number + 1}: {effect.without}; "
        "leave it out, or report this"
    )


def check_outputs(log: Log, samples: SampleImages) -> None:
    """Raises UserError for the first option that is not at its default and whose files the run has
    not written, or whose images are those of the default.
    """
    if log.start == log.config.steps or not log.run.writes:  # the run had ended before
        return
    run = FinishedRun(log, samples)
    for name, effect in OPTION_EFFECTS.items():
        if not isinstance(effect, Written) or effect.is_there is None:
            continue
        if _value(log.config, name) != _value(Config(), name) and not effect.is_there(run):
            raise UserError(
                f"{_describe_option(name, _value(log.config, name))} had no effect on what is in "
                f"{log.run.folder}; leave it out, or report this"
            )


def _describe_option(name: str, value: Any) -> str:
    """An option and its value, as on the command line."""
    flag = name.replace("_", "-")
    section, dot, option = flag.rpartition(".")
    if value is False:
        return f"--{section}{dot}no-{option}"
    return f"--{flag} {shorten_value(value)}"


def _value(settings: Any, name: str) -> Any:
    for key in name.removeprefix("stages.").split("."):
        settings = getattr(settings, key)
    return settings
