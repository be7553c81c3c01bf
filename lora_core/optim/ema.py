"""Exponential moving average of the trained parameters.

Diffusion models since arXiv 2006.11239 sample from such an average.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError


class ParameterAverage:
    """Moving average a of parameters p: a <- d_n a + (1 - d_n) p after the n-th step, with
    d_n = min(decay, (1 + n) / (10 + n)).

    n = 1, 2, ...; fp32 or better, initialized with the parameters. The warm-up of the decay
    (TensorFlow's ExponentialMovingAverage, the LDM code's LitEma) reduces the weight of the initial
    values, with which an adapter does nothing: without it they would still have 90 % after 1000
    steps at 0.9999. down and up are averaged separately, not their product: musubi's post-hoc EMA
    does the same and was 8 % off the average of the products in a toy run. The average of a frozen
    parameter approaches its value. The count is a Python number and no value is read from the
    device. n does not count the steps that were skipped.
    """

    def __init__(self, params: Iterable[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"--ema is {decay}; expected a decay in [0, 1), e.g. 0.999")
        self.params = list(params)
        self.decay = decay
        self.count = 0  # of updates; with `skipped` of those on a device that skipped steps
        self.skipped: Tensor | None = None  # [] on the device, of the updates that did nothing
        self.averages = []
        for p in self.params:
            wide = torch.promote_types(p.dtype, torch.float32)
            self.averages.append(p.detach().to(wide, copy=True))
        self._inside = False

    @torch.no_grad()
    def update_(self, skip: Tensor | None = None) -> None:
        """Update the averages; to be called once after each optimizer step. `skip`: 0-dim, 1 for a
        step that was skipped, which changes nothing here.

        Raises ValueError inside `swapped`, where the parameters are the averages.
        """
        if self._inside:
            raise ValueError(
                "the average cannot be updated while the parameters hold it; leave swapped() first"
            )
        if skip is not None and skip.device.type != "cpu":
            self._update_unless(skip)
            return
        if skip is not None and skip:  # nothing waits for a value on the CPU
            return
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        values = [p.to(a.dtype) for p, a in zip(self.params, self.averages)]
        torch._foreach_lerp_(self.averages, values, 1 - decay)

    @torch.no_grad()
    def _update_unless(self, skip: Tensor) -> None:
        """update_ on a device, where the number of steps that count is known to the device only."""
        self.count += 1
        if self.skipped is None:
            exact = torch.float32 if skip.device.type == "mps" else torch.float64
            self.skipped = torch.zeros((), dtype=exact, device=skip.device)
        self.skipped.add_(skip)
        n = self.count - self.skipped
        rate = 1 - ((1 + n) / (10 + n)).clamp(max=self.decay)
        rate = torch.where(skip == 0, rate, torch.zeros_like(rate))
        values = [p.to(a.dtype) for p, a in zip(self.params, self.averages)]
        changes = torch._foreach_sub(values, self.averages)
        torch._foreach_mul_(changes, rate.to(changes[0].dtype))
        torch._foreach_add_(self.averages, changes)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the parameters have the averages as values.

        Afterwards, or on an error, they have the trained values again, bit for bit. Blocks nest.
        """
        trained = [p.detach().clone() for p in self.params]
        inside = self._inside
        try:
            self._copy_to_parameters(self.averages)
            self._inside = True
            yield
        finally:
            self._copy_to_parameters(trained)
            self._inside = inside

    def state_dict(self) -> dict[str, Any]:
        """The averages as tensors (not copies) and the number of updates, without the decay."""
        skipped = 0 if self.skipped is None else int(self.skipped)
        return {"averages": self.averages, "count": self.count - skipped}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state bit for bit, onto the parameters' devices.

        Raises UserError when its shapes are not those of the parameters.
        """
        ours = [a.shape for a in self.averages]
        theirs = [a.shape for a in state["averages"]]
        if ours != theirs:
            raise UserError(
                f"the saved average has {len(theirs)} tensors that do not fit the {len(ours)} that "
                "train; resume with the run's own config"
            )
        for a, saved in zip(self.averages, state["averages"]):
            a.copy_(saved)
        self.count, self.skipped = int(state["count"]), None

    @torch.no_grad()
    def _copy_to_parameters(self, values: list[Tensor]) -> None:
        for p, value in zip(self.params, values):
            p.copy_(value)
