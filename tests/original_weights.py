"""Weights of a transformer as the original code stores them, made by our names for its layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.formats.layout import layout_of


def module_paths(network: nn.Module) -> list[str]:
    """The paths of all layers and norms of a network."""
    return layout_of({"transformer": network}).components["transformer"].modules


def fill_randomly(network: nn.Module) -> nn.Module:
    """The network with random parameters, so that no two are equal."""
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def original_weights(
    weights: Mapping[str, Tensor], fields: Mapping[str, Any], norm: str = "weight"
) -> dict[str, Tensor]:
    """A state dict under original names: joined, and swapped where the original's halves are.

    `norm` is the original code's name of the weight of a norm.
    """
    found = {}
    for path, name in fields["names"].items():
        for end in ("weight", "bias"):
            if (tensor := weights.get(f"{path}.{end}")) is not None:
                if path in fields["swapped"]:
                    tensor = tensor.roll(len(tensor) // 2, 0)
                found[f"{name}.{norm if '.norm_' in path else end}"] = tensor
    for name, parts in fields["fused"].items():
        for end in ("weight", "bias"):
            if f"{parts[0]}.{end}" in weights:
                found[f"{name}.{end}"] = torch.cat([weights[f"{part}.{end}"] for part in parts])
    return found


def assert_stored_once(paths: list[str], fields: Mapping[str, Any]) -> None:
    """Every path has one name or is part of one joined layer, and no two have the same name."""
    joined = []
    for parts in fields["fused"].values():
        joined += parts
    names = fields["names"]
    assert sorted([*joined, *names]) == sorted(paths)
    assert len(set(names.values()) | fields["fused"].keys()) == len(names) + len(fields["fused"])
    assert fields["swapped"] <= set(paths)
