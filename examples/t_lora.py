"""T-LoRA (arXiv 2507.05964): the noisier an example, the fewer ranks of the LoRA act on it.

    python train.py configs/toy_pti.toml --adapter.kind examples/t_lora.py:TLoRA --out runs/t_lora
    python infer.py --model toy/model --lora runs/t_lora --adapter-kind examples/t_lora.py:TLoRA \
        --prompt "a photo of TOK on a yellow background" --out t_lora.png

It trains and samples with the mask, so that no LoRA file or folded weight holds it; the run writes
runs/t_lora/t_lora_adapter.safetensors. (The paper's orthogonal initialization is another idea.)
"""

import torch
from torch import Tensor

from lora_core.adapters.adapter_module import BaseLayer
from lora_core.adapters.kinds import LoRA
from lora_core.adapters.noise_levels import ForwardLevel
from lora_core.errors import UserError

LEAST = 0.5  # share of the ranks that acts on pure noise


class TLoRA(LoRA):
    """r(t) = floor((r - r_min) (T - t) / T) + r_min ranks act, the first ones."""

    level: ForwardLevel
    reads_level = True
    masks_ranks = True

    def rank_mask(self, x: Tensor) -> Tensor:
        rank, least = len(self.down), max(1, round(LEAST * len(self.down)))
        acting = ((rank - least) * (1 - self.level.fraction)).floor() + least  # [b]
        return (torch.arange(rank, device=x.device) < acting[:, None]).to(self.down.dtype)

    def state(self) -> None:
        raise UserError("the ranks of a T-LoRA act by the noise level, which no LoRA file holds")

    def delta_weight(self, base: BaseLayer) -> None:
        self.state()
