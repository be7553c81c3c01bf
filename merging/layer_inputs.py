"""The inputs that layers get in forward passes, summed up for `least_squares`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.tokens import first_eos
from merging.least_squares import InputMoments
from merging.stored_layers import LayerKey

# Component -> which positions [b, s] of its text are recorded; None: all
ChosenPositions = Callable[[str], Tensor | None]


@contextmanager
def recorded_inputs(
    layers: Mapping[LayerKey, nn.Module], positions: ChosenPositions = lambda component: None
) -> Iterator[dict[LayerKey, InputMoments]]:
    """A context that records inputs: layer -> the inputs of all its calls, adapted or not.

    Layers that are called one after another with the same tensor (queries, keys, values) share one
    record. A layer that is not called is missing.
    """
    recorder = _Recorder(positions)
    with ExitStack() as hooks:
        for key, layer in layers.items():
            handle = layer.register_forward_pre_hook(recorder.make_hook(key))
            hooks.callback(handle.remove)
        yield recorder.moments


@contextmanager
def recorded_ids(encoders: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """A context that records token ids: text encoder -> the ids [b, s] that it reads last."""
    found: dict[str, Tensor] = {}

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_table: nn.Module, inputs: tuple[Any, ...]) -> None:
            found[name] = inputs[0]

        return hook

    with ExitStack() as hooks:
        for name, encoder in encoders.items():
            handle = encoder.get_input_embeddings().register_forward_pre_hook(make_hook(name))
            hooks.callback(handle.remove)
        yield found


def text_positions(ids: Tensor, eos_id: int) -> Tensor:
    """[b, s]: whether a position belongs to the text, from the first token to the first EOS."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return places <= first_eos(ids, eos_id)[:, None]


def concept_positions(ids: Tensor, learned: Sequence[int], eos_id: int) -> Tensor:
    """[b, s]: whether a position is a learned token, or the first EOS.

    In a text without learned tokens all positions after the first are, up to the EOS: its words
    are all that the concept has.
    """
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends.scatter_(1, first_eos(ids, eos_id)[:, None], True)
    is_learned = torch.isin(ids, torch.tensor(list(learned), device=ids.device))
    words = text_positions(ids, eos_id)
    words[:, 0] = False
    lacks_tokens = ~is_learned.any(1, keepdim=True)
    return torch.where(lacks_tokens, words, is_learned | ends)


def input_rows(layer: nn.Module, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The input of a layer as rows [n, in], of a convolution as patches [n, in * kh * kw].

    `positions` [b, s] chooses among those of a text [b, s, in]; a pooled one [b, in] has none.
    Raises ValueError for a convolution with groups or padding of another kind than zeros.
    """
    if isinstance(layer, nn.Conv2d):
        return _patches(layer, x)
    if positions is not None and x.ndim == 3:
        return x[positions]
    return x.reshape(-1, x.shape[-1])


class _Recorder:
    """The records of one context, and which layer's record another one shares."""

    def __init__(self, positions: ChosenPositions) -> None:
        self.positions = positions
        self.moments: dict[LayerKey, InputMoments] = {}
        self.owners: dict[LayerKey, LayerKey] = {}
        self.last: tuple[Tensor, int, LayerKey] | None = None  # with the tensor's version

    def make_hook(self, key: LayerKey) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.record(key, getattr(layer, "base", layer), inputs[0].detach())

        return hook

    def record(self, key: LayerKey, layer: nn.Module, x: Tensor) -> None:
        shared = self._shared_owner(key, layer, x)
        owner = self.owners.setdefault(key, shared)
        if owner != shared:
            raise RuntimeError(f"{'.'.join(key)} reads the input of {owner} in one pass only")
        self.moments.setdefault(key, self.moments.get(owner) or InputMoments())
        if owner == key:
            self.last = None if isinstance(layer, nn.Conv2d) else (x, x._version, key)
            self.moments[key].add(input_rows(layer, x, self.positions(key[0])))

    def _shared_owner(self, key: LayerKey, layer: nn.Module, x: Tensor) -> LayerKey:
        """The layer that has recorded this very input just now, or the layer itself."""
        if self.last is None or isinstance(layer, nn.Conv2d):
            return key
        before, version, owner = self.last
        is_same = before.data_ptr() == x.data_ptr() and version == x._version
        return owner if is_same and _spacing(before) == _spacing(x) else key


def _spacing(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride()


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies with its kernel, [n, in * kh * kw]."""
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError("a convolution with groups, or with padding that is not zeros")
    patches = F.unfold(
        x, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )
    return patches.transpose(1, 2).flatten(0, 1)
