"""Prodigy (arXiv 2306.06101): Adam whose step size is an estimate d of the distance from the first weights to the solution.

A readable reference with prodigyopt's names, order and defaults; with one group its numbers are prodigyopt's. Where it differs, on purpose:

- a group with lr = 0, or none of whose parameters has a gradient, is frozen: parameters, moments, `s`, numerator and count keep their bits, and the
  distance is measured on the groups that move (prodigyopt goes on along stale momentum, and divides the numerator of all by the `s` of some);
- groups may differ in lr, betas, eps and weight decay; each has its own count `k` (prodigyopt reads group 0 for all, and refuses two learning rates);
- `distance="group"` gives every group its own d, for text encoders that one shared d over-trains (konstmish/prodigy#20, #34);
- d, d_max, k and the sums are 0-dim float64 tensors on the parameters' device: nothing in a step waits for the device;
- coupled weight decay leaves `.grad` alone; p0 is always a whole copy (prodigyopt asks whether a parameter is zero); state is fp32 or better.

The state of a group lies in a few flat tensors, of which `state[p]` holds views: a step is some twenty operations, however many parameters there are.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lora_core.errors import UserError

SCALARS = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
ONE_DISTANCE = ("d0", "d_coef", "growth_rate", "beta3")  # what one shared estimate can have only one of


class Prodigy(torch.optim.Optimizer):
    """Prodigy; `param_groups[i]["d"]` is the estimate of a group (0-dim tensor), and d * lr the learning rate worth logging.

    `lr` multiplies d (leave it at 1; a group's own lr is its share of the common step); `slice_p` estimates on every p-th element only;
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
            raise UserError(f"distance is {distance!r}; expected 'shared' (one d for all groups) or 'group' (one each)")
        if not lr > 0:
            raise UserError(f"lr is {lr}; Prodigy needs a default lr > 0, 1.0 as a rule (a single group may have lr = 0 and is frozen)")
        self.distance = distance
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; under a shared distance it starts from the d reached so far."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group, self.param_groups[0], shared=self.distance == "shared")
        except UserError:
            self.param_groups.pop()
            raise
        device = group["params"][0].device
        for name in SCALARS:
            value = group["d0"] if name in ("d", "d_max", "d_hat") else 0.0
            group[name] = torch.full((), value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        if self.distance == "shared":
            group.update({name: self.param_groups[0][name].clone() for name in ("d", "d_max", "d_hat", "d_denom")})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state bit for bit (torch's own method would cast fp32 state to the dtype of a half-precision parameter)."""
        saved = {group.get("distance") for group in state_dict["param_groups"]}
        if saved != {self.distance}:
            raise UserError(f"the saved Prodigy has distance {sorted(map(str, saved))}, this run {self.distance!r}; resume with the saved one")
        super().load_state_dict(state_dict)
        self._rows.clear()
        for group, old in zip(self.param_groups, state_dict["param_groups"]):
            for p, index in zip(group["params"], old["params"]):
                if index in state_dict["state"]:
                    self.state[p] = {name: value.to(p.device, copy=True) for name, value in state_dict["state"][index].items()}
            group.update({name: group[name].to(group["params"][0].device, copy=True) for name in SCALARS})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every group that has lr > 0 and a gradient, and returns the closure's loss (or None)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for groups in [self.param_groups] if self.distance == "shared" else [[group] for group in self.param_groups]:
            moving = [self._gather(group) for group in groups if group["lr"] > 0 and any(p.grad is not None for p in group["params"])]
            if moving:
                self._update(groups, moving)
        return loss

    @property
    def _rows(self) -> dict[int, tuple["Rows", ...]]:
        """id of a group's parameter list -> the flat state it had in its last step; rebuilt from `state` wherever it does not fit."""
        return self.__dict__.setdefault("_flat", {})  # copying an optimizer leaves this behind

    def _gather(self, group: dict[str, Any]) -> "Moving":
        """The parameters of a group with a gradient, the gradients (fp32 or better, decay added if coupled) and the state, made on first sight."""
        params = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise UserError("Prodigy got a sparse gradient; build the embedding with sparse=False")
        rows = self._rows.get(id(group["params"]), ())
        if {id(p) for row in rows for p in row.params} != {id(p) for p in params}:
            rows = self._rows[id(group["params"])] = tuple(self._flatten(group, part) for part in _by_dtype(params))
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        parts = []
        for row in rows:
            g = _flatten_dense_tensors([p.grad for p in row.params]).to(row.dtype)
            p = _flatten_dense_tensors(row.params).to(row.dtype)
            if scale is not None:
                g = g * (1 / scale).reshape(())
            if group["weight_decay"] and not group["decouple"]:
                g = g.add(p, alpha=group["weight_decay"])
            if found_inf is not None:  # 0 * inf is NaN: an overflown gradient has to be replaced, not multiplied away
                g = torch.where(found_inf.reshape(()) != 0, torch.zeros_like(g), g)
            parts.append(Part(row, g, p))
        return Moving(group, parts)

    def _flatten(self, group: dict[str, Any], params: list[Tensor]) -> "Rows":
        """Flat state of parameters of one dtype, new or from `state`, which holds views of it from now on."""
        dtype, flat = _wide(params[0]), {}
        for p in params:
            if not self.state[p]:
                p0 = _sliced(p, group).to(dtype, copy=True)
                moments = {"exp_avg": torch.zeros_like(p, dtype=dtype)} if group["betas"][0] > 0 else {}
                self.state[p] = {"p0": p0, "s": torch.zeros_like(p0), **moments, "exp_avg_sq": torch.zeros_like(p, dtype=dtype)}
        for name in self.state[params[0]]:
            old = [self.state[p][name] for p in params]
            flat[name] = torch.cat([x.reshape(-1) for x in old])
            for p, view, shape in zip(params, flat[name].split([x.numel() for x in old]), [x.shape for x in old]):
                self.state[p][name] = view.view(shape)
        return Rows(params, dtype, flat)

    def _update(self, groups: list[dict[str, Any]], moving: list["Moving"]) -> None:
        """One step of the groups that share a distance; `groups` holds the paused ones too, which learn of the new d and nothing else."""
        first, found_inf = moving[0].group, getattr(self, "found_inf", None)
        d, d_max = first["d"], first["d_max"]
        sums = torch.stack([total for m in moving for total in m.accumulate(found_inf)])  # N's increments at even, D's at odd places
        if any(m.sharded for m in moving):
            torch.distributed.all_reduce(sums)
        numerators = [m.group["d_numerator"] * _beta3(m.group) + gain for m, gain in zip(moving, sums[0::2])]
        numerator, denominator = torch.stack(numerators).sum(), sums[1::2].sum()

        # prodigyopt returns here if D = 0; where() keeps the same values without asking the device. NaN != 0, so a NaN still shows in the weights.
        moves = denominator != 0
        if found_inf is not None:
            moves = moves & (found_inf.reshape(()) == 0)
        d_hat = torch.where(moves, first["d_coef"] * numerator / denominator, first["d_hat"])
        grown = torch.where(d == first["d0"], torch.fmax(d, d_hat), d)
        d_max = torch.where(moves, torch.fmax(d_max, d_hat), d_max)
        new_d = torch.where(moves, torch.fmin(d_max, grown * first["growth_rate"]), d)
        for m, decayed in zip(moving, numerators):
            m.apply_(new_d, moves)
            m.group.update(d_numerator=torch.where(moves, decayed, m.group["d_numerator"]), k=m.group["k"] + moves)
        denominator = torch.where(moves, denominator, first["d_denom"])
        for group in groups:
            group.update(d=new_d, d_max=d_max, d_hat=d_hat, d_denom=denominator)


class Rows(NamedTuple):
    """Parameters of one dtype and their state, end to end."""

    params: list[Tensor]
    dtype: torch.dtype
    state: dict[str, Tensor]  # name -> [n]; s and p0 [n / slice_p]


class Part(NamedTuple):
    rows: Rows
    grad: Tensor  # [n], ours to overwrite
    param: Tensor  # [n] copies


class Moving:
    """A group in one step: what moves in it, and its learning rate dlr = d * lr * bias correction (old d)."""

    def __init__(self, group: dict[str, Any], parts: list[Part]) -> None:
        self.group, self.parts = group, parts
        self.dtype = torch.float64 if any(part.grad.dtype == torch.float64 for part in parts) else torch.float32
        self.sharded = group["fsdp_in_use"] or any(hasattr(p, "_fsdp_flattened") for part in parts for p in part.rows.params)
        (beta1, beta2), k = group["betas"], group["k"] + 1
        self.dlr = group["d"] * group["lr"]
        if group["use_bias_correction"]:
            self.dlr = self.dlr * (1 - beta2**k) ** 0.5 / (1 - beta1**k)

    def accumulate(self, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
        """(this step's gain of N, the new D = |s|_1), float64, after bringing m, v and s up to date.

        m and v carry one and two powers of d, so that m / sqrt(v) is of order 1; s and N are decayed sums without a (1 - beta3).
        """
        group, d, (beta1, beta2) = self.group, self.group["d"], self.group["betas"]
        decay1, decay2, decay3 = (_decay(beta, found_inf, d) for beta in (beta1, beta2, _beta3(group)))
        weight = (d / group["d0"] * (d if group["safeguard_warmup"] else self.dlr)).to(self.dtype)
        small_d, inner, size = d.to(self.dtype), [], []
        for rows, grad, param in self.parts:
            seen, before = (grad, param) if group["slice_p"] == 1 else (_picked(grad, rows, group), _picked(param, rows, group))
            for g, p, p0, s in zip(*(_pieces(x) for x in (seen, before, rows.state["p0"], rows.state["s"]))):
                inner.append(_sum(g * (p0 - p)))
                size.append(_sum(s.mul_(decay3).add_(g * weight).abs()))
            moments = rows.state.get("exp_avg", grad)  # beta1 = 0 has none
            for g, m, v in zip(*(_pieces(x) for x in (grad, moments, rows.state["exp_avg_sq"]))):
                scaled = g * small_d
                if beta1 > 0:
                    m.mul_(decay1).add_(scaled, alpha=1 - beta1)
                v.mul_(decay2).addcmul_(scaled, scaled, value=1 - beta2)
        return d / group["d0"] * self.dlr * torch.stack(inner).sum(), torch.stack(size).sum()

    def apply_(self, new_d: Tensor, moves: Tensor) -> None:
        """p <- p - dlr decay p - dlr m / (sqrt(v) + d eps): dlr holds the old d, eps is multiplied by the new one; bit for bit p unless `moves`."""
        group, adam = self.group, self.group["betas"][0] > 0
        by_d = (1 / new_d).to(self.dtype)
        back = -torch.where(moves, self.dlr, torch.zeros_like(self.dlr))
        decay, rate = (back * group["weight_decay"]).to(self.dtype), (back / new_d if adam else back).to(self.dtype)
        for rows, grad, param in self.parts:
            first = rows.state["exp_avg"] if adam else grad
            for change, m, v, p in zip(*(_pieces(x) for x in (grad, first, rows.state["exp_avg_sq"], param))):
                # both sides divided by d: eps stays a number
                torch.div(m, v.sqrt().mul_(by_d).add_(group["eps"]), out=change).mul_(rate)
                if group["weight_decay"] and group["decouple"]:
                    change.add_(p.mul_(decay))
            torch._foreach_add_(rows.params, _unflatten_dense_tensors(grad, rows.params))


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The whole on an accelerator (fewest launches); on a CPU pieces that stay in its cache."""
    return x.split(32768) if x.device.type == "cpu" else (x,)


def _picked(flat: Tensor, rows: Rows, group: dict[str, Any]) -> Tensor:
    """Every slice_p-th element of each parameter."""
    return torch.cat([x[:: group["slice_p"]] for x in flat.split([p.numel() for p in rows.params])])


def _by_dtype(params: list[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        found.setdefault(p.dtype, []).append(p)
    return list(found.values())


def _check(group: dict[str, Any], first: dict[str, Any], *, shared: bool) -> None:
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
    devices = {str(p.device) for p in group["params"]} | ({str(first["params"][0].device)} if shared else set())
    if len(devices) > 1:
        raise UserError(f"the parameters lie on {sorted(devices)}; a distance is measured on one device, move them together or use distance='group'")
    for name in ONE_DISTANCE if shared else ():
        ours, theirs = (_beta3(group), _beta3(first)) if name == "beta3" else (group[name], first[name])
        if ours != theirs:
            raise UserError(f"two groups share one distance and differ in {name} ({theirs} and {ours}); make them equal or use distance='group'")


def _beta3(group: dict[str, Any]) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]


def _decay(beta: float, found_inf: Tensor | None, like: Tensor) -> Any:
    """beta, or exactly 1 (a 0-dim tensor) in a step that overflowed."""
    return beta if found_inf is None else torch.where(found_inf.reshape(()) != 0, torch.ones_like(like), torch.full_like(like, beta))


def _sliced(x: Tensor, group: dict[str, Any]) -> Tensor:
    return x.reshape(-1)[:: group["slice_p"]]


def _sum(x: Tensor) -> Tensor:
    """The sum in float64: fp32 within a piece (torch sums pairwise), double across pieces."""
    return x.sum().to(torch.float32 if x.device.type == "mps" else torch.float64)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
