"""Networks that come to a device to work: which tensors move, who is there, what is said."""

import pytest
import torch
from torch import nn

from lora_core import tokens
from lora_core.adapters import groups, injection
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.errors import UserError
from lora_core.memory.residency import (
    DENOISER,
    TEXT_ENCODERS,
    VAE,
    HostCopy,
    Place,
    Residency,
    check_offload,
    frozen_tensors,
    leaves_device,
    place_component,
    place_whole,
    whole_tensors,
)
from lora_core.settings import AdapterSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def small_network() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    network.requires_grad_(False)
    network.register_buffer("table", torch.ones(3))
    injection.inject(network, AdapterSpec(targets=("0",), rank=2))
    network[2] = tokens.LearnedEmbedding(network[2], torch.zeros(1, 4), ["<s0>"], first_id=5)
    return network


def test_adapters_and_token_rows_are_not_among_what_moves() -> None:
    network = small_network()
    moving = list(frozen_tensors(network))
    names = {id(t): name for name, t in [*network.named_parameters(), *network.named_buffers()]}
    assert sorted(names[id(t)] for t in moving) == [
        "0.base.bias", "0.base.weight", "1.bias", "1.weight", "2.table.weight", "table",
    ]  # fmt: skip
    shared = nn.ModuleList([network, network[0]])
    assert len(list(frozen_tensors(shared))) == len(moving)


def test_a_copy_on_the_host_is_used_only_for_the_same_numbers_and_layout() -> None:
    """Another memory format, and a change in place, make a new copy."""
    weight = nn.Parameter(torch.randn(2, 3, 4, 4), requires_grad=False)
    host = HostCopy()
    assert host.data_of(weight).data_ptr() == weight.data_ptr()
    host.keep(weight)
    before = weight.data
    weight.data = weight.data.clone()  # on the device
    assert host.data_of(weight).data_ptr() == before.data_ptr()
    weight.data = weight.data.to(memory_format=torch.channels_last)
    assert host.data_of(weight).stride() == weight.stride()
    weight.data = before.clone()
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(host.data_of(weight), before + 1)


def test_without_training_all_of_a_network_moves() -> None:
    network = small_network()
    every = {id(t) for t in [*network.parameters(), *network.buffers()]}
    assert {id(t) for t in whole_tensors(network)} == every
    assert len(every) > len(list(frozen_tensors(network)))


def test_a_part_that_is_used_sends_the_others_away_and_says_so_once() -> None:
    parts = {name: [nn.Linear(4, 1)] for name in (TEXT_ENCODERS, DENOISER, VAE)}
    parts[TEXT_ENCODERS].append(nn.Linear(4, 1))
    said: list[str] = []
    moved: list[tuple[nn.Module, bool]] = []

    def place(network: nn.Module, device: torch.device | None, host: HostCopy) -> int:
        moved.append((network, device is not None))
        return 4_000_000_000

    found = Residency(parts, CPU, moves=True, place=place, say=said.append)
    for part in (TEXT_ENCODERS, DENOISER, DENOISER, TEXT_ENCODERS, DENOISER):
        found.use(part)
        assert found.present == {part}
    assert said == [
        "text encoders: on the GPU (8 GB)",
        "text encoders: left the GPU (8 GB freed)",
        "denoiser: on the GPU (4 GB)",
        "denoiser: left the GPU (4 GB freed)",
    ]
    assert [comes for network, comes in moved if network is parts[DENOISER][0]] == [
        True, False, True,
    ]  # fmt: skip
    stays = Residency(parts, CPU, moves=False, place=place, say=said.append)
    stays.use(VAE)
    assert stays.present == set(parts) and len(said) == 4


@pytest.mark.parametrize("place", [place_component, place_whole])
def test_layers_act_as_a_group_again_after_a_strength_was_set_on_the_host(
    monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    """On a CPU no group acts; here a variable tells whether the network is there."""
    is_there = True
    monkeypatch.setattr(groups, "may_group", lambda device_type: is_there)
    attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("to_q", "to_k", "to_v")})
    network = nn.ModuleDict({"attention": attention}).requires_grad_(False)
    injection.inject(network, AdapterSpec(targets=("*",), rank=2))
    group, host = adapted_layers(network)[0].group, HostCopy()
    assert group is not None and group.acts
    is_there = False
    place(network, None, host)
    injection.set_strength(network, "default", 0.5)
    assert not group.acts
    is_there = True
    place(network, CPU, host)
    assert group.acts


def test_what_cannot_leave_is_refused_or_said() -> None:
    said: list[str] = []
    with pytest.raises(UserError, match="--no-offload has no effect on the CPU"):
        check_offload(CPU, offload=False, family="", say=said.append)
    for device, family in ((CPU, ""), (CPU, "own.py:FAMILY"), (GPU, "")):
        check_offload(device, offload=True, family=family, say=said.append)
    check_offload(GPU, offload=False, family="own.py:FAMILY", say=said.append)
    assert not said
    check_offload(GPU, offload=True, family="own.py:FAMILY", say=said.append)
    assert said == ["--family own.py:FAMILY: text encoders and VAE stay on the GPU, too"]
    assert leaves_device(GPU, offload=True, family="")
    assert not leaves_device(GPU, offload=False, family="")
    assert not leaves_device(GPU, offload=True, family="own.py:FAMILY")
    assert not leaves_device(CPU, offload=True, family="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_frozen_weights_go_to_the_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects stay the same, memory is freed, and the second visit has the first one's numbers."""
    device, host = torch.device("cuda", torch.cuda.current_device()), HostCopy()
    network = small_network()
    adapters = injection.adapter_parameters(network)
    before = {id(t): t.clone() for t in frozen_tensors(network)}
    big = nn.Linear(2048, 2048).requires_grad_(False)
    used = torch.cuda.memory_allocated()
    for _ in range(2):
        assert place_component(big, device, host) == 4 * (2048 * 2048 + 2048)
        assert torch.cuda.memory_allocated() >= used + 2048 * 2048 * 4
        place_component(network, device, host)
        for t in frozen_tensors(network):
            assert t.device == device and torch.equal(t.cpu(), before[id(t)])
        place_component(network, None, host)
        place_component(big, None, host)
        assert torch.cuda.memory_allocated() == used
        assert all(t.device.type == "cpu" for t in frozen_tensors(network))
        assert all(p.device.type == "cpu" for p in adapters)  # where they were made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_whole_network_goes_to_the_device_and_back() -> None:
    """What is written there, such as the strength of changes to norms, is kept."""
    device, host = torch.device("cuda", torch.cuda.current_device()), HostCopy()
    network = small_network()
    before = {id(t): t.clone() for t in whole_tensors(network)}
    norm = network[1].weight
    for visit in range(2):
        place_whole(network, device, host)
        assert all(t.device == device for t in [*network.parameters(), *network.buffers()])
        with torch.no_grad():
            norm.add_(1)
        place_whole(network, None, host)
        for t in whole_tensors(network):
            own = before[id(t)] + (visit + 1 if t is norm else 0)
            assert t.device == CPU and torch.equal(t, own)
