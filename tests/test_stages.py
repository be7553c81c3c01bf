"""Groups that pause for a stage."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from lora_core.config import Config, OptimizerConfig, Stage
from tests.conftest import learned
from training.stages import resolve_group_numbers


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


def test_a_text_adapter_that_pauses_needs_no_row_keys(config: Config, quick: None) -> None:
    stages = (Stage(1, ("denoiser", "text_encoder")), Stage(2, ("denoiser",)))
    run = train.train(replace(config, stages=stages, adapter=replace(config.adapter, dropout=0.5)))
    assert all(bool(p.isfinite().all()) for p in learned(run).values())


def test_each_group_has_the_schedule_that_is_named_for_it(config: Config, quick: None) -> None:
    """stages.I.schedules > stages.I.schedule > optimizer.schedules > optimizer.schedule."""
    chosen = OptimizerConfig(
        lr={"denoiser": 1e-2, "tokens": 1e-3},
        schedule="wsd",
        schedule_args={"decay": 0.5, "end": 0.1},
        schedules={"tokens": "constant"},
        warmup=1,
    )
    both = ("denoiser", "tokens")
    stages = (
        Stage(5, both),
        Stage(3, both, schedule="linear", schedules={"tokens": "rex"}),
        Stage(2, both, schedules={"denoiser": "constant"}),
    )
    run = train.train(replace(config, optimizer=chosen, stages=stages))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    denoiser = [line["lr_denoiser"] / 1e-2 for line in lines if "lr_denoiser" in line]
    tokens = [line["lr_tokens"] / 1e-3 for line in lines if "lr_tokens" in line]
    assert denoiser == pytest.approx([0, 1, 1, 1, 0.55, 0, 1, 0.5, 0, 1])
    assert tokens == pytest.approx([0, 1, 1, 1, 1, 0, 1, 2 / 3, 0, 1])


def test_one_number_is_for_all_groups_without_one_of_their_own() -> None:
    stages = (
        Stage(2, ("tokens",), lr={"all": 3.0}),
        Stage(1, ("denoiser", "tokens"), weight_decay={"all": 0.5, "tokens": 0.0}),
    )
    optimizer = OptimizerConfig(lr={"all": 1e-4, "tokens": 2e-3}, weight_decay={"all": 0.1})
    config = resolve_group_numbers(Config(stages=stages, optimizer=optimizer))
    assert config.optimizer.lr == {"denoiser": 1e-4, "tokens": 2e-3}
    assert config.optimizer.weight_decay == {"denoiser": 0.1, "tokens": 0.1}
    assert config.stages[0].lr == {"tokens": 3.0} and not config.stages[0].weight_decay
    assert config.stages[1].weight_decay == {"denoiser": 0.5, "tokens": 0.0}
    assert resolve_group_numbers(config) == config


def test_a_run_with_one_rate_is_the_run_with_the_rate_of_each_group(
    config: Config, quick: None
) -> None:
    stages = (Stage(1, ("denoiser", "tokens")),)
    runs = []
    for name, lr in (("one", {"all": 1e-3}), ("each", {"denoiser": 1e-3, "tokens": 1e-3})):
        optimizer = OptimizerConfig(lr=lr)
        out = f"{config.out}_{name}"
        runs.append(train.train(replace(config, stages=stages, optimizer=optimizer, out=out)))
    one, each = map(learned, runs)
    assert one.keys() == each.keys() and all(torch.equal(one[k], each[k]) for k in one)


def test_a_stage_has_a_warm_up_of_its_own(config: Config, quick: None) -> None:
    optimizer = OptimizerConfig(lr={"denoiser": 1e-3}, warmup=1)
    stages = (Stage(3, warmup=2), Stage(2), Stage(2, warmup=0))
    run = train.train(replace(config, stages=stages, optimizer=optimizer))
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr_denoiser"] for line in lines if "lr_denoiser" in line]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 0, 1e-3, 1e-3, 1e-3])
