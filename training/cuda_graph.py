"""CUDA-graph capture and replay of a training step, and torch.compile of a network's repeated
blocks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from lora_core import kernels
from lora_core.adapters import groups
from lora_core.errors import UserError
from lora_core.kernels import choice
from lora_core.tensor_trees import map_tensors, tree_tensors
from models.placement import named_blocks

# Eager calls before a capture, as torch's documentation of CUDA graphs has it: libraries initialize
# themselves, kernels are compiled.
WARMUP_CALLS = 3

Outputs = TypeVar("Outputs")  # a tuple with tensors in it


class Recording(Protocol):
    """One captured call, as CudaGraph below; tests replace it on machines without a GPU."""

    def record(self) -> AbstractContextManager[None]:
        """Inside the block, device work is recorded and not executed."""
        ...

    def replay(self) -> None:
        """Execute the recorded work, on the same addresses."""
        ...


class CudaGraph:
    """A recording by torch.cuda.CUDAGraph; all share one memory pool, for only one replays at a
    time.
    """

    pool: Any = None

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        CudaGraph.pool = CudaGraph.pool or torch.cuda.graph_pool_handle()

    @contextmanager
    def record(self) -> Iterator[None]:
        with torch.cuda.graph(self.graph, pool=CudaGraph.pool):
            yield

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class _Capture:
    inputs: Any  # its tensors are overwritten before each replay
    recording: Recording
    outputs: Any


class GraphReplay:
    """Calls fn(inputs) -> tensors: the first WARMUP_CALLS calls of each kind run eagerly, the
    following ones replay a CUDA graph.

    A kind is `key` and the shapes and dtypes of the tensors in `inputs`. fn must do all its work
    on the device, the same for every call of a kind, and keep tensors that outlive it (parameters,
    optimizer state) at their addresses; Python values that it reads are frozen at the capture.

    Before each capture one call runs eagerly, which makes the optimizers' pinned tables of
    addresses that a capture uses up. Our kernels count arrivals in memory that all graphs share:
    one graph replays at a time, on one stream.
    """

    def __init__(self) -> None:
        self.calls: dict[Hashable, int] = {}
        self.captures: dict[Hashable, _Capture] = {}
        self.ready = False  # whether an eager call came after the last capture

    def __call__(self, fn: Callable[[Any], Outputs], inputs: Any, key: Hashable = None) -> Outputs:
        """fn(inputs), as copies that the next call does not overwrite."""
        kind = (key, tuple((tuple(t.shape), t.dtype) for t in tree_tensors(inputs)))
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if self.calls[kind] <= WARMUP_CALLS or (kind not in self.captures and not self.ready):
            self.ready = True
            with choice.replayed():  # compiles the kernels that the capture will take
                return fn(inputs)
        if kind not in self.captures:
            self.ready = False
            # A cycle that holds a node of an earlier backward pass would bring that pass's stream
            # into the capture.
            gc.collect()
            static = map_tensors(inputs, torch.clone)
            recording: Recording = CudaGraph()
            with choice.replayed(), recording.record():
                outputs = fn(static)
            self.captures[kind] = _Capture(static, recording, outputs)
        capture = self.captures[kind]
        for old, new in zip(tree_tensors(capture.inputs), tree_tensors(inputs), strict=True):
            old.copy_(new)
        capture.recording.replay()
        return map_tensors(capture.outputs, torch.clone)


def call_eagerly(fn: Callable[[Any], Outputs], inputs: Any, key: Hashable = None) -> Outputs:
    """fn(inputs): the replacement of a GraphReplay without --cuda-graph."""
    return fn(inputs)


def compile_blocks(network: nn.Module) -> None:
    """torch.compile of each block that a diffusers network repeats, in place: one compilation
    serves all blocks of a kind and shape.

    The whole network at once takes several times as long (diffusers' `compile_repeated_blocks`, on
    an H200: 50.7 against 8.1 s, sglang#28193). Raises UserError where the network names no such
    blocks.
    """
    blocks = list(named_blocks(network).values())
    if not blocks:
        raise UserError(
            f"--compile finds no repeated blocks in {type(network).__name__}; leave it out"
        )
    # A block is compiled anew for each width, resolution and gradient mode, and with adapter
    # dropout for each block: its number is in the hash.
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, 64, 4 * len(blocks))
    kernels.import_backends()
    groups.remove_group_hooks(network)
    for block in blocks:
        block.compile(fullgraph=True)
