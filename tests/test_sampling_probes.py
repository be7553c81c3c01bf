"""Probes of sampling: options that act are seen, and what few calls cannot show is no error."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import train
from lora_core.config import Config
from lora_core.settings import SamplerSettings
from tests.test_configs import put
from training.probes import sampling_probes as probes


class Denoiser(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


@pytest.fixture
def run() -> Any:
    """The first step of a run of which only what sampling needs is there."""
    model = SimpleNamespace(
        denoiser=Denoiser(), evaluating=nullcontext, family=None, placeholders=()
    )
    return SimpleNamespace(
        config=Config(),
        data=None,
        model=model,
        optimization=SimpleNamespace(averaged=nullcontext),
        inputs=[SimpleNamespace(number=0)],
    )


class Samples(SimpleNamespace):
    """The images of that run."""

    def __init__(self, config: Config, _data: Any, model: Any, optimization: Any) -> None:
        look = config.samples
        super().__init__(model=model, optimization=optimization, prompts=["a"])
        self.settings = SamplerSettings(look.sampler, look.steps, look.guidance)

    def batch_of(self, prompts: Any, seeds: Any) -> Any:
        return SimpleNamespace(_replace=SimpleNamespace)


@pytest.mark.parametrize("calls, answer", [(5, False), (3, False), (2, None)])
@pytest.mark.parametrize("sampler", ["euler", "flow_euler"])
def test_sampling_that_ignores_its_settings_is_seen_after_three_calls(
    calls: int, answer: Any, sampler: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[int] = []

    def sample(*_: Any, **__: Any) -> Any:
        for i in range(calls):
            run.model.denoiser(torch.ones(2), scale=torch.tensor(0.5))
            carried_out.append(i)
        yield None

    monkeypatch.setattr(probes.generation, "generate_batches", sample)
    monkeypatch.setattr(probes, "SampleImages", Samples)
    run.config = put(Config(), {"samples.sampler": sampler})
    if sampler == "flow_euler":  # does what the default does, for flow models
        assert probes.changes_sampling("sampler")(run) is None
        return
    assert probes.changes_sampling("sampler")(run) is answer
    assert carried_out == 2 * [0, 1]
    assert not run.model.denoiser._forward_pre_hooks


def test_nothing_is_carried_out_after_a_difference(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[int] = []

    def sample(_family: Any, batches: Any, **_: Any) -> Any:
        for i in range(9):
            run.model.denoiser(torch.ones(batches[0].settings.steps), scale=torch.tensor(0.5))
            carried_out.append(i)
        yield None

    monkeypatch.setattr(probes.generation, "generate_batches", sample)
    monkeypatch.setattr(probes, "SampleImages", Samples)
    run.config = put(Config(), {"samples.steps": 7})
    assert probes.changes_sampling("steps")(run) is True
    assert carried_out == [0, 1]
    run.inputs[0].number = 1
    assert probes.changes_sampling("steps")(run) is None  # looked at once


@pytest.mark.parametrize(
    "values",
    [
        {"samples.sampler": "euler_ancestral"},  # one step, in which some samplers do the same
        {
            "samples.sampler": "euler_ancestral",
            "samples.steps": 4,
            "samples.guidance": 2.0,
            "samples.negative": "bad",
        },
        {"samples.steps": 3, "samples.sampler_args": {"eta": 1.0}},
    ],
)
def test_options_that_act_are_no_error(values: dict[str, Any], config: Config, quick: None) -> None:
    train.train(put(config, {**values, "stages.0.steps": 1}))
