"""Probes of sampling: options that act are seen, and what few calls cannot show is no error."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from lora_core.config import Config
from lora_core.settings import SamplerSettings
from tests.test_configs import put
from training.probes import sampling_probes as probes


class Family:
    def denoise(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


@pytest.fixture
def run() -> Any:
    """The first step of a run of which only what sampling needs is there."""
    model = SimpleNamespace(evaluating=nullcontext, family=Family(), placeholders=())
    return SimpleNamespace(
        config=Config(),
        data=None,
        model=model,
        optimization=SimpleNamespace(averaged=nullcontext),
        inputs=[SimpleNamespace(number=0)],
        can_run_denoiser=True,
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
            run.model.family.denoise(torch.ones(2), None)
            carried_out.append(i)
        yield None

    monkeypatch.setattr(probes.generation, "generate_batches", sample)
    monkeypatch.setattr(probes, "SampleImages", Samples)
    run.config = put(Config(), {"samples.sampler": sampler})
    if sampler == "flow_euler":  # does what the default does, for flow models
        answer = None
    assert probes.changes_sampling("sampler")(run) is answer
    assert carried_out == 2 * [0, 1]
    assert not vars(run.model.family)


def test_nothing_is_carried_out_after_a_difference(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[int] = []

    def sample(_family: Any, batches: Any, **_: Any) -> Any:
        for i in range(9):
            run.model.family.denoise(torch.ones(batches[0].settings.steps), None)
            carried_out.append(i)
        yield None

    monkeypatch.setattr(probes.generation, "generate_batches", sample)
    monkeypatch.setattr(probes, "SampleImages", Samples)
    run.config = put(Config(), {"samples.steps": 7})
    assert probes.changes_sampling("steps")(run) is True
    assert carried_out == [0, 1]
    run.inputs[0].number = 1
    assert probes.changes_sampling("steps")(run) is None  # looked at once


SAMPLER = """
import torch
from lora_core.diffusion.sampling import ddim

def fn(denoise, x, levels):
    return ddim(denoise, x, levels) + 0.01  # another one at its end alone
"""


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
        {"samples.steps": 3, "samples.sampler_args": {"eta": 0.0}},  # its default, in words
        {"samples.steps": 6, "samples.sampler": "euler", "precision": "bf16"},
        {"samples.steps": 6, "samples.sampler": "dpmpp_2m", "precision": "bf16"},
        {"samples.steps": 6, "samples.sampler": "FILE:fn"},
    ],
)
def test_options_that_act_are_no_error(
    values: dict[str, Any], config: Config, quick: None, tmp_path: Path
) -> None:
    file = tmp_path / "sampler.py"
    file.write_text(SAMPLER)
    if "FILE" in str(values):
        values = {**values, "samples.sampler": f"{file}:fn"}
    run = train.train(put(config, {**values, "stages.0.steps": 1}))
    assert (run / "summary.json").is_file()


def test_a_family_of_functions_gets_its_own_back() -> None:
    family = SimpleNamespace(denoise=min)
    with pytest.raises(KeyboardInterrupt), probes._replaced_denoise(family, max):
        assert family.denoise is max
        raise KeyboardInterrupt
    assert family.denoise is min
