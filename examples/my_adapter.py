"""A custom adapter, (IA)^3 (arXiv 2205.05638): one learned factor per output feature.

    python train.py configs/toy_pti.toml --adapter.kind examples/my_adapter.py:IA3 --out runs/ia3

(IA)^3 has no low-rank form, so no LoRA file can hold it. The run writes its own parameters
(runs/ia3/ia3_adapter.safetensors) and the whole model with the adapter folded in (runs/ia3/model,
for infer.py --model and diffusers). The lines at the end load the parameters onto a model again.
"""

import torch
from torch import Tensor, nn

from lora_core.adapters.kinds import BaseLayer, LayerSpec


class IA3(nn.Module):
    """y = (1 + l) * base(x), with one number l for each output feature."""

    low_rank = False  # rank, alpha and dropout do not apply

    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.zeros(base.weight.shape[0], device=base.weight.device))  # l

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        y0 = base(x)
        return y0 + self.update(base, x, y0, strength).to(y0.dtype)

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        scale = self.scale if isinstance(base, nn.Linear) else self.scale[:, None, None]
        return strength * scale * y0

    def delta_weight(self, base: BaseLayer) -> Tensor:
        return self.scale.detach().view(-1, *[1] * (base.weight.ndim - 1)) * base.weight.float()

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        return None if base.bias is None else self.scale.detach() * base.bias.float()


if __name__ == "__main__":
    from lora_core.adapters.custom_files import load_adapters
    from lora_core.adapters.injection import AdapterSpec, inject
    from models import load_family

    family = load_family("toy/model")
    inject(
        family.modules["unet"],
        AdapterSpec(family.layout.presets["unet"]["all"], kind="examples/my_adapter.py:IA3"),
    )  # as in the run's config
    load_adapters({"unet": family.modules["unet"]}, "runs/ia3/ia3_adapter.safetensors")
