"""Setup of a run: `open_data`, `open_model` (with adapters and learned tokens) and `open_optimizer`
return one frozen dataclass each; `open_run` opens the output folder. Nothing on the disk changes
before `open_run`, but for caches and for the masks of --data.masks clipseg:WORDS.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_core import distributed, plugins, tokens
from lora_core.adapters import injection, noise_levels
from lora_core.config import Config
from lora_core.data import buckets, dataset
from lora_core.data.dataset import Batch, ImageDataset
from lora_core.data.listing import Listing
from lora_core.diffusion import losses, masked_losses, sampling, validation
from lora_core.diffusion.validation import ValidationSet
from lora_core.family import Family, LoadOptions
from lora_core.memory.residency import DENOISER
from lora_core.optim import building, gradients, schedules
from lora_core.optim.ema import ParameterAverage
from lora_core.placeholders import Placeholder
from lora_core.progress import phase
from lora_core.runs.run_folder import Run
from lora_core.settings import ImageSettings, scheduler_changes
from lora_core.text import print_escaped
from lora_core.toml import to_toml
from models import DTYPES, choose_device, load_family, read_layout, use_device
from training import cuda_graph, learned_tokens, run_adapters, starting_lora
from training.checks import config_checks, model_checks, pair_checks
from training.inputs import class_images, training_images
from training.networks import base_weights, sharding
from training.networks.stage_residency import StageResidency, choose_loading_device, place_family
from training.run_identity import model_identity
from training.run_summary import RunLength, describe_run
from training.skipped_steps import SkippedSteps

# (step, steps of the stage, warm-up steps) -> factor of the learning rate
RateSchedule = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Data:
    """The images of a run."""

    training: ImageDataset  # trained on, cropped and augmented as the config says
    validation: ImageDataset  # center-cropped, without masks
    scored: ValidationSet  # the records of `validation`, and the name of their loss
    unused: Mapping[str, Sequence[Path]]  # reason -> files next to the images that nothing reads
    class_images: ImageDataset | None = None  # of prior preservation
    # file that --data.skip-bad leaves out -> reason
    left_out: Mapping[Path, str] = field(default_factory=dict)

    def batches(self, config: Config, start: int, stop: int) -> Iterator[Batch]:
        """This process's share of the batches of steps start .. stop - 1, which are determined by
        the seed and their numbers.
        """
        return dataset.iterate_batches(
            self.training,
            self.class_images,
            batch=config.images_per_step,
            seed=config.seed,
            start=start,
            stop=stop,
            workers=config.data.workers,
            share=distributed.process_slice(),
        )


@dataclass(frozen=True)
class Model:
    """The model of a run: frozen networks with trainable adapters and token rows in them."""

    family: Family
    device: torch.device
    residency: StageResidency  # the networks that are on the device
    denoiser: nn.Module
    encoders: dict[str, nn.Module]  # component -> text encoder
    adapted: dict[str, nn.Module]  # component -> network with adapters
    with_dora: tuple[nn.Module, ...]  # those of them with DoRA, whose row norms a step caches
    has_factors: bool  # whether LoRA or LyCORIS files can hold the adapters
    placeholders: tuple[Placeholder, ...]  # words of the captions and their tokens
    embeddings: dict[str, tokens.LearnedEmbedding]  # text encoder -> token rows [n, d]
    norm_targets: dict[str, Tensor]  # text encoder -> [n, 1] norms for --tokens.norm
    table_stds: dict[str, Tensor]  # text encoder -> 0-dim, spread of its vocabulary
    groups: dict[str, list[nn.Parameter]]  # trainable parameters of denoiser, text_encoder, tokens
    # group -> parameters with a learning rate of their own, and its ratio to the group's
    rate_ratios: dict[str, dict[Tensor, float]]
    gradient_hooks: dict[str, list[Callable[[], None]]]  # group -> change_gradients of its adapters
    identity: dict[str, str]  # component -> hash of its weights as they were loaded
    objective: str  # the loss, its weighting and masks in words
    guidance: float  # scale that a guidance-distilled denoiser reads
    autocast: torch.autocast  # matrix products in bf16 with --autocast

    @property
    def networks(self) -> list[nn.Module]:
        """The denoiser and the text encoders."""
        return [self.denoiser, *self.encoders.values()]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and no dropout, and networks take turns on the device; the training mode and
        what a step reads come back afterwards.
        """
        with self.residency.in_turns(), self.frozen():
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradients and no dropout; the training mode comes back afterwards."""
        before = [module.training for module in self.networks]
        try:
            with torch.no_grad():
                for module in self.networks:
                    module.eval()
                yield
        finally:
            for module, training in zip(self.networks, before):
                module.train(training)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base model, with the learned token rows."""
        with ExitStack() as stack:
            for module in self.adapted.values():
                stack.enter_context(injection.disable_adapters(module))
            yield

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """The model with its adapters at another strength than 1."""
        try:
            for module in self.adapted.values():
                injection.set_strength(module, "default", strength)
            yield
        finally:
            for module in self.adapted.values():
                injection.set_strength(module, "default", 1.0)


