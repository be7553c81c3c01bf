"""Vectors added to norms and biases of networks in memory, by name, at a strength, and taken off.

A parameter keeps a copy of its original values while something is added to it: changes of several
names add up against that copy, and when the last is taken off, the parameter has its original bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_core.errors import UserError

RECORDS = "changed_parameters"  # attribute of a module: name of its parameter -> ChangedParameter


@dataclass
class ChangedParameter:
    """A parameter's original values and the vectors that are added to them."""

    original: Tensor
    changes: dict[str, Tensor] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)

    def total(self) -> Tensor:
        """The original plus strength times every change, in fp32 or better, rounded once."""
        exact = self.original.to(torch.promote_types(self.original.dtype, torch.float32))
        for name, change in self.changes.items():
            exact = exact + self.strengths[name] * change.to(exact)
        return exact.to(self.original.dtype)


def add_changes(
    network: nn.Module, changes: Mapping[str, Tensor], name: str, strength: float
) -> None:
    """Adds strength * change to each parameter of the network, in place, under one name.

    Raises UserError, before anything is changed, for a parameter that the network lacks and for
    another length.
    """
    owners = {path: _owner(network, path) for path in changes}
    for path, (module, leaf) in owners.items():
        parameter = module._parameters.get(leaf)
        if parameter is None or parameter.shape != changes[path].shape:
            has = "no such parameter" if parameter is None else f"{list(parameter.shape)} there"
            raise UserError(
                f"{path} has a change {list(changes[path].shape)}, and the network has {has}; "
                "is it for another model?"
            )
    for path, (module, leaf) in owners.items():
        records = module.__dict__.setdefault(RECORDS, {})
        parameter = module._parameters[leaf]
        assert parameter is not None
        record = records.setdefault(leaf, ChangedParameter(parameter.detach().clone()))
        record.changes[name] = changes[path].detach()
        record.strengths[name] = strength
        _write_values(module, leaf, record.total())


def set_change_strength(network: nn.Module, name: str, strength: float) -> None:
    """Changes the strength of all changes of one name."""
    for module in network.modules():
        for leaf, record in module.__dict__.get(RECORDS, {}).items():
            if name in record.changes:
                record.strengths[name] = strength
                _write_values(module, leaf, record.total())


def remove_changes(network: nn.Module, name: str) -> None:
    """Takes the changes of one name off; without others a parameter has its original bits."""
    for module in network.modules():
        records = module.__dict__.get(RECORDS, {})
        for leaf, record in list(records.items()):
            if record.changes.pop(name, None) is not None:
                del record.strengths[name]
                _write_values(module, leaf, record.total() if record.changes else record.original)
            if not record.changes:
                del records[leaf]
        if RECORDS in module.__dict__ and not records:
            delattr(module, RECORDS)


def names_of_changes(network: nn.Module) -> set[str]:
    """The names under which something is added to the network's parameters."""
    names: set[str] = set()
    for module in network.modules():
        for record in module.__dict__.get(RECORDS, {}).values():
            names.update(record.changes)
    return names


def _owner(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and its name there; an adapted layer's is its base."""
    where, _, leaf = path.rpartition(".")
    try:
        module = network.get_submodule(where)
    except AttributeError:
        return nn.Module(), leaf  # has no parameter: refused by the caller
    return getattr(module, "base", module), leaf


@torch.no_grad()
def _write_values(module: nn.Module, leaf: str, values: Tensor) -> None:
    parameter = module._parameters[leaf]
    assert parameter is not None
    parameter.copy_(values)
