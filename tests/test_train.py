"""The laws of a training run: what must not change a bit, and that every option does something."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from lora_core.config import AdapterConfig, Config, OptimizerConfig, Stage, ValidationConfig
from lora_core.diffusion.losses import StepOutput, mse
from tests.conftest import distance, final, learned, merged, rows, same
from training.inputs.step_inputs import StepInputs
from training.setup import Model
from training.step import Loss

TOKENS = ("tokens",)
ALL = ("denoiser", "text_encoder", "tokens")


# ---------------------------------------------------------------- what must not change a bit


def test_the_bits_do_not_depend_on_data_workers(config: Config, quick: None) -> None:
    data = replace(config.data, crop="random", zoom=1.5, flip=True, jitter=True)
    runs = [
        train.train(
            replace(
                config, out=f"{config.out}{n}", stages=(Stage(5),), data=replace(data, workers=n)
            )
        )
        for n in (0, 2)
    ]
    assert same(*map(final, runs)) and rows(runs[0]) == rows(runs[1])


def test_frozen_parameters_and_vocabulary_keep_their_bits(config: Config, quick: None) -> None:
    before: dict[str, Tensor] = {}
    opened: list[Model] = []

    def watched(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
        if not opened:
            opened.append(model)
            before.update({k: v.clone() for k, v in frozen(model).items()})
        return train.training_step(model, x, config, loss)

    def frozen(model: Model) -> dict[str, Tensor]:
        trained = {id(p) for p in itertools.chain(*model.groups.values())}
        found = {}
        for name, module in model.family.modules.items():
            for key, value in module.state_dict(keep_vars=True).items():
                if id(value) not in trained:
                    found[f"{name}/{key}"] = value
        return found

    train.train(
        replace(
            config,
            stages=(Stage(3, ALL),),
            optimizer=OptimizerConfig(lr={"tokens": 0.1}, weight_decay={"tokens": 0.5}),
        ),
        step=watched,
    )
    model = opened[0]
    assert any("token_embedding.table" in name for name in before) and len(before) > 200
    assert same(before, {k: v.detach() for k, v in frozen(model).items()})
    embedding = model.embeddings["text_encoder"]
    assert not torch.equal(embedding.rows, embedding.initial)


# ---------------------------------------------------------------- losses and steps of one's own


def test_a_loss_from_a_file_changes_the_loss_and_nothing_else(
    config: Config, quick: None, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "seen = []\n"
        "def same(step):\n    return (step.out - step.target).square().flatten(1).mean(1)\n"
        "def cube(step, power=3):\n    seen.append((step.x_t.clone(), step.level.t.clone(), "
        "step.eps.clone()))\n"
        "    return (step.out - step.target).abs().pow(power).flatten(1).mean(1)\n"
    )
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(step: StepOutput) -> Tensor:
        seen.append((step.x_t.clone(), step.level.t.clone(), step.eps.clone()))
        return mse(step)

    base = rows(train.train(config, loss=keep))
    same_loss = rows(
        train.train(replace(config, out=config.out + "same", loss=f"{tmp_path}/mine.py:same"))
    )
    assert same_loss == base
    other = rows(
        train.train(
            replace(
                config,
                out=config.out + "cube",
                loss=f"{tmp_path}/mine.py:cube",
                loss_arg={"power": 4},
            )
        )
    )
    assert other[1]["loss"] != base[1]["loss"] and other[1]["lr_denoiser"] == base[1]["lr_denoiser"]
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def cube(step: StepOutput) -> Tensor:
        found.append((step.x_t.clone(), step.level.t.clone(), step.eps.clone()))
        return (step.out - step.target).abs().pow(4).flatten(1).mean(1)

    again = rows(train.train(replace(config, out=config.out + "again"), loss=cube))
    assert again == other
    assert len(seen) == len(found) == 2
    for one, two in zip(seen, found):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_a_step_of_ones_own_replaces_training_step(config: Config, quick: None) -> None:
    def two_forwards(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
        first = train.training_step(model, x, config, loss)
        later = replace(x, number=x.number + 1000)
        return 0.5 * first + 0.5 * train.training_step(model, later, config, loss)

    run, other = (
        train.train(config),
        train.train(replace(config, out=config.out + "2"), step=two_forwards),
    )
    assert (
        distance(learned(other), learned(run)) < 1e-5
    )  # nothing in the step depends on its number without dropout


# ---------------------------------------------------------------- every option does something

OPTIONS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 1},
    "accumulation": {"accumulation": 2},
    "huber": {"loss": "huber"},
    "huber delta": {"loss": "huber", "loss_arg": {"delta": 0.3}},
    "l1": {"loss": "l1"},
    "smooth_l1": {"loss": "smooth_l1"},
    "min_snr": {"weighting": "min_snr"},
    "min_snr gamma": {"weighting": "min_snr", "weighting_arg": {"gamma": 1}},
    "soft_min_snr": {"weighting": "soft_min_snr"},
    "debiased": {"weighting": "debiased"},
    "p2": {"weighting": "p2"},
    "snr": {"weighting": "snr"},
    "sigma_sqrt": {"weighting": "sigma_sqrt"},
    "cosmap": {"weighting": "cosmap"},
    "edm space": {
        "noise": {"space": "edm", "prediction": "v_prediction"}
    },  # of an epsilon network it is the same loss
    "edm space huber": {"noise": {"space": "edm"}, "loss": "huber"},
    "edm space min_snr": {
        "noise": {"space": "edm"},
        "weighting": "min_snr",
        "weighting_arg": {"gamma": 0.1},
    },
    "logit_normal": {"noise": {"density": "logit_normal"}},
    "logit_normal mean": {"noise": {"density": "logit_normal", "density_args": {"mean": 1.0}}},
    "mode": {"noise": {"density": "mode"}},
    "cosmap density": {"noise": {"density": "cosmap"}},
    "low": {"noise": {"low": 0.5}},
    "high": {"noise": {"high": 0.5}},
    "stage low": {"stages": (Stage(2, low=0.6),)},
    "stage high": {"stages": (Stage(2, high=0.3),)},
    "offset": {"noise": {"offset": 0.1}},
    "multires": {"noise": {"multires_levels": 2}},
    "multires discount": {"noise": {"multires_levels": 2, "multires_discount": 0.8}},
    "perturbation": {"noise": {"perturbation": 0.1}},
    "v": {"noise": {"prediction": "v_prediction"}},
    "sample": {"noise": {"prediction": "sample"}},
    "zero snr": {"noise": {"prediction": "v_prediction", "zero_terminal_snr": True}},
    "masks": {"data": {"masks": "file"}},
    "mask temperature": {"data": {"masks": "file"}, "stages": (Stage(2, mask_temperature=3.0),)},
    "crop": {"data": {"crop": "random"}},
    "zoom": {"data": {"zoom": 1.5}},
    "flip": {"data": {"flip": True}, "stages": (Stage(4),)},
    "jitter": {"data": {"jitter": True}},
    "variants": {"data": {"crop": "random", "variants": 1}, "stages": (Stage(6),)},
    "no variants": {"data": {"crop": "random"}, "stages": (Stage(6),)},
    "repeats": {"data": {"repeats": 2}},
    "caption": {"data": {"captions": "one", "caption": "a cat"}},
    "templates": {"data": {"captions": "object", "caption": "cat"}},
    "caption dropout": {"data": {"caption_dropout": 0.6}, "stages": (Stage(3),)},
    "buckets": {"data": {"buckets": True, "bucket_step": 4}},
    "bucket step": {"data": {"buckets": True, "bucket_step": 8}},
    "interpolation": {"data": {"interpolation": "lanczos"}},
    "clip skip": {"clip_skip": 1},
    "vae precision": {"vae_precision": "bf16"},
    "resolution": {"data": {"resolution": 8}},
    "rank": {"adapter": {"rank": 2}},
    "alpha": {"adapter": {"alpha": 1.0}},
    "targets": {"adapter": {"targets": ("all",)}},
    "exclude": {"adapter": {"exclude": ("*.to_q",)}},
    "rank pattern": {"adapter": {"rank_pattern": {"*.attn2.*": 2}}},
    "alpha pattern": {"adapter": {"alpha_pattern": {"*.attn2.*": 2.0}}},
    "dropout": {"adapter": {"dropout": 0.3}, "stages": (Stage(3),)},
    "rank dropout": {"adapter": {"rank_dropout": 0.3}, "stages": (Stage(3),)},
    "module dropout": {"adapter": {"module_dropout": 0.3}, "stages": (Stage(3),)},
    "full": {"adapter": {"kind": "full", "rank": 16}},
    "lora plus": {"optimizer": {"lora_plus": 4.0}},
    "rslora": {"adapter": {"rslora": True}},
    "kaiming": {"adapter": {"init": "kaiming"}},
    "dora": {"adapter": {"kind": "dora"}},
    "lr": {"optimizer": {"lr": {"denoiser": 1e-3}}},
    "stage lr": {"stages": (Stage(2, lr={"denoiser": 2e-3}),)},
    "betas": {"optimizer": {"betas": {"denoiser": (0.5, 0.9)}}, "stages": (Stage(3),)},
    "weight decay": {"optimizer": {"weight_decay": {"denoiser": 0.5}}},
    "stage decay": {"stages": (Stage(2, weight_decay={"denoiser": 0.6}),)},
    "args": {"optimizer": {"args": {"eps": 1e-3}}},
    "prodigy": {"optimizer": {"name": "prodigy", "lr": {}}},
    "prodigy d0": {"optimizer": {"name": "prodigy", "lr": {}, "args": {"d0": 1e-3}}},
    "sgd": {"optimizer": {"name": "torch.optim.SGD"}},
    "sgd momentum": {
        "optimizer": {"name": "torch.optim.SGD", "args": {"momentum": 0.9}},
        "stages": (Stage(3),),
    },
    "adagrad": {"optimizer": {"name": "torch.optim.Adagrad"}},
    "linear": {"optimizer": {"schedule": "linear"}},
    "cosine": {"optimizer": {"schedule": "cosine"}, "stages": (Stage(3),)},
    "restarts": {
        "optimizer": {"schedule": "cosine_restarts", "schedule_args": {"cycles": 2}},
        "stages": (Stage(3),),
    },
    "polynomial": {"optimizer": {"schedule": "polynomial", "schedule_args": {"power": 2}}},
    "stage schedule": {"stages": (Stage(4, schedule="cosine"),)},
    "warmup": {"optimizer": {"warmup": 2}},
    "clip": {"optimizer": {"name": "torch.optim.SGD", "clip": 0.01}},
    "no clip": {
        "optimizer": {"name": "torch.optim.SGD", "clip": 0.0},
        "loss": "smooth_l1",
        "loss_arg": {"delta": 0.01},
    },
    "prior": {"prior": {"prompt": "a cat", "count": 1}},
    "prior weight": {"prior": {"prompt": "a cat", "count": 1, "weight": 3.0}},
    "prior count": {"prior": {"prompt": "a cat", "count": 3}},
    "swap": {"prior": {"swap": {"TOK": "cat"}}, "stages": (Stage(3),)},
    "swap weight": {"prior": {"swap": {"TOK": "cat"}, "swap_weight": 9.0}, "stages": (Stage(3),)},
    "bf16": {"precision": "bf16"},
    "tokens": {"stages": (Stage(2, TOKENS),)},
    "vectors": {"stages": (Stage(2, TOKENS),), "tokens": {"vectors": 3}},
    "zero tokens": {"stages": (Stage(2, TOKENS),), "tokens": {"init": ("zero",)}},
    "word tokens": {"stages": (Stage(2, TOKENS),), "tokens": {"init": ("c",)}},
    "drawn tokens": {"stages": (Stage(2, TOKENS),), "tokens": {"init": ("random:0.5",)}},
    "all the initializer's tokens": {
        "stages": (Stage(2, TOKENS),),
        "tokens": {"init": ("a b c d",), "vectors": 0},
    },
    "norm none": {"stages": (Stage(2, TOKENS),), "tokens": {"norm": "none"}},
    "norm rescale": {"stages": (Stage(2, TOKENS),), "tokens": {"norm": "rescale"}},
    "stage norm": {"stages": (Stage(3, TOKENS, norm="none"),)},
    "norm target": {"stages": (Stage(2, TOKENS),), "tokens": {"norm_target": 3.0}},
    "text encoder": {"stages": (Stage(2, ("text_encoder",)),)},
    "text targets": {
        "stages": (Stage(2, ("text_encoder",)),),
        "adapter": {"text_targets": ("kohya",)},
    },
}


@pytest.fixture(scope="module")
def fingerprints() -> dict[bytes, str]:
    """What an option's run learned -> its name: no two options may come to the same."""
    return {}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_what_is_learned(
    config: Config, quick: None, fingerprints: dict[bytes, str], name: str
) -> None:
    config = replace(config, validation=ValidationConfig(every=-1))  # it changes no step
    if not fingerprints:
        fingerprints[digest(train.train(replace(config, out=config.out + "0")))] = "the base run"
    change = dict(OPTIONS[name])
    stages = change.get("stages", (Stage(groups=("denoiser",)),))
    groups = set(itertools.chain(*[stage.groups for stage in stages]))
    if "denoiser" not in groups:
        change["optimizer"] = {"lr": dict.fromkeys(groups, 1e-2)}
    if groups == {"tokens"}:
        change["adapter"] = AdapterConfig()
    run = train.train(merged(config, change))
    result = learned(run)
    assert all(bool(p.isfinite().all()) and p.dtype == torch.float32 for p in result.values())
    assert all(math.isfinite(row["loss"]) for row in rows(run) if "loss" in row)
    found = fingerprints.setdefault(digest(run), name)
    assert found == name, f"{name} came to the same numbers as {found}"


def digest(run: Path) -> bytes:
    return b"".join(k.encode() + v.numpy().tobytes() for k, v in sorted(learned(run).items()))
