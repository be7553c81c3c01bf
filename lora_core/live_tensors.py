"""Bytes of the tensors that a computation makes, while they live, and the largest sum of them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operators make inside the block, from their birth to their death.

    Works on any device; on "meta" nothing is computed, and a number that is read from a tensor
    is 1. Temporary tensors inside one operator are not seen, but for those that `transient` gives:
    name of an aten operator -> function of its arguments, bytes.
    """

    def __init__(self, transient: dict[str, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.transient = transient or {}
        self.sizes: dict[int, int] = {}  # storage -> bytes
        self.live = 0  # bytes now
        self.peak = 0  # largest `live`, with the transient bytes of an operator
        self.peak_of = ""  # the operator that ran then

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads_meta = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta
        out = 1.0 if reads_meta else func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        aliases = [result.alias_info is not None for result in func._schema.returns]
        if not aliases or not all(aliases):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        more = self.transient[name](*args, **kwargs) if name in self.transient else 0
        if self.live + more > self.peak:
            self.peak, self.peak_of = self.live + more, name
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.live += size
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages of all tensors in a tree."""
    sizes = {}
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def flash_backward_bytes(grad: Tensor, query: Tensor, *_: Any, **__: Any) -> int:
    """Bytes that the backward of flash or memory-efficient attention needs for a moment: the
    gradient of the queries [b, h, s, d] in fp32 and one number a query (arXiv 2205.14135, B.4).
    """
    return 4 * (query.numel() + math.prod(query.shape[:-1]))


ATTENTION_BACKWARD = {
    "_scaled_dot_product_flash_attention_backward": flash_backward_bytes,
    "_scaled_dot_product_efficient_attention_backward": flash_backward_bytes,
}
