"""A stand-in for a GPU on machines without one: networks that are not on it have no numbers."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import infer
from lora_core.config import Config
from lora_core.family import Family
from lora_core.memory import placed_family
from lora_core.memory.residency import (
    HostCopy,
    Residency,
    frozen_tensors,
    place_whole,
    whole_tensors,
)
from training.networks import base_weights, stage_residency
from training.networks.stage_residency import StageResidency


class PartedMemory:
    """Moves between the host and the stand-in, in order; `peak` are the parts that were there at
    the same time.
    """

    def __init__(self) -> None:
        self.moves: list[tuple[str, str]] = []
        self.names: dict[nn.Module, str] = {}
        self.there: set[nn.Module] = set()
        self.together: set[tuple[str, ...]] = set()
        self.copies: dict[nn.Module, HostCopy] = {}  # made when a run begins
        self.tensors: Callable[[nn.Module], Iterator[Tensor]] = frozen_tensors  # that move
        # method of the family, with the kind of call -> the parts that were there
        self.calls: dict[str, set[tuple[str, ...]]] = {}

    def place(self, network: nn.Module, device: torch.device | None, host: HostCopy) -> int:
        """As `residency.place_component`: a network that leaves is left with empty tensors, so that
        whatever reads its weights fails.
        """
        self.note_move(network, comes=device is not None)
        if device is None:
            self.remove(network, host)
        for tensor in self.tensors(network) if device else ():
            if id(tensor) in host.kept:
                tensor.data = host.kept[id(tensor)][1]
        return 4_000_000_000

    def remove(self, network: nn.Module, host: HostCopy) -> None:
        for tensor in self.tensors(network):
            if tensor.numel():
                host.keep(tensor)
                tensor.data = tensor.data.new_empty(0)

    def note_move(self, network: nn.Module, *, comes: bool) -> None:
        (self.there.add if comes else self.there.discard)(network)
        self.moves.append((self.names[network], "comes" if comes else "leaves"))
        self.together.add(self.parts_there())

    def parts_there(self) -> tuple[str, ...]:
        return tuple(sorted({self.names[own] for own in self.there}))

    def place_packed(
        self, family: Family, *arguments: Any, resident: Collection[str], **options: Any
    ) -> list[str]:
        """As `placement.place_networks`, which reads weights on the host."""
        lines = PLACE_NETWORKS(family, *arguments, resident=resident, **options)
        for name, network in family.modules.items() if self.copies else ():
            if name in resident:
                self.note_move(network, comes=True)
            else:
                self.remove(network, self.copies[network])
        return lines

    def opened(self) -> tuple[str, ...]:
        """The parts that were there before the first one left."""
        came = set[str]()
        for part, direction in self.moves:
            if direction == "leaves":
                break
            came.add(part)
        return tuple(sorted(came))

    def watch(self, family: Family) -> None:
        """Note the parts that are there when methods of the family work: of the denoiser apart with
        gradients and without.
        """
        for name in ("encode", "encode_images", "denoise", "decode"):
            setattr(family, name, partial(self.call, name, getattr(family, name)))

    def call(self, name: str, method: Callable[..., Any], *inputs: Any) -> Any:
        kind = f"{name}, trains" if torch.is_grad_enabled() else name
        self.calls.setdefault(kind, set()).add(self.parts_there())
        return method(*inputs)

    def open(self, config: Config, family: Family, device: torch.device) -> StageResidency:
        """As `stage_residency.open_residency`, where all networks move, and none is there. Those to
        be packed keep their numbers until then.
        """
        found = REAL(config, family, device)
        found.moves, found.place, found.present = config.offload, self.place, set()
        for part, networks in found.parts.items():
            self.names |= dict.fromkeys(networks, part)
        for part in found.parts if config.offload else ():
            if part not in stage_residency.late_parts(config):
                found._place(part, None)
            self.copies |= dict(zip(found.parts[part], found.copies[part]))
        self.watch(family)
        self.moves.clear()
        self.together.clear()
        return found

    def take_turns(
        self, family: Family, refiner: Family | None, device: torch.device, **options: Any
    ) -> tuple[Family, Family | None]:
        """As `placed_family.take_turns`, where all networks are on the host."""
        placed: Any = TAKE_TURNS(family, refiner, device, **options)
        residency: Residency = placed[0].residency
        assert residency.place is place_whole
        residency.place, self.tensors = self.place, matrices
        for part, networks in residency.parts.items():
            self.names |= dict.fromkeys(networks, part)
            residency._place(part, None)
        for model in filter(None, (family, refiner)):
            self.watch(model)
        self.moves.clear()
        self.together.clear()
        return placed

    def order(self) -> Iterator[str]:
        """Part and direction of each move; several networks of a part move together."""
        last = ""
        for part, direction in self.moves:
            move = f"{part} {direction}"
            if move != last:
                yield move
            last = move


def matrices(network: nn.Module) -> Iterator[Tensor]:
    """What moves of a network that does not train, but for vectors: the strength of a LoRA that
    changes norms and biases is written into those, also while the network is away.
    """
    for tensor in whole_tensors(network):
        if tensor.ndim > 1 or not tensor.numel():  # a matrix that is away is empty
            yield tensor


def place_on_host(
    family: Family, *arguments: Any, resident: Collection[str] | None, **options: Any
) -> list[str]:
    """As `placement.place_networks` in inference, whose networks end on the host."""
    assert resident is not None and not resident
    return PLACE_NETWORKS(family, *arguments, resident=resident, **options)


REAL = stage_residency.open_residency
TAKE_TURNS = placed_family.take_turns
PLACE_NETWORKS = base_weights.place_networks


@contextmanager
def parted_memory() -> Iterator[PartedMemory]:
    """Inside, networks leave the stand-in as they leave a GPU."""
    memory = PartedMemory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_residency, "open_residency", memory.open)
        patch.setattr(base_weights, "place_networks", memory.place_packed)
        yield memory


@contextmanager
def parted_drawing() -> Iterator[PartedMemory]:
    """Inside, networks of infer.py leave the stand-in as they leave a GPU."""
    memory = PartedMemory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "leaves_device", lambda _, *, offload, family: offload and not family)
        patch.setattr(infer, "take_turns", memory.take_turns)
        patch.setattr(infer, "place_networks", place_on_host)
        yield memory
