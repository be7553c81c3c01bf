"""Probes of a step see every option that acts, and looking at a run changes no bit of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import train
from lora_core.config import Config, Stage, ValidationConfig
from tests.conftest import learned, same
from tests.test_configs import put
from training.probes import effects
from training.probes.first_step import FirstStep

RUNS: list[dict[str, Any]] = [
    {
        "precision": "fp64",
        "vae_precision": "bf16",
        "gradient_checkpointing": "blocks",
        "accumulation": 2,
        "loss": "huber",
        "loss_arg": {"delta": 0.3},
        "weighting": "min_snr",
        "weighting_arg": {"gamma": 2.0},
        "ema": 0.9,
        "data.crop": "random",
        "data.zoom": 1.5,
        "data.flip": True,
        "data.jitter": True,
        "data.variants": 8,
        "data.interpolation": "lanczos",
        "data.caption_dropout": 0.3,
        "data.repeats": 2,
        "prior.prompt": "a cat",
        "prior.count": 2,
        "prior.weight": 0.3,
        "adapter.rank": 3,
        "adapter.alpha": 2.0,
        "adapter.rslora": True,
        "adapter.init": "kaiming",
        "adapter.dropout": 0.1,
        "adapter.rank_dropout": 0.1,
        "adapter.module_dropout": 0.1,
        "noise.offset": 0.1,
        "noise.multires_levels": 3,
        "noise.multires_discount": 0.5,
        "noise.perturbation": 0.1,
        "noise.density": "logit_normal",
        "noise.density_args": {"mean": 1.0},
        "noise.prediction": "v_prediction",
        "noise.zero_terminal_snr": True,
        "optimizer.weight_decay": {"denoiser": 0.3},
        "optimizer.betas": {"denoiser": (0.5, 0.9)},
        "optimizer.args": {"eps": 1e-5},
        "optimizer.schedule": "cosine",
        "optimizer.warmup": 1,
        "optimizer.lora_plus": 4.0,
        "optimizer.clip": 1e-6,
        "stages.0.steps": 3,
        "stages.0.lr": {"denoiser": 2e-3},
        "stages.0.low": 0.2,
        "stages.0.high": 0.8,
    },
    {
        "autocast": True,
        "mask_scale": "cloneofsimo",
        "data.masks": "file",
        "data.buckets": True,
        "data.bucket_step": 2,
        "prior.swap": {"TOK": "b"},
        "prior.outside_mask": 0.5,
        "adapter.kind": "dora",
        "adapter.norm_grad": "full",
        "tokens.words": ("TOK", "photo"),
        "tokens.vectors": 3,
        "tokens.per_layer": True,
        "tokens.init": ("zero", "a"),
        "noise.space": "edm",
        "noise.low": 0.2,
        "noise.high": 0.8,
        "optimizer.name": "prodigy",
        "optimizer.lr": {"denoiser": 0.5},
        "stages.0.groups": ("denoiser", "text_encoder", "tokens"),
        "stages.0.norm": "rescale",
        "stages.0.mask_temperature": 2.0,
        "stages.0.schedules": {"tokens": "linear"},
        "stages.0.steps": 3,
    },
    {
        "seed": 3,
        "processes": 2,
        "clip_skip": 1,
        "data.captions": "one",
        "data.caption": "a drawing of TOK",
        "prior.swap": {"TOK": "b"},
        "prior.swap_weight": 0.5,
        "adapter.targets": ("*.to_q", "*.to_k"),
        "adapter.exclude": ("mid_block.*.to_k",),
        "adapter.rank_pattern": {"*.to_q": 2.0},
        "adapter.alpha_pattern": {"up_blocks.*": 1.0},
        "tokens.norm_target": 0.4,
        "optimizer.schedule": "polynomial",
        "optimizer.schedule_args": {"power": 2.0},
        "stages.0.groups": ("denoiser", "tokens"),
        "stages.0.steps": 3,
    },
    {
        "quantize": "int8",
        "stream": True,
        "gradient_checkpointing": "blocks",
        "adapter.kind": "dora",
        "adapter.text_targets": ("*.q_proj",),
        "stages.0.groups": ("denoiser", "text_encoder"),
        "optimizer.lr": {},
    },
]
# A run may not show them; without its own forward passes a step cannot.
UNDECIDED = {"data.crop", "optimizer.schedule", "gradient_checkpointing"}


@pytest.mark.parametrize("values", RUNS, ids=["adapters", "tokens", "patterns", "packed"])
def test_options_that_act_are_seen_and_looking_changes_nothing(
    values: dict[str, Any], config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(put(config, values), validation=ValidationConfig(every=-1))
    answers: dict[str, bool | None] = {}
    shown = {n: e for n, e in effects.OPTION_EFFECTS.items() if isinstance(e, effects.Shown)}
    given = shown.keys() & {name.replace("stages.0.", "stages.") for name in values}
    whole = effects._check_option

    def look(first: FirstStep, name: str, effect: effects.Shown) -> None:
        if name in given:
            answers[name] = effect.probe(first)
        whole(first, name, effect)

    monkeypatch.setattr(effects, "_check_option", look)
    run = train.train(config)
    assert {name for name in given if answers[name] is not True} <= UNDECIDED
    monkeypatch.setattr(effects, "check_step", lambda *_: None)
    assert same(learned(run), learned(train.train(replace(config, out=config.out + "_blind"))))


# What acted and was called an option without effect.
ACTING: dict[str, dict[str, Any]] = {
    "a stage from 0": {"stages": (Stage(1, low=0.0, high=0.5), Stage(1, low=0.5))},
    "a bound that the first stage has of its own": {
        "noise.low": 0.2,
        "stages": (Stage(1, low=0.5), Stage(1)),
    },
    "a last validation after the last one that was due": {
        "stages.0.steps": 3,
        "validation.every": 2,
        "validation.bins": 1,
    },
    "layers behind the last checkpointed block": {
        "gradient_checkpointing": "blocks",
        "adapter.targets": ("up_blocks.*attn2*",),
    },
    "no learned token in a batch of dropped captions": {
        "loss": "attention",
        "loss_arg": {"attention_weight": 0.02},
        "data.masks": "file",
        "data.caption_dropout": 0.9,
        "stages.0.groups": ("denoiser", "tokens"),
        "optimizer.lr": {},
        "batch_size": 1,
    },
    "an adapter that drops itself": {
        "adapter.module_dropout": 0.9,
        "adapter.targets": ("mid_block.*",),
        "batch_size": 1,
    },
    "a small weight of preservation": {"prior.swap": {"TOK": "b"}, "prior.swap_weight": 1e-6},
    "no weight of preservation": {"prior.swap": {"TOK": "b"}, "prior.swap_weight": 0.0},
    "dropout beside packed and streamed weights": {
        "adapter.dropout": 0.5,
        "adapter.rank_dropout": 0.5,
        "adapter.kind": "dora",
        "quantize": "int8",
        "stream": True,
        "gradient_checkpointing": "blocks",
    },
    "dropout in double precision": {"adapter.module_dropout": 0.5, "precision": "fp64"},
    "an adapter of one's own that knows its batch": {
        "adapter.kind": "examples/t_lora.py:TLoRA",
        "adapter.dropout": 0.1,
    },
}


@pytest.mark.parametrize("change", ACTING.values(), ids=ACTING)
def test_options_that_this_step_cannot_show_are_no_error(
    config: Config, quick: None, change: dict[str, Any]
) -> None:
    usual = {"stages.0.steps": 1, "validation.every": -1}
    if "validation.every" not in change:
        usual["validation"] = ValidationConfig()
    train.train(put(config, {**usual, **change}))
