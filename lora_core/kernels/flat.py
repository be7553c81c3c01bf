"""Many parameters as views of one tensor, so that an optimiser's step is a call and not a loop."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError

ALIGNED = 64  # bytes; what a CPU allocation of torch is aligned to, and more than cuBLAS asks for: products of a view keep their bits


class FlatParameters:
    """Parameters of one dtype in one tensor `param` [n], their state in `state` (name -> [n]), of which p.data and the given states become views.

    Every parameter keeps its name, hooks, gradient, values, strides, alignment and version counter. Whoever rebinds p.data (module.to, swapping)
    leaves the buffer: `whole` says so, and a new Flat takes over the values found then. A parameter that is not row-major (channels last) stays
    where it is and is copied in and out at each step. Between the parameters lie zeros, up to the next aligned place.
    """

    def __init__(
        self, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], slice_p: int = 1
    ) -> None:
        """States are shaped as their parameter, but "step" is one number, and "p0" and "s" are [every slice_p-th element]."""
        self.params = list(params)
        device, unit = params[0].device, max(1, ALIGNED // params[0].element_size())
        counts = [p.numel() for p in params]
        seen = [-(-count // slice_p) for count in counts]
        *starts, size = 0, *accumulate(-(-count // unit) * unit for count in counts)
        *firsts, picked = (*starts, size) if slice_p == 1 else (0, *accumulate(seen))
        self.bounds = list(
            zip(starts, counts, firsts)
        )  # start in param, elements, start in p0 and s
        self.param = params[0].new_zeros(size, requires_grad=False)
        self.loose: list[tuple[Tensor, Tensor]] = []  # a parameter and its row-major copy here
        for p, start, count in zip(params, starts, counts):
            view = self.param[start : start + count].view(p.shape)
            view.copy_(p.detach())
            if p.is_contiguous():
                p.data = view
            else:
                self.loose.append((p, view))
        self.state: dict[str, Tensor] = {}
        ones = list(range(len(params)))
        for name in states[0]:
            places, total = {
                "step": (ones, len(ones)),
                "p0": (firsts, picked),
                "s": (firsts, picked),
            }.get(name, (starts, size))
            self.state[name] = torch.zeros(total, dtype=states[0][name].dtype, device=device)
            for state, place in zip(states, places):
                old = state[name]
                state[name] = (
                    self.state[name][place : place + old.numel()].view(old.shape).copy_(old)
                )
        self.places = [p.data_ptr() for p in params]
        self.geometry = torch.tensor(self.bounds, device=device).reshape(-1, 3)  # [parameters, 3]
        self.words = DeviceTable(device)
        self.room: dict[str, Tensor] = {}  # workspace of the kernels, made by them

    def whole(self) -> bool:
        """Whether every parameter is where it was laid."""
        return [p.data_ptr() for p in self.params] == self.places

    def gradients(self) -> list[Tensor | None]:
        """The gradient of each parameter, row-major, or None, to begin a step with. Raises UserError for a sparse one."""
        grads = [p.grad for p in self.params]
        if any(g is not None and g.is_sparse for g in grads):
            raise UserError(
                "the optimiser got a sparse gradient; build the embedding with sparse=False"
            )
        for p, copy in self.loose:
            copy.copy_(p)
        return [g if g is None or g.is_contiguous() else g.contiguous() for g in grads]

    def finish(self, grads: Sequence[Tensor | None]) -> None:
        """Ends a step: autograd learns that the parameters with a gradient have changed."""
        torch.autograd.graph.increment_version(
            [p for p, g in zip(self.params, grads) if g is not None]
        )
        for p, copy in self.loose:
            p.copy_(copy)


class DeviceTable:
    """64-bit words on a device, whole numbers and then doubles: the addresses of gradients and the numbers of a recipe.

    They are sent when they differ from the last ones, from pinned memory without a wait. Within the capture of a CUDA graph they get a tensor of
    their own, which stays alive for its replays; pinned memory for that must lie ready, so a step outside of any graph has to come first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sent: tuple[list[int], list[float]] | None = None
        self.tensor = torch.empty(0, dtype=torch.int64, device=device)
        self.spare: Tensor | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []

    def send(self, whole: list[int], numbers: list[float]) -> Tensor:
        """[whole + numbers] int64 on the device, the doubles by their bits."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.sent == (whole, numbers) and not capturing:
            return self.tensor
        host = torch.frombuffer(
            bytearray(struct.pack(f"={len(whole)}q{len(numbers)}d", *whole, *numbers)),
            dtype=torch.int64,
        )
        if capturing:
            return self._captured(host)
        if self.tensor.shape != host.shape:
            self.tensor = torch.empty_like(host, device=self.device)
        if self.device.type == "cuda":
            if self.spare is None or self.spare.shape != host.shape:
                self.spare = torch.empty_like(host).pin_memory()
            host = host.pin_memory()  # torch reuses its memory only after the copy
        self.tensor.copy_(host, non_blocking=True)
        self.sent = (list(whole), list(numbers))
        return self.tensor

    def _captured(self, host: Tensor) -> Tensor:
        if self.spare is None or self.spare.shape != host.shape:
            raise UserError(
                "a CUDA graph captures an optimiser that has not stepped since the last capture; run one step outside first"
            )
        pinned, self.spare, self.sent = self.spare, None, None
        pinned.copy_(host)
        table = torch.empty_like(host, device=self.device)
        table.copy_(pinned, non_blocking=True)
        self.kept.append((pinned, table))
        return table


def state_dtype(p: Tensor) -> torch.dtype:
    """fp64 for fp64 parameters, else fp32: what their state is kept in."""
    return torch.promote_types(p.dtype, torch.float32)


def lay_out_flat(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    fresh: Callable[[Tensor], dict[str, Tensor]],
    slice_p: int = 1,
) -> Sequence[FlatParameters]:
    """The group's parameters that have had a gradient, a Flat for each dtype; the same ones from step to step while they fit.

    `fresh` gives the state of a parameter at its first gradient. The layout is no part of an optimiser's state: copies and pickles leave it behind.
    """
    kept = optimizer.__dict__.setdefault("_layouts", {})
    params = group["params"]
    known = kept.get(id(params))
    if known is not None:
        ids, laid, flats = known
        if (
            ids == [id(p) for p in params]
            and all(p.grad is None or id(p) in laid for p in params)
            and all(flat.whole() for flat in flats)
        ):
            return flats
    state = optimizer.state
    for p in params:
        if p.grad is not None and not state[p]:
            state[p] = fresh(p)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        if state.get(p):
            by_dtype.setdefault(p.dtype, []).append(p)
    flats = tuple(
        FlatParameters(part, [state[p] for p in part], slice_p) for part in by_dtype.values()
    )
    kept[id(params)] = (
        [id(p) for p in params],
        {id(p) for part in by_dtype.values() for p in part},
        flats,
    )
    return flats


def forget_layout(optimizer: torch.optim.Optimizer) -> None:
    """The next step lays everything out anew, from the optimiser's state."""
    optimizer.__dict__.pop("_layouts", None)
