"""Numbers that are none are refused where they enter, and no checkpoint or file is made of them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train
from lora_core.adapters import injection
from lora_core.config import Config, Stage
from lora_core.diffusion.losses import StepOutput, mse
from lora_core.errors import UserError
from lora_core.runs.run_folder import Run, nonfinite_names
from tests.conftest import learned, rows
from training import nonfinite
from training.inputs.step_inputs import StepInputs
from training.log import Log
from training.setup import Model, Optimization
from training.step import Loss

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_is_found_in_every_dtype(dtype: torch.dtype, bad: float) -> None:
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    tensors = {
        "good": largest,
        "int": torch.tensor([1]),
        "empty": largest[:0],
        "bad": largest.clone(),
        ("a", 0): -largest,
    }
    tensors["bad"][1, 2] = bad
    assert nonfinite_names(tensors) == ["bad"]


# ---------------------------------------------------------------- checkpoints


def broken_gradient(at: int) -> Any:
    """A loss that is a number in every step, and whose gradient is none from one on."""

    def loss(step: StepOutput) -> torch.Tensor:
        zero = (step.out - step.out.detach()).square().mean((1, 2, 3))
        return mse(step) + (zero.sqrt() if step.step >= at else zero)

    return loss


@pytest.mark.parametrize(
    "log_every, save_every, validate", [(100, 2, 0), (100, 0, 0), (1, 1, 0), (100, 2, 2)]
)
def test_a_gradient_of_nan_under_a_finite_loss_writes_nothing(
    config: Config, quick: None, log_every: int, save_every: int, validate: int
) -> None:
    validation = replace(config.validation, every=validate)
    config = replace(
        config,
        stages=(Stage(9),),
        log_every=log_every,
        save_every=save_every,
        keep=1,
        validation=validation,
    )
    last = {0: "there is no checkpoint", 1: "of step 7", 2: "of step 6"}[save_every]
    with pytest.raises(
        UserError,
        match="the gradient is nan in step 8, whose loss is a number.*5 steps in a row.*" + last,
    ):
        train.train(config, loss=broken_gradient(3))
    kept = [
        load_file(folder / "state.safetensors") for folder in Path(config.out).glob("checkpoints/*")
    ]
    assert len(kept) == bool(save_every) and not any(nonfinite_names(tensors) for tensors in kept)
    assert (
        not (Path(config.out) / "pytorch_lora_weights.safetensors").exists()
        and not (Path(config.out) / ".lock").exists()
    )
    if save_every:
        assert (
            train.train(replace(config, resume=True, resume_anyway=True)) / "summary.json"
        ).is_file()


DAMAGED = {
    "parameter": (lambda o: params(o, "denoiser")[2], r"denoiser \(unet\..*\.down\) holds NaN"),
    "rows of tokens": (lambda o: params(o, "tokens")[0], r"tokens \(text_encoder\..*\) holds NaN"),
    "optimizer": (
        lambda o: o.optimizer.state[params(o, "denoiser")[0]]["exp_avg_sq"],
        "the optimizer's state of denoiser holds NaN",
    ),
    "average": (lambda o: o.average.averages[1], "the moving average holds NaN"),
}


def params(optimization: Optimization, name: str) -> list[torch.Tensor]:
    groups = optimization.optimizer.param_groups
    return next(group["params"] for group in groups if group["name"] == name)


@pytest.mark.parametrize("place, said", DAMAGED.values(), ids=DAMAGED)
def test_damaged_state_is_named_and_not_saved(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, place: Any, said: str
) -> None:
    config = replace(config, ema=0.5, stages=(Stage(2, ("denoiser", "tokens")),))
    whole, calls = Optimization.update_average_, []

    def damage(optimization: Optimization) -> None:
        whole(optimization)
        calls.append(1)
        if len(calls) == 2:
            place(optimization).data.view(-1)[0] = NAN

    monkeypatch.setattr(Optimization, "update_average_", damage)
    with pytest.raises(UserError, match=f"{said} or infinity after step 2.*there is no checkpoint"):
        train.train(config)
    assert not list(Path(config.out).glob("checkpoints/*")) and not list(
        Path(config.out).glob("*.safetensors")
    )


def test_initial_values_that_are_none_are_named(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = injection.inject

    def inject(module: torch.nn.Module, *args: Any, **settings: Any) -> Any:
        found = whole(module, *args, **settings)
        with torch.no_grad():
            injection.adapter_parameters(module)[3].view(-1)[1] = math.inf
        return found

    monkeypatch.setattr(injection, "inject", inject)
    with pytest.raises(
        UserError, match=r"denoiser \(unet\..*\) holds NaN or infinity before the first step"
    ):
        train.train(config)


def test_a_checkpoint_of_nan_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(tmp_path / "run")
    for step, value in ((1, 1.0), (2, NAN)):
        run.save_checkpoint(step, {"a": torch.tensor([value])}, {})
    assert run.load_checkpoint().step == 1  # type: ignore[union-attr]
    assert "a holds NaN or infinity" in capsys.readouterr().out


# ---------------------------------------------------------------- fp16


def test_steps_that_overflow_are_counted_said_and_end_the_run(
    config: Config, quick: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(step: StepOutput) -> torch.Tensor:
        return mse(step) * (1e30 if step.step in (0, 2) else 1.0)

    config = replace(config, precision="fp16", stages=(Stage(3),))
    run = train.train(config, loss=loss)
    assert [row["skipped"] for row in rows(run) if "loss" in row] == [1, 1, 2] and json.loads(
        (run / "summary.json").read_text()
    )["skipped"] == 2
    assert (
        "2 of 3 steps were skipped" in capsys.readouterr().out
        and "steps skipped in fp16 | 2" in (run / "README.md").read_text()
    )
    with pytest.raises(UserError, match="all 3 steps were skipped"):
        train.train(replace(config, out=config.out + "2"), loss=lambda step: mse(step) * 1e30)
    assert not list(Path(config.out + "2").glob("*.safetensors"))
    monkeypatch.setattr(nonfinite, "MAX_SKIPPED_IN_A_ROW", 4)
    longer = replace(config, out=config.out + "3", stages=(Stage(9),), save_every=2, log_every=9)
    with pytest.raises(
        UserError, match=r"the last 4 steps up to step 5 were skipped.*--precision bf16.*of step 4"
    ):
        train.train(longer, loss=lambda step: mse(step) * (1e30 if step.step else 1.0))


def test_runs_that_are_not_in_fp16_have_no_such_column(config: Config, quick: None) -> None:
    run = train.train(config)
    assert not any("skipped" in row for row in rows(run)) and "skipped" not in json.loads(
        (run / "summary.json").read_text()
    )


# ---------------------------------------------------------------- where it enters


@pytest.mark.parametrize(
    "part, said",
    [
        ("vae", r"the VAE gives NaN or infinity for .*\.png in fp32"),
        ("unet", "unet has NaN or infinity among its weights"),
        ("text_encoder", "the text encoder gives NaN or infinity for the prompt"),
    ],
)
@pytest.mark.parametrize("random", [False, True])
def test_a_damaged_part_of_the_model_is_named(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, part: str, said: str, random: bool
) -> None:
    from training import setup

    load = setup.load_family

    def damaged(*args: Any, **settings: Any) -> Any:
        family = load(*args, **settings)
        with torch.no_grad():
            module = family.modules[part]
            (module.encoder.conv_in if part == "vae" else module).get_parameter(
                "weight" if part == "vae" else max(dict(module.named_parameters()))
            ).fill_(NAN)
        return family

    monkeypatch.setattr(setup, "load_family", damaged)
    monkeypatch.setattr(Log, "validate", lambda log, done, scorer: None)
    config = replace(config, data=replace(config.data, flip=random))
    with pytest.raises(UserError, match=said):
        train.train(config)
    assert not list(Path(config.out).glob("checkpoints/*"))


def test_the_first_validation_says_so_too(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import setup

    load = setup.load_family

    def damaged(*args: Any, **settings: Any) -> Any:
        family = load(*args, **settings)
        with torch.no_grad():
            family.modules["unet"].conv_out.bias.fill_(NAN)
        return family

    monkeypatch.setattr(setup, "load_family", damaged)
    with pytest.raises(
        UserError,
        match=r"the validation loss is nan after 0 steps: unet has NaN .* first in conv_out\.bias",
    ):
        train.train(config)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda step: mse(step).mean(), "bad returned a scalar"),
        (lambda step: mse(step)[:1], r"bad returned shape \[1\]"),
        (lambda step: (step.out - step.target) ** 2, r"bad returned shape \[2, 4, 8, 8\]"),
        (lambda step: mse(step) * math.nan, "bad returned nan for row 0"),
        (lambda step: 0.0, "bad returned float"),
        (lambda step: torch.ones(2), "bad returned numbers without a gradient"),
    ],
    ids=["scalar", "short", "unreduced", "nan", "number", "constant"],
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
        return mse(step) * (math.nan if step.step >= 2 else 1.0)

    with pytest.raises(
        UserError,
        match=r"the loss is nan.* up to step 7 .*the last good checkpoint is that of step 6",
    ):
        train.train(replace(config, stages=(Stage(7),), save_every=2, log_every=100), loss=late)
    assert all(bool(p.isfinite().all()) for p in learned(Path(config.out)).values())
