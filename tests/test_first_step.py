"""What a first step gives to probes: losses without gradient, keys, counts of forward passes."""

from dataclasses import replace

import torch

from lora_core.config import Config, Stage
from lora_core.diffusion.losses import mse
from tests.opened_run import open_parts
from training.inputs.step_inputs import make_step_inputs
from training.probes.first_step import FirstStep, forward_calls
from training.stages import begin_stage, set_learning_rates
from training.step import optimizer_step


def take_first_step(config: Config) -> FirstStep:
    """The first step of a run, as the training loop takes it."""
    s = open_parts(config)
    stage = config.stages[0]
    begin_stage(stage, config, s.model, s.optimization)
    s.source.begin_stage(stage, range(1))
    batch = next(iter(s.data.batches(config, 0, 1)))
    set_learning_rates(stage, 0, config, s.optimization)
    inputs = make_step_inputs(s.source, batch, stage, 0, check=True)
    optimizer_step(s.functions, stage, config, s.model, s.optimization, True, inputs)
    s.optimization.update_average_()
    return FirstStep(s.source, s.functions, s.optimization, stage, batch, inputs)


def test_a_step_as_probes_see_it(config: Config, quick: None) -> None:
    config = replace(config, accumulation=2, batch_size=1, stages=(Stage(1),))
    first = take_first_step(config)
    assert first.config is first.source.config and first.data is first.source.data
    assert first.keys.names == (first.batch.keys[0],) and len(first.batch.keys) == 2
    assert [group["name"] for group in first.groups] == ["denoiser"]
    calls: list[bool] = []
    with forward_calls(first.model.denoiser, calls, torch.is_grad_enabled):
        one, two = first.losses(mse), first.losses(mse)
    assert torch.equal(one, two) and not one.requires_grad and calls == [False, False]
    first.losses(mse)
    assert len(calls) == 2
    assert not torch.equal(one, first.losses(mse, inputs=first.inputs[0]))
