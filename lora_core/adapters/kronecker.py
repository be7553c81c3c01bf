"""LoKr: the update of a layer as a Kronecker product (KronA, arXiv 2212.10650; LyCORIS)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.adapters.adapter_module import (
    BaseLayer,
    LayerSpec,
    apply_layer,
    convolution_groups,
    initial_generator,
)
from lora_core.adapters.product_adapter import ProductAdapter
from lora_core.adapters.weight_updates import kronecker_product, multiply_pair
from lora_core.settings import KIND_OPTIONS


class LoKr(ProductAdapter):
    """delta W = scale * kron(w1, w2), w1 [o1, i1] and w2 [o2, i2 (, kh, kw)].

    o1 o2 = out and i1 i2 = in as `factorize` divides them. A rank below half of w2's larger side
    makes w2 a product w2_a w2_b of that rank; from there on w2 is whole and the scale is 1, as in
    LyCORIS. w1 is always whole in training; a file's w1_a w1_b and Tucker core w2 act too.

    The update of a layer with one group is applied without the product: with x as [i1, i2] it is
    w1 x w2^T, (o2 i2 i1 + o1 i1 o2) multiplications instead of o1 o2 i1 i2. A grouped convolution
    takes the product.

    At first w1 ~ U(+-1 / sqrt(i1)), w2_a ~ U(+-1 / sqrt(rank)), and w2_b or w2 is zero (LyCORIS).
    """

    kind = "LoKr"
    options = KIND_OPTIONS["lokr"]

    def initial_tensors(self, base: BaseLayer, spec: LayerSpec) -> dict[str, Tensor]:
        out, inner, *kernel = base.weight.shape
        (o1, o2), (i1, i2) = factorize(out, spec.factor), factorize(inner, spec.factor)
        tensors = {"lokr_w1": _kaiming_uniform(spec, "lokr_w1", o1, i1)}
        if spec.rank >= max(o2, i2) / 2:
            self.scale = 1.0
            return tensors | {"lokr_w2": torch.zeros(o2, i2, *kernel)}
        fan_in = i2 * math.prod(kernel)
        return tensors | {
            "lokr_w2_a": _kaiming_uniform(spec, "lokr_w2_a", o2, spec.rank),
            "lokr_w2_b": torch.zeros(spec.rank, fan_in),
        }

    @property
    def is_whole(self) -> bool:
        """Whether w2 is one tensor, without a rank."""
        return "lokr_w2" in self._parameters

    def product(self) -> Tensor:
        return kronecker_product(dict(self.named_parameters()))

    def branch(self, base: BaseLayer, x: Tensor, scale: float) -> Tensor:
        if convolution_groups(base) > 1:
            delta = scale * self.product().view(self.shape)
            return apply_layer(base, x, delta.to(x.dtype), None)
        w1, *w2 = self._factors(base, x.dtype, scale)
        if isinstance(base, nn.Linear):
            return _apply_linear(x, w1, w2)
        return _apply_convolution(base, x, w1, w2)

    def _factors(self, base: BaseLayer, dtype: torch.dtype, scale: float) -> list[Tensor]:
        """scale * w1, and w2 as one tensor [o2, i2 (, kh, kw)] or as w2_b [r, i2 (...)], w2_a."""
        own: dict[str, Tensor] = dict(self.named_parameters())
        if "lokr_w1" in own:
            w1 = own["lokr_w1"]
        else:
            w1 = multiply_pair(own["lokr_w1_a"], own["lokr_w1_b"])
        shape = self.shape[1] // w1.shape[1], *self.shape[2:]
        if "lokr_w2" in own:
            w2 = [own["lokr_w2"].reshape(-1, *shape)]
        elif "lokr_t2" in own:
            core = own["lokr_w2_a"], own["lokr_w2_b"], own["lokr_t2"]
            w2 = [multiply_pair(*core).reshape(-1, *shape)]
        else:
            w2 = [own["lokr_w2_b"].reshape(-1, *shape), own["lokr_w2_a"]]
        return [tensor.to(dtype) for tensor in (scale * w1, *w2)]


def factorize(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m n = size and m <= n, as LyCORIS divides a layer's inputs and outputs.

    A factor that divides the size is one of them. Otherwise m is the largest divisor that is at
    most the factor and the root of the size; a factor of -1 sets no limit.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    best = 1
    for m in range(2, math.isqrt(size) + 1):
        if m <= limit and size % m == 0:
            best = m
    return best, size // best


def _apply_linear(x: Tensor, w1: Tensor, w2: list[Tensor]) -> Tensor:
    """kron(w1, w2) x for x [..., in]: w1 X w2^T with X [..., i1, i2]."""
    hidden = F.linear(x.unflatten(-1, (w1.shape[1], -1)), w2[0])  # [..., i1, o2 or r]
    hidden = F.linear(hidden.transpose(-1, -2), w1).transpose(-1, -2)  # [..., o1, o2 or r]
    for left in w2[1:]:
        hidden = F.linear(hidden, left)
    return hidden.flatten(-2)


def _apply_convolution(base: nn.Conv2d, x: Tensor, w1: Tensor, w2: list[Tensor]) -> Tensor:
    """The convolution by w2 of each of i1 parts of the channels, then w1 over the parts."""
    b, _, *size = x.shape
    hidden = base._conv_forward(x.reshape(b * w1.shape[1], -1, *size), w2[0], None)
    size = list(hidden.shape[2:])
    hidden = w1 @ hidden.reshape(b, w1.shape[1], -1)  # [b, o1, (o2 or r) h w]
    hidden = hidden.reshape(b * len(w1), -1, *size)
    for left in w2[1:]:
        hidden = F.conv2d(hidden, left[:, :, None, None])
    return hidden.reshape(b, -1, *size)


def _kaiming_uniform(spec: LayerSpec, role: str, rows: int, columns: int) -> Tensor:
    """[rows, columns] of U(+-1 / sqrt(columns)), by (seed, path, role) only."""
    if spec.init == "zero":
        return torch.zeros(rows, columns)
    generator = initial_generator(spec, role)
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
