"""What rectified-flow families share: schedules, the steps of samplers, packed latents."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lora_core.diffusion import sampling
from lora_core.diffusion.noise import flow_schedule as shifted_flow
from lora_core.errors import UserError
from models import flow


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_are_those_that_diffusers_scheduler_lays_out(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    found = flow.scheduler_steps(steps, shift, dynamic=False)
    assert torch.allclose(torch.tensor(found), scheduler.sigmas[:-1], atol=1e-6)


def test_four_steps_at_shift_3():
    found = flow.scheduler_steps(4, 3.0, dynamic=False)
    assert found == pytest.approx([1, 0.858, 0.602, 0.009], abs=1e-3)


@pytest.mark.parametrize("mu", [0.5, 1.1])
def test_steps_with_a_dynamic_shift(mu):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(5, mu=mu)
    found = flow.scheduler_steps(5, float(torch.tensor(mu).exp()), dynamic=True)
    assert torch.allclose(torch.tensor(found), scheduler.sigmas[:-1], atol=1e-6)


def test_a_sampler_takes_the_schedules_own_steps():
    plain = shifted_flow(shift=3.0)
    own = flow.with_scheduler_steps(plain)
    assert sampling.sampler_timesteps(plain, 4)[1:] == pytest.approx([0.9, 0.75, 0.5])
    levels = sampling.sampler_levels("euler", own, 4, strength=0.5)
    assert levels.sigma.tolist() == pytest.approx([0.602, 0.0089, 0], abs=1e-3)


def test_device_and_precision_are_those_of_the_first_layer():
    class Other(flow.FlowFamily):
        first_layer = "caption_projection.0"

    family = Other.__new__(Other)
    projection = torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    family.transformer = torch.nn.Module()
    family.transformer.caption_projection = projection
    assert family.device == torch.device("cpu") and family.dtype == torch.bfloat16
    family.working_device = torch.device("meta")
    assert family.device == torch.device("meta")


@pytest.mark.parametrize("patch", [1, 2])
def test_packed_latents_come_back(patch):
    x = torch.randn(2, 3, 4, 6)
    packed = flow.pack_latents(x, patch)
    assert packed.shape == (2, 24 // patch**2, 3 * patch**2)
    assert torch.equal(flow.unpack_latents(packed, 4, 6, patch), x)


@pytest.mark.parametrize("length, found", [(0, 256), (100, 100), (512, 512)])
def test_length_of_a_prompt(length, found):
    assert flow.prompt_length(length, 256) == found


@pytest.mark.parametrize("length", [-1, 513])
def test_a_length_beyond_the_pipelines_is_refused(length):
    with pytest.raises(UserError, match="expected 1 to 512 tokens, or 0 for the model's own 77"):
        flow.prompt_length(length, 77)


def test_parts_of_two_models_are_refused():
    with pytest.raises(UserError, match="joint_attention_dim 4096, expected 2048, as t5 has it"):
        flow.check_fit("m", {"joint_attention_dim": 4096}, {"joint_attention_dim": 2048}, "t5")
    flow.check_fit("m", {}, {"joint_attention_dim": 2048}, "t5")


def test_a_control_image_is_refused():
    with pytest.raises(UserError, match="takes 32 channels, expected 16"):
        flow.check_channels(32, 16)
