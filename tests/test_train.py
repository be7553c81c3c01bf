"""The laws of a training run: what must not change a bit, what must change something, and what a
run leaves behind.
"""

import itertools
import json
import math
import statistics
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import infer
import train
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    PriorConfig,
    SamplesConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.diffusion import validation
from lora_core.diffusion.losses import StepOutput, mse
from lora_core.errors import UserError
from lora_core.toml import from_table, to_toml
from tests.conftest import distance, final, learned, rows, same, save_photos, save_pipeline
from tests.opened_run import open_parts
from training import setup
from training import step as step_module
from training.setup import Model
from training.step import Loss
from training.step_inputs import StepInputs

TOKENS = ("tokens",)
ALL = ("denoiser", "text_encoder", "tokens")


def merged(config: Config, change: dict[str, Any]) -> Config:
    """The config with some of its fields replaced, section by section."""
    tables = ("loss_arg", "weighting_arg")
    return replace(
        config,
        **{
            k: replace(getattr(config, k), **v) if isinstance(v, dict) and k not in tables else v
            for k, v in change.items()
        },
    )


def gradients(config: Config) -> dict[str, Tensor]:
    """Of the first step, before clipping."""
    found: dict[str, Tensor] = {}
    update = step_module.update_parameters

    def keep(model: Model, *rest: Any) -> Tensor:
        for name, params in model.groups.items():
            for i, p in enumerate(params):
                if p.grad is not None:
                    found.setdefault(f"{name}/{i}", p.grad.clone())
        return update(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "update_parameters", keep)
        train.train(config)
    return found


def gradient_error(found: dict[str, Tensor], exact: dict[str, Tensor], group: str) -> float:
    """Of a group's gradient as one vector, relative to its length."""
    a, b = (
        torch.cat([g.flatten().double() for name, g in of.items() if name.startswith(f"{group}/")])
        for of in (found, exact)
    )
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------- what must not change a bit, or
# not by more than rounding


@pytest.fixture
def splits(config: Config) -> list[Config]:
    """Batch 4 as 4 x 1, 2 x 2 and 1 x 4 passes, all groups, with class images."""
    config = replace(
        config,
        stages=(Stage(1, ALL),),
        prior=PriorConfig("a cat", count=3, weight=0.7),
        weighting="min_snr",
    )
    return [
        replace(config, batch_size=4 // n, accumulation=n, out=f"{config.out}{n}")
        for n in (1, 2, 4)
    ]


@pytest.mark.parametrize("prior", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    splits: list[Config], quick: None, prior: bool
) -> None:
    """Whatever the split, a gradient is no further from float64 than twice the whole batch's own,
    and a rounding for each sum.
    """
    splits = [c if prior else replace(c, prior=PriorConfig()) for c in splits]
    whole, *parts = map(gradients, splits)
    exact = gradients(replace(splits[0], precision="fp64", out=splits[0].out + "_fp64"))
    assert {name.split("/")[0] for name in exact} == set(ALL)
    for group in ALL:
        allowed = 2 * gradient_error(whole, exact, group)
        for config, part in zip(splits[1:], parts, strict=True):
            assert (
                gradient_error(part, exact, group)
                <= allowed + config.accumulation * torch.finfo(torch.float32).eps / 2
            )


@pytest.mark.parametrize("prior", [False, True])
def test_twenty_accumulated_steps_agree_in_float64(
    splits: list[Config], quick: None, prior: bool
) -> None:
    longer = [
        replace(
            c,
            precision="fp64",
            data=replace(c.data, resolution=8),
            stages=(Stage(20, ALL),),
            prior=c.prior if prior else PriorConfig(),
        )
        for c in splits[:: 2 if prior else 1][:2]
    ]
    whole, *parts = [learned(train.train(c)) for c in longer]
    assert all(p.dtype == torch.float64 for p in whole.values())
    for part in parts:
        assert distance(part, whole) < 1e-10


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


@pytest.mark.parametrize(
    "optimizer",
    [OptimizerConfig(), OptimizerConfig("prodigy", args={"d0": 1e-3})],
    ids=["adamw", "prodigy"],
)
def test_a_paused_group_is_frozen_and_takes_its_state_up_again(
    config: Config, quick: None, optimizer: OptimizerConfig
) -> None:
    stages = (Stage(2, ("tokens", "denoiser")), Stage(2, ("denoiser",)), Stage(1, ("tokens",)))
    run = train.train(replace(config, stages=stages, optimizer=optimizer, save_every=1, keep=9))
    folders = {n: run / f"checkpoints/{n}" for n in range(1, 6)}
    state = {
        n: (load_file(f / "state.safetensors"), json.loads((f / "state.json").read_text()))
        for n, f in folders.items()
    }
    index = {
        n: state[2][1]["meta"]["optimizer"]["param_groups"][g]["params"]
        for g, n in enumerate(("denoiser", "tokens"))
    }
    tokens = [
        k
        for k in state[2][0]
        if k.startswith("groups/tokens")
        or any(k.startswith(f"optimizer/state/{i}/") for i in index["tokens"])
    ]
    assert len(tokens) >= 3
    for k in tokens:
        assert torch.equal(state[2][0][k], state[4][0][k]), k
    assert not torch.equal(state[2][0]["groups/denoiser/0"], state[4][0]["groups/denoiser/0"])
    moment = next(k for k in tokens if k.endswith("exp_avg_sq"))
    after, before = state[5][0][moment], state[4][0][moment]
    assert not torch.equal(after, before) and bool(
        (after >= 0.99 * before).all()
    )  # decayed by beta2, not begun anew at zero
    assert all(
        torch.equal(state[4][0][k], state[5][0][k])
        for k in state[4][0]
        if k.startswith("groups/denoiser")
    )


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


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda step: mse(step).mean(), "bad returned a scalar"),
        (lambda step: mse(step)[:1], r"bad returned shape \[1\]"),
        (lambda step: (step.out - step.target) ** 2, r"bad returned shape \[2, 4, 8, 8\]"),
        (lambda step: mse(step) * math.nan, "bad returned nan for row 0"),
        (lambda step: 0.0, "bad returned float"),
    ],
    ids=["scalar", "short", "unreduced", "nan", "number"],
)
def test_a_loss_that_is_no_row_per_example_is_refused_by_name(
    config: Config, quick: None, bad: Any, said: str
) -> None:
    bad.__name__ = "bad"
    with pytest.raises(UserError, match=said):
        train.train(config, loss=bad)

    def bad_step(model: Model, x: StepInputs, config: Config, loss: Loss) -> Any:
        return bad(
            StepOutput(*[torch.ones(2, 4, 8, 8)] * 5, None, "epsilon", None, torch.zeros(2), 0)
        )  # type: ignore[arg-type]

    with pytest.raises(UserError, match=said.replace("bad", "bad_step").replace("nan", "nan")):
        train.train(replace(config, overwrite=True), step=bad_step)


