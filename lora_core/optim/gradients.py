"""Gradient clipping, fp16 loss scaling, skipped steps, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError

SMALL = 2**18  # elements up to which concatenation is cheaper on a CPU than a norm of each tensor


@torch.no_grad()
def clip_gradients_(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients to global L2 norm `max_norm` if theirs is larger; returns their norm
    before clipping, a 0-dim fp64 tensor on their device.

    As torch's clip_grad_norm_, but with the norm in float64 (its fp32 norm of a long tensor on the
    CPU is off by 3e-5) and without waiting for the device. A norm that is not finite makes the
    gradients NaN, as in torch; unscale fp16 gradients first. Raises UserError when no parameter has
    a gradient.
    """
    grads = []
    elements = 0
    for p in params:
        if p.grad is not None:
            grads.append(p.grad)
            elements += p.grad.numel()
    if not grads:
        raise UserError(
            "there is no gradient to clip: no parameter of this stage took part in the loss"
        )
    if not max_norm > 0:
        raise UserError(
            f"the gradient norm to clip at is {max_norm}; "
            "expected a positive number (inf only measures)"
        )
    device_type = grads[0].device.type
    if device_type == "cpu" and elements < SMALL:
        whole = torch.cat(list(map(torch.flatten, grads)))
        norm = torch.linalg.vector_norm(whole, dtype=torch.float64)
    else:
        dtype = torch.float32 if device_type == "mps" else torch.float64
        norms = torch._foreach_norm(grads, 2.0, dtype)
        norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm < math.inf:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: torch's
        torch._foreach_mul_(grads, factor.to(torch.promote_types(grads[0].dtype, torch.float32)))
    return norm


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Call optimizer.step(), without effect where `skip`, a 0-dim fp32 tensor, is 1.

    Our optimizers and torch's fused ones take `skip` as torch.amp's `found_inf` and never wait for
    the device. Any other optimizer may count its steps on the host, so that its step is left out
    as in GradScaler, by reading one value from the device.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip:  # the one host sync
        optimizer.step()


class LossScaler:
    """Dynamic loss scale for fp16 by torch.amp.GradScaler's rule (arXiv 1710.03740).

    On any device, in device tensors that keep their addresses, so that a CUDA graph may contain a
    whole step:

        scaler.scale(loss).backward()
        scaler.unscale_(params)
        clip_gradients_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    A step that overflowed changes no parameter and no optimizer state (`step_unless`).
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        init: float = 65536.0,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ) -> None:
        if not (init > 0 and growth > 1 and 0 < backoff < 1 and interval >= 1):
            raise UserError(
                f"loss scale got init {init}, growth {growth}, backoff {backoff}, "
                f"interval {interval}; "
                "expected init > 0, growth > 1, backoff in (0, 1) and interval >= 1"
            )
        self.growth, self.backoff, self.interval = growth, backoff, interval
        # The scale; steps without overflow since the last change of the scale; steps that
        # overflowed since the run began; 1 after an overflow since the last update.
        self.current = torch.full((), init, dtype=torch.float32, device=device)
        self.clean = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """loss * scale, in fp32: a half-precision loss would already overflow here."""
        return loss.float() * self.current

    @torch.no_grad()
    def unscale_(self, params: Iterable[Tensor]) -> Tensor:
        """Divide the gradients by the scale, once before each step; returns found_inf.

        found_inf is 0-dim, 1.0 if any gradient is not finite.
        """
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            raise UserError(
                "there is no gradient to unscale: no parameter of this stage took part in the loss"
            )
        factor = 1 / self.current.double()
        torch._foreach_mul_(grads, factor.to(torch.promote_types(grads[0].dtype, torch.float32)))
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(grads, math.inf)])
        overflow = (~largest.isfinite().all()).float()
        return self.found_inf.copy_(torch.maximum(self.found_inf, overflow))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Call optimizer.step(), without effect if unscale_ found an overflow."""
        step_unless(optimizer, self.found_inf)

    def update(self, ignored: Tensor | None = None) -> None:
        """Reduce the scale after an overflow; raise it after `interval` steps without one.

        Never grows to infinity; resets found_inf. `ignored`: 0-dim bool, true for a step that says
        nothing about the scale, for its loss is not finite.
        """
        counted = torch.ones_like(self.found_inf, dtype=torch.bool) if ignored is None else ~ignored
        overflow = (self.found_inf != 0) & counted
        due = (self.clean + 1 >= self.interval) & ~overflow & counted
        grown = self.current * self.growth
        scale = torch.where(due & grown.isfinite(), grown, self.current)
        self.current.copy_(torch.where(overflow, self.current * self.backoff, scale))
        self.skipped.add_(overflow)
        restart = overflow | due
        self.clean.copy_(torch.where(restart, torch.zeros_like(self.clean), self.clean + counted))
        self.found_inf.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Scale, numbers of steps without overflow and skipped as tensors, and the settings."""
        return {
            "current": self.current,
            "clean": self.clean,
            "skipped": self.skipped,
            "growth": self.growth,
            "backoff": self.backoff,
            "interval": self.interval,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state bit for bit, onto this scaler's device."""
        self.current.copy_(state["current"])
        self.clean.copy_(state["clean"])
        # checkpoints of earlier versions did not count the skipped steps
        self.skipped.copy_(state.get("skipped", self.skipped))
        self.growth, self.backoff = state["growth"], state["backoff"]
        self.interval = state["interval"]
