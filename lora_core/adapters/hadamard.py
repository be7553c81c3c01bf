"""LoHa: the update of a layer as an elementwise product of two products (arXiv 2108.06098)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter_module import (
    BaseLayer,
    LayerSpec,
    apply_layer,
    convolution_groups,
    initial_generator,
    is_plain_layer,
)
from lora_core.adapters.product_adapter import ProductAdapter
from lora_core.adapters.weight_updates import hadamard_product
from lora_core.errors import UserError
from lora_core.kernels import call
from lora_core.kernels.reference import wide_dtype
from lora_core.settings import KIND_OPTIONS


class LoHa(ProductAdapter):
    """delta W = scale * (w1_a w1_b) o (w2_a w2_b), w_a [out, r] and w_b [r, in (kh kw)].

    Of rank r^2 at most: with up[o, rs] = w1_a[o, r] w2_a[o, s] and down[rs, i] = w1_b[r, i]
    w2_b[s, i] it is up @ down. The forward takes these two where they are smaller than delta W;
    otherwise, and for a grouped convolution or a file's Tucker cores, delta W itself, added to a
    base weight of fp32 and applied apart from one of half precision.

    At first w1_b and w2_b ~ N(0, 1), w1_a ~ N(0, 0.1^2), and w2_a is zero (LyCORIS).
    """

    kind = "LoHa"
    options = KIND_OPTIONS["loha"]
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def initial_tensors(self, base: BaseLayer, spec: LayerSpec) -> dict[str, Tensor]:
        out, fan_in, rank = len(base.weight), math.prod(base.weight.shape[1:]), spec.rank
        if rank > min(out, fan_in):
            raise UserError(
                f"rank {rank} exceeds min(out, in) = {min(out, fan_in)} for {spec.path}; "
                "lower --adapter.rank or narrow --adapter.targets"
            )
        return {
            "hada_w1_a": _normal(spec, "hada_w1_a", out, rank) * 0.1,
            "hada_w1_b": _normal(spec, "hada_w1_b", rank, fan_in),
            "hada_w2_a": torch.zeros(out, rank),
            "hada_w2_b": _normal(spec, "hada_w2_b", rank, fan_in),
        }

    def product(self) -> Tensor:
        return hadamard_product(dict(self.named_parameters()))

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        if self._is_small(base) or self._drops_in_training() or not _adds_exactly(base, x):
            return super().forward(base, x, strength)
        weight = base.weight + self._delta(base, self.scale * strength)
        return apply_layer(base, x, weight, base.bias)

    def branch(self, base: BaseLayer, x: Tensor, scale: float) -> Tensor:
        if not self._is_small(base):
            return apply_layer(base, x, self._delta(base, scale).to(x.dtype), None)
        down, up = self._low_rank_factors(base)
        if isinstance(base, nn.Linear):
            return call("lora_linear", x, None, None, down, up, scale)
        hidden = apply_layer(base, x, down.to(x.dtype), None)
        return nn.functional.conv2d(hidden, (scale * up).to(x.dtype))

    def _delta(self, base: BaseLayer, scale: float) -> Tensor:
        return scale * self.product().view(self.shape)

    def _is_small(self, base: BaseLayer) -> bool:
        """Whether down and up have fewer numbers than delta W."""
        if convolution_groups(base) > 1 or "hada_t1" in self._parameters:
            return False
        out, fan_in = self.shape[0], math.prod(self.shape[1:])
        count = len(self.hada_w1_b) * len(self.hada_w2_b)
        return count * (out + fan_in) < out * fan_in

    def _low_rank_factors(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """down [r r, in (, kh, kw)] and up [out, r r (, 1, 1)]."""
        out, *inner = self.shape
        first, second = self.hada_w1_b.flatten(1), self.hada_w2_b.flatten(1)
        down = (first[:, None] * second).reshape(-1, *inner)
        up = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)
        return down, up.reshape(out, -1, *[1] * (len(inner) - 1))


def _adds_exactly(base: BaseLayer, x: Tensor) -> bool:
    """Whether W + delta W is applied without rounding it to half precision.

    Then one operation with the sum replaces two with its parts.
    """
    if not is_plain_layer(base) or torch.is_autocast_enabled(x.device.type):
        return False
    return base.weight.dtype == wide_dtype(base.weight.dtype) == x.dtype


def _normal(spec: LayerSpec, role: str, rows: int, columns: int) -> Tensor:
    """[rows, columns] of N(0, 1), by (seed, path, role) only."""
    if spec.init == "zero":
        return torch.zeros(rows, columns)
    return torch.randn(rows, columns, generator=initial_generator(spec, role))
