"""The first step of a stage, after its update, which shows whether options have effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.config import Config, Stage
from lora_core.data.batches import Batch
from lora_core.data.dataset import micro_batches
from lora_core.diffusion.losses import mse
from lora_core.diffusion.noise import RandomKeys
from training.inputs.step_inputs import InputSource, StepInputs
from training.setup import Data, Model, Optimization
from training.step import Loss, StepFunctions

# True or False: whether an option acts; None: nothing of this step could show it.
Probe = Callable[["FirstStep"], bool | None]


@dataclass(frozen=True)
class FirstStep:
    """What a step was made of; gradients are still there, clipped."""

    source: InputSource
    functions: StepFunctions
    optimization: Optimization
    stage: Stage
    batch: Batch
    inputs: Sequence[StepInputs]

    @property
    def config(self) -> Config:
        return self.source.config

    @property
    def model(self) -> Model:
        return self.source.model

    @property
    def data(self) -> Data:
        return self.source.data

    @property
    def micro_batch(self) -> Batch:
        """The images of the first forward pass."""
        return next(micro_batches(self.batch, self.source.passes))

    @property
    def keys(self) -> RandomKeys:
        """Those of the first micro-batch."""
        batch = self.micro_batch
        return RandomKeys(self.config.seed, batch.keys, batch.visits)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups that the stage steps."""
        groups = self.optimization.optimizer.param_groups
        return [group for group in groups if group["name"] in self.stage.groups]

    @property
    def can_run_denoiser(self) -> bool:
        """Whether it may be called again: not where processes share it, all of which would have to
        do the same, and not where each block would be compiled or copied for it.
        """
        return not (self.config.shard or self.config.compile or self.config.stream)

    @property
    def can_compare(self) -> bool:
        """Whether losses may be computed again: not by a step of the user's own."""
        return self.functions.own_step is None and self.can_run_denoiser

    @cached_property
    def mse(self) -> Tensor:
        """[b] losses of mse."""
        return self.losses(mse)

    @torch.no_grad()
    def losses(
        self,
        loss: Loss,
        *,
        config: Config | None = None,
        inputs: StepInputs | None = None,
        model: Model | None = None,
    ) -> Tensor:
        """[b] losses of the last micro-batch, whose dropout keys the adapters still have."""
        x = replace(inputs or self.inputs[-1], readings={})
        return self.functions.step(model or self.model, x, config or self.config, loss)


@contextmanager
def forward_calls(module: nn.Module, found: list[Any], note: Callable[[], Any]) -> Iterator[None]:
    """Inside the block, note() at each forward of the module is appended to `found`."""
    handle = module.register_forward_pre_hook(lambda *_: found.append(note()))
    try:
        yield
    finally:
        handle.remove()
