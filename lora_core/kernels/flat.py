"""Parameters and optimizer state as views of a few flat tensors, for steps in few calls."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.text import shorten_value

# Bytes. What a CPU allocation of torch is aligned to, and more than cuBLAS needs: products of a
# view have the same bits as those of a tensor of its own.
ALIGNED = 64
SLICED = ("p0", "s")  # states that Prodigy has for every slice_p-th element only


class FlatParameters:
    """Parameters of one dtype in one tensor `param` [n], and their state in `state`, name -> [n].

    p.data and the given states become views of them. Every parameter keeps its name, hooks,
    gradient, values, strides, alignment and version counter. Code that rebinds p.data (module.to,
    swapping) takes the parameter out of the flat tensor, which GroupLayout.is_current detects; a
    new FlatParameters then copies the current values. A parameter that is not row-major (channels
    last) keeps its own memory and is copied in and out at each step. Parameters are padded with
    zeros to the alignment.
    """

    def __init__(
        self, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]], slice_p: int = 1
    ) -> None:
        """States have their parameter's shape, except "step" (one number) and SLICED."""
        self.params = list(params)
        self.slice_p = slice_p
        device = params[0].device
        self.bounds, size, sliced_size = _place(params, slice_p)  # (start, elements, start in p0)
        self.param = params[0].new_zeros(size, requires_grad=False)
        self.loose: list[tuple[Tensor, Tensor]] = []  # a parameter, its row-major copy in `param`
        for p, (start, count, _) in zip(params, self.bounds):
            view = self.param[start : start + count].view(p.shape)
            view.copy_(p.detach())
            if p.is_contiguous():
                p.data = view
            else:
                self.loose.append((p, view))
        self.state: dict[str, Tensor] = {}
        sizes = {"step": len(params), **dict.fromkeys(SLICED, sliced_size)}
        for name, value in states[0].items():
            self.state[name] = torch.zeros(sizes.get(name, size), dtype=value.dtype, device=device)
            for i, state in enumerate(states):
                old = state[name]
                place = self._find_state(i, name)
                state[name] = self.state[name][place : place + old.numel()].view(old.shape)
                state[name].copy_(old)
        self.is_sharded = any(hasattr(p, "_fsdp_flattened") for p in params)
        self.geometry = torch.tensor(self.bounds, device=device).reshape(-1, 3)  # [parameters, 3]
        self.table = DeviceTable(device)
        self.workspace: dict[str, Tensor] = {}  # temporary tensors of the kernels, made by them

    def _find_state(self, i: int, name: str) -> int:
        """Where the state `name` of parameter i begins in its flat tensor."""
        if name == "step":
            return i
        return self.bounds[i][2 if name in SLICED else 0]

    def read_gradients(self) -> list[Tensor | None]:
        """The gradient of each parameter, row-major, or None; [] if no parameter has one.

        Called first in a step. Raises UserError for a sparse gradient.
        """
        grads = []
        found = False
        for p in self.params:
            g = p.grad
            if g is not None and g.is_sparse:
                raise UserError(
                    "the optimizer got a sparse gradient; build the embedding with sparse=False"
                )
            found = found or g is not None
            grads.append(g if g is None or g.is_contiguous() else g.contiguous())
        for p, copy in self.loose:
            copy.copy_(p)
        return grads if found else []

    def send_table(
        self, settings: list[float], grads: Sequence[Tensor | None], *whole: int
    ) -> Tensor:
        """[settings, whole numbers, address of each gradient or 0] int64, on the device."""
        words = list(whole)
        for g in grads:
            words.append(0 if g is None else g.data_ptr())
        return self.table.send(settings, words)

    def iterate_tensors(
        self, grads: Sequence[Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Each parameter with a gradient: values [n], gradient [n] and state, views of the flat."""
        for i, (g, (start, count, _)) in enumerate(zip(grads, self.bounds)):
            if g is None:
                continue
            lengths = {"step": 1, **dict.fromkeys(SLICED, -(-count // self.slice_p))}
            state = {}
            for name, value in self.state.items():
                place = self._find_state(i, name)
                state[name] = value[place : place + lengths.get(name, count)]
            yield self.param[start : start + count], g.reshape(-1), state

    def finish_step(self, grads: Sequence[Tensor | None]) -> None:
        """Mark the parameters with a gradient as changed in autograd's version counters."""
        moved = []
        for p, g in zip(self.params, grads):
            if g is not None:
                moved.append(p)
        torch.autograd.graph.increment_version(moved)
        for p, copy in self.loose:
            p.copy_(copy)


def _place(params: Sequence[Tensor], slice_p: int) -> tuple[list[tuple[int, int, int]], int, int]:
    """((start, elements, start of the sliced state) of each, elements in all, sliced elements)."""
    unit = max(1, ALIGNED // params[0].element_size())
    counts = [p.numel() for p in params]
    *starts, size = accumulate((-(-count // unit) * unit for count in counts), initial=0)
    if slice_p == 1:
        return list(zip(starts, counts, starts)), size, size
    *firsts, sliced_size = accumulate((-(-count // slice_p) for count in counts), initial=0)
    return list(zip(starts, counts, firsts)), size, sliced_size


class DeviceTable:
    """A table of 64-bit words on a device: settings (doubles), then whole numbers and addresses.

    It is sent when it differs from the last one, from pinned memory, without waiting. During the
    capture of a CUDA graph each table gets its own tensor, which is kept alive for the replays; the
    pinned memory for it must already exist, so that an eager step has to come first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sent: tuple[list[float], list[int]] | None = None
        self.tensor = torch.empty(0, dtype=torch.int64, device=device)
        self.spare: Tensor | None = None
        self.captured: list[tuple[Tensor, Tensor]] = []

    def send(self, settings: list[float], whole: list[int]) -> Tensor:
        """[settings + whole] int64 on the device, the doubles by their bits."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.sent == (settings, whole) and not capturing:
            return self.tensor
        packed = struct.pack(f"={len(settings)}d{len(whole)}q", *settings, *whole)
        host = torch.frombuffer(bytearray(packed), dtype=torch.int64)
        if capturing:
            return self._capture(host)
        if self.tensor.shape != host.shape:
            self.tensor = torch.empty_like(host, device=self.device)
        if self.device.type == "cuda":
            if self.spare is None or self.spare.shape != host.shape:
                self.spare = torch.empty_like(host).pin_memory()
            host = host.pin_memory()  # torch reuses its memory only after the copy
        self.tensor.copy_(host, non_blocking=True)
        self.sent = (list(settings), list(whole))
        return self.tensor

    def _capture(self, host: Tensor) -> Tensor:
        if self.spare is None or self.spare.shape != host.shape:
            raise UserError(
                "a CUDA graph captures an optimizer that has not stepped since the last capture; "
                "run one step outside first"
            )
        pinned = self.spare
        self.spare = self.sent = None
        pinned.copy_(host)
        table = torch.empty_like(host, device=self.device)
        table.copy_(pinned, non_blocking=True)
        self.captured.append((pinned, table))
        return table


def state_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's optimizer state: float64 for float64, else float32."""
    return torch.promote_types(p.dtype, torch.float32)


class GroupLayout(NamedTuple):
    """A group's parameters, their addresses and their flat tensors."""

    params: list[Tensor]
    addresses: dict[int, int]  # id -> address, of those that have had a gradient
    flats: tuple[FlatParameters, ...]  # one for each dtype

    def is_current(self, params: Sequence[Tensor]) -> bool:
        """Whether these are still the group's parameters, at the same addresses, and those with a
        gradient are among the flat ones.
        """
        if len(params) != len(self.params):
            return False
        for p, known in zip(params, self.params):
            address = self.addresses.get(id(p))
            if p is not known or (address is None and p.grad is not None):
                return False
            if address is not None and address != p.data_ptr():
                return False
        return True


def lay_out_flat(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    initial_state: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
    slice_p: int = 1,
) -> tuple[FlatParameters, ...]:
    """The group's parameters that have had a gradient, one FlatParameters for each dtype.

    Reused from step to step while current. `initial_state` makes the state of a parameter of the
    group at its first gradient. The layout is not part of the optimizer's state: copies and pickles
    of the optimizer do not have it.
    """
    layouts: dict[int, GroupLayout] = optimizer.__dict__.setdefault("_layouts", {})
    params = group["params"]
    known = layouts.get(id(params))
    if known is not None and known.is_current(params):
        return known.flats
    state = optimizer.state
    for p in params:
        if p.grad is not None and not state[p]:
            state[p] = initial_state(p, group)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in params:
        if state.get(p):
            by_dtype.setdefault(p.dtype, []).append(p)
    flats = []
    addresses: dict[int, int] = {}
    for part in by_dtype.values():
        _check_states(part, [state[p] for p in part], slice_p)
        flats.append(FlatParameters(part, [state[p] for p in part], slice_p))
        addresses |= {id(p): p.data_ptr() for p in part}
    layouts[id(params)] = GroupLayout(list(params), addresses, tuple(flats))
    return layouts[id(params)].flats


def _check_states(
    params: Sequence[Tensor], states: Sequence[Mapping[str, Any]], slice_p: int
) -> None:
    """Raises UserError for states that no step has made: a checkpoint may be a stranger's."""
    for p, state in zip(params, states):
        sizes = {"step": 1, **dict.fromkeys(SLICED, -(-p.numel() // slice_p))}
        expected = {name: sizes.get(name, p.numel()) for name in states[0]}
        found = {name: v.numel() for name, v in state.items() if isinstance(v, Tensor)}
        if found != expected:
            raise UserError(
                f"the optimizer's saved state of a parameter has the sizes {shorten_value(found)}, "
                f"expected {expected}; begin anew in another --out"
            )


def forget_layout(optimizer: torch.optim.Optimizer) -> None:
    """Discard the layout, so that the next step makes a new one from the optimizer's state."""
    optimizer.__dict__.pop("_layouts", None)
