"""A loss that reads attention: the word of the subject is to act inside the mask.

    python train.py configs/toy_pti.toml --loss examples/attention_in_mask.py:attention_in_mask \
        --loss-arg word=TOK --data.masks "clipseg:a creature" --out runs/inside

The share of the word's attention outside the mask is a number in [0, 1] for each image, which is
logged as `outside` too. `word` is a placeholder word or any other word of the captions.
"""

from torch import Tensor

from lora_core.diffusion.losses import StepOutput, mse
from lora_core.errors import UserError


def attention_in_mask(step: StepOutput, *, word: str = "TOK", weight: float = 0.1) -> Tensor:
    """[b] mse plus `weight` times the share of the attention on `word` outside the mask."""
    if step.drawn_mask is None:
        raise UserError("attention_in_mask needs masks, and there are none; set --data.masks")
    attention = step.attention_of(word)  # [b, h, w], on the grid of the latents
    mask = step.drawn_mask[:, 0]  # [b, h, w], 1 on the subject
    share = (attention * (1 - mask)).sum((1, 2)) / attention.sum((1, 2)).clamp(min=1e-6)
    step.log("outside", share)
    return mse(step) + weight * share


attention_in_mask.reads_attention = True
attention_in_mask.capturable = True  # the same operations in every step, for --cuda-graph
