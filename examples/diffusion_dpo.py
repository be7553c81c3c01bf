"""Diffusion-DPO: learn which of two images people prefer (arXiv 2311.12908 eq. 14).

python train.py --model toy/model --data.images WINNERS --data.pairs LOSERS --data.resolution 64 \
    --data.caption "a photo" --loss examples/diffusion_dpo.py:diffusion_dpo --out runs/dpo
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from lora_core.diffusion.losses import StepOutput, mse


def diffusion_dpo(step: StepOutput, *, beta: float = 5000.0) -> Tensor:
    """[b] -log sigmoid(beta / 2 ((r_w - e_w) - (r_l - e_l))) of each pair, in both of its rows.

    e and r are the mean squared errors of the model and of the reference, which is the model
    without adapters, on the winner w and the loser l with the same noise. beta is beta_dpo of the
    paper's code (beta / 2 is the paper's beta T omega times the size of a latent, for e is a mean);
    diffusers' LoRA script has beta in place of beta / 2. The first step's loss is ln 2. Train the
    denoiser alone: the reference reads what trained text encoders and tokens make of the text.
    """
    gain = mse(replace(step, out=step.base_out)) - mse(step)
    winner, loser = step.split_pairs(gain)
    step.log("accuracy", (winner > loser).float())  # pairs of which the winner gained more
    return -F.logsigmoid(beta / 2 * (winner - loser)).repeat_interleave(2)


diffusion_dpo.reads_pairs = True
diffusion_dpo.capturable = True
diffusion_dpo.weighting = "none"  # the paper weights by noise level inside the sigmoid
