"""A custom adapter, (IA)^3 (arXiv 2205.05638): one learned factor per output feature.

    python train.py configs/toy_pti.toml --adapter.kind examples/my_adapter.py:IA3 --out runs/ia3
    python infer.py --model toy/model --lora runs/ia3 --adapter-kind examples/my_adapter.py:IA3 \
        --prompt "a photo of TOK on a yellow background" --out ia3.png

`update` is all that an adapter needs: for Linear layers the weight to fold follows from it, and
`delta_weight` and `delta_bias` give it for convolutions. No LoRA file can hold (IA)^3, so the run
writes its own parameters (runs/ia3/ia3_adapter.safetensors) and the whole model with them folded in
(runs/ia3/model).
"""

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter_module import Adapter, BaseLayer, LayerSpec


class IA3(Adapter):
    """y = (1 + l) * base(x), with one number l for each output feature."""

    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(base.weight.shape[0], device=base.weight.device))  # l

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        scale = self.scale if isinstance(base, nn.Linear) else self.scale[:, None, None]
        return strength * scale * y0

    def delta_weight(self, base: BaseLayer) -> Tensor:
        return self.scale.detach().view(-1, *[1] * (base.weight.ndim - 1)) * base.weight.float()

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        return None if base.bias is None else self.scale.detach() * base.bias.float()
