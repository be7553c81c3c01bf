"""A step whose loss or gradient is not finite changes nothing, is counted, and five in a row end
the run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from lora_core.config import AdapterConfig, Config, OptimizerConfig, Stage, ValidationConfig
from lora_core.diffusion.losses import StepOutput, mse
from lora_core.errors import UserError
from lora_core.optim.ema import ParameterAverage
from lora_core.report import write_report
from lora_core.runs.report_data import read_run
from tests.conftest import final, rows, same
from tests.test_optimizer_check import OWN
from training import setup
from training.skipped_steps import SkippedSteps, StepExamples
from training.step import StepResult

NAN = float("nan")
BOTH = ("denoiser", "tokens")


def failing(at: set[int], how: str = "loss") -> Callable[[StepOutput], Tensor]:
    """mse, but not finite in some steps: the loss, the gradient under a finite loss, or one image
    of the batch.
    """

    def loss(step: StepOutput) -> Tensor:
        found = mse(step)
        zero = (step.out - step.out.detach()).square().mean((1, 2, 3))
        if step.step not in at:
            return found + zero
        if how == "gradient":
            return found + zero.sqrt()
        bad = torch.tensor([NAN if how == "loss" else math.inf] + [1.0] * (len(found) - 1))
        return found * bad

    return loss


def run_without_updates(config: Config, at: set[int]) -> Path:
    """The run whose steps `at` have no update of any kind."""
    take, average = train.optimizer_step, setup.Optimization.update_average_
    number = [0]

    def step(functions: Any, stage: Stage, *rest: Any) -> StepResult:
        number[0] = rest[-1][0].number
        if number[0] in at:
            return StepResult(torch.zeros(()), torch.zeros(()), {})
        return take(functions, stage, *rest)

    def update(optimization: setup.Optimization) -> None:
        if number[0] not in at:
            average(optimization)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "optimizer_step", step)
        patch.setattr(setup.Optimization, "update_average_", update)
        return train.train(replace(config, out=config.out + "_without"), loss=failing(set()))


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, ema": {"ema": 0.5, "optimizer": OptimizerConfig(warmup=2, schedule="cosine")},
    "prodigy, tokens": {
        "optimizer": OptimizerConfig("prodigy", args={"d0": 1e-3}),
        "stages": (Stage(5, BOTH),),
    },
    "tokens, rescaled": {"stages": (Stage(5, BOTH, norm="rescale"),), "ema": 0.9},
    "tokens, stopped": {"stages": (Stage(5, BOTH, norm="stop"),)},
    "bf16, dora": {"precision": "bf16", "adapter": AdapterConfig(rank=2, kind="dora")},
    "fp64": {"precision": "fp64"},
    "fp16": {"precision": "fp16"},
    "accumulated": {"batch_size": 1, "accumulation": 2},
    "by path": {"optimizer": OptimizerConfig("torch.optim.Adam", lr={"denoiser": 1e-3})},
    "fused": {
        "optimizer": OptimizerConfig(
            "torch.optim.AdamW", lr={"denoiser": 1e-3}, args={"fused": True}
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_skipped_step_is_one_without_an_update(name: str, config: Config, quick: None) -> None:
    data, none = replace(config.data, resolution=8), ValidationConfig(every=-1)
    config = replace(config, stages=(Stage(5),), log_every=3, data=data, validation=none)
    config = replace(config, **CASES[name])
    how = {"prodigy, tokens": "gradient", "adamw, ema": "inf"}.get(name, "loss")
    whole = train.train(config, loss=failing({2, 3}, how))
    assert same(final(whole), final(run_without_updates(config, {2, 3})))
    logged = [row for row in rows(whole) if "loss" in row]
    counts = [row.get("skipped", 0) for row in logged]
    assert counts == [0, 0, 1, 2, 2]
    assert json.loads((whole / "summary.json").read_text())["skipped"] == 2
    assert "steps skipped as not finite | 2" in (whole / "README.md").read_text()


def test_the_schedule_free_optimizer_skips_too(config: Config, quick: None, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    optimizer = OptimizerConfig(f"{tmp_path}/own.py:Averaging", lr={"denoiser": 1e-2})
    config = replace(config, stages=(Stage(4),), optimizer=optimizer)
    whole = train.train(config, loss=failing({1, 2}))
    assert same(final(whole), final(run_without_updates(config, {1, 2})))


# ---------------------------------------------------------------- too many in a row


def test_four_in_a_row_go_on_and_five_end_the_run_with_its_images(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, stages=(Stage(9),), log_every=20, save_every=2)
    train.train(config, loss=failing({1, 2, 3, 4, 6, 7, 8}))
    warnings = capsys.readouterr().err
    assert warnings.count("is skipped, for its loss is not finite") == 3
    assert "further ones are only counted" in warnings
    config = replace(config, out=config.out + "_five")
    with pytest.raises(
        UserError,
        match=r"^the loss is nan, and 5 steps in a row up to step 7 are skipped "
        r"\(step 3: \d\.png at timestep \d+, \d\.png at \d+; step 4: .*; step 7: [^)]*\);"
        r".*--optimizer.lr.*; the last good checkpoint is that of step 6",
    ):
        train.train(config, loss=failing({2, 3, 4, 5, 6}))
    assert [row["loss"] for row in rows(Path(config.out)) if row["step"] == 7] == [None]
    config = replace(config, out=config.out + "_gradient", save_every=0)
    with pytest.raises(
        UserError,
        match=r"the gradient is nan in step 6, whose loss is a number.*there is no checkpoint",
    ):
        train.train(config, loss=failing({1, 2, 3, 4, 5}, "gradient"))


def test_one_damaged_image_does_not_end_a_run(config: Config, quick: None) -> None:
    """Each epoch of five images has it once."""
    seen: list[bool] = []

    def loss(step: StepOutput) -> Tensor:
        is_bad = bool((step.x0.std() - first[0]).abs() < 1e-6) if first else False
        first[:1] = first[:1] or [step.x0.std()] * (step.step == 1)
        seen.append(is_bad)
        return mse(step) * (NAN if is_bad else 1.0)

    first: list[Tensor] = []
    data = replace(config.data, resolution=8)
    config = replace(config, batch_size=1, data=data, stages=(Stage(8),))
    run = train.train(config, loss=loss)
    assert json.loads((run / "summary.json").read_text()).get("skipped", 0) == sum(seen[:8])


def test_the_counts_go_on_after_a_resume(config: Config, quick: None) -> None:
    config = replace(config, stages=(Stage(9),), save_every=1, log_every=3)
    bad = failing({2, 3, 4, 5, 6})
    with pytest.raises(UserError, match="up to step 7"):
        train.train(config, loss=bad)
    again = replace(config, resume=True, resume_anyway=True)
    with pytest.raises(UserError, match=r"5 steps in a row up to step 7 .*\(step 7: "):
        train.train(again, loss=bad)  # from step 6, after four that were skipped
    run = train.train(again, loss=failing({7}))
    assert json.loads((run / "summary.json").read_text())["skipped"] == 5
    assert [row.get("skipped", 0) for row in rows(run) if "loss" in row] == [
        0, 0, 1, 2, 3, 4, 4, 5, 5,
    ]  # fmt: skip


def test_a_run_of_skipped_steps_alone_is_an_error(config: Config, quick: None) -> None:
    first = failing({0})
    first.__name__ = "first"
    with pytest.raises(UserError, match="first returned nan for row 0"):
        train.train(config, loss=first)
    with pytest.raises(UserError, match="all 2 steps were skipped, for their loss or gradient"):
        train.train(replace(config, overwrite=True), loss=failing({0, 1}, "gradient"))


def test_in_fp16_an_overflow_and_a_loss_of_nan_are_two_things(config: Config, quick: None) -> None:
    def loss(step: StepOutput) -> Tensor:
        return mse(step) * {1: 1e30, 3: 1e30, 4: NAN, 5: math.inf}.get(step.step, 1.0)

    config = replace(config, precision="fp16", stages=(Stage(7),), ema=0.5)
    run = train.train(config, loss=loss)
    assert [row["skipped"] for row in rows(run) if "loss" in row] == [0, 1, 1, 2, 3, 4, 4]
    card = (run / "README.md").read_text()
    assert "steps skipped in fp16 | 2" in card and "steps skipped as not finite | 2" in card
    state = final(run)
    assert float(state["scaler/current"]) == 65536 / 4 and int(state["scaler/skipped"]) == 2
    with pytest.raises(UserError, match="the loss is nan, and 5 steps in a row up to step 6"):
        train.train(replace(config, out=config.out + "_nan"), loss=failing({1, 2, 3, 4, 5}))


# ---------------------------------------------------------------- the log


def test_a_skipped_step_is_null_in_the_log_and_pages_read_it(config: Config, quick: None) -> None:
    run = train.train(replace(config, stages=(Stage(4),)), loss=failing({2}))

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    text = (run / "metrics.jsonl").read_text()
    logged = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [row["step"] for row in logged if row.get("loss", 0) is None] == [3]
    record = read_run(run)
    assert record.metrics["loss"][0] == [1, 2, 4] and record.metrics["skipped"][0] == [3, 4]
    write_report([run])
    assert "Skipped steps" in (run / "report.html").read_text()
    shutil.copytree(run, run.with_name("other"))
    write_report([run, run.with_name("other")], run.with_name("page.html"))


def test_counts_of_rows() -> None:
    own = SkippedSteps()
    found = [
        own.count(row)
        for row in (
            {"step": 0, "val_loss": 1.0},
            {"step": 1, "loss": 1.0, "grad_norm": 1.0, "skipped": 0},
            {"step": 2, "loss": 1.0, "grad_norm": math.inf, "skipped": 1},
            {"step": 3, "loss": 1.0, "grad_norm": NAN, "skipped": 1},
            {"step": 4, "loss": NAN, "grad_norm": NAN, "skipped": 1},
        )
    ]
    assert found == ["", "", "", "gradient", "loss"]
    assert (own.overflows, own.nonfinite, own.nonfinite_in_a_row, own.total) == (1, 2, 2, 3)
    again = SkippedSteps()
    again.load_state_dict(own.state_dict())
    assert again == own
    examples = StepExamples([("a", "b"), ("c",)], [torch.tensor([5.0, 0.25]), torch.tensor([7.0])])
    assert examples.describe({"a": "a.png"}) == "a.png at timestep 5, b at 0.250, c at 7"


def test_of_many_images_the_first_are_named() -> None:
    examples = StepExamples([tuple("abcdefghijklmnopqrst")], [torch.arange(20)])
    assert examples.describe({}).endswith("p at 15, and 4 more")


# ---------------------------------------------------------------- the moving average on a device


def test_the_average_that_a_device_skips_is_that_of_the_steps_alone() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    ours, exact = ParameterAverage([p], 0.9), ParameterAverage([q], 0.9)
    for n in range(20):
        skip = torch.tensor(float(n % 3 == 1))
        before = ours.averages[0].clone()
        with torch.no_grad():
            p.add_(n), q.add_(n)
        ours._update_unless(skip)  # what a GPU takes
        exact.update_(skip)
        assert not skip or torch.equal(before, ours.averages[0])
    torch.testing.assert_close(ours.averages, exact.averages, rtol=1e-13, atol=0)
    assert ours.state_dict()["count"] == exact.state_dict()["count"] == 13
