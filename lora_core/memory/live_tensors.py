"""Bytes of the tensors that a computation makes, while they live, and the largest sum of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import chain
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
        self.peak = 0  # largest `live`
        self.peak_inside = 0  # largest `live` with the transient bytes of an operator
        self.shapes = _SHAPES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.shapes.call(func, args, kwargs)
        name = func._schema.name.partition("::")[2]
        aliases = [result.alias_info is not None for result in func._schema.returns]
        if not aliases or not all(aliases):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        more = self.transient[name](*args, **kwargs) if name in self.transient else 0
        self.peak = max(self.peak, self.live)
        self.peak_inside = max(self.peak_inside, self.live + more)
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


class ResultShapes:
    """Results of operators on the meta device, remembered by the shapes of their arguments: torch
    derives them in Python, which takes most of the time of a step there (SDXL: 10 of 13 s).
    """

    def __init__(self) -> None:
        # operator and arguments -> (size, stride, dtype) of each result; None: not to be remembered
        self.known: dict[Any, tuple[Any, ...] | None] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """func(*args, **kwargs); a number that is read from the meta device is 1."""
        schema = func._schema
        if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in _leaves(args)):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if not schema.returns:
            return None  # an operator that only writes: nothing is written here
        if any(result.alias_info is not None for result in schema.returns):
            return func(*args, **kwargs)
        key = _argument_key((func, args, kwargs))
        if key is None:
            return func(*args, **kwargs)
        if key not in self.known:
            out = func(*args, **kwargs)
            self.known[key] = _result_shapes(out, args)
            return out
        shapes = self.known[key]
        if shapes is None:
            return func(*args, **kwargs)
        made = [
            own and torch.empty_strided(*own[:2], dtype=own[2], device="meta") for own in shapes
        ]
        return made[0] if len(schema.returns) == 1 else tuple(made)


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _argument_key(value: Any) -> Any:
    """A hashable form of arguments, tensors by their shapes; None for what has none."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        parts = [_argument_key(part) for part in value]
        missing = [part is None and own is not None for part, own in zip(parts, value)]
        return None if any(missing) else (len(parts), *parts)
    if isinstance(value, dict):
        return _argument_key(list(chain.from_iterable(sorted(value.items()))))
    try:
        hash(value)
    except TypeError:
        return None
    return type(value), value


def _result_shapes(out: Any, args: Any) -> tuple[Any, ...] | None:
    """(size, stride, dtype) of each result, None for one that is missing; None where a result is
    no new tensor of its own on the meta device.
    """
    results = out if isinstance(out, tuple) else (out,)
    given = [leaf.untyped_storage()._cdata for leaf in _leaves(args) if isinstance(leaf, Tensor)]
    found: list[Any] = []
    for result in results:
        if result is None:
            found.append(None)
        elif (
            not isinstance(result, Tensor)
            or not result.is_meta
            or result.untyped_storage()._cdata in given
        ):
            return None
        else:
            found.append((tuple(result.shape), result.stride(), result.dtype))
    return tuple(found)


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages of all tensors in a tree."""
    sizes = {}
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


_SHAPES = ResultShapes()  # of this process: the shapes depend on nothing else
