"""Which of a model's networks are on the device: each is there while it works (--offload).

Text encoders encode prompts, the VAE encodes and decodes images, the denoiser trains or samples;
the largest of them is the peak. In training only frozen tensors move: adapters and learned tokens
stay on the device. In inference a network moves with all that is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from lora_core import tokens
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.byte_sizes import format_bytes
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
    return _place_tensors(network, frozen_tensors(network), device, host)


def place_whole(network: nn.Module, device: torch.device | None, host: HostCopy) -> int:
    """As `place_component`, with the adapters and learned tokens, which do not train."""
    return _place_tensors(network, whole_tensors(network), device, host)


def _place_tensors(
    network: nn.Module, tensors: Iterator[Tensor], device: torch.device | None, host: HostCopy
) -> int:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else _do_nothing
    synchronize()
    size, streamed = 0, find_streamed(network)
    if streamed is not None and device is None:
        streamed.release()
    for tensor in tensors:
        size += tensor.numel() * tensor.element_size()
        if device is None:
            tensor.data = host.data_of(tensor)
        elif tensor.device.type != device.type:  # "cuda" is not equal to "cuda:0"
            host.keep(tensor)
            tensor.data = tensor.data.to(device)
    if device is not None:
        _watch_groups(network)
    synchronize()
    if device is None and torch.cuda.is_available():
        torch.cuda.empty_cache()  # a stream's freed memory is of no use to another one
    return size


def _watch_groups(network: nn.Module) -> None:
    """Let groups of layers act again: a strength that was set while the network was on the host
    made them stop, as on a CPU.
    """
    for layer in adapted_layers(network):
        if layer.group is not None:
            layer.group.watch_parent()


def frozen_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a network, each once, without adapters, learned token rows and
    streamed blocks.
    """
    for _, tensor in named_frozen_tensors(network):
        yield tensor


def whole_tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a network, each once, without streamed blocks."""
    for _, tensor in _named_tensors(network, set()):
        yield tensor


def named_frozen_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of the parameters and buffers of a network, each once, without adapters,
    learned token rows and streamed blocks.
    """
    ours: set[int] = set()
    for layer in adapted_layers(network):
        for adapter in layer.adapters.values():
            ours.update(map(id, adapter.modules()))
    for module in network.modules():
        if isinstance(module, tokens.LearnedEmbedding):
            ours.add(id(module))
    yield from _named_tensors(network, ours)


def _named_tensors(network: nn.Module, left_out: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of a network without streamed blocks; `left_out` are ids of modules."""
    streamed = find_streamed(network)
    seen = set(map(id, chain.from_iterable(streamed.host))) if streamed is not None else set()
    for path, module in network.named_modules():
        if id(module) in left_out:
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}", tensor


class Residency:
    """The parts of a model (text encoders, denoiser, VAE) that are on the device: each comes when
    it is used, and the others leave. Several models may share the turns.

    Says a line, with `say`, when a part first comes and first leaves.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[nn.Module]],
        device: torch.device,
        *,
        moves: bool,
        place: Place = place_component,
        say: Callable[[str], None] = print,
    ) -> None:
        self.parts, self.device, self.place, self.say = parts, device, place, say
        self.moves = moves  # False: everything is on the device from the beginning
        self.present: set[str] = set() if moves else set(parts)
        self.copies = {name: [HostCopy() for _ in own] for name, own in parts.items()}
        self.said: set[tuple[str, str]] = set()

    def use(self, part: str) -> None:
        """Have a part on the device, and no other."""
        self.bring_together([part])

    def bring_together(self, parts: Collection[str]) -> None:
        """Have several parts on the device at once, and no others."""
        if not self.moves:
            return
        self.send_away(self.present - set(parts))
        for part in parts:
            if part not in self.present:
                self._bring(part)

    def send_away(self, parts: Collection[str], done: str = "") -> None:
        """Take parts off the device. `done` says, in a line of its own, what they did there."""
        for part in sorted(set(parts) & self.present if self.moves else ()):
            size = self._place(part, None)
            self.present.remove(part)
            if done or (part, "left") not in self.said:
                self.said.add((part, "left"))
                work = f"{done}, " if done else ""
                self.say(f"{part}: {work}left the GPU ({format_bytes(size)} freed)")

    def _bring(self, part: str) -> None:
        size = self._place(part, self.device)
        self.present.add(part)
        self._say_came(part, size)

    def _say_came(self, part: str, size: int) -> None:
        if (part, "came") not in self.said:
            self.said.add((part, "came"))
            self.say(f"{part}: on the GPU ({format_bytes(size)})")

    def _place(self, part: str, device: torch.device | None) -> int:
        pairs = zip(self.parts[part], self.copies[part], strict=True)
        return sum(self.place(network, device, copy) for network, copy in pairs)


def model_parts(family: Family, owner: str = "") -> dict[str, list[nn.Module]]:
    """Name of a part -> its networks; of a second model with its `owner` ("refiner's ") before."""
    modules = dict(family.modules)
    encoders = [modules.pop(name) for name in family.tokenizers]
    return {
        owner + TEXT_ENCODERS: encoders,
        owner + DENOISER: [modules.pop(family.denoiser)],
        owner + VAE: list(modules.values()),
    }


def leaves_device(device: torch.device, *, offload: bool, family: str) -> bool:
    """Whether networks leave the device while they do not work, by the options --offload and
    --family.
    """
    return offload and device.type != "cpu" and not reason_to_stay(family)


def reason_to_stay(family: str) -> str:
    """The option with which networks stay on the device; "" for none.

    A family of the user's own may read any network in any method.
    """
    return f"--family {family}" if family else ""


def check_offload(
    device: torch.device, *, offload: bool, family: str, say: Callable[[str], None] = print
) -> None:
    """Raises UserError for --no-offload where nothing could leave. Says a line for an option with
    which nothing leaves.
    """
    if device.type == "cpu" and not offload:
        raise UserError(
            "--no-offload has no effect on the CPU, where all networks are in one memory; leave "
            "it out"
        )
    if reason_to_stay(family) and offload and device.type != "cpu":
        say(f"{reason_to_stay(family)}: text encoders and VAE stay on the GPU, too")


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device; from pinned memory to a GPU, so that the host need not wait."""
    x = x if dtype is None else x.to(dtype)
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _do_nothing() -> None:
    pass
