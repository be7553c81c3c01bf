"""A training step with two forward passes: each image with its noise and with the opposite noise.

    python train.py configs/toy_pti.toml --step examples/my_step.py:antithetic_step --out runs/two

The mean of both losses has the same expectation as one of them and a smaller variance (antithetic
variates). A loss that needs its own second forward pass has step.out_at(level) instead.
"""

from dataclasses import replace

from torch import Tensor

from lora_core.config import Config
from train import training_step
from training.inputs.step_inputs import StepInputs
from training.setup import Model
from training.step import Loss


def antithetic_step(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
    """[b] mean loss of the noise and the opposite noise, at one noise level."""
    mirrored = replace(x, eps=-x.eps, eps_in=-x.eps_in)
    first = training_step(model, x, config, loss)
    second = training_step(model, mirrored, config, loss)
    return (first + second) / 2
