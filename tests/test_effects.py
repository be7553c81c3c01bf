"""Every option has a row that says what shows its effect; with its implementation switched off the
run ends with an error that names the option.
"""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models.flux
import train
from lora_core.adapters import adapter_module, kinds, norm_limits
from lora_core.config import Config, SamplesConfig, Stage, ValidationConfig
from lora_core.data import dataset, records
from lora_core.diffusion import densities, generation, losses, masked_losses, noise
from lora_core.diffusion.losses import mse
from lora_core.diffusion.sampling import SAMPLERS
from lora_core.errors import UserError
from lora_core.optim import building, ema, gradients, schedules
from lora_core.runs import reports
from tests import tiny_flux
from tests.test_configs import put
from training import checkpoints, cuda_graph, processes, results, run_adapters, scores, setup
from training import step as step_module
from training.checks import config_checks
from training.inputs import latent_cache, step_inputs, training_images
from training.probes import effects

BOTH, TOKENS = ("denoiser", "tokens"), ("tokens",)


# ---------------------------------------------------------------- the table


def test_every_option_has_a_row_and_every_row_names_what_there_is() -> None:
    assert list(effects.option_names()) == list(dict.fromkeys(effects.option_names()))
    assert set(effects.OPTION_EFFECTS) == set(effects.option_names())
    for effect in effects.OPTION_EFFECTS.values():
        if isinstance(effect, effects.Refused | effects.Place):
            module, _, name = (getattr(effect, "check", "") or effect.reader).partition(":")
            assert callable(getattr(importlib.import_module(module), name))
        elif isinstance(effect, effects.Written):
            assert Path(effect.test).is_file()


# ---------------------------------------------------------------- options that are switched off


