"""Bytes of a network's frozen weights on the device: as they are, quantized, or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lora_core import tokens
from lora_core.adapters.adapted_layer import Adapted, adapted_layers
from lora_core.config import Config
from lora_core.quantized_weights import is_quantizable, stored_bytes

LARGE_ENCODER = 10**9  # parameters of a text encoder that is quantized too: T5, not CLIP
RESNET_BLOCKS = ("ResnetBlock2D",)  # of UNets, beside the blocks that diffusers names


def component_bytes(config: Config, network: nn.Module, *, is_denoiser: bool) -> int:
    """Bytes of a network's frozen tensors on the device, while it works there.

    With --quantize of the denoiser, and of a text encoder as large as T5 that does not train; with
    --stream all of the denoiser that is in no block, and two of its largest blocks.
    """
    trains = config.trains("text_encoder") or config.trains("tokens")
    is_quantized = is_denoiser or (_count(network) >= LARGE_ENCODER and not trains)
    sizes = _tensor_sizes(network, config.quantize if is_quantized else "none")
    if not (is_denoiser and config.stream and config.gradient_checkpointing != "none"):
        return sum(sizes.values())  # without checkpointing autograd keeps the blocks' copies
    blocks = dict.fromkeys(checkpointed_blocks(network), 0)
    outside = 0
    for path, size in sizes.items():
        inside = [block for block in blocks if path.startswith(f"{block}.")]
        if inside:
            blocks[inside[0]] += size
        else:
            outside += size
    return outside + 2 * max(blocks.values(), default=0)


def unpacked_bytes(config: Config, network: nn.Module) -> int:
    """Bytes of the largest weight that a quantized layer unpacks for a moment, with the fp32
    numbers that torchao forms first.
    """
    largest = 0
    for layer in quantized_layers(network, config.quantize).values():
        largest = max(largest, layer.weight.numel() * (4 + layer.weight.element_size()))
    return largest


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _tensor_sizes(network: nn.Module, quantize: Any) -> dict[str, int]:
    """Path of a frozen tensor -> its bytes on the device, each storage once."""
    packed = {id(layer.weight) for layer in quantized_layers(network, quantize).values()}
    sizes = {}
    for path, tensor in frozen_tensors(network):
        if id(tensor) in packed:
            sizes[path] = stored_bytes(tensor.shape, quantize, tensor.dtype)
        else:
            sizes[path] = tensor.numel() * tensor.element_size()
    return sizes


def frozen_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of the parameters and buffers, each once, without adapters and token rows."""
    ours: set[int] = set()
    for layer in adapted_layers(network):
        for adapter in layer.adapters.values():
            ours.update(map(id, adapter.modules()))
    seen: set[int] = set()
    for path, module in network.named_modules():
        if id(module) in ours or isinstance(module, tokens.LearnedEmbedding):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}", tensor


def quantized_layers(network: nn.Module, quantize: Any) -> dict[str, nn.Linear]:
    """Path -> linear layer of the network's repeated blocks whose weight can be quantized."""
    blocks = tuple(f"{path}." for path in repeated_blocks(network))
    found = {}
    for path, module in network.named_modules():
        base = module.base if isinstance(module, Adapted) else module
        if type(base) is nn.Linear and path.startswith(blocks) and not path.endswith(".base"):
            if is_quantizable(base.weight.shape, quantize):
                found[path] = base
    return {path: base for path, base in found.items() if ".adapters." not in path}


def repeated_blocks(network: nn.Module) -> list[str]:
    """Paths of the blocks that a diffusers network names, else the members of its lists."""
    names = getattr(network, "_repeated_blocks", None) or ()
    return _blocks_of(network, tuple(names))


def checkpointed_blocks(network: nn.Module) -> list[str]:
    """Those, and the residual blocks of a UNet."""
    names = getattr(network, "_repeated_blocks", None) or ()
    return _blocks_of(network, (*names, *RESNET_BLOCKS) if names else ())


def _blocks_of(network: nn.Module, names: tuple[str, ...]) -> list[str]:
    if names:
        return [path for path, module in network.named_modules() if type(module).__name__ in names]
    found = []
    for path, module in network.named_modules():
        if isinstance(module, nn.ModuleList):
            found += [f"{path}.{i}" for i in range(len(module))]
    return found
