"""Prodigy (arXiv 2306.06101): Adam that estimates its own step size.

d estimates the distance from the initial weights to the solution. Arguments, their order and
defaults are prodigyopt's (the authors' package), and with one group so are the results; the
algorithm itself is in kernels/steps.py. Intended differences from prodigyopt:

- A group with lr = 0, or none of whose parameters has a gradient, is frozen: parameters, moments,
  `s`, numerator and count keep their bits, and d is estimated from the groups that move.
  (prodigyopt continues with stale momentum, and divides the numerator of all groups by the `s` of
  some.)
- Groups may differ in lr, betas, eps and weight decay; each has its own count `k`. (prodigyopt
  reads group 0 for all, and refuses two learning rates.)
- `distance="group"` gives every group its own d, for text encoders that overfit with a shared d
  (konstmish/prodigy#20, #34).
- d, d_max, k and the sums are 0-dim float64 tensors on the parameters' device: nothing in a step
  waits for the device.
- Coupled weight decay does not change `.grad`; p0 is always a whole copy (prodigyopt checks whether
  a parameter is zero); state is fp32 or better.

Parameters and state of a group are in a few flat tensors (kernels/flat.py), of which p.data and
`state[p]` are views, and d and the other scalars are updated in place: a step is two kernels (the
op prodigy_step), and a CUDA graph may contain it. Use `group["d"].clone()` to keep a value.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lora_core import kernels
from lora_core.errors import UserError
from lora_core.kernels.flat import forget_layout, lay_out_flat, state_dtype
from lora_core.kernels.steps import MovingGroup, ProdigySettings

# In the order of the columns in kernels.steps.
SCALARS = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
SHARED_SETTINGS = ("d0", "d_coef", "growth_rate", "beta3")  # equal in groups that share a distance


class Prodigy(torch.optim.Optimizer):
    """The Prodigy optimizer. `param_groups[i]["d"]` is a group's estimate d, a 0-dim tensor.

    The effective learning rate, which is worth logging, is d * lr. `lr` multiplies d: leave it at
    1. A group's lr scales its own step; as a 0-dim tensor it may change between replays of a CUDA
    graph. With `slice_p` d is estimated from every p-th element only. `growth_rate` bounds the
    growth of d in a step, but not its first jump from d0, as in prodigyopt (1.0 keeps d constant).
    `fsdp_in_use` sums the estimate over the ranks of torch.distributed, each of which has a shard;
    a group must be frozen on all ranks or on none.
    Follows torch's protocol for loss scalers (attributes `found_inf`, `grad_scale`): a step with
    found_inf = 1 changes nothing.
    Raises UserError for values out of range, and for groups that share one distance and differ in
    SHARED_SETTINGS.
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler and LossScaler

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
                f"distance is {distance!r}; "
                "expected 'shared' (one d for all groups) or 'group' (one each)"
            )
        if not lr > 0:
            raise UserError(
                f"lr is {lr}; Prodigy needs a default lr > 0, usually 1.0 "
                "(a single group may have lr = 0 and is frozen)"
            )
        defaults = dict(
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
        )
        super().__init__(params, defaults)

    @property
    def distance(self) -> str:
        """ "shared": one distance for all groups; "group": one each."""
        # copies and pickles of an optimizer hold its defaults, and no other attribute
        return str(self.defaults["distance"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; with a shared distance it starts from the current d."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        shared = self.distance == "shared"
        try:
            _check_group(group, self.param_groups[0], shared=shared)
        except UserError:
            self.param_groups.pop()
            raise
        device = group["params"][0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name in SCALARS:
            value = group["d0"] if name in ("d", "d_max", "d_hat") else 0.0
            group[name] = torch.full((), value, dtype=dtype, device=device)
        if shared:
            for name in ("d", "d_max", "d_hat", "d_denom"):
                group[name] = self.param_groups[0][name].clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state bit for bit.

        torch's own method would cast fp32 state to the dtype of a half-precision parameter. d and
        the other scalars keep their addresses; the flat layout is made anew.
        """
        saved = {group.get("distance") for group in state_dict["param_groups"]}
        if saved != {self.distance}:
            raise UserError(
                f"the saved Prodigy has distance {sorted(map(str, saved))}, "
                f"this run {self.distance!r}; resume with the saved one"
            )
        places = [{name: group[name] for name in SCALARS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        forget_layout(self)
        saved_groups = state_dict["param_groups"]
        for group, old, place in zip(self.param_groups, saved_groups, places):
            for p, index in zip(group["params"], old["params"]):
                state = state_dict["state"].get(index)
                if state is not None:
                    copies = {name: x.to(p.device, copy=True) for name, x in state.items()}
                    self.state[p] = copies
            for name in SCALARS:
                group[name] = place[name].copy_(group[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every group with lr > 0 and a gradient; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        sharing: Iterable[Sequence[dict[str, Any]]] = [self.param_groups]
        if self.defaults["distance"] == "group":
            sharing = zip(self.param_groups)  # each group alone
        for groups in sharing:
            moving: list[MovingGroup] = []
            for index, group in enumerate(groups):
                moving += self._moving_groups(index, group)
            if moving:
                scalars = self._share_scalars(groups)
                kernels.call("prodigy_step", scalars, found_inf, grad_scale, tuple(moving))
                for moved in moving:
                    moved.flat.finish_step(moved.grads)
        return loss

    def _moving_groups(self, index: int, group: dict[str, Any]) -> list[MovingGroup]:
        """A group's parameters with a gradient, by dtype; empty where lr is the number 0."""
        lr = group["lr"]
        if not (isinstance(lr, Tensor) or lr > 0):
            return []
        found = []
        for flat in lay_out_flat(self, group, _initial_state, group["slice_p"]):
            grads = flat.read_gradients()
            if grads:
                settings = ProdigySettings(
                    lr=lr,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    beta3=_beta3(group),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    d0=group["d0"],
                    d_coef=group["d_coef"],
                    growth_rate=group["growth_rate"],
                    decouple=group["decouple"],
                    bias_correction=group["use_bias_correction"],
                    safeguard=group["safeguard_warmup"],
                    slice_p=group["slice_p"],
                    sharded=group["fsdp_in_use"] or flat.is_sharded,
                )
                found.append(MovingGroup(index, settings, flat, grads))
        return found

    def _share_scalars(self, groups: Sequence[dict[str, Any]]) -> Tensor:
        """[groups, 6] SCALARS of groups that share a distance, written in place by the steps.

        group["d"] and the others become views of it.
        """
        blocks = self.__dict__.setdefault("_blocks", {})  # copies of an optimizer do not have it
        key = id(groups[0]["params"])
        block, views = blocks.get(key, (None, []))
        current = []
        for group in groups:
            for name in SCALARS:
                current.append(group[name])
        if len(current) == len(views) and all(map(operator.is_, current, views)):
            return block
        device = groups[0]["params"][0].device
        block = torch.stack([value.to(device) for value in current]).view(len(groups), len(SCALARS))
        views = list(block.view(-1).unbind())
        for i, group in enumerate(groups):
            group.update(zip(SCALARS, views[i * len(SCALARS) :]))
        blocks[key] = block, views
        return block


def read_distance(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> Tensor | float | None:
    """A copy of a group's distance estimate d, for Prodigy and its variants.

    None where the group has no "d", or it is an argument of the class.
    """
    d = group.get("d")
    # in torch's Adafactor d is a clipping threshold
    if _has_setting_d(type(optimizer)):  # type: ignore[arg-type]
        return None
    if isinstance(d, Tensor):
        return d.detach().clone().reshape(()) if d.numel() == 1 else None
    return float(d) if isinstance(d, int | float) else None


@functools.lru_cache(maxsize=64)
def _has_setting_d(cls: type[torch.optim.Optimizer]) -> bool:
    return "d" in inspect.signature(cls).parameters


def _initial_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter at its first gradient."""
    dtype = state_dtype(p)
    p0 = p.detach().reshape(-1)[:: group["slice_p"]].to(dtype, copy=True)
    state = {"p0": p0, "s": torch.zeros_like(p0)}
    if group["betas"][0] > 0:
        state["exp_avg"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
    state["exp_avg_sq"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
    return state


def _check_group(group: dict[str, Any], first: dict[str, Any], *, shared: bool) -> None:
    """Raises UserError for settings out of range, or not those that all groups must share."""
    ranges = {
        "lr": group["lr"] >= 0,
        "weight_decay": group["weight_decay"] >= 0,
        "betas": all(0 <= beta < 1 for beta in group["betas"]),
        "beta3": 0 <= _beta3(group) <= 1,
        "eps": group["eps"] > 0,
        "d0": group["d0"] > 0,
        "d_coef": group["d_coef"] > 0,
        "growth_rate": group["growth_rate"] > 0,
        "slice_p": isinstance(group["slice_p"], int) and group["slice_p"] >= 1,
    }
    for name, in_range in ranges.items():
        if not in_range:
            raise UserError(
                f"Prodigy got {name} = {group[name]}; expected lr, weight_decay >= 0, "
                "betas in [0, 1), beta3 in [0, 1], eps, d0, d_coef, growth_rate > 0 "
                "and a whole slice_p >= 1"
            )
    devices = {str(p.device) for p in group["params"]}
    if shared:
        devices.add(str(first["params"][0].device))
    if len(devices) > 1:
        raise UserError(
            f"the parameters are on {sorted(devices)}; a distance is measured on one device, "
            "move them together or use distance='group'"
        )
    if shared:
        _check_shared(group, first)


def _check_shared(group: dict[str, Any], first: dict[str, Any]) -> None:
    """Raises UserError for two groups that share a distance and differ in SHARED_SETTINGS."""
    for name in SHARED_SETTINGS:
        ours, theirs = group[name], first[name]
        if name == "beta3":
            ours, theirs = _beta3(group), _beta3(first)
        if ours != theirs:
            raise UserError(
                f"two groups share one distance and differ in {name} ({theirs} and {ours}); "
                "make them equal or use distance='group'"
            )


def _beta3(group: dict[str, Any]) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]