def given(place: Any, name: str, **fixed: Any) -> tuple[Any, str, Callable[[Any], Any]]:
    """The function `name` of a module or class, with some arguments fixed whatever is passed."""

    def disable(whole: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **settings: whole(*args, **(settings | fixed))

    return place, name, disable


def instead(place: Any, name: str, other: Any) -> tuple[Any, str, Callable[[Any], Any]]:
    """Another object in the place of one."""
    return place, name, lambda whole: other


def with_settings(place: Any, name: str, number: int, **fixed: Any) -> Any:
    """A function whose positional argument `number`, a dataclass, has some fields fixed."""

    def disable(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            changed = list(args)
            own = changed[number]
            changed[number] = (
                own._replace(**fixed) if hasattr(own, "_replace") else replace(own, **fixed)
            )
            return whole(*changed, **settings)

        return call

    return place, name, disable


def nothing(*_: Any, **__: Any) -> None:
    return None


def same(first: Any, *_: Any, **__: Any) -> Any:
    return first


def constant(*_: Any, **__: Any) -> float:
    return 1.0


def plain_call(function: Any, *args: Any, **settings: Any) -> Any:
    for name in ("use_reentrant", "preserve_rng_state", "context_fn"):
        settings.pop(name, None)
    return function(*args, **settings)


def ignore_purpose(purpose: str) -> Any:
    """Draws of one purpose are 0."""

    def disable(whole: Any) -> Any:
        def draw(self: Any, record: Any, visit: int, own: str) -> float:
            return 0.0 if own == purpose else whole(self, record, visit, own)

        return draw

    return dataset.ImageDataset, "_uniform", disable


def never_twice(whole: Any) -> Any:
    numbers = iter(torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist())
    return lambda self, record, visit, purpose: next(numbers)


def without_schedule_arguments(whole: Any) -> Any:
    def set_rates(stage: Stage, step: int, config: Config, optimization: Any) -> None:
        whole(stage, step, config, optimization)
        for group in optimization.optimizer.param_groups:
            group["rate"] = group["lr"] = 1e-3

    return set_rates


def without_warmup(whole: Any) -> Any:
    def resolve(name: str, /, **args: Any) -> Any:
        multiplier = whole(name, **args)
        return lambda step, total, warmup: multiplier(step, total, 0)

    return resolve


def without_setting(option: str) -> Any:
    def disable(whole: Any) -> Any:
        def settings(*args: Any, **given: Any) -> Any:
            found = whole(*args, **given)
            for group in found.values():
                group.pop(option, None)
            return found

        return settings

    return building, "group_settings", disable


def frozen_parameter(whole: Any) -> Any:
    def begin(stage: Stage, config: Config, model: Any, optimization: Any) -> None:
        whole(stage, config, model, optimization)
        model.groups["denoiser"][1].requires_grad_(False)

    return begin


def usual_decay(whole: Any) -> Any:
    def begin(stage: Stage, config: Config, model: Any, optimization: Any) -> None:
        whole(stage, config, model, optimization)
        for group in optimization.optimizer.param_groups:
            group["weight_decay"] = 0.01

    return begin


def without_decay(whole: Any) -> Any:
    def begin(stage: Stage, config: Config, model: Any, optimization: Any) -> None:
        whole(replace(stage, weight_decay={}), config, model, optimization)

    return begin


def with_usual_guidance(whole: Any) -> Any:
    return lambda model, *rest: whole(replace(model, guidance=3.5), *rest)


def first_call_only(whole: Any) -> Any:
    def write(self: Any, done: int, log: Any) -> None:
        if done == log.config.steps:
            whole(self, done, log)

    return write


def shorter_scores(count: int) -> Any:
    return train.Scorer, "score", lambda whole: lambda self: whole(self)[:count]


def with_samples(writer: str, **fixed: Any) -> Any:
    """A function that writes a sheet, with some options of [samples] fixed."""

    def disable(whole: Any) -> Any:
        def write(samples: Any, *rest: Any) -> Any:
            other = copy.copy(samples)
            other.config = put(samples.config, {f"samples.{k}": v for k, v in fixed.items()})
            return whole(other, *rest)

        return write

    return results, writer, disable


def even(mask: Tensor, temperature: float) -> Tensor:
    return torch.ones_like(mask)


NO_MASK = masked_losses.MaskScale(even, masked_losses.MASK_SCALES["mean"].factor)
BLUNT = masked_losses.MaskScale(
    lambda mask, temperature: mask, masked_losses.MASK_SCALES["mean"].factor
)


def one_caption(caption: str) -> dict[str, Any]:
    return {"data.captions": "one", "data.caption": caption}


def without_tags(**fixed: Any) -> Any:
    return with_settings(dataset, "compose_caption", 1, **fixed)


LEVELS, NOISE = (noise, "sample_levels"), (noise, "sample_noise")
INJECT = (run_adapters.injection, "inject")
SPEC = with_settings
MASKS: dict[str, Any] = {"data.masks": "file", "stages.0.steps": 1}
PRIOR: dict[str, Any] = {"prior.prompt": "a cat", "prior.count": 2}
FOUR_STEPS = {"samples.steps": 4}
SHUFFLES: dict[str, Any] = {"data.shuffle_caption": True}
FIXED_TEXTS = instead(records, "add_fixed_texts", lambda texts, settings: tuple(texts))
TOKEN_STAGE: dict[str, Any] = {"stages.0.groups": BOTH}

# Option -> its value, what else it needs, and the function that is switched off.
CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "clip_skip": (1, {}, with_settings(setup, "load_family", 1, clip_skip=0)),
    "max_token_length": (150, {}, with_settings(setup, "load_family", 1, max_token_length=0)),
    "seed": (3, {}, (step_inputs, "RandomKeys", lambda f: lambda seed, *rest: f(0, *rest))),
    "processes": (2, {"batch_size": 1}, given(dataset, "iterate_batches", batch=1)),
    "quantize": (
        "int8",
        {},
        (
            setup.base_weights,
            "place_networks",
            lambda f: lambda family, device, _, **rest: f(family, device, "none", **rest),
        ),
    ),
    "stream": (
        True,
        {"gradient_checkpointing": "blocks"},
        given(setup.base_weights, "place_networks", stream=False),
    ),
    "threads": (3, {}, instead(setup.torch, "set_num_threads", nothing)),
    "precision": ("fp64", {}, with_settings(setup, "load_family", 1, dtype=torch.float32)),
    "vae_precision": ("bf16", {}, with_settings(setup, "load_family", 1, vae_dtype=None)),
    "autocast": (True, {}, given(setup.torch, "autocast", enabled=False)),
    "compile": (True, {}, instead(cuda_graph, "compile_blocks", nothing)),
    "gradient_checkpointing": ("blocks", {}, instead(setup, "checkpoint", plain_call)),
    "batch_size": (3, {}, given(dataset, "iterate_batches", batch=2)),
    "accumulation": (2, {}, instead(step_inputs, "micro_batches", lambda batch, parts: [batch])),
    "loss": ("l1", {}, instead(losses.LOSSES, "l1", mse)),
    "loss_arg": (
        {"delta": 0.3},
        {"loss": "huber"},
        (losses.LOSSES, "huber", lambda whole: lambda step, delta=0.1: whole(step)),
    ),
    "mask_scale": (
        "cloneofsimo",
        MASKS,
        instead(masked_losses.MASK_SCALES, "cloneofsimo", masked_losses.MASK_SCALES["mean"]),
    ),
    "weighting": (
        "min_snr",
        {},
        (losses, "loss_weights", lambda _: lambda name, level, *a, **k: torch.ones_like(level.t)),
    ),
    "weighting_arg": (
        {"gamma": 2.0},
        {"weighting": "min_snr"},
        (losses, "loss_weights", lambda f: lambda *a, space="model", **_: f(*a, space=space)),
    ),
    "ema": (0.9, {}, instead(ema.ParameterAverage, "update_", nothing)),
    "data.resolution": (24, {}, instead(dataset, "cut_size", lambda *_: (16, 16))),
    "data.crop": (
        "random",
        {},
        (dataset, "_crop_corner", lambda f: lambda image, size, draw: f(image, size, None)),
    ),
    "data.zoom": (1.5, {}, ignore_purpose("zoom")),
    "data.flip": (True, {}, instead(dataset, "mirror_image", same)),
    "data.jitter": (True, {}, instead(dataset, "jitter_colors", same)),
    "data.variants": (
        2,
        {"data.flip": True, "data.crop": "random"},
        (dataset.ImageDataset, "_uniform", never_twice),
    ),
    "data.buckets": (
        True,
        {"data.bucket_step": 2},
        instead(dataset, "cut_size", lambda *_: (16, 16)),
    ),
    "data.bucket_step": (
        4,
        {"data.buckets": True, "batch_size": 1},
        instead(dataset, "cut_size", lambda *_: (14, 18)),
    ),
    "data.bucket_min": (
        16,
        {"data.buckets": True, "data.bucket_step": 2},
        with_settings(dataset, "cut_size", 0, bucket_min=0),
    ),
    "data.bucket_max": (
        16,
        {"data.buckets": True, "data.bucket_step": 2},
        with_settings(dataset, "cut_size", 0, bucket_max=0),
    ),
    "data.bucket_upscale": (
        False,
        {"data.buckets": True, "data.bucket_step": 2, "data.resolution": 64},
        with_settings(dataset, "cut_size", 0, bucket_upscale=True),
    ),
    "data.interpolation": (
        "lanczos",
        {},
        (
            dataset,
            "resize_image",
            lambda f: lambda image, size, how="bilinear": f(image, size, "bilinear"),
        ),
    ),
    "data.caption": (
        "a drawing of TOK",
        {"data.captions": "one"},
        given(training_images.dataset, "scan_folder", caption="a TOK"),
    ),
    "data.caption_dropout": (
        0.3,
        {},
        instead(
            dataset.ImageDataset, "_choose_caption", lambda self, r, visit: (r.captions[0], False)
        ),
    ),
    "data.caption_lines": (
        "first",
        {"data.captions": "object", "data.caption": "TOK"},
        FIXED_TEXTS,
    ),
    "data.caption_prefix": ("best", {}, FIXED_TEXTS),
    "data.caption_suffix": ("side", {}, FIXED_TEXTS),
    "data.wildcards": (True, one_caption("{a|b} TOK"), without_tags(wildcards=False)),
    "data.shuffle_caption": (True, one_caption("TOK, a, b"), without_tags(shuffle_caption=False)),
    "data.keep_tokens": (1, SHUFFLES | one_caption("TOK, a, b"), without_tags(keep_tokens=0)),
    "data.keep_tokens_separator": (
        "|||",
        SHUFFLES | one_caption("TOK ||| a, b"),
        without_tags(keep_tokens_separator=""),
    ),
    "data.tag_dropout": (0.5, one_caption("TOK, a, b"), without_tags(tag_dropout=0.0)),
    "data.tag_separator": (
        ".",
        SHUFFLES | one_caption("TOK. a, b"),
        without_tags(tag_separator=","),
    ),
    "data.secondary_separator": (
        ";",
        one_caption("TOK;a, b"),
        without_tags(secondary_separator=""),
    ),
    "data.repeats": (2, {}, given(dataset, "scan_folder", repeats=1)),
    "data.masks": ("file", {}, instead(masked_losses.MASK_SCALES, "mean", NO_MASK)),
    "data.cache": (
        "CACHE",
        {},
        (latent_cache, "TensorCache", lambda f: lambda made_by, folder: f(made_by, None)),
    ),
    "prior.prompt": ("a cat", {}, instead(setup.class_images, "open_class_images", nothing)),
    "prior.count": (
        3,
        {"prior.prompt": "a cat"},
        with_settings(setup.class_images, "open_class_images", 0, count=2),
    ),
    "prior.images": (
        "CLASS",
        PRIOR,
        with_settings(setup.class_images, "open_class_images", 0, images=""),
    ),
    "prior.weight": (0.3, PRIOR, given(losses, "sum_losses", prior_weight=1.0)),
    "prior.swap": ({"TOK": "b"}, {}, instead(losses, "add_preservation", same)),
    "prior.swap_weight": (
        0.5,
        {"prior.swap": {"TOK": "b"}},
        (losses, "add_preservation", lambda f: lambda loss, weight: f(loss, 1.0)),
    ),
    "prior.outside_mask": (0.5, MASKS, instead(masked_losses, "add_outside_preservation", same)),
    "adapter.targets": (("*.to_q",), {}, SPEC(*INJECT, 1, targets=("*.to_k",))),
    "adapter.text_targets": (
        ("*.q_proj",),
        {"stages.0.groups": ("text_encoder",), "optimizer.lr": {}},
        SPEC(*INJECT, 1, targets=("*.k_proj",)),
    ),
    "adapter.exclude": (("*.to_q",), {}, SPEC(*INJECT, 1, exclude=())),
    "adapter.kind": ("dora", {}, SPEC(*INJECT, 1, kind="lora")),
    "adapter.rank_pattern": ({"*.to_q": 2.0}, {}, SPEC(*INJECT, 1, rank_pattern={})),
    "adapter.alpha_pattern": ({"*.to_q": 2.0}, {}, SPEC(*INJECT, 1, alpha_pattern={})),
    "adapter.rank": (3, {}, SPEC(*INJECT, 1, rank=4)),
    "adapter.alpha": (2.0, {}, SPEC(*INJECT, 1, alpha=0.0)),
    "adapter.rslora": (True, {}, SPEC(*INJECT, 1, rslora=False)),
    "adapter.norm_grad": ("full", {"adapter.kind": "dora"}, SPEC(*INJECT, 1, norm_grad="detach")),
    "adapter.factor": (2, {"adapter.kind": "lokr"}, SPEC(*INJECT, 1, factor=-1)),
    "adapter.init": ("kaiming", {}, SPEC(*INJECT, 1, init="gaussian")),
    "adapter.dropout": (
        0.1,
        {},
        instead(adapter_module.DroppingAdapter, "_input_dropout", nothing),
    ),
    "adapter.rank_dropout": (0.1, {}, instead(kinds.FactorAdapter, "rank_mask", nothing)),
    "adapter.module_dropout": (
        0.1,
        {},
        instead(adapter_module.DroppingAdapter, "_kept_examples", nothing),
    ),
    "tokens.words": (
        ("TOK", "a"),
        TOKEN_STAGE,
        (
            setup.learned_tokens.model_checks,
            "token_initializers",
            lambda f: lambda c: f(put(c, {"tokens.words": ("TOK",)})),
        ),
    ),
    "tokens.vectors": (
        3,
        TOKEN_STAGE,
        (
            setup.learned_tokens,
            "make_placeholders",
            lambda f: lambda i, vectors, **k: f(i, [1] * len(vectors), **k),
        ),
    ),
    "tokens.names": (
        ("<s1>", "<s2>"),
        TOKEN_STAGE,
        given(setup.learned_tokens, "make_placeholders", names=()),
    ),
    "tokens.per_layer": (
        True,
        TOKEN_STAGE,
        given(setup.learned_tokens, "make_placeholders", layers=0),
    ),
    "tokens.init": (
        ("zero",),
        TOKEN_STAGE,
        (setup.learned_tokens.tokens, "_initial_rows", lambda f: lambda *a, **k: f(*a, **k) + 0.1),
    ),
    "tokens.norm": ("rescale", TOKEN_STAGE, instead(step_module, "control_token_norms", nothing)),
    "tokens.norm_target": (
        0.4,
        TOKEN_STAGE,
        (setup.learned_tokens, "_norm_target", lambda f: lambda rows, wanted: f(rows, 0.0)),
    ),
    "noise.offset": (0.1, {}, SPEC(*NOISE, 2, offset=0.0)),
    "noise.adaptive_offset": (2.0, {"noise.offset": 0.1}, SPEC(*NOISE, 2, adaptive_offset=0.0)),
    "noise.multires_levels": (3, {}, SPEC(*NOISE, 2, multires_levels=0)),
    "noise.multires_discount": (
        0.5,
        {"noise.multires_levels": 3},
        SPEC(*NOISE, 2, multires_discount=0.3),
    ),
    "noise.perturbation": (0.1, {}, SPEC(*NOISE, 2, perturbation=0.0)),
    "noise.low": (0.2, {}, given(*LEVELS, low=0.0)),
    "noise.high": (0.8, {}, given(*LEVELS, high=1.0)),
    "noise.density": ("logit_normal", {}, given(*LEVELS, density=None)),
    "noise.density_args": (
        {"mean": 1.0},
        {"noise.density": "logit_normal"},
        (densities, "bind_density", lambda f: lambda name, **_: f(name)),
    ),
    "noise.space": (
        "edm",
        {},
        (train, "to_loss_space", lambda f: lambda p, space, *a: f(p, "model", *a)),
    ),
    "noise.prediction": (
        "v_prediction",
        {},
        instead(setup, "scheduler_changes", lambda *a, **k: {}),
    ),
    "noise.zero_terminal_snr": (
        True,
        {"noise.prediction": "v_prediction"},
        given(setup, "scheduler_changes", zero_terminal_snr=False),
    ),
    "optimizer.name": (
        "torch.optim.Adam",
        {},
        (
            building,
            "build_optimizer",
            lambda f: lambda name, groups, args: f("adamw", groups, args),
        ),
    ),
    "optimizer.lr": (
        {"denoiser": 2e-3},
        {},
        (train, "set_learning_rates", without_schedule_arguments),
    ),
    "optimizer.weight_decay": ({"denoiser": 0.3}, {}, (train, "begin_stage", usual_decay)),
    "optimizer.betas": ({"denoiser": (0.5, 0.9)}, {}, without_setting("betas")),
    "optimizer.args": (
        {"eps": 1e-5},
        {},
        (building, "build_optimizer", lambda f: lambda name, groups, args: f(name, groups, {})),
    ),
    "optimizer.schedule": (
        "linear",
        {"stages.0.steps": 5},
        instead(schedules.SCHEDULES, "linear", constant),
    ),
    "optimizer.schedule_args": (
        {"power": 2.0},
        {"optimizer.schedule": "polynomial", "stages.0.steps": 100},
        (
            schedules.SCHEDULES,
            "polynomial",
            lambda f: lambda step, steps, power=1.0, end=0.0: f(step, steps, end=end),
        ),
    ),
    "optimizer.schedules": (
        {"denoiser": "linear"},
        {"stages.0.steps": 5},
        instead(schedules.SCHEDULES, "linear", constant),
    ),
    "optimizer.warmup": (2, {"stages.0.steps": 5}, (schedules, "resolve_schedule", without_warmup)),
    "optimizer.lr_pattern": (
        {"*.to_q": 0.5},
        {},
        instead(run_adapters, "layer_rates", lambda *_: {}),
    ),
    "optimizer.lora_plus": (
        4.0,
        {},
        (building, "split_by_ratio", lambda f: lambda groups, ratios: f(groups, {})),
    ),
    "optimizer.clip": (
        1e-6,
        {},
        (gradients, "clip_gradients_", lambda f: lambda params, limit: f(params, 1e9)),
    ),
    "optimizer.max_update_norm": (
        1e-6,
        {},
        instead(
            step_module, "limit_update_norms_", lambda *_, **__: norm_limits.LimitedNorms(0, 0)
        ),
    ),
    "stages.groups": (("denoiser",), {}, (train, "begin_stage", frozen_parameter)),
    "stages.lr": (
        {"denoiser": 2e-3},
        {"optimizer.lr": {}},
        (train, "set_learning_rates", without_schedule_arguments),
    ),
    "stages.weight_decay": ({"denoiser": 0.3}, {}, (train, "begin_stage", without_decay)),
    "stages.schedule": (
        "linear",
        {"stages.0.steps": 5},
        instead(schedules.SCHEDULES, "linear", constant),
    ),
    "stages.schedules": (
        {"denoiser": "linear"},
        {"stages.0.steps": 5},
        instead(schedules.SCHEDULES, "linear", constant),
    ),
    "stages.warmup": (2, {"stages.0.steps": 5}, (schedules, "resolve_schedule", without_warmup)),
    "stages.low": (0.2, {}, given(*LEVELS, low=0.0)),
    "stages.high": (0.8, {}, given(*LEVELS, high=1.0)),
    "stages.norm": ("rescale", TOKEN_STAGE, instead(step_module, "control_token_norms", nothing)),
    "stages.mask_temperature": (2.0, MASKS, instead(masked_losses.MASK_SCALES, "mean", BLUNT)),
    # what a run writes
    "save_every": (1, {"keep": 3}, (checkpoints.Checkpoints, "write", first_call_only)),
    "keep": (1, {"save_every": 1}, given(processes, "hold_run", keep=5)),
    "samples.every": (1, {}, instead(train, "save_sample_grid", nothing)),
    "samples.sampler": ("dpmpp_2m", FOUR_STEPS, instead(SAMPLERS, "dpmpp_2m", SAMPLERS["ddim"])),
    "samples.sampler_args": (
        {"eta": 1.0},
        FOUR_STEPS,
        (
            generation.sampling,
            "run_sampler",
            lambda f: lambda name, _arguments, *rest: f(name, {}, *rest),
        ),
    ),
    "samples.steps": (
        4,
        {},
        (
            generation.sampling,
            "sampler_levels",
            lambda f: lambda name, schedule, _, **rest: f(name, schedule, 25, **rest),
        ),
    ),
    "samples.guidance": (
        2.0,
        FOUR_STEPS,
        instead(generation, "guidance_scale", lambda *_: SamplesConfig().guidance),
    ),
    "samples.negative": (
        "bad",
        {**FOUR_STEPS, "samples.guidance": 2.0},
        with_settings(generation, "encode_guidance", 2, negative=""),
    ),
    "samples.prompts": (
        ("a TOK", "TOK in a box"),
        {},
        instead(results.SampleImages, "_prompts", lambda self: {"a TOK": False}),
    ),
    "samples.new_prompts": (("a TOK",), {}, with_samples("before_after_grid", new_prompts=())),
    "samples.show_data": (True, {}, with_samples("before_after_grid", show_data=False)),
    "samples.strengths": ((0.0, 1.0), {}, with_samples("save_sample_grid", strengths=(1.0,))),
    "samples.base_word": (
        "thing",
        TOKEN_STAGE,
        instead(results.SampleImages, "ordinary_prompt", lambda self, prompt: prompt),
    ),
    "validation.every": (1, {}, instead(train.Log, "validate", nothing)),
    "validation.count": (2, {}, shorter_scores(1)),
    "validation.bins": (2, {}, shorter_scores(1)),
    "validation.draws": (2, {}, shorter_scores(1)),
    "validation.seed": (5, {}, given(scores.validation, "score_latents", seed=0)),
    "data.skip_bad": (
        True,
        {"data.images": "DAMAGED"},
        instead(setup.training_images, "write_left_out", nothing),
    ),
    "report": ("tensorboard", {}, instead(reports.SINKS, "tensorboard", nothing)),
}


FLUX: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "max_sequence_length": (24, {}, with_settings(setup, "load_family", 1, max_sequence_length=16)),
    "tokens.encoders": (
        ("clip_l", "t5"),
        TOKEN_STAGE,
        (
            setup.learned_tokens,
            "install_run_tokens",
            lambda f: lambda c, *rest: f(put(c, {"tokens.encoders": ()}), *rest),
        ),
    ),
    "noise.shift": (3.0, {}, given(*LEVELS, shift=1.0)),
    "noise.dynamic_shift": (
        True,
        {},
        instead(models.flux.Flux, "schedule_at", lambda self, *_: self.schedule),
    ),
    "noise.guidance": (1.0, {}, (train, "encode_conditioning", with_usual_guidance)),
}
# Options that no small run shows: their probes are called in tests/test_input_probes.py and
# tests/test_model_probes.py.
ELSEWHERE = {"data.dropped", "data.mask_use", "data.pairs", "data.streaming", "data.subsets"}
ELSEWHERE |= {"offload", "shard"}


