"""Densities of timesteps that come from a user's file."""

import torch

from lora_core.diffusion.densities import bind_density
from lora_core.diffusion.noise import flow_schedule, levels_at_quantiles


def test_a_quantile_function_from_a_file_places_the_timesteps(tmp_path):
    """Q(u) = 1 - sqrt(1 - u), of the density 2 (1 - f), at a flow's sigma."""
    file = tmp_path / "mine.py"
    file.write_text("def falling(u, *, power=0.5):\n    return 1 - (1 - u) ** power\n")
    density = bind_density(f"{file}:falling", power=0.5)
    u = (torch.arange(2000) + 0.5) / 2000
    sigma = levels_at_quantiles(flow_schedule(), u, density=density).sigma
    for share in (0.1, 0.5, 0.9):  # the share of sigmas below x is 1 - (1 - x)^2
        below = (sigma <= share).double().mean().item()
        assert abs(below - (1 - (1 - share) ** 2)) < 2e-3
