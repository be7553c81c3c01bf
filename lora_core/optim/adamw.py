"""AdamW (arXiv 1711.05101) with torch.optim.AdamW's arguments, results and state.

One call updates all the parameters of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lora_core import kernels
from lora_core.errors import UserError
from lora_core.kernels.flat import forget_layout, lay_out_flat, state_dtype
from lora_core.kernels.steps import AdamWSettings

UNSUPPORTED = ("amsgrad", "maximize", "differentiable")  # options of torch's class only


class AdamW(torch.optim.Optimizer):
    """AdamW as torch.optim.AdamW, without the UNSUPPORTED options (for which torch's class can be
    chosen by the optimizer name "torch.optim.AdamW").

    Parameters and state are in flat tensors (kernels/flat.py). `state[p]` has exp_avg, exp_avg_sq
    and step, as in torch's class, so that either class loads the other's state; for half-precision
    parameters the state is fp32, where torch keeps it in their dtype. `lr` may be a 0-dim tensor,
    which a CUDA graph reads at each replay. Nothing waits for the device; loss scalers set
    `found_inf` and `grad_scale`. Raises UserError for values out of range.
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler and LossScaler

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises UserError for values out of range."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except UserError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state bit for bit, also one of torch.optim.AdamW.

        Raises UserError for a state that was made with one of UNSUPPORTED.
        """
        for group in state_dict["param_groups"]:
            for name in UNSUPPORTED:
                if group.get(name):
                    raise UserError(
                        f"the saved AdamW has {name}=True, which adamw does not support; "
                        "resume with torch.optim.AdamW"
                    )
        super().load_state_dict(state_dict)
        forget_layout(self)
        for group, old in zip(self.param_groups, state_dict["param_groups"]):
            for p, index in zip(group["params"], old["params"]):
                saved = state_dict["state"].get(index)
                if saved is not None:
                    self.state[p] = {name: _restore_value(name, x, p) for name, x in saved.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter with a gradient; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            for flat in lay_out_flat(self, group, _initial_state):
                grads = flat.read_gradients()
                if grads:
                    beta1, beta2 = group["betas"]
                    settings = AdamWSettings(
                        group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
                    )
                    arguments = flat.param, found_inf, grad_scale, flat, grads, settings
                    kernels.call("adamw_step", *arguments)
                    flat.finish_step(grads)
        return loss


def _initial_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter at its first gradient."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros(p.shape, dtype=state_dtype(p), device=p.device)
    return state


def _restore_value(name: str, value: Any, p: Tensor) -> Tensor:
    """A saved value of a parameter's state on its device, in fp32 or better.

    Early versions of torch saved `step` as a number.
    """
    dtype = torch.float32 if name == "step" else state_dtype(p)
    return torch.as_tensor(value).to(p.device, dtype, copy=True)


def _check_group(group: dict[str, Any]) -> None:
    """Raises UserError for settings out of range and for complex parameters."""
    ranges = {
        "lr": bool(group["lr"] >= 0),
        "eps": group["eps"] >= 0,
        "weight_decay": group["weight_decay"] >= 0,
        "betas": all(0 <= beta < 1 for beta in group["betas"]),
    }
    for name, in_range in ranges.items():
        if not in_range:
            raise UserError(
                f"AdamW got {name} = {group[name]}; "
                "expected lr, eps, weight_decay >= 0 and betas in [0, 1)"
            )
    if any(not p.is_floating_point() for p in group["params"]):
        raise UserError(
            "AdamW got a parameter that is not of floating point; "
            "torch.optim.AdamW supports complex ones"
        )
