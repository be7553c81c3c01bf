"""A limit on the norm of each layer's LoRA update (max-norm regularization)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core.adapters.adapted_layer import Adapted, adapted_layers
from lora_core.adapters.adapter_module import convolution_groups


class LimitedNorms(NamedTuple):
    """What a limit on the updates' norms did: two numbers on the adapters' device."""

    scaled: Tensor  # [] layers that were scaled
    largest: Tensor  # [] float64 norm of the largest update before that


@torch.no_grad()
def limit_update_norms_(
    networks: Iterable[nn.Module], limit: float, *, skip: Tensor | None = None
) -> LimitedNorms:
    """Scale down and up of each LoRA layer whose update has a Frobenius norm above `limit`.

    With n = ||scale up @ down||_F and r = min(n, limit) / n, both factors are multiplied by
    sqrt(r), as by kohya's --scale_weight_norms. The norm is computed in float64 from the Gram
    matrices of the factors, ||B A||^2 = sum(B^T B * A A^T), so that B A is never formed. Changes
    nothing where `skip` [] is not 0. Reads nothing back from the device.
    """
    roots, norms = [], []
    for layers in _layers_by_shape(networks):
        norm = _update_norms(layers)
        root = (limit / norm.clamp(min=limit)).sqrt()
        if skip is not None:
            root = torch.where(skip != 0, torch.ones_like(root), root)
        for layer, own in zip(layers, root):
            adapter = layer.adapter("default")
            for factor in (adapter.down, adapter.up):
                factor.mul_(own.to(factor.dtype))
        roots.append(root)
        norms.append(norm)
    return LimitedNorms((torch.cat(roots) < 1).sum(), torch.cat(norms).max())


@torch.no_grad()
def largest_update_norm(networks: Iterable[nn.Module]) -> Tensor:
    """[] float64 the largest ||scale up @ down||_F of the LoRA layers."""
    return torch.cat([_update_norms(layers) for layers in _layers_by_shape(networks)]).max()


def _layers_by_shape(networks: Iterable[nn.Module]) -> Iterable[list[Adapted]]:
    """The layers of all networks, those with factors of one shape together."""
    found: dict[tuple[int, ...], list[Adapted]] = {}
    for network in networks:
        for layer in adapted_layers(network):
            adapter = layer.adapter("default")
            shape = (convolution_groups(layer.base), *adapter.down.shape, *adapter.up.shape)
            found.setdefault(shape, []).append(layer)
    return found.values()


def _update_norms(layers: Sequence[Adapted]) -> Tensor:
    """[layers] float64 ||scale up @ down||_F of layers with factors of one shape.

    Each group of a grouped convolution has its own ranks, input and output channels.
    """
    groups = convolution_groups(layers[0].base)
    squares = torch.stack([_scaled_grams(layer, groups) for layer in layers])
    return squares.sum(dim=(1, 2, 3)).clamp(min=0).sqrt()


def _scaled_grams(layer: Adapted, groups: int) -> Tensor:
    """[groups, r, r] float64 whose sum is ||scale up @ down||^2."""
    adapter = layer.adapter("default")
    down = adapter.down.double().flatten(1).unflatten(0, (groups, -1))  # [g, r, in]
    up = adapter.up.double().flatten(1).unflatten(0, (groups, -1))  # [g, out, r]
    return adapter.scale**2 * (up.mT @ up) * (down @ down.mT)