@dataclass(frozen=True)
class Optimization:
    """The optimizer, its settings by group, schedules, loss scaling and moving average."""

    optimizer: torch.optim.Optimizer
    settings: dict[str, dict[str, Any]]  # group -> name, lr ... that it was built with
    weight_decays: dict[str, float]  # group -> weight decay in stages that give none
    rate_schedules: dict[str, RateSchedule]  # name -> factor of the learning rate
    scaler: gradients.LossScaler | None  # in fp16
    average: ParameterAverage | None  # with --ema
    skip: Tensor  # [] fp32 on the device: 1 where the newest step was skipped
    skipped: SkippedSteps  # up to the last row of the log
    images: int = 1  # of a step, class images not counted
    processes: int = 1  # that sum their gradients

    def update_average_(self) -> None:
        """Update the moving average after a step that was not skipped, where there is one."""
        if self.average is not None:
            self.average.update_(self.skip)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters have the values to evaluate and save: the moving average of --ema
        or of a schedule-free optimizer; without either, the trained values.
        """
        with ExitStack() as stack:
            stack.enter_context(building.use_evaluation_parameters(self.optimizer))
            if self.average is not None:
                stack.enter_context(self.average.swapped())
            yield


# ---------------------------------------------------------------- the device and the run's folder


def check_before_opening(
    config: Config, loss: Callable[..., Tensor], own_step: Callable[..., Tensor] | None
) -> None:
    """All checks that need neither data nor weights; prints the device and makes it torch's current
    one. Raises UserError. `own_step`: the function that replaces train.training_step, if any.
    """
    for function in filter(None, (loss, own_step)):
        if getattr(function, "reads_attention", False):
            layout = read_layout(config.model, config.model_config, config.family)
            model_checks.check_attention(layout, plugins.function_name(function))
    config_checks.check_startup(config)
    config_checks.check_declared_needs(config, loss, plugins.function_name(loss))
    if own_step is not None:
        config_checks.check_declared_needs(config, own_step, plugins.function_name(own_step))
    if config.threads:
        torch.set_num_threads(config.threads)
    device = use_device(config.device)
    config_checks.check_device(config, device)
    config_checks.check_optimizer(config, device)
    pair_checks.check_reads_pairs(config, loss, own_step)
    if config.cuda_graph:
        config_checks.check_capturable(loss, plugins.function_name(loss), own_step)


def describe_start(config: Config, data: Data, model: Model, run: Run) -> None:
    """Print the summary of the run, and write OUT/config.toml, from which it resumes."""
    length = RunLength(config.steps, config.batch_size, config.passes_per_step)
    words = describe_run(data.training, data.class_images, model.placeholders, length, data.unused)
    print_escaped(words)
    run.write("config.toml", to_toml(config.recorded))
    training_images.write_left_out(data.left_out, run)


# ---------------------------------------------------------------- data


def open_data(config: Config) -> Data:
    """Find images, captions and masks, and print warnings about them. Raises UserError for a folder
    without images, and for captions and masks that the config cannot train on.
    """
    d, v = config.data, config.validation
    found = training_images.open_training_images(config)
    training = ImageDataset(
        found.records,
        d,
        seed=config.seed,
        caption_dropout=d.caption_dropout,
        hard_masks=d.mask_use != "loss",
    )
    if d.buckets:
        size = config.images_per_step
        unit = "pair" if d.pairs else "image"
        print(buckets.describe_buckets(training.sizes, size, unit))
    _print_warnings(training, found.listing)
    _check_words(config, found.records)
    model_checks.check_masks(config, training)
    folder = str(found.listing.root) if found.listing else d.dataset
    class_images.check_class_folder(config.prior.images, folder)
    held_out = training_images.open_held_out_images(config) if v.images else None
    scored = validation.choose_images(found.winners, held_out, v.count)
    if v.every >= 0:
        print(scored.sentence)
    plain = ImageSettings(d.resolution, interpolation=d.interpolation)
    own = ImageDataset(scored.records, plain, keep_bytes=0, plain_captions=True)
    return Data(training, own, scored, found.unused, left_out=found.left_out)


def _print_warnings(training: ImageDataset, listing: Listing | None) -> None:
    sentences = [dataset.describe_upscaled(training), dataset.describe_moved_crops(training)]
    if listing is not None:
        sentences.append(dataset.describe_unread_folder_names(listing, training.records))
    for sentence in filter(None, sentences):
        print(f"warning: {sentence}", file=sys.stderr)


def _check_words(config: Config, records: Sequence[dataset.Record]) -> None:
    """Raises UserError for a placeholder word that no caption has."""
    words: Mapping[str, str] = config.prior.swap
    if config.trains("tokens"):
        words = model_checks.token_initializers(config)
    for word in words:
        model_checks.check_placeholder(records, word)


def add_class_images(
    config: Config, data: Data, run: Run, draw: Callable[[Sequence[int]], list[Image.Image]]
) -> Data:
    """The data with the class images of prior preservation, if the config has a class prompt.
    Missing images are generated: `draw` takes seeds and gives the base model's images.
    """
    found = class_images.open_class_images(config.prior, run.folder, data.training, draw)
    return replace(data, class_images=found)


def check_captions(data: Data, model: Model) -> None:
    """Raises UserError for a learned token that a text encoder's limit cuts off every caption."""
    model_checks.check_token_limit(
        model.family, model.embeddings, model.placeholders, data.training.records
    )