def test_each_option_that_a_run_looks_at_is_switched_off_here() -> None:
    shown = {
        name
        for name, effect in effects.OPTION_EFFECTS.items()
        if isinstance(effect, effects.Shown) or getattr(effect, "is_there", None)
    }
    assert CASES.keys() | FLUX.keys() | ELSEWHERE == shown


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "model"
    tiny_flux.save(folder)
    return folder


@pytest.mark.parametrize("option", FLUX)
def test_the_same_for_options_of_flow_models(
    option: str, config: Config, flux: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, more, (place, name, disable) = FLUX[option]
    base = {"model": str(flux), "stages.0.steps": 1, "validation": ValidationConfig(every=-1)}
    config = put(config, base | more | {option: value})
    monkeypatch.setattr(place, name, disable(getattr(place, name)))
    with pytest.raises(UserError, match=f"^--{option.replace('_', '-')} .* had no effect"):
        train.train(config)


@pytest.mark.parametrize("option", CASES)
def test_an_option_whose_implementation_is_off_is_an_error(
    option: str, config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    value, more, (place, name, disable) = CASES[option]
    if value == "CACHE" or value == "CLASS":
        value = str(tmp_path / "folder")
    if more.get("data.images") == "DAMAGED":
        shutil.copytree(config.data.images, tmp_path / "images")
        (tmp_path / "images" / "damaged.png").write_bytes(b"no image")
        (tmp_path / "images" / "damaged.txt").write_text("a TOK")
        more = {**more, "data.images": str(tmp_path / "images")}
    is_output = isinstance(effects.OPTION_EFFECTS[option], effects.Written)
    steps = 2 if is_output else 1
    validation = ValidationConfig(bins=1) if is_output else ValidationConfig(every=-1)
    base = {"stages.0.steps": steps, "validation": validation, **more}
    config = put(config, base | {option.replace("stages.", "stages.0."): value})
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, disable(place[name]))
    else:
        monkeypatch.setattr(place, name, disable(getattr(place, name)))
    monkeypatch.setattr(config_checks.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(reports, "check_login", nothing)
    flag = option.replace("stages.", "stages.0.").replace("_", "-")
    section, _, own = flag.rpartition(".")
    given = f"--{section}.no-{own} had" if value is False else f"--{flag} .* had"
    with pytest.raises(UserError, match=f"^{given} no effect") as caught:
        train.train(config)
    print(caught.value)
