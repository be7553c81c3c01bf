"""Tensors that autograd saves for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


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
    known = set()
    for leaf in tree_leaves(excluded):
        if isinstance(leaf, Tensor):
            known.add(leaf.untyped_storage()._cdata)
    kept.tensors = [tensor for key, tensor in found.items() if key not in known]
