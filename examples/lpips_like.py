"""A perceptual loss: the decoded prediction and the image, compared in a network's features.

python train.py configs/toy_pti.toml --loss examples/lpips_like.py:lpips_like --weighting none \
    --out runs/perceptual
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.diffusion.losses import StepOutput

LAYERS = ((3, 16), (16, 32), (32, 64))  # channels of each layer's input and features


@lru_cache(maxsize=4)
def feature_kernels(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Frozen 3 x 3 convolutions with random weights; those of a trained network go here."""
    drawn = torch.Generator().manual_seed(0)
    kernels = [torch.randn(n, c, 3, 3, generator=drawn) / (4.5 * c) ** 0.5 for c, n in LAYERS]
    return [kernel.to(device, dtype) for kernel in kernels]


def lpips_like(step: StepOutput) -> Tensor:
    """[b] sum over layers of the mean over h, w of |y - y0|^2 (arXiv 1801.03924 eq. 1, w = 1).

    y and y0 are a layer's features of prediction and image, at each place divided by their norm.
    """
    b, both = len(step.x0), torch.cat([step.pixels, step.decode(step.x0).detach()])
    rows = both.new_zeros(b)
    for kernel in feature_kernels(both.device, both.dtype):
        both = F.conv2d(both, kernel, stride=2, padding=1).relu()
        unit = both / (both.square().sum(1, keepdim=True) + 1e-10).sqrt()
        rows = rows + (unit[:b] - unit[b:]).square().sum(1).mean((1, 2))
    return rows


lpips_like.weighting = "none"
