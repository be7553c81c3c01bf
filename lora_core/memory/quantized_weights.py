"""Linear layers whose frozen weight is stored in 8 or 4 bits by torchao, and their sizes in bytes.

    fp8     float8_e4m3, one fp32 scale for each row (output feature)
    int8    whole numbers -128 ... 127, one fp32 scale for each row, symmetric
    int4    the 16 levels of NF4 in 4 bits (QLoRA, arXiv 2305.14314): blocks of 64 numbers with a
            scale each, which are themselves int8 with a scale for up to 256 of them

The weight is unpacked to the model's dtype in each forward and again in each backward, one layer at
a time; activations and gradients are not quantized. torchao's own layers would keep the unpacked
weight for the backward of every layer, which takes the memory that was saved.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_core.errors import UserError

Quantize = Literal["none", "fp8", "int8", "int4"]
NF4_BLOCK = 64  # numbers that share a scale, as in QLoRA
NF4_CHUNK = 2**20  # numbers that torchao compares with the 16 levels at once
NF4_SCALERS = 256  # scales that share a scale, at most: a power of 2 that divides their number


# ---------------------------------------------------------------- sizes


def is_quantizable(shape: Sequence[int], quantize: Quantize) -> bool:
    """Whether a linear layer's weight of this shape can be stored in that form: blocks have to fit,
    and torchao's fp8 takes no matrix of one row or column.
    """
    if quantize == "none" or len(shape) != 2 or min(shape) < 2:
        return False
    return quantize != "int4" or math.prod(shape) % NF4_BLOCK == 0


def stored_bytes(shape: Sequence[int], quantize: Quantize, dtype: torch.dtype) -> int:
    """Bytes of a linear layer's weight [out, in] with its scales, in a model of this dtype.

    The plain size for "none", and for a shape that is not quantizable. torchao is not imported.
    """
    numbers, size = math.prod(shape), dtype.itemsize
    if not is_quantizable(shape, quantize):
        return numbers * size
    if quantize == "fp8":
        return numbers + 4 * shape[0]
    if quantize == "int8":  # torchao stores the zero points too, an int8 for each row
        return numbers + (4 + 1) * shape[0]
    blocks = numbers // NF4_BLOCK
    scalers = blocks // _scaler_block(blocks)
    return numbers // 2 + blocks + (scalers + 1 + 16) * size  # with their mean and the 16 levels


def packing_bytes(numbers: int, quantize: Quantize, dtype: torch.dtype) -> int:
    """Most bytes that live while a weight of so many numbers is packed, with the weight itself; of
    torchao 0.18.
    """
    if quantize == "none":
        return 0
    size = dtype.itemsize
    wide = 4 if size < 4 else 0  # the weight in fp32
    if quantize == "fp8":
        return numbers * (size + wide + 9)
    if quantize == "int8":
        return numbers * (size + 8)
    return numbers * (2 * size + 1) + 32 * size * min(numbers, NF4_CHUNK)


def unpacking_bytes(numbers: int, quantize: Quantize, dtype: torch.dtype) -> int:
    """Most bytes that live while a packed weight of so many numbers is unpacked, with the result
    and without the packed form; of torchao 0.18.
    """
    size = dtype.itemsize
    if quantize == "fp8":
        return numbers * (8 + (size if size < 4 else 0))
    if quantize == "int8":
        return numbers * (4 + size)
    return numbers * (8 + 3 * size) if quantize == "int4" else 0  # with indices of 8 bytes


def _scaler_block(blocks: int) -> int:
    return math.gcd(blocks, NF4_SCALERS)


# ---------------------------------------------------------------- packed weights


@dataclass(frozen=True)
class Packing:
    """The form of a packed weight: all but its tensors, by torch's protocol of tensor classes."""

    kind: Any  # a tensor class of torchao
    context: Any
    names: tuple[str, ...]  # of the tensors that hold the numbers
    shape: torch.Size

    def unpack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weight [out, in] in the model's dtype."""
        stride = (self.shape[1], 1)
        inner = dict(zip(self.names, tensors, strict=True))
        packed = self.kind.__tensor_unflatten__(inner, self.context, self.shape, stride)
        if hasattr(packed, "get_original_weight"):  # NF4: its dequantize takes other arguments
            return packed.get_original_weight()
        return packed.dequantize()


def pack_weight(weight: Tensor, quantize: Quantize) -> tuple[Packing, list[Tensor]]:
    """(form, tensors) of a weight [out, in] in fp32, bf16 or fp16, packed on its device."""
    packed = _torchao_packer(quantize)(weight.detach().contiguous())
    names, context = packed.__tensor_flatten__()
    packing = Packing(type(packed), context, tuple(names), weight.shape)
    return packing, [getattr(packed, name) for name in names]


def check_installed(quantize: Quantize) -> None:
    """Raises UserError where torchao is needed and not installed; does not import it."""
    if quantize != "none" and importlib.util.find_spec("torchao") is None:
        raise UserError(f"--quantize {quantize} needs the package torchao: pip install torchao")


def _torchao_packer(quantize: Quantize) -> Callable[[Tensor], Any]:
    from torchao import quantization  # an extra, and slow to import

    def pack(weight: Tensor) -> Any:
        if quantize == "fp8":
            by_row = quantization.PerRow()
            return quantization.Float8Tensor.from_hp(weight, granularity=by_row)
        if quantize == "int8":
            return quantization.Int8Tensor.from_hp(weight, quantization.PerRow())
        scaler_block = _scaler_block(weight.numel() // NF4_BLOCK)
        return quantization.to_nf4(weight, NF4_BLOCK, scaler_block)

    return pack


# ---------------------------------------------------------------- layers


class QuantizedLinear(nn.Linear):
    """A frozen Linear with a packed weight; `weight` unpacks it each time that it is read.

    The packed tensors are buffers, which move with the model and are never cast. The bias stays as
    it was.
    """

    def __init__(self, linear: nn.Linear, quantize: Quantize) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packing, tensors = pack_weight(linear.weight, quantize)
        for name, tensor in zip(self.packing.names, tensors, strict=True):
            self.register_buffer(f"packed_{name}", tensor)
        self.register_parameter("bias", linear.bias)
        self.training = linear.training

    @property
    def packed(self) -> list[Tensor]:
        """The tensors of the weight, as `packing` names them."""
        return [getattr(self, f"packed_{name}") for name in self.packing.names]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] the weight that the layer computes with, in the model's dtype."""
        return self.packing.unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _PackedLinear.apply(x, self.bias, self.packing, *self.packed)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class _PackedLinear(torch.autograd.Function):
    """x W^T + b, W unpacked anew in the backward: only the packed tensors are kept for it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, packing: Packing, *packed: Tensor
    ) -> Tensor:
        ctx.packing, ctx.dtype = packing, x.dtype
        ctx.save_for_backward(*packed)
        return F.linear(x, packing.unpack(packed), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        d_x = d_bias = None
        packed = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            weight = ctx.packing.unpack(packed).to(dy.dtype)
            d_x = (dy @ weight).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            d_bias = dy.flatten(0, -2).sum(0)
        return d_x, d_bias, None, *(None for _ in packed)
