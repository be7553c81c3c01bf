"""A model's networks on their device: quantized on the way there, or streamed block by block."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_core.adapters.adapted_layer import (
    Adapted,
    adaptable_layers,
    adapted_layers,
    module_parents,
)
from lora_core.adapters.adapter_module import BaseLayer
from lora_core.byte_sizes import format_bytes
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.memory.quantized_weights import (
    Quantize,
    QuantizedLinear,
    is_quantizable,
    stored_bytes,
)
from lora_core.memory.streamed_blocks import mark_streamed, move_around_blocks, stream_blocks

LARGE_ENCODER = 10**9  # parameters of a text encoder that is quantized too: T5, not CLIP
RESNET_BLOCKS = ("ResnetBlock2D",)  # of UNets, which diffusers checkpoints beside the transformers'
HOST = torch.device("cpu")


def loading_device(
    device: torch.device, quantize: Quantize, *, stream: bool, comes_later: bool
) -> torch.device:
    """Where a model is loaded to: the host if `place_networks`, or what else `comes_later`, brings
    it to the device.
    """
    return HOST if quantize != "none" or stream or comes_later else device


def place_networks(
    family: Family,
    device: torch.device,
    quantize: Quantize,
    *,
    stream: bool = False,
    trained: Collection[str] = (),
    resident: Collection[str] | None = None,
) -> list[str]:
    """Bring a model's networks from the host to a device, adapters included; returns what was done,
    in a line for each network. With `resident` the networks of other names end on the host; they
    come first, so that a layer is packed next to no other network.

    With `quantize`, the linear layers in the denoiser's blocks become QuantizedLinear, one at a
    time, and so do those of a text encoder as large as T5 that is not among `trained`. What is
    outside the blocks stays as it is: embeddings of timesteps, text and latents, and the last
    layer; so do norms, convolutions and the linear layers around a UNet's transformers. They are
    few, and each acts on all that the denoiser computes. With `stream`, the denoiser's blocks stay
    on the host, as streamed_blocks.py describes. Raises UserError where nothing can be quantized,
    or no blocks are found.
    """
    lines = []
    remain = set(family.modules if resident is None else resident)
    for name in sorted(family.modules, key=remain.__contains__):
        network = family.modules[name]
        storage = device if name in remain else HOST
        chosen: list[str] = []
        is_denoiser = name == family.denoiser
        is_large = name in family.tokenizers and parameter_count(network) >= LARGE_ENCODER
        if quantize != "none" and (is_denoiser or (is_large and name not in trained)):
            chosen = quantizable_paths(network, quantize)
            if not chosen:
                raise UserError(
                    f"--quantize {quantize} finds no linear layer in the blocks of {name} that it "
                    "could store; leave it out"
                )
            lines.append(describe_quantization(name, network, chosen, quantize))
        if is_denoiser and stream:
            lines.append(_stream_network(name, network, device, storage, quantize, chosen))
            continue
        _place_layers(network, device, storage, quantize, chosen, chosen)
        network.to(storage)
    return lines


def _stream_network(
    name: str,
    network: nn.Module,
    device: torch.device,
    storage: torch.device,
    quantize: Quantize,
    packed: list[str],
) -> str:
    """Quantize the layers `packed`, move what is not in a block to `storage`, stream the blocks,
    and say so.
    """
    blocks = checkpointed_blocks(network)
    if not blocks:
        raise UserError(
            f"--stream finds no repeated blocks in {type(network).__name__}; leave it out"
        )
    inside = tuple(f"{path}." for path in blocks)
    moved = []
    for path, layer in adaptable_layers(network).items():
        if path in packed or (isinstance(layer, Adapted) and path.startswith(inside)):
            moved.append(path)
    _place_layers(network, device, HOST, quantize, packed, moved)
    move_around_blocks(network, list(blocks.values()), storage)
    for adapted in adapted_layers(network):
        adapted.adapters.to(storage)
    if device.type == "cuda":  # before their memory is pinned, which another layout would replace
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    streamed = stream_blocks(blocks, device)
    mark_streamed(network, streamed)
    size, largest = format_bytes(streamed.host_bytes), format_bytes(streamed.largest_block)
    return (
        f"streamed: {len(blocks)} blocks of {name}, {size}, stay in host memory; at most "
        f"two are on the device, each of up to {largest}"
    )


def _place_layers(
    network: nn.Module,
    device: torch.device,
    storage: torch.device,
    quantize: Quantize,
    packed: Collection[str],
    moved: Collection[str],
) -> None:
    """Move layers with their adapters to the device, one at a time, and quantize those `packed`
    there; the frozen tensors end on `storage`.
    """
    parents = module_parents(network)
    pack: Any = partial(QuantizedLinear, quantize=quantize)
    for path, layer in adaptable_layers(network).items():
        if path not in moved:
            continue
        make = pack if path in packed else _keep
        if isinstance(layer, Adapted):
            layer.change_base(make, device)
            layer.base.to(storage)
        else:
            made = make(layer.to(device)).to(storage)
            for parent, attribute in parents[id(layer)]:
                parent._modules[attribute] = made


def _keep(base: BaseLayer) -> BaseLayer:
    return base


# ---------------------------------------------------------------- which layers, which blocks


def named_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> block of the classes that a diffusers network names as those it repeats."""
    return _blocks_of_classes(network, tuple(getattr(network, "_repeated_blocks", None) or ()))


def repeated_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> block that a network repeats: of the classes that a diffusers network names, else the
    members of its outermost lists, as in a text encoder.
    """
    return named_blocks(network) or _list_members(network)


def checkpointed_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> block whose activations gradient checkpointing recomputes: the repeated ones, and the
    residual blocks of a UNet.
    """
    names = getattr(network, "_repeated_blocks", None) or ()
    if not names:
        return _list_members(network)
    return _blocks_of_classes(network, (*names, *RESNET_BLOCKS))


def quantizable_paths(network: nn.Module, quantize: Quantize) -> list[str]:
    """Paths of the linear layers in a network's blocks whose weights have a fitting shape; also for
    a network on the meta device.
    """
    inside = tuple(f"{path}." for path in repeated_blocks(network))
    found = []
    for path, layer in adaptable_layers(network).items():
        base = layer.base if isinstance(layer, Adapted) else layer
        is_inside = type(base) is nn.Linear and path.startswith(inside)
        if is_inside and is_quantizable(base.weight.shape, quantize):
            found.append(path)
    return found


def describe_quantization(
    name: str, network: nn.Module, paths: Collection[str], quantize: Quantize
) -> str:
    """A line with the number of layers, and their bytes before and after."""
    before = after = 0
    for path, layer in adaptable_layers(network).items():
        if path in paths:
            shape, dtype = layer.weight.shape, layer.weight.dtype
            before += stored_bytes(shape, "none", dtype)
            after += stored_bytes(shape, quantize, dtype)
    form = "4 bits (NF4)" if quantize == "int4" else quantize
    return (
        f"quantized: {len(paths)} linear layers of {name} in {form}, {format_bytes(after)} "
        f"instead of {format_bytes(before)}"
    )


def parameter_count(network: nn.Module) -> int:
    """The numbers of all parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def _blocks_of_classes(network: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    return {p: m for p, m in network.named_modules() if type(m).__name__ in names}


def _list_members(network: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            found |= {f"{prefix}{name}.{i}": block for i, block in enumerate(child)}
        else:
            found |= _list_members(child, f"{prefix}{name}.")
    return found