# ---------------------------------------------------------------- the model


def open_model(config: Config, *, weights_itself: bool = False) -> Model:
    """Load the model onto the config's device and inject adapters and learned tokens. Prints the
    loss and the adapters. Raises UserError for options that this model does not support.
    `weights_itself`: whether the loss takes no weighting by noise level.
    """
    plan = model_checks.plan_adapters(
        config, read_layout(config.model, config.model_config, config.family)
    )
    device = choose_device(config.device)
    family = _open_family(config, choose_loading_device(config, device))
    if far := model_checks.describe_far_resolution(config, family.resolution):
        print(f"warning: {far}", file=sys.stderr)
    identity = model_identity(family.modules, family.schedule, family.prediction)
    objective = _describe_loss(config, family, weights_itself=weights_itself)
    print(objective)
    family, residency = place_family(config, family, plan, device)
    encoders = {name: family.modules[name] for name in family.tokenizers}
    adapters = run_adapters.inject_run_adapters(config, family, plan)
    adapted = adapters.adapted
    placeholders, embeddings = learned_tokens.install_run_tokens(config, family, encoders)
    starting_lora.load_start(config, family, adapted, placeholders, embeddings)
    base_weights.place_model(config, family, residency)
    model = Model(
        family=family,
        device=device,
        residency=residency,
        denoiser=family.modules[family.denoiser],
        encoders=encoders,
        adapted=adapted,
        with_dora=base_weights.networks_with_dora(config, family, adapted),
        has_factors=adapters.has_factors,
        placeholders=placeholders,
        embeddings=embeddings,
        norm_targets=learned_tokens.norm_targets(config, embeddings),
        table_stds={name: tokens.table_std(e) for name, e in embeddings.items()},
        groups=run_adapters.parameter_groups(family, adapted, embeddings),
        rate_ratios=adapters.rate_ratios,
        gradient_hooks=adapters.gradient_hooks,
        identity=identity,
        objective=objective,
        guidance=config.noise.guidance,
        # a graph replays addresses: no copies of weights may be kept from one step to the next
        autocast=torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=config.autocast,
            cache_enabled=not config.cuda_graph,
        ),
    )
    _set_up_networks(config, model)
    return model


