"""Examples of losses and steps against their formulas: examples/my_step.py, and second forwards."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import train
from examples.my_step import antithetic_step
from lora_core.config import Config, Stage
from lora_core.diffusion.losses import StepOutput, mse
from tests.conftest import rows


def test_the_loss_is_the_mean_over_a_noise_and_its_opposite(config: Config, quick: None) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def loss(step: StepOutput) -> Tensor:
        found = mse(step)
        wanted = (step.out.double() - step.target.double()).square().mean((1, 2, 3))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
        seen.append((step.eps, step.x_t, wanted.detach()))
        return found

    stages = (Stage(2, ("denoiser", "tokens")),)
    run = train.train(replace(config, stages=stages), loss=loss, step=antithetic_step)
    assert len(seen) == 4  # two forward passes in each of two steps
    for first, second, row in zip(seen[::2], seen[1::2], rows(run)[1:]):
        assert torch.equal(first[0], -second[0]) and not torch.equal(first[1], second[1])
        wanted = torch.cat([first[2], second[2]]).mean()
        assert row["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert 'step = "examples/my_step.py:antithetic_step"' in (run / "config.toml").read_text()


def test_in_training_out_at_the_steps_own_level_is_out(config: Config, quick: None) -> None:
    """And the base model's; at another level both differ."""

    def loss(step: StepOutput) -> Tensor:
        assert torch.equal(step.out_at(step.level), step.out)
        assert torch.equal(step.base_out_at(step.level), step.base_out)
        assert step.schedule is not None and step.out_at(step.level).requires_grad
        other = step.schedule.level((step.level.t + 7) % 900)
        assert not torch.allclose(step.out_at(other), step.out)
        assert not torch.allclose(step.base_out_at(other), step.base_out)
        assert not step.base_out_at(other).requires_grad
        torch.testing.assert_close(step.decode(step.x0_pred), step.pixels)
        error = step.out_at(other) - step.target_at(other)
        return mse(step) + error.square().mean((1, 2, 3))

    train.train(replace(config, stages=(Stage(2, ("denoiser", "tokens")),)), loss=loss)
