"""Contrastive flow matching: away from where another image of the batch leads (arXiv 2506.05350).

python train.py configs/toy_pti.toml --loss examples/contrastive_flow.py:contrastive_flow \
    --loss-arg strength=0.05 --out runs/contrastive
"""

from dataclasses import replace

from torch import Tensor

from lora_core.diffusion.losses import StepOutput, mse
from lora_core.diffusion.prediction import PREDICTIONS, eps_from_x0
from lora_core.errors import UserError


def contrastive_flow(step: StepOutput, *, strength: float = 0.05) -> Tensor:
    """[b] |v - v_own|^2 - strength |v - v_other|^2, means over c h w, in units of the output.

    v_other is the velocity that the image and the noise of the example before this one in the batch
    would have at this noise level. A v or flow model predicts v itself; the output of an epsilon
    model is compared with the noise that belongs to this velocity at x_t.
    """
    if len(step.x0) < 2 or not 0 <= strength < 1:
        raise UserError(
            f"contrastive_flow got {len(step.x0)} image(s) and strength {strength:g}; it compares "
            "at least 2 (--batch-size), and from strength 1 on it has no minimum"
        )
    law = PREDICTIONS["flow" if step.prediction == "flow" else "v_prediction"]
    velocity = law.target(step.x0.roll(1, 0), step.eps.roll(1, 0), step.level)
    x0 = law.x0(step.x_t, velocity, step.level)  # where it leads
    eps = eps_from_x0(step.x_t, x0, step.level)
    other = PREDICTIONS[step.prediction].target(x0, eps, step.level)
    return mse(step) - strength * mse(replace(step, target=other))


contrastive_flow.whole_batch = True
contrastive_flow.capturable = True
