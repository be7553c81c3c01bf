"""Streamed blocks: the same bits as blocks that stay, at most two on the device, none used before
its copy is complete.
"""

import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core.adapters import injection
from lora_core.memory.streamed_blocks import (
    Slabs,
    StartedCopy,
    StreamedBlocks,
    frozen_slots,
    move_around_blocks,
    stream_blocks,
)
from lora_core.settings import AdapterSpec

WIDTH, BLOCKS = 8, 5


class LateCopier:
    """Copies whose numbers are NaN until `finish` is called, as a side stream's could be; counts
    the bytes that are alive and notes the order of what happens.
    """

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self.events: list[str] = []
        self.blocks: dict[int, str] = {}  # address of a block's first tensor on the host -> name

    def start(self, tensors):
        name = self.blocks.setdefault(tensors[0].data_ptr(), f"block {len(self.blocks)}")
        self.events.append(f"start {name}")
        copies = []
        for tensor in tensors:
            memory = np.full(tensor.shape, np.nan, dtype=np.float32)  # lives as long as its storage
            copies.append(torch.from_numpy(memory))
            self.alive += memory.nbytes
            weakref.finalize(memory, self.free, memory.nbytes)
        self.peak = max(self.peak, self.alive)

        def finish():
            self.events.append(f"finish {name}")
            for copy, tensor in zip(copies, tensors):
                copy.data.copy_(tensor)

        return StartedCopy(copies, finish)

    def free(self, nbytes):
        self.alive -= nbytes


def linear():
    return nn.Linear(WIDTH, WIDTH)


class Net(nn.Module):
    """Blocks of two layers, one of them for an adapter, and a norm; checkpointed or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = linear()
        self.blocks = nn.ModuleList(
            nn.Sequential(linear(), nn.LayerNorm(WIDTH), nn.GELU(), linear()) for _ in range(BLOCKS)
        )
        self.is_checkpointed = True
        self.requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return x


def adapted_net(copier=None):
    """(net, its streamed blocks) with a LoRA that is not zero on the first layer of each block."""
    net = Net()
    injection.inject(net, AdapterSpec(targets=("first", "blocks.*.0"), rank=2))
    for parameter in injection.up_parameters(net):
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return net, copier and StreamedBlocks(list(net.blocks), copier, pin=False)


def take_steps(net, count=3, device="cpu"):
    """Losses and gradients of some steps, each with a forward without gradients after it."""
    parameters = injection.adapter_parameters(net)
    found = []
    for step in range(count):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).to(device)
        loss = net(x).square().mean()
        loss.backward()
        with torch.no_grad():
            found += [loss.detach(), net(x)]
        found += [p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.data.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    return found


@pytest.mark.parametrize("is_checkpointed", [True, False])
def test_steps_have_the_same_bits(is_checkpointed):
    plain, _ = adapted_net()
    net, _ = adapted_net(LateCopier())
    plain.is_checkpointed = net.is_checkpointed = is_checkpointed
    for mine, theirs in zip(take_steps(net), take_steps(plain), strict=True):
        assert torch.equal(mine, theirs)


def test_at_most_two_blocks_are_on_the_device():
    copier = LateCopier()
    net, streamed = adapted_net(copier)
    take_steps(net)
    assert streamed.host_bytes == BLOCKS * streamed.largest_block
    assert copier.peak == 2 * streamed.largest_block
    net.is_checkpointed = False  # the saved activations hold the weights
    take_steps(net, 1)
    assert copier.peak > 3 * streamed.largest_block


def test_the_next_block_is_being_copied_during_a_turn():
    copier = LateCopier()
    net, _ = adapted_net(copier)
    take_steps(net, 2)
    for block in net.blocks:
        block[1].register_forward_hook(lambda *_: copier.events.append("compute"))
    copier.events.clear()
    take_steps(net, 1)
    assert copier.events.count("compute") == 3 * BLOCKS  # forward, its repetition, sampling
    starts = [i for i, event in enumerate(copier.events) if event.startswith("start ")]
    for i in starts[:-1]:  # the last is for the next step
        until = copier.events.index(copier.events[i].replace("start", "finish"), i)
        assert "compute" in copier.events[i:until]  # before the copy has to be there


def test_outside_its_turn_a_block_has_its_parameters_back():
    net, _ = adapted_net(LateCopier())
    parameters = dict(net.named_parameters())
    take_steps(net, 1)
    assert all(parameters[name] is p for name, p in net.named_parameters())
    slots = list(itertools.chain.from_iterable(map(frozen_slots, net.blocks)))
    assert len(slots) == 6 * BLOCKS  # weights and biases, no adapter's tensor
    assert not any(slot.table[slot.name].requires_grad for slot in slots)


def test_an_error_inside_a_block_gives_the_weights_back():
    net, _ = adapted_net(LateCopier())
    weights = {name: p for name, p in net.named_parameters()}
    with pytest.raises(RuntimeError):
        net.blocks[0](torch.zeros(2, WIDTH + 1))
    assert all(weights[name] is p for name, p in net.named_parameters())


def test_slabs_keep_values_strides_and_alignment():
    slabs = Slabs(pin=False, size=2048)
    for shape, dtype in (((3, 5), torch.bfloat16), ((7,), torch.int8), ((40, 40), torch.float32)):
        tensor = torch.ones(shape).cumsum(0).to(dtype)
        stored = slabs.store(tensor)
        assert torch.equal(stored, tensor) and stored.data_ptr() % 64 == 0
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    stored = slabs.store(image)
    assert torch.equal(stored, image) and stored.stride() == image.stride()
    assert slabs.store(torch.empty(0, 3)).shape == (0, 3)
    assert slabs.store(torch.tensor(2.0)) == 2.0
    for part in (torch.randn(4, 6)[:, ::2], torch.randn(3, 1).expand(3, 4)):
        assert torch.equal(slabs.store(part), part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_side_stream_gives_the_same_bits_from_pinned_memory():
    device = torch.device("cuda")
    plain, _ = adapted_net()
    plain.to(device)
    net, _ = adapted_net()
    for layer in injection.layers_with_adapter(net, "default").values():
        layer.change_base(lambda base: base, device)
    streamed = stream_blocks(dict(net.blocks.named_children()), device)
    move_around_blocks(net, list(net.blocks), device)
    assert all(tensor.is_pinned() for tensor in streamed.host[0])
    for mine, theirs in zip(take_steps(net, device=device), take_steps(plain, device=device)):
        assert torch.equal(mine, theirs)
