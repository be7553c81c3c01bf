"""LoRA-FA (arXiv 2308.03303): down stays as it was drawn, and up trains.

    python train.py configs/toy_pti.toml --adapter.kind examples/lora_fa.py:LoRAFA --out runs/fa

A buffer does not train and is saved and resumed with the parameters. Everything else is LoRA's.
"""

from lora_core.adapters.adapter_module import BaseLayer, LayerSpec
from lora_core.adapters.kinds import LoRA


class LoRAFA(LoRA):
    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__(base, layer)
        down = self.down.detach()
        del self.down
        self.register_buffer("down", down)
