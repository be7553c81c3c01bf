"""PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775): LoRA that starts as a part of the weight.

    python train.py configs/toy_pti.toml --adapter.kind examples/start_from_weight.py:PiSSA \
        --adapter.rank 4 --out runs/pissa

Both take the product of the first factors from the weight. Here the weight stays as it is, and the
update is up @ down - up0 @ down0 = (up - up0) @ down + up0 @ (down - down0): an ordinary LoRA of
twice the rank, which is zero at first in every precision.
"""

import torch
from torch import Tensor

from lora_core.adapters.adapter_module import BaseLayer, LayerSpec
from lora_core.adapters.kinds import LoRA


class PiSSA(LoRA):
    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__(base, layer)
        down, up = self.split(base.weight.detach().to(self.down).flatten(1), layer.rank)
        for name, own in (("down", down), ("up", up)):
            parameter = getattr(self, name)
            parameter.data.copy_((own / self.scale**0.5).view_as(parameter))
            self.register_buffer(f"{name}0", parameter.detach().clone())

    def split(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = s[:rank].sqrt()
        return root[:, None] * v[:rank], u[:, :rank] * root

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = (self.down, self.down - self.down0), (self.up - self.up0, self.up0)
        return torch.cat(down), torch.cat(up, dim=1)


class OLoRA(PiSSA):
    def split(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        return r[:rank] * self.scale**0.5, q[:, :rank] * self.scale**0.5  # as peft: not divided
