"""Tensors that consist of other tensors, such as torchao's 8-bit optimizer state: their parts, by
which a checkpoint holds them, and an optimizer's state from parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class TensorParts(dict[str, Any]):
    """Name -> part of a tensor in a saved state: a tensor, or the parts of one.

    It does not say which class they are of: a file's word for a class is not taken.
    """


def split_tensor(tensor: Tensor) -> TensorParts | None:
    """The parts of a tensor that consists of others; None for any other tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return None
    names, _ = tensor.__tensor_flatten__()
    return TensorParts({name: getattr(tensor, name) for name in names})


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor consists of, at last; one that consists of no others alone."""
    parts = split_tensor(tensor)
    if parts is None:
        return [tensor]
    found: list[Tensor] = []
    for part in parts.values():
        if isinstance(part, Tensor):  # a DTensor also has the processes that it is divided among
            found += plain_tensors(part)
    return found


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)`, where `state` may hold TensorParts.

    An optimizer makes its state in its first step, and only it knows the classes in it. So for
    parts it takes a step with gradients of zero, after which its parameters are put back, and the
    parts are copied into the state that this made. Raises ValueError where they do not fit.
    """
    if any(isinstance(node, TensorParts) for node in _nodes(state)):
        _make_state(optimizer, state)
        state = _fill(optimizer.state_dict(), state, "the state")
    optimizer.load_state_dict(state)


def _make_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """A step with gradients of zero for the parameters of which a state is saved."""
    params: list[Tensor] = []
    for group in optimizer.param_groups:
        params += group["params"]
    before = [(p, p.detach().clone(), p.grad) for p in params]
    devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():  # for rounding at random
        for i, p in enumerate(params):
            p.grad = torch.zeros_like(p) if i in saved["state"] else None
        optimizer.step()
        for p, values, gradient in before:
            p.copy_(values)
            p.grad = gradient


def _fill(made: Any, saved: Any, place: str) -> Any:
    """`saved`, with the tensors of `made` in place of parts, which are copied into them."""
    if isinstance(saved, TensorParts):
        own = split_tensor(made) if isinstance(made, Tensor) else None
        if own is None or own.keys() != saved.keys():
            raise ValueError(f"{place} has the parts {', '.join(saved)}, and the optimizer none")
        for name, part in saved.items():
            _fill_part(own[name], part, f"{place}/{name}")
        return made
    if isinstance(saved, Mapping):
        table = made if isinstance(made, Mapping) else {}
        return {key: _fill(table.get(key), saved[key], f"{place}/{key}") for key in saved}
    if isinstance(saved, (list, tuple)):
        items = made if isinstance(made, (list, tuple)) and len(made) == len(saved) else saved
        filled = [_fill(item, own, place) for item, own in zip(items, saved)]
        return filled if isinstance(saved, list) else tuple(filled)
    return saved


def _fill_part(own: Tensor, saved: Any, place: str) -> None:
    if isinstance(saved, TensorParts):
        _fill(own, saved, place)
        return
    if own.shape != saved.shape or own.dtype != saved.dtype:
        found, wanted = (f"{t.dtype} {list(t.shape)}" for t in (saved, own))
        raise ValueError(f"{place} is {found}, expected {wanted}")
    with torch.no_grad():
        own.copy_(saved)


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _nodes(value)
