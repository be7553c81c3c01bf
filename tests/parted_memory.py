"""A stand-in for a GPU on machines without one: networks that are not on it have no numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lora_core.config import Config
from lora_core.family import Family
from training.networks import placed_family, residency
from training.networks.residency import HostCopy, Residency, frozen_tensors


class PartedMemory:
    """Moves between the host and the stand-in, in order; `peak` are the parts that were there at
    the same time.
    """

    def __init__(self) -> None:
        self.moves: list[tuple[str, str]] = []
        self.names: dict[nn.Module, str] = {}
        self.there: set[nn.Module] = set()
        self.together: set[tuple[str, ...]] = set()

    def place(self, network: nn.Module, device: torch.device | None, host: HostCopy) -> int:
        """As `residency.place_component`: a network that leaves is left with empty tensors, so that
        whatever reads its weights fails.
        """
        (self.there.add if device else self.there.discard)(network)
        self.moves.append((self.names[network], "comes" if device else "leaves"))
        self.together.add(tuple(sorted({self.names[own] for own in self.there})))
        for tensor in frozen_tensors(network):
            if device is None and tensor.numel():
                host.keep(tensor)
                tensor.data = tensor.data.new_empty(0)
            elif id(tensor) in host.kept:
                tensor.data = host.kept[id(tensor)][1]
        return 4_000_000_000

    def open(self, config: Config, family: Family, device: torch.device) -> Residency:
        """As `residency.open_residency`, where all networks move, and none is there."""
        found = REAL(config, family, device)
        found.moves, found.place, found.present = config.offload, self.place, set()
        for part, networks in found.parts.items():
            self.names |= dict.fromkeys(networks, part)
        for part in found.parts if config.offload else ():
            found._place(part, None)
        self.moves.clear()
        self.together.clear()
        return found

    def order(self) -> Iterator[str]:
        """Part and direction of each move; several networks of a part move together."""
        last = ""
        for part, direction in self.moves:
            move = f"{part} {direction}"
            if move != last:
                yield move
            last = move


REAL = residency.open_residency


@contextmanager
def parted_memory() -> Iterator[PartedMemory]:
    """Inside, networks leave the stand-in as they leave a GPU."""
    memory = PartedMemory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placed_family.places, "open_residency", memory.open)
        yield memory