def _open_family(config: Config, device: torch.device) -> Family:
    """The frozen model. Raises UserError for options that it does not support."""
    n = config.noise
    options = LoadOptions(
        DTYPES[config.precision],
        device,
        config.vae,
        None if config.vae_precision == "fp32" else DTYPES[config.vae_precision],
        scheduler_changes(n.prediction, zero_terminal_snr=n.zero_terminal_snr),
        config.clip_skip,
        config.max_sequence_length,
        config.max_token_length,
        config.model_config,
        config.family,
    )
    with phase("loading the model"):
        family = load_family(config.model, options)
    model_checks.check_model(config, family)
    look = config.samples
    levels = sampling.sampler_levels(  # raises for a number of steps that the schedule lacks
        look.sampler, family.schedule, look.steps, spacing=family.spacing, offset=family.offset
    )
    sampling.try_sampler(look.sampler, look.sampler_args, levels)
    return family


def _describe_loss(config: Config, family: Family, *, weights_itself: bool) -> str:
    space = config.noise.space
    words = f"loss: {config.loss}, not weighted by noise level"
    if not weights_itself:
        words = losses.describe_loss(
            config.weighting, family.prediction, space, loss=config.loss, **config.weighting_arg
        )
    if config.masks_loss:
        words += masked_losses.describe_mask(config.mask_scale, config.prior.outside_mask)
    return words


def _set_up_networks(config: Config, model: Model) -> None:
    """Gradient checkpointing, memory format and compilation."""
    if config.gradient_checkpointing != "none":
        # No layer here draws from the device's generator, whose state a CUDA graph cannot read.
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        own, level = again, noise_levels.find_level(model.denoiser)
        if level is not None:  # blocks of an earlier forward are recomputed at its timesteps
            own = functools.partial(again, context_fn=level.recompute_contexts)
        model.denoiser.enable_gradient_checkpointing(own)  # type: ignore[operator]
    if config.gradient_checkpointing == "all":
        changing = model.adapted.keys() | model.embeddings.keys()  # a frozen one saves nothing
        for encoder in (model.encoders[name] for name in model.encoders if name in changing):
            # transformers 6 keeps the first name only
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            enable = enable or encoder.gradient_checkpointing_enable
            enable(again.keywords)  # type: ignore[operator]
    if model.device.type == "cuda":  # cuDNN's half-precision kernels are NHWC
        model.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        cuda_graph.compile_blocks(model.denoiser)
    if config.shard:
        sharding.shard_denoiser(model.denoiser, model.groups, model.device)
        model.residency.note_arrival([DENOISER])


# ---------------------------------------------------------------- the optimizer


def open_optimizer(
    config: Config,
    groups: Mapping[str, list[nn.Parameter]],
    rate_ratios: Mapping[str, Mapping[Tensor, float]],
) -> Optimization:
    """The optimizer over the groups of parameters; those in `rate_ratios` have the group's learning
    rate times a ratio. Raises UserError for arguments that its class does not take.
    """
    o = config.optimizer
    settings = building.group_settings(o.name, groups, lr=o.lr, decay=o.weight_decay, betas=o.betas)
    whole = [{"params": params, **settings[name]} for name, params in groups.items()]
    split = building.split_by_ratio(whole, rate_ratios)
    optimizer = building.build_optimizer(o.name, split, o.args)
    if building.is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    parameters = list(itertools.chain(*groups.values()))
    scaler = None
    if config.precision == "fp16":
        scaler = gradients.LossScaler(device=parameters[0].device)
    decays = building.DEFAULT_WEIGHT_DECAYS
    return Optimization(
        optimizer=optimizer,
        settings=settings,
        weight_decays={name: o.weight_decay.get(name, decays[name]) for name in groups},
        rate_schedules=_resolve_schedules(config),
        scaler=scaler,
        average=ParameterAverage(parameters, config.ema) if config.ema else None,
        skip=torch.zeros((), device=parameters[0].device),
        skipped=SkippedSteps(),
        images=config.images_per_step * (2 if config.data.pairs else 1),
        processes=distributed.process_count(),
    )


def _resolve_schedules(config: Config) -> dict[str, RateSchedule]:
    """Name -> learning-rate schedule, for the groups of the stages; --optimizer.schedule-args
    belong to --optimizer.schedule.
    """
    o = config.optimizer
    found: dict[str, RateSchedule] = {}
    for stage in config.stages:
        for group in stage.groups:
            name = stage.schedule_of(group, o)
            arguments = o.schedule_args if name == o.schedule else {}
            found[name] = schedules.resolve_schedule(name, **arguments)
    return found
