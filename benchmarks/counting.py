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

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
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
