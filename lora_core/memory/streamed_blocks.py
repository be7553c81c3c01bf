"""Frozen blocks of a network that stay in host memory and are copied to the device for their turn.

Around a block's forward its frozen weights are copies on the device; the block that comes next is
being copied meanwhile, on a stream of its own. The copies of a turn are new tensors: autograd keeps
those that it needs until the block's backward is done, and then they are freed. With gradient
checkpointing of the blocks that is one block, since its forward is repeated just before its
backward; without, all blocks of the step would be kept. So at most two blocks are on the device.

Adapters, and whatever else trains, stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lora_core.adapters.adapted_layer import Adapted

# Pinned memory is taken in pieces of this size: torch rounds each piece up to a power of 2.
SLAB_BYTES = 1 << 28
ALIGNMENT = 256  # bytes; torch's own allocations on a GPU begin at multiples of 512

Table = dict[str, Tensor | None]  # the parameters or the buffers of a module
Call = tuple[int, bool]  # of a block: its number, and whether gradients are recorded


class StartedCopy(NamedTuple):
    """Tensors on the device that are being copied, and the function that makes it safe to use
    them (or to free them) in what is computed from now on.
    """

    tensors: list[Tensor]
    finish: Callable[[], None]


class Copier(Protocol):
    """Copies from host memory to a device."""

    def start(self, tensors: Sequence[Tensor]) -> StartedCopy:
        """Begin to copy tensors of the host."""
        ...


class DirectCopier:
    """Copies that are complete at once, for the CPU."""

    def start(self, tensors: Sequence[Tensor]) -> StartedCopy:
        return StartedCopy([tensor.clone() for tensor in tensors], lambda: None)


class SideStreamCopier:
    """Copies on a CUDA stream of their own, next to what the current stream computes.

    The memory comes from the current stream, so that it is reused in that stream's order: the side
    stream waits for what was computed before a copy starts, the current one for the copy before it
    is used or freed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, tensors: Sequence[Tensor]) -> StartedCopy:
        copies = [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            done = self.stream.record_event()
        return StartedCopy(copies, lambda: torch.cuda.current_stream(self.device).wait_event(done))


class Slot(NamedTuple):
    """The place of a frozen tensor: a module's table of parameters or buffers, and its name."""

    table: Table
    name: str


class StreamedBlocks:
    """Blocks whose frozen tensors are on the device for their turn alone.

    The next block is the one that came after the same two calls the last time: so forward,
    backward and sampling each have their order, which the first pass finds out without prefetching.
    A wrong guess costs time, never a wrong weight.
    """

    def __init__(self, blocks: Sequence[nn.Module], copier: Copier, *, pin: bool) -> None:
        self.copier = copier
        self.slots = [list(frozen_slots(block)) for block in blocks]
        slabs = Slabs(pin=pin)
        for slots in self.slots:
            for slot in slots:
                _move_to_slab(slot, slabs)
        self.host = [[_tensor_at(slot) for slot in slots] for slots in self.slots]
        self.present: StartedCopy | None = None  # of the block whose turn it is
        self.ahead: dict[int, StartedCopy] = {}  # block -> its copy for the next turn
        self.calls: tuple[Call, Call] = ((-1, False), (-1, False))  # the last two
        self.followers: dict[tuple[Call, Call], int] = {}  # two calls -> the block after them
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(index))
            block.register_forward_hook(self._leaving(index), always_call=True)

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks in host memory."""
        return sum(map(_total_bytes, self.host))

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block."""
        return max(map(_total_bytes, self.host))

    def enter(self, index: int) -> None:
        """Put a block's copies in its layers, and start to copy the block that comes next."""
        own = self.ahead.pop(index, None)
        self.release()
        own = own or self.copier.start(self.host[index])
        own.finish()
        for slot, tensor in zip(self.slots[index], own.tensors, strict=True):
            slot.table[slot.name] = tensor
        self.present = own
        self.followers[self.calls] = index
        self.calls = (self.calls[1], (index, torch.is_grad_enabled()))
        following = self.followers.get(self.calls)
        if following is not None and following != index:
            self.ahead[following] = self.copier.start(self.host[following])

    def leave(self, index: int) -> None:
        """Put the host's tensors back; the copies are freed unless the block comes next again."""
        for slot, tensor in zip(self.slots[index], self.host[index], strict=True):
            slot.table[slot.name] = tensor
        present, self.present = self.present, None
        if present is not None and self.followers.get(self.calls) == index:
            self.ahead[index] = present

    def release(self) -> None:
        """Free copies that are on the device for a turn to come."""
        for unused in self.ahead.values():
            unused.finish()
        self.ahead.clear()

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.enter(index)

        return enter

    def _leaving(self, index: int) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.leave(index)

        return leave


