"""Prodigy (arXiv 2306.06101): Adam whose step size is an estimate d of the distance from the first weights to the solution.

A readable reference with prodigyopt's names, order and defaults; with one group its numbers are prodigyopt's. Where it differs, on purpose:

- a group with lr = 0, or none of whose parameters has a gradient, is frozen: parameters, moments, `s`, numerator and count keep their bits, and the
  distance is measured on the groups that move (prodigyopt goes on along stale momentum, and divides the numerator of all by the `s` of some);
- groups may differ in lr, betas, eps and weight decay; each has its own count `k` (prodigyopt reads group 0 for all, and refuses two learning rates);
- `distance="group"` gives every group its own d, for text encoders that one shared d over-trains (konstmish/prodigy#20, #34);
- d, d_max, k and the sums are 0-dim float64 tensors on the parameters' device: nothing in a step waits for the device;
- coupled weight decay leaves `.grad` alone; p0 is always a whole copy (prodigyopt asks whether a parameter is zero); state is fp32 or better.

Parameters and state of a group lie in a few flat tensors (lora_core/kernels/flat.py), of which p.data and `state[p]` hold views, and d and the other scalars
are updated in place: a step is two kernels (the op prodigy_step), and a CUDA graph may hold it. Read `group["d"]` with .clone() to keep a value.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lora_core import kernels
from lora_core.errors import UserError
from lora_core.kernels.flat import forget_layout, lay_out_flat, state_dtype
from lora_core.kernels.steps import MovingGroup, ProdigySettings

SCALARS = (
    "d",
    "d_max",
    "d_numerator",
    "d_denom",
    "d_hat",
    "k",
)  # in the order of the columns of kernels.steps
SHARED_SETTINGS = (
    "d0",
    "d_coef",
    "growth_rate",
    "beta3",
)  # what one shared estimate can have only one of


class Prodigy(torch.optim.Optimizer):
    """Prodigy; `param_groups[i]["d"]` is the estimate of a group (0-dim tensor), and d * lr the learning rate worth logging.

    `lr` multiplies d (leave it at 1; a group's own lr is its share of the common step; a 0-dim tensor may change within a CUDA graph);
    `slice_p` estimates on every p-th element only;
    `growth_rate` bounds the growth of d a step, but not its first jump away from d0, as in prodigyopt (1.0 stops d where it is).
    `fsdp_in_use` sums the estimate over the ranks of torch.distributed, each of which holds a shard; a group pauses on all ranks or on none.
    Follows torch's protocol for loss scalers (attributes `found_inf`, `grad_scale`): a step with found_inf = 1 changes nothing.
    Raises UserError for values out of range, and for groups that disagree on what one shared distance can have only once.
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler and optim.LossScaler

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        *,
        distance: Literal["shared", "group"] = "shared",
    ) -> None:
        if distance not in ("shared", "group"):
            raise UserError(
                f"distance is {distance!r}; expected 'shared' (one d for all groups) or 'group' (one each)"
            )
        if not lr > 0:
            raise UserError(
                f"lr is {lr}; Prodigy needs a default lr > 0, 1.0 as a rule (a single group may have lr = 0 and is frozen)"
            )
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                beta3=beta3,
                eps=eps,
                weight_decay=weight_decay,
                decouple=decouple,
                use_bias_correction=use_bias_correction,
                safeguard_warmup=safeguard_warmup,
                d0=d0,
                d_coef=d_coef,
                growth_rate=growth_rate,
                fsdp_in_use=fsdp_in_use,
                slice_p=slice_p,
                distance=distance,
            ),
        )

    @property
    def distance(self) -> str:
        """Shared by all groups, or one each."""
        return str(
            self.defaults["distance"]
        )  # copies and pickles of an optimizer hold its defaults, and no other attribute

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; under a shared distance it starts from the d reached so far."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, self.param_groups[0], shared=self.distance == "shared")
        except UserError:
            self.param_groups.pop()
            raise
        device = group["params"][0].device
        for name in SCALARS:
            value = group["d0"] if name in ("d", "d_max", "d_hat") else 0.0
            group[name] = torch.full(
                (),
                value,
                dtype=torch.float32 if device.type == "mps" else torch.float64,
                device=device,
            )
        if self.distance == "shared":
            group.update(
                {
                    name: self.param_groups[0][name].clone()
                    for name in ("d", "d_max", "d_hat", "d_denom")
                }
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state bit for bit (torch's own method would cast fp32 state to the dtype of a half-precision parameter).

        d and the other scalars stay where they are in memory; the flat state is laid out anew.
        """
        saved = {group.get("distance") for group in state_dict["param_groups"]}
        if saved != {self.distance}:
            raise UserError(
                f"the saved Prodigy has distance {sorted(map(str, saved))}, this run {self.distance!r}; resume with the saved one"
            )
        places = [{name: group[name] for name in SCALARS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        forget_layout(self)
        for group, old, place in zip(self.param_groups, state_dict["param_groups"], places):
            for p, index in zip(group["params"], old["params"]):
                if index in state_dict["state"]:
                    self.state[p] = {
                        name: value.to(p.device, copy=True)
                        for name, value in state_dict["state"][index].items()
                    }
            group.update({name: place[name].copy_(group[name]) for name in SCALARS})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every group that has lr > 0 and a gradient, and returns the closure's loss (or None)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for groups in (
            [self.param_groups]
            if self.distance == "shared"
            else [[group] for group in self.param_groups]
        ):
            rows = [row for i, group in enumerate(groups) for row in self._rows(i, group)]
            if rows:
                kernels.call(
                    "prodigy_step", self._scalars(groups), found_inf, grad_scale, tuple(rows)
                )
                for row in rows:
                    row.flat.finish(row.grads)
        return loss

    def _rows(self, index: int, group: dict[str, Any]) -> list[MovingGroup]:
        """What moves in a group: nothing where its lr is the number 0 or no parameter has a gradient."""
        lr = group["lr"]
        if not (isinstance(lr, Tensor) or lr > 0) or all(p.grad is None for p in group["params"]):
            return []
        recipe = ProdigySettings(
            lr, group["betas"][0], group["betas"][1], _beta3(group), group["eps"], group["weight_decay"], group["d0"], group["d_coef"],
            group["growth_rate"], group["decouple"], group["use_bias_correction"], group["safeguard_warmup"], group["slice_p"],
            sharded=group["fsdp_in_use"] or any(hasattr(p, "_fsdp_flattened") for p in group["params"]),
        )  # fmt: skip
        flats = [
            (flat, flat.gradients())
            for flat in lay_out_flat(
                self, group, lambda p: _initial_state(p, group), group["slice_p"]
            )
        ]
        return [
            MovingGroup(index, recipe, flat, grads)
            for flat, grads in flats
            if any(g is not None for g in grads)
        ]

    def _scalars(self, groups: list[dict[str, Any]]) -> Tensor:
        """[groups, 6] SCALARS of groups that share a distance, of which group["d"] and the others are views, written in place from now on."""
        blocks = self.__dict__.setdefault("_blocks", {})  # copying an optimizer leaves this behind
        block, views = blocks.get(id(groups[0]["params"]), (None, []))
        now = [group[name] for group in groups for name in SCALARS]
        if len(now) != len(views) or any(a is not b for a, b in zip(now, views)):
            block = torch.stack([value.to(groups[0]["params"][0].device) for value in now]).view(
                len(groups), len(SCALARS)
            )
            views = list(block.view(-1).unbind())
            for i, group in enumerate(groups):
                group.update(zip(SCALARS, views[i * len(SCALARS) :]))
            blocks[id(groups[0]["params"])] = block, views
        return block


def _initial_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter at its first gradient."""
    dtype = state_dtype(p)
    p0 = p.detach().reshape(-1)[:: group["slice_p"]].to(dtype, copy=True)
    moments = (
        {"exp_avg": torch.zeros(p.shape, dtype=dtype, device=p.device)}
        if group["betas"][0] > 0
        else {}
    )
    return {
        "p0": p0,
        "s": torch.zeros_like(p0),
        **moments,
        "exp_avg_sq": torch.zeros(p.shape, dtype=dtype, device=p.device),
    }


def _check_group(group: dict[str, Any], first: dict[str, Any], *, shared: bool) -> None:
    ranges = {
        "lr": group["lr"] >= 0,
        "weight_decay": group["weight_decay"] >= 0,
        "betas": all(0 <= beta < 1 for beta in group["betas"]),
        "beta3": 0 <= _beta3(group) <= 1,
        **{name: group[name] > 0 for name in ("eps", "d0", "d_coef", "growth_rate")},
        "slice_p": isinstance(group["slice_p"], int) and group["slice_p"] >= 1,
    }
    for name, ok in ranges.items():
        if not ok:
            raise UserError(
                f"Prodigy got {name} = {group[name]}; expected lr, weight_decay >= 0, betas in [0, 1), beta3 in [0, 1], "
                "eps, d0, d_coef, growth_rate > 0 and a whole slice_p >= 1"
            )
    devices = {str(p.device) for p in group["params"]} | (
        {str(first["params"][0].device)} if shared else set()
    )
    if len(devices) > 1:
        raise UserError(
            f"the parameters lie on {sorted(devices)}; a distance is measured on one device, move them together or use distance='group'"
        )
    for name in SHARED_SETTINGS if shared else ():
        ours, theirs = (
            (_beta3(group), _beta3(first)) if name == "beta3" else (group[name], first[name])
        )
        if ours != theirs:
            raise UserError(
                f"two groups share one distance and differ in {name} ({theirs} and {ours}); make them equal or use distance='group'"
            )


def _beta3(group: dict[str, Any]) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]
