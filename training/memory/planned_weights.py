"""Bytes of a network's frozen weights on the device: as they are, quantized, or streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.adapted_layer import Adapted, adaptable_layers
from lora_core.config import Config
from lora_core.memory.quantized_weights import packing_bytes, stored_bytes, unpacking_bytes
from lora_core.memory.residency import named_frozen_tensors
from models.placement import LARGE_ENCODER, checkpointed_blocks, parameter_count, quantizable_paths


def component_bytes(
    config: Config, network: nn.Module, *, is_denoiser: bool, works: bool = True
) -> int:
    """Bytes of a network's frozen tensors on the device, while it is there.

    With --quantize of the denoiser, and of a text encoder as large as T5 that does not train. Of a
    streamed denoiser all that is in no block, and while it works two of its largest blocks; of one
    that is divided among processes (--shard) also a share of all blocks.
    """
    sizes = frozen_sizes(network, _form(config, network, is_denoiser=is_denoiser))
    # without checkpointing autograd keeps the blocks' copies
    is_streamed = config.stream and config.gradient_checkpointing != "none"
    is_divided = config.shard and config.processes > 1
    if not is_denoiser or not (is_streamed or is_divided):
        return sum(sizes.values())
    blocks = dict.fromkeys(checkpointed_blocks(network), 0)
    outside = 0
    for path, size in sizes.items():
        inside = [block for block in blocks if path.startswith(f"{block}.")]
        if inside:
            blocks[inside[0]] += size
        else:
            outside += size
    share = 0 if is_streamed else sum(blocks.values()) // config.processes
    return outside + share + (2 * max(blocks.values(), default=0) if works else 0)


def unpacked_bytes(config: Config, network: nn.Module, *, is_denoiser: bool = True) -> int:
    """Bytes of the largest weight that a quantized layer unpacks for a moment, with what torchao
    forms on the way.
    """
    return _largest(unpacking_bytes, config, network, is_denoiser=is_denoiser)


def packed_bytes(config: Config, network: nn.Module, *, is_denoiser: bool = True) -> int:
    """Bytes of the largest weight that is packed on the device, with what torchao forms on the way;
    the network itself is on the host.
    """
    return _largest(packing_bytes, config, network, is_denoiser=is_denoiser)


def _largest(
    count: Callable[[int, Any, torch.dtype], int],
    config: Config,
    network: nn.Module,
    *,
    is_denoiser: bool,
) -> int:
    form = _form(config, network, is_denoiser=is_denoiser)
    found = quantized_weights(network, form).values()
    return max((count(weight.numel(), form, weight.dtype) for weight in found), default=0)


def _form(config: Config, network: nn.Module, *, is_denoiser: bool) -> Any:
    """The form in which a network's linear layers are stored."""
    is_large = parameter_count(network) >= LARGE_ENCODER and not config.trains("text_encoder")
    return config.quantize if is_denoiser or is_large else "none"


def quantized_weights(network: nn.Module, quantize: Any) -> dict[int, Tensor]:
    """Identity of a tensor -> weight of a linear layer that --quantize stores in its form."""
    layers = adaptable_layers(network)
    found = {}
    for path in quantizable_paths(network, quantize) if quantize != "none" else ():
        layer = layers[path]
        base = layer.base if isinstance(layer, Adapted) else layer
        found[id(base.weight)] = base.weight
    return found


def frozen_sizes(network: nn.Module, quantize: Any = "none") -> dict[str, int]:
    """Path of a frozen tensor -> its bytes on the device in a form, each tensor once."""
    packed = quantized_weights(network, quantize)
    sizes = {}
    for path, tensor in named_frozen_tensors(network):
        if id(tensor) in packed:
            sizes[path] = stored_bytes(tensor.shape, quantize, tensor.dtype)
        else:
            sizes[path] = tensor.numel() * tensor.element_size()
    return sizes
