"""VeRA (arXiv 2310.11454): one frozen random pair of factors for all layers, two vectors for each.

    python train.py configs/toy_pti.toml --adapter.kind examples/vera.py:VeRA --out runs/vera

delta W = diag(b) B diag(d) A is a product of two factors, so that every LoRA file holds it. The
vectors alone, which are all that trains, are in runs/vera/vera_adapter.safetensors.
"""

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter_module import BaseLayer, LayerSpec
from lora_core.adapters.kinds import FactorAdapter, factor_shapes


class VeRA(FactorAdapter):
    @classmethod
    def make_shared(cls, bases: list[BaseLayer], layer: LayerSpec) -> nn.Module:
        """A [r, widest input] and B [widest output, r], Kaiming uniform by the run's seed."""
        inputs, outputs = (max(base.weight.flatten(1).shape[i] for base in bases) for i in (1, 0))
        pair, generator = nn.Module(), torch.Generator().manual_seed(layer.seed)
        for name, shape in (("A", (layer.rank, inputs)), ("B", (outputs, layer.rank))):
            numbers = torch.rand(shape, generator=generator) * 2 - 1
            pair.register_buffer(name, numbers * (6 / shape[1]) ** 0.5, persistent=False)
        return pair.to(bases[0].weight.device)

    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__(layer)
        self.pair, weight = layer.shared, base.weight
        self.width, self.shapes = weight.flatten(1).shape[1], factor_shapes(base, layer.rank)
        self.d = nn.Parameter(torch.full((layer.rank, 1), 0.1, device=weight.device))
        self.b = nn.Parameter(torch.zeros(len(weight), 1, device=weight.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.d * self.pair.A[:, : self.width], self.b * self.pair.B[: len(self.b)]
        return down.view(self.shapes[0]), up.view(self.shapes[1])