def test_a_loss_that_breaks_down_later_leaves_no_broken_checkpoint(
    config: Config, quick: None
) -> None:
    def late(step: StepOutput) -> Tensor:
        return mse(step) * (math.nan if step.step == 2 else 1.0)

    with pytest.raises(
        UserError,
        match=r"the loss is nan since step 3.*the last checkpoint, of step 2, is from before",
    ):
        train.train(replace(config, stages=(Stage(4),), save_every=2, log_every=100), loss=late)
    assert all(bool(p.isfinite().all()) for p in learned(Path(config.out)).values())


def test_lazy_members_of_a_step_work_in_a_loss(config: Config, quick: None) -> None:
    seen: dict[str, Any] = {}

    def loss(step: StepOutput) -> Tensor:
        seen.update(base=step.base_out, attention=step.attention, pixels=step.pixels, out=step.out)
        return (
            mse(step)
            + 0.1 * (step.base_out - step.out).square().flatten(1).mean(1)
            + 0.1 * step.pixels.abs().flatten(1).mean(1)
            + sum(a.square().flatten(1).mean(1) for a in step.attention)
        )

    run = train.train(replace(config, stages=(Stage(3, ("denoiser", "tokens")),)), loss=loss)
    assert (
        seen["pixels"].shape == (2, 3, 16, 16)
        and seen["pixels"].abs().max() <= 1
        and seen["pixels"].requires_grad
    )
    assert not seen["base"].requires_grad and not torch.equal(seen["base"], seen["out"])
    assert len(seen["attention"]) == 3 + 1 and all(
        a.shape[0] == 2 and torch.allclose(a.sum(-1), torch.ones(())) for a in seen["attention"]
    )
    assert seen["attention"][0].requires_grad and len(rows(run)) == 5


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


