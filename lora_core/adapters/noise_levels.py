"""The noise level of a denoiser's forward pass, for adapters that read it.

A kind with `reads_level = True` gets a `ForwardLevel` as its attribute `level`. One hook of the
denoiser fills it, from the argument `timestep` that networks of diffusers have, in training,
validation and sampling, and in a program that calls the network itself. Networks without such an
adapter have no hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.errors import UserError

TIMESTEP = "timestep"  # the argument of a network's forward


class ForwardLevel:
    """Timesteps of the examples in the network's current forward pass; one object for all layers.

    Tensors of the device that no code here reads back, so that a CUDA graph may replay them.
    """

    def __init__(self) -> None:
        self.now: Tensor | None = None
        self.t_max: float | None = None  # the t of pure noise, see Schedule.t_max
        self.handle: Any = None  # of the network's hook
        self.names: tuple[str, ...] = ()  # of the arguments of its forward

    @property
    def t(self) -> Tensor:
        """[b] timesteps as the network reads them."""
        if self.now is None:
            raise UserError(
                "an adapter reads the noise level outside of its network's forward pass; call the "
                "network, which sets it"
            )
        return self.now

    @property
    def fraction(self) -> Tensor:
        """[b] timesteps as a fraction of the schedule, 0 clean and 1 pure noise."""
        if self.t_max is None:
            raise UserError(
                "an adapter reads the noise level as a fraction, and the t of pure noise is not "
                "known: call noise_levels.set_largest_timestep(network, 1000), or 1 for a flow "
                "model; an EDM model has none"
            )
        return self.t / self.t_max

    def read_timestep(self, _network: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        """Take the timesteps from the arguments of a forward: the hook."""
        arguments = dict(zip(self.names, args)) | given
        examples = arguments[self.names[0]]
        t = torch.as_tensor(arguments[TIMESTEP], device=examples.device)
        t = t if t.is_floating_point() else t.float()
        self.now = t.expand(len(examples))

    def recompute_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch's checkpoint: a block is computed again at its own timesteps."""
        return nullcontext(), self._restored(self.now)

    @contextmanager
    def _restored(self, then: Tensor | None) -> Iterator[None]:
        later, self.now = self.now, then
        try:
            yield
        finally:
            self.now = later


def find_level(network: nn.Module) -> ForwardLevel | None:
    """The level that the network's adapters read, or None where none reads it."""
    for adapter in _reading_adapters(network):
        if isinstance(getattr(adapter, "level", None), ForwardLevel):
            return adapter.level
    return None


def set_largest_timestep(network: nn.Module, t_max: float | None) -> None:
    """Set the t of pure noise, by which `fraction` divides; None for a schedule without one."""
    level = find_level(network)
    if level is not None:
        level.t_max = None if t_max is None else float(t_max)


def connect_levels(network: nn.Module) -> None:
    """Give every adapter that reads the level the network's one, and set the hook that fills it.

    Raises UserError for a network whose forward takes no timestep, such as a text encoder.
    """
    readers = _reading_adapters(network)
    if not readers:
        return
    level = find_level(network) or ForwardLevel()
    for adapter in readers:
        adapter.level = level
    if level.handle is None:
        level.names = _argument_names(network, type(readers[0]).__name__)
        level.handle = network.register_forward_pre_hook(level.read_timestep, with_kwargs=True)


def disconnect_level(network: nn.Module, level: ForwardLevel | None) -> None:
    """Remove the hook, where no adapter of the network reads the level any more."""
    if level is not None and level.handle is not None and not _reading_adapters(network):
        level.handle.remove()
        level.handle = None


def _argument_names(network: nn.Module, kind: str) -> tuple[str, ...]:
    names = tuple(inspect.signature(network.forward).parameters)
    if TIMESTEP not in names:
        raise UserError(
            f"{kind} reads the noise level, and a {type(network).__name__} is called without a "
            "timestep; give it to the denoiser alone, and train no text_encoder"
        )
    return names


def _reading_adapters(network: nn.Module) -> list[Any]:
    found: list[Any] = []
    for layer in adapted_layers(network):
        for adapter in layer.adapters.values():
            if getattr(adapter, "reads_level", False):
                found.append(adapter)
    return found
