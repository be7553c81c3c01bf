"""Adapters whose update is another product of small tensors than up @ down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter_module import BaseLayer, DroppingAdapter, LayerSpec
from lora_core.adapters.weight_updates import DenseUpdate, delta_weight
from lora_core.kernels import call
from lora_core.kernels.reference import wide_dtype


class ProductAdapter(DroppingAdapter):
    """delta W = scale * product of the parameters, which are called as their tensors in files.

    A subclass gives `kind`, `initial_tensors`, `product` and `branch`. Dropout of ranks does not
    apply: not every product has a rank between two factors.
    """

    kind: str  # of its DenseUpdate
    any_rank = True

    def __init__(self, base: BaseLayer, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.shape = tuple(base.weight.shape)
        self._set_tensors(base, self.initial_tensors(base, spec))

    def initial_tensors(self, base: BaseLayer, spec: LayerSpec) -> dict[str, Tensor]:
        """Role -> tensor whose product is zero; only zeros for spec.init "zero"."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """The product, with its graph."""
        raise NotImplementedError

    def branch(self, base: BaseLayer, x: Tensor, scale: float) -> Tensor:
        """The layer's operation with scale * product as its weight, without a bias."""
        raise NotImplementedError

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        y0 = base(x)
        return y0 + self.update(base, x, y0, strength).to(y0.dtype)

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        drop = self._input_dropout(x)
        if drop is not None:
            x = call("keyed_dropout", x, *drop)
        update = self.branch(base, x, self.scale * strength)
        kept = self._kept_examples(x)
        return update if kept is None else torch.where(kept, update, 0)

    def delta_weight(self, base: BaseLayer) -> Tensor:
        with torch.no_grad():
            return delta_weight(self.state(), base.weight)

    def state(self) -> DenseUpdate:
        tensors = {role: tensor.detach().clone() for role, tensor in self.named_parameters()}
        return DenseUpdate(self.kind, self.shape, tensors, self.scale)

    @torch.no_grad()
    def load(self, update: DenseUpdate) -> None:
        """Take the tensors into the parameters, which have their roles and shapes."""
        self.scale = float(update.scale)
        for role, parameter in self.named_parameters():
            parameter.copy_(update.tensors[role])

    def load_onto(self, base: BaseLayer, update: DenseUpdate) -> None:
        """Take the tensors of any roles and shapes that make up the weight, as new parameters."""
        self.scale = float(update.scale)
        self._set_tensors(base, dict(update.tensors))

    def _set_tensors(self, base: BaseLayer, tensors: dict[str, Tensor]) -> None:
        device, dtype = base.weight.device, wide_dtype(base.weight.dtype)
        self._parameters.clear()
        for role, tensor in tensors.items():
            own = tensor.detach().to(device, dtype, copy=True)
            self.register_parameter(role, nn.Parameter(own))