@pytest.mark.parametrize("groups", [("denoiser",), ("text_encoder",), ("denoiser", "tokens")])
def test_gradient_checkpointing_gives_the_same_numbers(
    config: Config, quick: None, groups: Any
) -> None:
    config = replace(
        config,
        stages=(Stage(2, groups),),
        optimizer=OptimizerConfig(),
        adapter=replace(config.adapter, dropout=0.2),
    )
    plain = train.train(config)
    saving = train.train(replace(config, out=config.out + "2", gradient_checkpointing=True))
    for a, b in zip(rows(plain), rows(saving), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_a_text_adapter_that_pauses_needs_no_row_keys(config: Config, quick: None) -> None:
    stages = (Stage(1, ("denoiser", "text_encoder")), Stage(2, ("denoiser",)))
    run = train.train(replace(config, stages=stages, adapter=replace(config.adapter, dropout=0.5)))
    assert all(bool(p.isfinite().all()) for p in learned(run).values())


def test_the_moving_average_is_what_is_kept_and_shown(config: Config, quick: None) -> None:
    config = replace(
        config, stages=(Stage(4),), optimizer=replace(config.optimizer, lr={"denoiser": 0.1})
    )
    plain, mean = train.train(config), train.train(replace(config, out=config.out + "2", ema=0.5))
    assert same(learned(plain), learned(mean))  # training itself does not see it
    files = [load_file(run / "pytorch_lora_weights.safetensors") for run in (plain, mean)]
    assert (
        distance(*files) > 0.01 and rows(plain, "val")[-1]["loss"] != rows(mean, "val")[-1]["loss"]
    )
    # the average begins as the start, so that three updates at decays 1/5, 1/4, 1/3 ... are between
    # the first and the last step
    half = replace(config, out=config.out + "3", ema=0.5, stages=(Stage(2),))
    train.train(half)
    assert same(final(train.train(replace(half, stages=config.stages, resume=True))), final(mean))
    with pytest.raises(UserError, match="was written with --ema; resume as the run began"):
        train.train(replace(half, ema=0.0, stages=(Stage(5),), resume=True))


def test_a_full_fine_tune_leaves_a_whole_model(config: Config, quick: None) -> None:
    config = replace(
        config,
        adapter=AdapterConfig(kind="full", targets=("all",)),
        stages=(Stage(2, ("denoiser", "tokens")),),
    )
    run = train.train(config)
    before, after = (
        StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
        for path in (config.model, run / "model")
    )
    moved = [
        n
        for n, p in after.unet.state_dict().items()
        if not torch.equal(p, before.unet.state_dict()[n])
    ]
    assert len(moved) > 40 and all("norm" not in name for name in moved)
    assert same(before.text_encoder.state_dict(), after.text_encoder.state_dict()) and len(
        after.tokenizer
    ) == len(before.tokenizer)
    assert (
        not (run / "pytorch_lora_weights.safetensors").exists()
        and (run / "run_emb.safetensors").exists()
    )
    assert (
        infer.main(
            [
                "--model",
                str(run / "model"),
                "--prompt",
                "a b",
                "--steps",
                "2",
                "--out",
                str(run / "out.png"),
            ]
        )
        == 0
    )


def test_preservation_holds_the_class_to_the_base_model(config: Config, quick: None) -> None:
    """With an overwhelming weight on it the adapter learns next to nothing that shows on the class
    caption.
    """

    def shift(weight: float) -> float:
        seen: list[float] = []
        swap = PriorConfig(swap={"TOK": "cat"}, swap_weight=weight)

        def loss(step: StepOutput) -> Tensor:
            now, base = step.preserved
            seen.append((now - base).square().mean().item())
            return mse(step) + weight * (now - base).square().flatten(1).mean(1)

        c = replace(
            config,
            out=f"{config.out}{weight:g}",
            stages=(Stage(12),),
            prior=replace(swap, swap_weight=0.0),
        )
        train.train(c, loss=loss)
        return sum(seen[-4:])

    assert shift(300.0) < 0.3 * shift(0.0)


def test_the_preview_needs_no_weights(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(
        to_toml(replace(config, noise=replace(config.noise, density="logit_normal")))
    )
    (copy := tmp_path / "model").mkdir()
    for file in Path(config.model).rglob("*.json"):
        (copy / file.relative_to(config.model)).parent.mkdir(exist_ok=True)
        (copy / file.relative_to(config.model)).write_text(file.read_text())
    assert (
        train.main(
            [
                str(tmp_path / "c.toml"),
                "--model",
                str(copy),
                "--preview-density",
                "--out",
                str(tmp_path / "mine"),
            ]
        )
        == 0
    )
    assert (
        "from clean to pure noise" in capsys.readouterr().out
        and (tmp_path / "mine_density.png").is_file()
        and not (tmp_path / "mine").exists()
    )


def test_half_precision_with_a_loss_scale_that_is_kept(config: Config, quick: None) -> None:
    config = replace(config, precision="fp16", stages=(Stage(3, ("denoiser", "tokens")),))
    run = train.train(config)
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in learned(run).values())
    assert "scaler/current" in final(run)
    other = replace(config, out=config.out + "2", stages=(Stage(2, ("denoiser", "tokens")),))
    train.train(other)
    train.train(replace(other, stages=config.stages, resume=True))
    assert same(final(run), final(Path(other.out)))


def test_an_adapter_of_ones_own(config: Config, quick: None, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from lora_core.adapters.kinds import LoRA\nclass Half(LoRA):\n    def __init__(self, "
        "base, layer):\n"
        "        super().__init__(base, layer)\n        self.scale /= 2\n"
    )
    own = train.train(replace(config, adapter=replace(config.adapter, kind=f"{file}:Half")))
    half = train.train(
        replace(config, out=config.out + "2", adapter=replace(config.adapter, alpha=2.0))
    )
    assert same(learned(own), learned(half))


def test_another_vae_and_another_cache_change_what_they_should(
    config: Config, quick: None, model: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    vae = AutoencoderKL.from_pretrained(model / "vae")
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(1.5)
    vae.save_pretrained(tmp_path / "vae")
    cached = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    base, filled = train.train(config), train.train(replace(cached, out=config.out + "1"))
    files = list((tmp_path / "cache").iterdir())
    assert 1 < len(files) <= 5 and same(final(base), final(filled))
    other = train.train(replace(cached, out=config.out + "2", vae=str(tmp_path / "vae")))
    assert not same(final(base), final(other)) and len(list((tmp_path / "cache").iterdir())) > len(
        files
    )


def test_class_images_are_drawn_once_and_own_ones_are_kept(
    config: Config, quick: None, tmp_path: Path
) -> None:
    own = save_photos(tmp_path / "class", count=1)
    (own / "0.mask.png").unlink()
    (own / "0.png").rename(own / "00001.png")
    before = (own / "00001.png").read_bytes()
    prior = PriorConfig("a cat", str(own), count=3)
    train.train(replace(config, prior=prior))
    names = sorted(p.name for p in own.glob("*.png"))
    assert (
        names == ["00000.png", "00001.png", "00002.png"]
        and (own / "00001.png").read_bytes() == before
    )
    drawn = (own / "00000.png").read_bytes()
    train.train(replace(config, out=config.out + "2", prior=prior))
    assert (own / "00000.png").read_bytes() == drawn and sorted(
        p.name for p in own.glob("*.png")
    ) == names


def test_more_class_images_than_asked_for_are_said(
    config: Config, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = save_photos(tmp_path / "class", count=3)
    for mask in own.glob("*.mask.png"):
        mask.unlink()
    found = open_parts(
        replace(config, prior=PriorConfig("a cat", images=str(own), count=2))
    ).data.class_images
    assert found is not None and len(found) == 3
    assert f"class images: all 3 of {own}; --prior.count 2" in capsys.readouterr().out


def test_tensorboard_gets_the_numbers(config: Config, quick: None) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train.train(replace(config, report="tensorboard"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in rows(run) if "loss" in row], rel=1e-6
    )


def test_an_inpainting_model_trains_and_draws(
    config: Config, plain: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # draws for real
    run = train.train(
        replace(
            config,
            model=str(save_pipeline(tmp_path / "inpaint", channels=9)),
            prior=PriorConfig("a cat", count=1),
        )
    )
    assert Image.open(run / "before_after.png").size[0] > 300


# ---------------------------------------------------------------- what a run leaves behind


@pytest.fixture(scope="module")
def finished(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A whole run with images and plots."""
    config = Config(
        model=str(model),
        out=str(tmp_path_factory.mktemp("finished") / "run"),
        device="cpu",
        batch_size=2,
        log_every=1,
        data=DataConfig(images=str(photos), resolution=16),
        adapter=AdapterConfig(rank=4, kind="dora"),
        tokens=TokensConfig(init=("c",)),
        optimizer=OptimizerConfig(
            "prodigy", args={"d0": 1e-4}, betas={"tokens": (0.9, 0.99), "denoiser": (0.9, 0.99)}
        ),
        stages=(Stage(4, ("denoiser", "tokens"), low=0.1),),
        samples=SamplesConfig(steps=2, every=2, prompts=("a TOK",), new_prompts=("a TOK on mars",)),
        validation=ValidationConfig(bins=3, every=2, draws=2),
    )
    train.train(config)
    return config


def test_a_run_leaves_the_files_of_the_contract(finished: Config) -> None:
    run = Path(finished.out)
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names >= {
        "pytorch_lora_weights.safetensors",
        "run.safetensors",
        "run_emb.safetensors",
        "config.toml",
        "metrics.jsonl",
        "val.jsonl",
        "summary.json",
        "samples/step_000002.png",
        "samples/step_000004.png",
        "before_after.png",
        "loss.png",
        "val.png",
        "d.png",
        "checkpoints/4/state.safetensors",
    }
    for name in ("loss.png", "before_after.png", "samples/step_000004.png"):
        assert Image.open(run / name).convert("L").getextrema() != (255, 255)
    again = from_table(tomllib.loads((run / "config.toml").read_text()))
    assert again == finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seconds"] > 0 and summary["steps"] == 4
    scores = validation.read_scores(run)
    assert sorted(scores) == [0, 2, 4]
    for name, step in (("val_loss_before", 0), ("val_loss_after", 4)):
        assert summary[name] == pytest.approx(
            statistics.fmean(s.loss for s in scores[step]), rel=1e-12
        )


def test_validation_gives_the_same_numbers_whatever_the_training_seed(
    config: Config, quick: None
) -> None:
    config = replace(config, validation=ValidationConfig(bins=3, draws=2), batch_size=3)
    other = merged(
        config,
        {
            "out": config.out + "1",
            "seed": 7,
            "data": {"flip": True, "crop": "random", "repeats": 2},
            "noise": {"offset": 0.1},
        },
    )
    a, b = (rows(train.train(c), "val") for c in (config, other))
    count = 5 * 3 * 2
    assert a[:count] == b[:count] and a[count:] != b[count:] and len(a) == 2 * count
    seeded = train.train(
        replace(config, out=config.out + "2", validation=ValidationConfig(bins=3, draws=2, seed=1))
    )
    assert rows(seeded, "val")[:count] != a[:count]


def test_compare_prints_paired_differences(
    finished: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    a = Path(finished.out)
    b = train.train(replace(finished, out=finished.out + "b", seed=3, resume=False))
    capsys.readouterr()
    assert train.main(["--compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    last = {
        run: {(r["key"], r["draw"], r["t"]): r["loss"] for r in rows(run, "val") if r["step"] == 4}
        for run in (a, b)
    }
    lines = {
        line.split()[0]: line.split()[1:]
        for line in printed.splitlines()
        if line.strip() and line.split()[0].replace(".", "").isdigit()
    }
    times = sorted({t for _, _, t in last[a]})
    assert len(times) == 3 and len(lines) == 3
    for t in times:
        changes = [last[b][k] - last[a][k] for k in last[a] if k[2] == t]
        assert len(changes) == 10
        *_, mean, error, pairs = lines[f"{t:.0f}"]
        assert float(mean) == pytest.approx(statistics.fmean(changes), abs=1e-6)
        assert float(error) == pytest.approx(statistics.stdev(changes) / math.sqrt(10), abs=1e-6)
        assert pairs == "10"
    assert Image.open(b / "compare_run.png").width > 100
    whole = [
        statistics.fmean(last[b][k] - last[a][k] for k in last[a] if k[:2] == pair)
        for pair in {k[:2] for k in last[a]}
    ]
    total = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["all"])
    assert float(total[3]) == pytest.approx(statistics.fmean(whole), abs=1e-6)
    assert float(total[4]) == pytest.approx(
        statistics.stdev(whole) / math.sqrt(len(whole)), abs=1e-6
    )


def test_compare_refuses_runs_scored_on_other_images(
    finished: Config, config: Config, quick: None, tmp_path: Path, capsys: Any
) -> None:
    other = train.train(
        replace(
            config, data=replace(config.data, images=str(save_photos(tmp_path / "others", side=32)))
        )
    )
    assert train.main(["--compare", finished.out, str(other)]) == 2
    assert "different images, timesteps or draws" in capsys.readouterr().err
    assert train.main(["--compare", finished.out, str(tmp_path)]) == 2
    assert "has no val.jsonl" in capsys.readouterr().err
    assert train.main(["--compare", finished.out]) == 2


def test_the_held_out_images_are_the_ones_scored(
    config: Config, quick: None, tmp_path: Path
) -> None:
    held_out = save_photos(tmp_path / "held", side=40, count=2)
    run = train.train(replace(config, validation=ValidationConfig(str(held_out), bins=2)))
    trained = setup.open_data(replace(config, out=config.out + "2")).training
    assert len(rows(run, "val")) == 2 * 2 * 2 and not {r["key"] for r in rows(run, "val")} & {
        r.key for r in trained.records
    }
