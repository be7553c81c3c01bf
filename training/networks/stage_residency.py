"""The turns of a run's networks: as in inference while it begins and evaluates; in the steps of a
stage, what they read is there together.

Only frozen tensors move: adapters and learned tokens stay on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch
from torch import nn

from lora_core.config import Config
from lora_core.family import Family
from lora_core.memory.placed_family import PlacedFamily
from lora_core.memory.residency import (
    DENOISER,
    TEXT_ENCODERS,
    HostCopy,
    Place,
    Residency,
    check_offload,
    frozen_tensors,
    leaves_device,
    model_parts,
    place_component,
)
from lora_core.settings import AdapterSpec
from models.placement import loading_device


class StageResidency(Residency):
    """A `Residency` whose parts take turns while a run begins and evaluates.

    In the steps of a stage no part leaves, so that autograd and CUDA graphs keep what they refer
    to: those that the steps read come first, and one that is used nevertheless stays until the
    stage ends.
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
        super().__init__(parts, device, moves=moves, place=place)
        self.keeps_addresses = keeps_addresses  # of what steps read: a CUDA graph has them
        self.held: set[str] = set()  # what the steps of the stage read
        self.in_steps = False
        self.trained: tuple[str, ...] = ()  # parts with adapters or learned tokens
        self.fixed: set[str] = set()  # parts that stay once they are there

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

    def send_away(self, parts: Collection[str], done: str = "") -> None:
        """Take parts off the device, but for those that are fixed there."""
        super().send_away(set(parts) - self.fixed, done)

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
        super()._bring(part)
        if part in self.fixed:
            self.copies[part] = [HostCopy() for _ in self.parts[part]]  # of no use any more


def choose_loading_device(config: Config, device: torch.device) -> torch.device:
    """Where the weights are loaded. Raises UserError for --no-offload where nothing could leave.

    Prints a line for an option with which nothing leaves.
    """
    check_offload(device, offload=config.offload, family=config.family)
    return loading_device(
        device,
        config.quantize,
        stream=config.stream,
        comes_later=_takes_turns(config, device) or config.shard,
    )


def late_parts(config: Config) -> set[str]:
    """The parts that come to the device after adapters and token rows are made in them on the host:
    what is to be packed, streamed or divided may be too large for it before.
    """
    if config.quantize != "none" or config.stream:
        return {TEXT_ENCODERS, DENOISER}
    return {DENOISER} if config.shard else set()


def open_residency(config: Config, family: Family, device: torch.device) -> StageResidency:
    """The residency of a model's networks, all of which are on the host where they move."""
    return StageResidency(
        model_parts(family),
        device,
        moves=_takes_turns(config, device),
        keeps_addresses=config.cuda_graph,
    )


def place_family(
    config: Config, family: Family, plan: Mapping[str, AdapterSpec], device: torch.device
) -> tuple[Family, StageResidency]:
    """The family with networks that come and go, and its residency; the family itself where they
    stay. The networks that train, for `plan` or for learned tokens, are on the device: adapters and
    token rows are made there, and stay. With --quantize, --stream and --shard they are made on the
    host, and `base_weights.place_model` and `sharding.shard_denoiser` bring them.
    """
    residency = open_residency(config, family, device)
    if not residency.moves:
        return family, residency
    texts_change = config.trains("tokens") or any(name in family.tokenizers for name in plan)
    training = [TEXT_ENCODERS] if texts_change else []
    if family.denoiser in plan or config.shard:
        training.append(DENOISER)
    if config.shard:
        residency.fixed.add(DENOISER)  # its weights are divided there
    residency.trained = tuple(training)
    residency.bring_together([part for part in training if part not in late_parts(config)])
    placed = PlacedFamily(family, residency, keeps_texts=not texts_change)
    return cast(Family, placed), residency


def _takes_turns(config: Config, device: torch.device) -> bool:
    return leaves_device(device, offload=config.offload, family=config.family)
