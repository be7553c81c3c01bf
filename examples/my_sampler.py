"""A custom sampler: Heun's method, two calls of the network in a step (arXiv 2206.00364).

    python train.py configs/toy_pti.toml --samples.sampler examples/my_sampler.py:heun \
        --out runs/heun
    python infer.py --model toy/model --lora runs/heun --sampler examples/my_sampler.py:heun \
        --prompt "a photo of TOK" --out heun.png

`levels` has one level more than there are steps; x is alpha x0 + sigma eps at each.
"""

from torch import Tensor

from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.prediction import eps_from_x0
from lora_core.diffusion.sampling import Denoise, step_ends, step_level


def heun(denoise: Denoise, x: Tensor, levels: NoiseLevel) -> Tensor:
    """x at the last level, by algorithm 1 without churn: dy/ds = eps, y = x / alpha, s = sigma /
    alpha.
    """
    for i, (alpha, sigma, alpha_next, sigma_next) in enumerate(step_ends(levels)):
        level, after = (step_level(levels, j, x) for j in (i, i + 1))
        x0 = denoise(x, level)
        eps = eps_from_x0(x, x0, level)
        x = alpha_next * x0 + sigma_next * eps  # Euler's step
        if sigma_next > 0:
            change = eps_from_x0(x, denoise(x, after), after) - eps
            x = x + (sigma_next - alpha_next * sigma / alpha) * change / 2
    return x