def frozen_slots(block: nn.Module) -> Iterator[Slot]:
    """The places of a block's tensors that do not train, without those of adapters."""
    own = {id(module) for module in block.modules()}
    for module in block.modules():
        if isinstance(module, Adapted):
            own -= {id(part) for part in module.adapters.modules()}
    for module in block.modules():
        if id(module) not in own:
            continue
        tables: tuple[Any, ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and not tensor.requires_grad:
                    yield Slot(table, name)


def move_around_blocks(
    network: nn.Module, blocks: Sequence[nn.Module], device: torch.device
) -> None:
    """Move a network to a device, but for its blocks."""
    inside = set(map(id, blocks))

    def move(module: nn.Module) -> None:
        if id(module) in inside:
            return
        for child in module.children():
            move(child)
        module._apply(lambda tensor: tensor.to(device), recurse=False)

    move(network)


# ---------------------------------------------------------------- host memory


class Slabs:
    """Host memory in large pieces, pinned for copies that run next to computation."""

    def __init__(self, *, pin: bool, size: int = SLAB_BYTES) -> None:
        self.pin, self.size = pin, size
        self.rest = torch.empty(0, dtype=torch.uint8)

    def store(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in a slab, with its strides if it is dense, else contiguous."""
        if _spanned_bytes(tensor) != tensor.nbytes:
            tensor = tensor.contiguous()
        needed = tensor.nbytes + -tensor.nbytes % ALIGNMENT
        if len(self.rest) < needed:
            self.rest = torch.empty(max(self.size, needed), dtype=torch.uint8, pin_memory=self.pin)
        piece, self.rest = self.rest[:needed], self.rest[needed:]
        numbers = piece.view(tensor.dtype)
        stored = numbers.as_strided(tensor.shape, tensor.stride(), numbers.storage_offset())
        return stored.copy_(tensor)


def _spanned_bytes(tensor: Tensor) -> int:
    """Bytes from the first number to the last: the tensor's own where it is dense."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _total_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _tensor_at(slot: Slot) -> Tensor:
    tensor = slot.table[slot.name]
    assert tensor is not None
    return tensor


def _move_to_slab(slot: Slot, slabs: Slabs) -> None:
    """A parameter keeps its object, whose memory is replaced; a buffer is replaced."""
    tensor = _tensor_at(slot)
    stored = slabs.store(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        tensor.data = stored
    else:
        slot.table[slot.name] = stored


def stream_blocks(blocks: Mapping[str, nn.Module], device: torch.device) -> StreamedBlocks:
    """Stream blocks, by path, to a device; those of a CPU are copied within its memory."""
    if device.type == "cuda":
        return StreamedBlocks(list(blocks.values()), SideStreamCopier(device), pin=True)
    return StreamedBlocks(list(blocks.values()), DirectCopier(), pin=False)


def mark_streamed(network: nn.Module, streamed: StreamedBlocks) -> None:
    """Note which of a network's blocks are streamed, for `find_streamed`."""
    vars(network)["streamed_blocks"] = streamed


def find_streamed(network: nn.Module) -> StreamedBlocks | None:
    """The streamed blocks of a network, if it has any."""
    found: StreamedBlocks | None = vars(network).get("streamed_blocks")
    return found
