"""Probes of what a run has written: options that act are seen, and what a run cannot show is no
error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import train
from lora_core.config import Config, SamplesConfig
from lora_core.diffusion.generation import ImageBatch
from lora_core.runs.pictures import CELLS
from lora_core.settings import SamplerSettings
from tests.conftest import learned, same
from tests.test_configs import put
from training import results
from training.probes import effects
from training.probes import outcome_probes as probes

ACTING: list[dict[str, Any]] = [
    {
        "samples.sampler": "euler_ancestral",
        "samples.steps": 4,
        "samples.guidance": 2.0,
        "samples.negative": "bad",
        "samples.prompts": ("a TOK", "TOK TOK", "a TOK"),
        "samples.every": 1,
        "samples.strengths": (0.0, 0.5, 1.0),
        "samples.new_prompts": ("a", "TOK"),
        "samples.show_data": True,
        "samples.base_word": "thing",
        "stages.0.groups": ("denoiser", "tokens"),
        "save_every": 1,
        "keep": 1,
        "ema": 0.9,
    },
    {
        "samples.steps": 3,
        "samples.sampler_args": {"eta": 1.0},
        "validation.seed": 5,
        "validation.bins": 2,
        "validation.draws": 2,
        "validation.count": 2,
        "validation.every": 1,
        "data.skip_bad": True,
    },
]


@pytest.mark.parametrize("values", ACTING, ids=["images", "scores"])
def test_options_that_act_are_seen_and_looking_changes_nothing(
    values: dict[str, Any], config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    whole = effects.check_outputs

    def look(log: Any, samples: Any) -> None:
        run = probes.FinishedRun(log, samples)
        for name in values:
            effect = effects.OPTION_EFFECTS[name.replace("stages.0.", "stages.")]
            if isinstance(effect, effects.Written) and effect.is_there is not None:
                assert effect.is_there(run) is True, name
                asked.append(name)
        whole(log, samples)

    monkeypatch.setattr(effects, "check_outputs", look)
    run = train.train(put(config, values))
    left = {"stages.0.groups", "ema"}
    assert set(asked) == values.keys() - left
    monkeypatch.setattr(effects, "check_outputs", lambda *_: None)
    blind = train.train(put(config, values | {"out": f"{config.out}_blind"}))
    assert same(learned(run), learned(blind))
    for file in ("val.jsonl", "metrics.jsonl"):
        assert (run / file).read_bytes() == (blind / file).read_bytes()


def test_one_sampling_step_shows_no_sampler(config: Config, quick: None) -> None:
    """With one step some samplers do the same."""
    train.train(put(config, {"samples.sampler": "euler_ancestral", "stages.0.steps": 1}))


class Denoiser(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        return x * scale


@pytest.mark.parametrize("calls, answer", [(5, False), (2, True)])
def test_too_few_calls_show_nothing(
    calls: int, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling that ignores its settings is seen after three calls."""
    denoiser = Denoiser()

    def sample(*_: Any, **__: Any) -> Iterator[torch.Tensor]:
        for _i in range(calls):
            yield denoiser(torch.ones(2), scale=0.5)

    monkeypatch.setattr(probes.generation, "generate_batches", sample)
    run: Any = finished_run(denoiser, SamplerSettings(steps=4))
    assert probes.changes_sampling("steps")(run) is answer
    assert not denoiser._forward_pre_hooks


def finished_run(denoiser: nn.Module, settings: SamplerSettings) -> Any:
    """A run of which only what sampling needs is there."""
    from contextlib import nullcontext

    model = SimpleNamespace(denoiser=denoiser, evaluating=nullcontext, family=None, placeholders=())
    samples = SimpleNamespace(
        settings=settings,
        prompts=["a"],
        optimization=SimpleNamespace(averaged=nullcontext),
        batch_of=lambda prompts, seeds: ImageBatch(prompts, seeds, settings),
    )
    log = SimpleNamespace(model=model, config=Config(samples=SamplesConfig(steps=4)))
    return probes.FinishedRun(log, samples)  # type: ignore[arg-type]


def test_flow_euler_is_the_sampler_of_flow_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does the same as the default, ddim, for them."""
    monkeypatch.setattr(probes, "_first_calls", lambda *_: [[torch.ones(1)]] * probes.CALLS)
    run = finished_run(Denoiser(), SamplerSettings(sampler="flow_euler"))
    assert probes.changes_sampling("sampler")(run)
    run = finished_run(Denoiser(), SamplerSettings(sampler="euler"))
    assert not probes.changes_sampling("sampler")(run)


def test_prompts_without_the_word_have_no_base_word(config: Config, quick: None) -> None:
    values = {"samples.prompts": ("a",), "samples.base_word": "thing"}
    train.train(put(config, values | {"stages.0.groups": ("denoiser", "tokens")}))


def test_sheets_say_what_they_show(config: Config, tmp_path: Path) -> None:
    """The probes read the text of the PNG, as the report does."""
    values = {"samples.new_prompts": ("TOK",), "stages.0.steps": 1}
    run = train.train(put(config, values))
    with results.pictures.Image.open(run / "before_after.png") as sheet:
        sheet.load()
        cells = json.loads(sheet.info[CELLS])["cells"]
    assert [cell["caption"] for cell in cells if cell["role"] == "new"] == ["TOK"]
