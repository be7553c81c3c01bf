"""An adapter of your own: (IA)^3 (arXiv 2205.05638).

    python train.py configs/toy_pti.toml --adapter.kind examples/my_adapter.py:IA3 --out runs/ia3

It has no low-rank form, so the run writes its own parameters (runs/ia3/ia3_adapter.safetensors) and
the whole model with them folded in (runs/ia3/model, for infer.py --model and diffusers) instead of
LoRA files. The lines at the end put the parameters on a model again.
"""

import torch
from torch import Tensor, nn

from lora_core.adapters.kinds import BaseLayer, LayerSpec


class IA3(nn.Module):
    """y = (1 + l) * base(x), one number for each output feature."""

    low_rank = False  # rank, alpha and dropout do not apply

    def __init__(self, base: BaseLayer, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
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
