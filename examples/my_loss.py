"""A custom loss: squared error that also compares edges.

python train.py configs/toy_pti.toml --loss examples/my_loss.py:edges --out runs/edges
"""

from torch import Tensor

from lora_core.diffusion.losses import StepOutput, masked_mean


def edges(step: StepOutput, *, strength: float = 0.5) -> Tensor:
    """[b] squared error of the output and of its differences between neighboring latents."""
    error = step.out - step.target  # [b, c, h, w]
    across = error.diff(dim=-1, append=error[..., -1:])
    down = error.diff(dim=-2, append=error[..., -1:, :])
    return masked_mean(error**2 + strength * (across**2 + down**2), step.mask)
