"""Which of a model's networks are on the device: each is there while it works (--offload).

A run works in phases, and the largest of them is its peak: text encoders encode captions, the VAE
encodes images, the denoiser trains with whatever else its steps read; samples and validation take
the networks in turns. Only frozen tensors move: adapters and learned tokens stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from lora_core import tokens
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.byte_sizes import format_bytes
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.memory.streamed_blocks import find_streamed

TEXT_ENCODERS, DENOISER, VAE = "text encoders", "denoiser", "VAE"
HOST = torch.device("cpu")


class HostCopy:
    """Frozen tensors of a network that lie on the host while the network is on the device.

    The tensors do not change, so that leaving the device copies nothing.
    """

    def __init__(self) -> None:
        # address of the tensor object -> it, its data on the host, its version then
        self.kept: dict[int, tuple[Tensor, Tensor, int]] = {}

    def keep(self, tensor: Tensor) -> None:
        """Keep the data of a tensor that is on the host now."""
        self.kept[id(tensor)] = tensor, tensor.data, tensor._version

    def data_of(self, tensor: Tensor) -> Tensor:
        """The tensor's data on the host; copied where there is no copy of the same layout."""
        _, data, version = self.kept.get(id(tensor), (tensor, None, -1))
        if data is None or version != tensor._version or data.stride() != tensor.stride():
            return tensor.data.to(HOST)
        return data


# (network, device or None for the host, its tensors on the host) -> bytes that moved
Place = Callable[[nn.Module, torch.device | None, HostCopy], int]


def place_component(network: nn.Module, device: torch.device | None, host: HostCopy) -> int:
    """Puts the frozen tensors of a network on a device, or with None back on the host, in place:
    parameters and buffers stay the same objects. Returns the bytes of them. Streamed blocks stay on
    the host; a copy of one that is on the device for its next turn is freed with the others.

    Work on the device that reads them is done before they leave, and they are whole when this
    returns, for any stream.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else _do_nothing
    synchronize()
    size, streamed = 0, find_streamed(network)
    if streamed is not None and device is None:
        streamed.release()
    for tensor in frozen_tensors(network):
        size += tensor.numel() * tensor.element_size()
        if device is None:
            tensor.data = host.data_of(tensor)
        elif tensor.device != device:
            host.keep(tensor)
            tensor.data = tensor.data.to(device)
    synchronize()
    if device is None and torch.cuda.is_available():
        torch.cuda.empty_cache()  # a stream's freed memory is of no use to another one
    return size


def frozen_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a network, each once, without adapters, learned token rows and
    streamed blocks.
    """
    for _, tensor in named_frozen_tensors(network):
        yield tensor


