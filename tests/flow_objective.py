"""The loss of a flow family for given latents and noise, by our laws; tests compare it with the
public scripts' formula.
"""

import torch
from torch import Tensor

from lora_core.diffusion import losses, noise, prediction
from lora_core.diffusion.losses import StepOutput
from lora_core.diffusion.noise import NoiseLevel
from lora_core.family import Conditioning, Family


def level_of_entries(family: Family, rows: Tensor) -> NoiseLevel:
    """The noise levels of entries `rows` of the scripts' table, which descends from sigma 1."""
    count = len(family.schedule)
    return noise.levels_at_quantiles(family.schedule, (count - 0.5 - rows) / count)


def mean_loss(
    family: Family,
    latents: Tensor,
    eps: Tensor,
    cond: Conditioning,
    rows: Tensor,
    weighting: str,
    **arguments: float,
) -> Tensor:
    """The mean squared error of the velocity at entries `rows` of the scripts' table, weighted."""
    level = level_of_entries(family, rows)
    x_t = noise.add_noise(latents, eps, level)
    out = family.denoise(prediction.scale_input("flow", x_t, level), level, cond)
    out, target, row = prediction.to_loss_space("flow", "model", out, latents, eps, level)
    is_prior = torch.zeros(len(latents), dtype=torch.bool)
    step = StepOutput(
        out, target, latents, eps, x_t, level, row, None, is_prior, 0, {}, 1.0, "flow"
    )
    weights = losses.loss_weights(weighting, level, "flow", **arguments)
    return (losses.mse(step) * weights).mean()
