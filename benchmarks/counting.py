"""Counter of a computation's aten calls, the bytes they read and write, and saved activations.

Exact, and without a GPU:

    parameters = list(model.parameters())
    with Counter() as counter, saved_activations(parameters) as kept, as_cuda():
        out = model(x)
    kept.bytes; counter.tally.ops; counter.tally.elementwise

The convention, for tensors on any device (on "meta" nothing is computed):
- An op is one call of an aten operator by autograd or Python. Some are several kernels on a GPU
  (group norm, split-K products); they are one here, for every contender. A custom op `lora_core::*`
  counts the launches and bytes that `kernels.COSTS` declares for its arguments; one without a
  declaration is an error.
- Not counted: views (operators whose results alias an argument), FREE (allocations without a fill
  and metadata) and calls whose tensors are all empty. Zeros, fills, casts and copies are counted.
- Waits of the host for the device (SYNCS on a tensor that is not on the CPU) are counted
  separately, not as ops. A tensor without memory returns 1.
- Bytes: every distinct tensor argument once for the read, every result and every argument that is
  written once for the write; elements that broadcasting repeats (stride 0) once. OVERWRITES do not
  read what they write, SHAPED read a shape only. Caches are not modeled.
- Each operator has a class: product, convolution, attention; all others, also normalizations and
  reductions, are elementwise.
- Saved: the distinct storages that autograd keeps for backward, custom Functions included, without
  parameters and inputs.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_core import kernels

FREE = frozenset(
    {
        "empty",
        "empty_like",
        "empty_strided",
        "empty_permuted",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
        "set_",
        "resize_",
        "sym_size",
        "sym_numel",
        "sym_stride",
        "is_same_size",
        "_has_same_storage_numel",
    }
)
SYNCS = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"})
OVERWRITES = frozenset(
    {
        "copy_",
        "fill_",
        "zero_",
        "normal_",
        "uniform_",
        "random_",
        "bernoulli_",
        "_foreach_copy_",
        "_foreach_zero_",
    }
)
SHAPED = frozenset(
    {
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_full",
    }
)
PRODUCTS = frozenset(
    {
        "mm",
        "addmm",
        "addmm_",
        "bmm",
        "baddbmm",
        "baddbmm_",
        "mv",
        "addmv",
        "dot",
        "_addmm_activation",
        "_scaled_mm",
        "linear",
    }
)
CONVOLUTIONS = frozenset({"convolution", "convolution_backward", "_convolution", "conv2d"})


@dataclass
class OperatorCount:
    """Calls and bytes of one operator."""

    ops: int = 0
    bytes: int = 0


def _counts() -> dict[str, OperatorCount]:
    return defaultdict(OperatorCount)


@dataclass
class Tally:
    """Sums by class (product, convolution, attention, elementwise) and by operator."""

    classes: dict[str, OperatorCount] = field(default_factory=_counts)
    operators: dict[str, OperatorCount] = field(default_factory=_counts)
    syncs: int = 0

    @property
    def ops(self) -> int:
        return sum(count.ops for count in self.classes.values())

    @property
    def bytes(self) -> int:
        return sum(count.bytes for count in self.classes.values())

    @property
    def elementwise(self) -> int:
        """Bytes of everything but matrix products, convolutions and attention."""
        return self.classes["elementwise"].bytes

    def add(self, name: str, kind: str, ops: int, size: int) -> None:
        for count in (self.classes[kind], self.operators[name]):
            count.ops += ops
            count.bytes += size


class Counter(TorchDispatchMode):
    """Counts the operators that run inside the block; further blocks add to the counts.

    Calls inside a custom op are not counted: the op declares its cost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads_meta = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta
        out = 1.0 if reads_meta else func(*args, **kwargs)
        self.count(func, args, kwargs, out)
        return out

    def count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Add one call to the tally."""
        whole_name = func._schema.name
        space, _, name = whole_name.partition("::")
        if space == "lora_core":
            cost = kernels.COSTS.get(whole_name)
            if cost is None:
                raise LookupError(
                    f"{whole_name} declares no cost; "
                    "add an entry to kernels.COSTS next to its kernel"
                )
            launches, size, product = cost(*args, **kwargs)
            self.tally.add(whole_name, "product" if product else "elementwise", launches, size)
            return
        if name in SYNCS:
            self.tally.syncs += any(t.device.type != "cpu" for t in _tensors(args))
            return
        if name in FREE or is_view(func):
            return
        if any(t.numel() for t in _tensors((args, kwargs, out))):
            self.tally.add(name, operator_class(name), 1, traffic_bytes(func, args, kwargs, out))


def is_view(func: Any) -> bool:
    """Whether every result aliases an argument that the call does not write."""
    infos = [result.alias_info for result in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def operator_class(name: str) -> str:
    """ "product", "convolution", "attention" or "elementwise"."""
    if name in PRODUCTS:
        return "product"
    if name in CONVOLUTIONS:
        return "convolution"
    return "attention" if name.startswith("_scaled_dot_product") else "elementwise"


def traffic_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that one call reads and writes."""
    read: dict[Any, int] = {}
    written: dict[Any, int] = {}
    name = func._schema.name.partition("::")[2]
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            if writes:
                written[_place(tensor)] = touched_bytes(tensor)
            if name not in SHAPED and not (writes and (argument.is_out or name in OVERWRITES)):
                read[_place(tensor)] = touched_bytes(tensor)
    for tensor in _tensors(out):
        written[_place(tensor)] = touched_bytes(tensor)
    return sum(read.values()) + sum(written.values())


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor without the elements that an expanded axis repeats."""
    size = tensor.element_size()
    for n, stride in zip(tensor.shape, tensor.stride()):
        size *= 1 if stride == 0 and n else n
    return size


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


# ---------------------------------------------------------------- saved activations


class _Held:
    """A saved tensor, owned by autograd's node and freed with it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass
class SavedActivations:
    """The distinct storages that autograd still held at the end of a `saved_activations` block.

    Each is represented by one of its tensors.
    """

    tensors: list[Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)


@contextmanager
def saved_activations(*excluded: Any) -> Iterator[SavedActivations]:
    """The tensors that autograd saved inside the block and still holds at its end.

    The storages of `excluded` (parameters, inputs) are left out.
    """
    kept, held = SavedActivations(), weakref.WeakSet[_Held]()

    def pack(tensor: Tensor) -> _Held:
        one = _Held(tensor)
        held.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        yield kept
    found = {one.tensor.untyped_storage()._cdata: one.tensor for one in held}
    known = {tensor.untyped_storage()._cdata for tensor in _tensors(excluded)}
    kept.tensors = [tensor for key, tensor in found.items() if key not in known]


# ---------------------------------------------------------------- composite operators of a GPU


@contextmanager
def as_cuda() -> Iterator[None]:
    """Inside the block attention and RMS norm are one op forward and one backward, as on CUDA.

    The CPU and the meta device decompose them. Attention is flash attention (memory-efficient for
    fp32 or with a mask): whichever kernel a GPU chooses saves the same tensors. torch has no
    autocast on the meta device and raises where CUDA reports "off"; inside the block the meta
    device reports that too.
    """
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def autocast_or_nothing(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type == "meta" and kwargs.get("enabled") is False:
            return nullcontext()
        return autocast(device_type, *args, **kwargs)

    def is_enabled(*device_type: str) -> bool:
        return device_type != ("meta",) and enabled(*device_type)

    with (
        _AsCuda(),
        patch.object(torch, "autocast", autocast_or_nothing),
        patch.object(torch, "is_autocast_enabled", is_enabled),
    ):
        yield


class _AsCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm):
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert not enable_gqa
    tensors = query, key, value
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*tensors, dropout_p, is_causal, scale=scale)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(*tensors, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    assert weight is not None and len(normalized_shape) == 1 and not weight.requires_grad
    return _RMSNorm.apply(x, weight, eps or torch.finfo(x.dtype).eps)


class _RMSNorm(torch.autograd.Function):
    """aten._fused_rms_norm and its backward, which exist on CUDA alone, with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.benchmarks.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.benchmarks.rms_norm_backward(dy, *ctx.saved_tensors), None, None


@torch.library.custom_op("benchmarks::rms_norm", mutates_args=())
def _rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x.float() * rstd * weight.float()).to(x.dtype), rstd


@torch.library.custom_op("benchmarks::rms_norm_backward", mutates_args=())
def _rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    normal, slope = x.float() * rstd, dy.float() * weight.float()
    return ((slope - normal * (slope * normal).mean(-1, keepdim=True)) * rstd).to(x.dtype)


@_rms_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_rms_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x)