def named_frozen_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of the parameters and buffers of a network, each once, without adapters,
    learned token rows and streamed blocks.
    """
    ours: set[int] = set()
    for layer in adapted_layers(network):
        for adapter in layer.adapters.values():
            ours.update(map(id, adapter.modules()))
    streamed = find_streamed(network)
    seen = set(map(id, chain.from_iterable(streamed.host))) if streamed is not None else set()
    for path, module in network.named_modules():
        if id(module) in ours or isinstance(module, tokens.LearnedEmbedding):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}", tensor


class Residency:
    """The parts of a model (text encoders, denoiser, VAE) that are on the device.

    In turns, which is how a run begins and evaluates, a part that is used sends the others away. In
    the steps of a stage no part leaves, so that autograd and CUDA graphs keep what they refer to:
    those that the steps read come first, and one that is used nevertheless stays until the stage
    ends. Prints a line when a part first comes and first leaves.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[nn.Module]],
        device: torch.device,
        *,
        moves: bool,
        keeps_addresses: bool = False,
        place: Place = place_component,
    ) -> None:
        self.parts, self.device, self.place = parts, device, place
        self.moves = moves  # False: everything is on the device from the beginning
        self.keeps_addresses = keeps_addresses  # of what steps read: a CUDA graph has them
        self.present: set[str] = set() if moves else set(parts)
        self.held: set[str] = set()  # what the steps of the stage read
        self.in_steps = False
        self.trained: tuple[str, ...] = ()  # parts with adapters or learned tokens
        self.fixed: set[str] = set()  # parts that stay once they are there
        self.copies = {name: [HostCopy() for _ in own] for name, own in parts.items()}
        self.said: set[tuple[str, str]] = set()

    def use(self, part: str) -> None:
        """Have a part on the device; in turns, the others leave it."""
        if not self.moves:
            return
        if not self.in_steps:
            self.send_away(self.present - {part} - (self.held if self.keeps_addresses else set()))
        if part not in self.present:
            self._bring(part)
        if self.in_steps:
            self.held.add(part)

    def bring_together(self, parts: Collection[str]) -> None:
        """Have several parts on the device at once, and no others."""
        if not self.moves:
            return
        self.send_away(self.present - set(parts))
        for part in parts:
            if part not in self.present:
                self._bring(part)

    def note_arrival(self, parts: Collection[str]) -> None:
        """Parts were put on the device by what packed, streamed or divided their weights."""
        for part in parts if self.moves else ():
            self.present.add(part)
            tensors = chain.from_iterable(map(frozen_tensors, self.parts[part]))
            if part not in self.fixed:  # whose shares have a line of their own
                self._say_came(part, sum(tensor.nbytes for tensor in tensors))

    def networks_of(self, parts: Collection[str]) -> set[nn.Module]:
        """The networks of several parts."""
        return set(chain.from_iterable(self.parts[part] for part in parts))

    def networks_there(self, networks: Collection[nn.Module]) -> list[nn.Module]:
        """Those of the networks that are on the device."""
        there = self.networks_of(self.present)
        return [network for network in networks if network in there]

    def send_away(self, parts: Collection[str], done: str = "") -> None:
        """Take parts off the device. `done` says, in a line of its own, what they did there."""
        for part in sorted((set(parts) & self.present) - self.fixed if self.moves else ()):
            size = self._place(part, None)
            self.present.remove(part)
            if done or (part, "left") not in self.said:
                self.said.add((part, "left"))
                print(f"{part}: {done}{', ' * bool(done)}left the GPU ({format_bytes(size)} freed)")

    def end_steps(self) -> None:
        """A stage is over, or has not begun: parts take turns, and none is held."""
        self.in_steps = False
        self.held = set()

    def begin_steps(self, held: Collection[str]) -> None:
        """The steps of a stage, which read these parts, begin."""
        self.held = set(held)
        self.bring_together(self.held)
        self.in_steps = True

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """Inside, parts take turns; what the steps of a stage under way read comes back after."""
        before, self.in_steps = self.in_steps, False
        try:
            yield
            if before:
                self.bring_together(self.held)
        finally:
            self.in_steps = before

    @contextmanager
    def trained_together(self) -> Iterator[None]:
        """Inside, all parts with adapters or learned tokens are on the device, for what reads their
        weights.
        """
        before = set(self.present)
        self.bring_together({*self.trained, *(before if self.in_steps else ())})
        yield
        if self.in_steps:
            self.bring_together(before)

    def _bring(self, part: str) -> None:
        size = self._place(part, self.device)
        self.present.add(part)
        if part in self.fixed:
            self.copies[part] = [HostCopy() for _ in self.parts[part]]  # of no use any more
        self._say_came(part, size)

    def _say_came(self, part: str, size: int) -> None:
        if (part, "came") not in self.said:
            self.said.add((part, "came"))
            print(f"{part}: on the GPU ({format_bytes(size)})")

    def _place(self, part: str, device: torch.device | None) -> int:
        pairs = zip(self.parts[part], self.copies[part], strict=True)
        return sum(self.place(network, device, copy) for network, copy in pairs)


def open_residency(config: Config, family: Family, device: torch.device) -> Residency:
    """The residency of a model's networks, all of which are on the host where they move."""
    modules = dict(family.modules)
    encoders = [modules.pop(name) for name in family.tokenizers]
    parts = {
        TEXT_ENCODERS: encoders,
        DENOISER: [modules.pop(family.denoiser)],
        VAE: list(modules.values()),
    }
    moves, keeps = leaves_device(config, device), config.cuda_graph
    return Residency(parts, device, moves=moves, keeps_addresses=keeps, place=place_component)


def leaves_device(config: Config, device: torch.device) -> bool:
    """Whether the networks of a run leave the device while they do not work."""
    return config.offload and device.type != "cpu" and not reason_to_stay(config)


def reason_to_stay(config: Config) -> str:
    """The option with which networks stay on the device; "" for none.

    A family of the user's own may read any network in any method.
    """
    return f"--family {config.family}" if config.family else ""


def late_parts(config: Config) -> set[str]:
    """The parts that come to the device after adapters and token rows are made in them on the host:
    what is to be packed, streamed or divided may be too large for it before.
    """
    if config.quantize != "none" or config.stream:
        return {TEXT_ENCODERS, DENOISER}
    return {DENOISER} if config.shard else set()


def choose_loading_device(config: Config, device: torch.device) -> torch.device:
    """Where the weights are loaded. Raises UserError for --no-offload where nothing could leave.

    Prints a line for an option with which nothing leaves.
    """
    if device.type == "cpu" and not config.offload:
        raise UserError(
            "--no-offload has no effect on the CPU, where all networks are in one memory; leave "
            "it out"
        )
    if reason_to_stay(config) and config.offload and device.type != "cpu":
        print(f"{reason_to_stay(config)}: text encoders and VAE stay on the GPU, too")
    return HOST if leaves_device(config, device) or late_parts(config) else device


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device; from pinned memory to a GPU, so that the host need not wait."""
    x = x if dtype is None else x.to(dtype)
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _do_nothing() -> None:
    pass
