"""Tensors in nested lists, tuples, mappings and dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tree_tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples, mappings and dataclasses, in order."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(tree, keep)
    return found


def map_tensors(tree: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with fn(t) for every tensor t."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, fn) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[map_tensors(value, fn) for value in tree])
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, fn) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: map_tensors(getattr(tree, f.name), fn) for f in fields(tree)}
        return type(tree)(**values)
    return tree
