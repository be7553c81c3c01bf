"""An exponential moving average of what trains (as arXiv 2006.11239 and the diffusion models after it sample from)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError


class ParameterAverage:
    """a <- d_n a + (1 - d_n) p after the n-th step, d_n = min(decay, (1 + n) / (10 + n)), n = 1, 2, ...; fp32 or better, started from the parameters.

    The warm-up of the decay (TensorFlow's ExponentialMovingAverage, the LDM code's LitEma) lets the average forget its start, where an adapter does
    nothing: without it 0.9999 would still hold 90 % of it after 1000 steps. What is averaged is each parameter, down and up apart, not their product:
    musubi's post-hoc EMA does the same and was 8 % off the average of the products in a toy run. A parameter that pauses is averaged towards where
    it rests. The count is a Python number and no value is read from the device.
    """

    def __init__(self, params: Iterable[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"--ema is {decay}; expected a decay in [0, 1), e.g. 0.999")
        self.params, self.decay, self.count = list(params), decay, 0
        self.averages = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self.params
        ]
        self._inside = False

    @torch.no_grad()
    def update_(self) -> None:
        """Once after each optimiser step. Raises ValueError inside `swapped`, where the parameters are the averages."""
        if self._inside:
            raise ValueError(
                "the average cannot be updated while it stands in the parameters; leave swapped() first"
            )
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(
            self.averages, [p.to(a.dtype) for p, a in zip(self.params, self.averages)], 1 - decay
        )

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages stand in the parameters inside the block; afterwards, or on an error, the trained values are back, bit for bit. Nests."""
        trained, inside = [p.detach().clone() for p in self.params], self._inside
        try:
            self._put(self.averages)
            self._inside = True
            yield
        finally:
            self._put(trained)
            self._inside = inside

    def state_dict(self) -> dict[str, Any]:
        """The averages as tensors (not copies) and the number of updates; the decay is the config's."""
        return {"averages": self.averages, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state bit for bit, on the parameters' devices. Raises UserError when its shapes are not theirs."""
        ours, theirs = (
            [list(a.shape) for a in averages] for averages in (self.averages, state["averages"])
        )
        if ours != theirs:
            raise UserError(
                f"the saved average has {len(theirs)} tensors that do not fit the {len(ours)} that train; resume with the run's own config"
            )
        for a, saved in zip(self.averages, state["averages"]):
            a.copy_(saved)
        self.count = int(state["count"])

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for p, value in zip(self.params, values):
            p.copy_(value)
