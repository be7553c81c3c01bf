"""Kinds of adapter that files have and runs do not train: DoRA by columns, whole updates.

They act on a model as those of kinds.py do, and are made by `injection.load_factors`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter_module import BaseLayer, LayerSpec, apply_layer, convolution_groups
from lora_core.adapters.hadamard import LoHa
from lora_core.adapters.kinds import DoRA, FullUpdate, LoRA
from lora_core.adapters.kronecker import LoKr
from lora_core.adapters.product_adapter import ProductAdapter
from lora_core.adapters.weight_updates import (
    DenseUpdate,
    LayerUpdate,
    LowRank,
    column_gain,
    delta_weight,
)
from lora_core.errors import UserError
from lora_core.kernels.reference import wide_dtype


class ColumnDoRA(LoRA):
    """W' = (W + scale * up @ down) m / n, n the column norms of the bracket (older LyCORIS).

    With g = m / n the layer's inputs are multiplied by g, so that W' is never formed:
    (W' - W) x = W ((g - 1) x) + scale * up(down(g x)). g is computed once, of the base weight at
    the time of loading.
    """

    gain: Tensor  # [1, in] or [1, in / groups, 1, 1]
    magnitude: Tensor  # of that shape

    def __init__(self, base: BaseLayer, spec: LayerSpec) -> None:
        super().__init__(base, spec)
        if not base.weight.is_floating_point():
            raise UserError(
                f"{spec.path} stores its weight as {base.weight.dtype}, whose columns have no "
                "norms for a DoRA; load the model in fp32 or bf16"
            )
        shape = (1, base.weight.shape[1], *[1] * (base.weight.ndim - 2))
        ones = torch.ones(shape, dtype=wide_dtype(base.weight.dtype), device=base.weight.device)
        self.register_buffer("magnitude", ones)
        self.register_buffer("gain", ones.clone())

    @torch.no_grad()
    def load_onto(self, base: BaseLayer, lr: LowRank) -> None:
        """Take the factors and the magnitude, for this base weight."""
        assert lr.magnitude is not None
        self.load(lr)
        self.magnitude.copy_(lr.magnitude.reshape(self.magnitude.shape))
        self.gain.copy_(column_gain(self.state(), base.weight))

    def state(self) -> LowRank:
        return super().state()._replace(magnitude=self.magnitude.detach().clone())

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        y0 = base(x)
        return y0 + self.update(base, x, y0, strength).to(y0.dtype)

    def fits_lora_linear(self, base: BaseLayer, strength: float) -> bool:
        return False

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        gain = self.gain.flatten().repeat(convolution_groups(base))
        if isinstance(base, nn.Conv2d):
            gain = gain.view(-1, 1, 1)
        changed = ((gain - 1) * x).to(x.dtype)
        scaled = (gain * x).to(x.dtype)
        moved = apply_layer(base, changed, base.weight, None)
        return strength * (moved.to(gain.dtype) + self._branch(base, scaled, self.scale))


class LycorisUpdate(FullUpdate):
    """W' = W + delta W, computed when loaded.

    For LyCORIS' full updates, for LoHa and LoKr with a DoRA's magnitude, and for parts of these.
    """

    def __init__(self, base: BaseLayer, spec: LayerSpec) -> None:
        super().__init__(base, spec)
        self.bias = None

    @torch.no_grad()
    def load_onto(self, base: BaseLayer, update: DenseUpdate) -> None:
        """Take the update, for this base weight."""
        weight = base.weight.detach().to("cpu", self.weight.dtype).reshape(update.shape)
        self.weight.copy_(delta_weight(update, weight).reshape(self.weight.shape))


PRODUCT_KINDS: dict[str, type[ProductAdapter]] = {"LoKr": LoKr, "LoHa": LoHa}


def kind_of_update(update: LayerUpdate) -> type[LoRA] | type[LycorisUpdate] | type[ProductAdapter]:
    """The class of adapter that applies an update of a file."""
    if isinstance(update, DenseUpdate):
        is_plain = update.is_whole and update.magnitude is None
        return PRODUCT_KINDS.get(update.kind, LycorisUpdate) if is_plain else LycorisUpdate
    if update.magnitude is None:
        return LoRA
    return DoRA if update.magnitude.ndim == 1 else ColumnDoRA
