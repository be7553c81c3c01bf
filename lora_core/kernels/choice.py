"""Which implementation of an op runs: `call` runs one, `resolve` names it.

In the mode auto it is the fastest by measurement (winners.py), looked up in about a microsecond.
LORA_KERNELS, `set_mode` and `with use_kernels("reference"):` choose another mode. LORA_CANDIDATE
puts a user's function in the place of an op (candidate.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.kernels import winners
from lora_core.kernels.candidate import VARIABLE, Candidate, read_candidate
from lora_core.kernels.device import HAS_TRITON
from lora_core.kernels.winners import ANY, REPLAYED, Winners
from lora_core.quiet_libraries import Notice

MODES = ("auto", "reference", "fused", "triton")
# Shapes remembered per op, device and dtype, some 1 MB; a run has as many as layers times buckets.
ENTRIES = 4096


class Dispatch:
    """State that the choice of an implementation depends on, beyond the op and its arguments.

    A plain object: a context variable would not reach autograd's threads, where checkpointing
    recomputes.
    """

    mode: str | None  # one of MODES; None until LORA_KERNELS is read, at the first use
    generation: int  # grows when the mode, an entry of OPS or the winners change

    def __init__(self) -> None:
        vars(self).update(mode=None, generation=0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode" and value != self.mode:
            self.generation += 1
        super().__setattr__(name, value)


dispatch = Dispatch()


@dataclass(frozen=True)
class Op:
    """One operation: its implementations, and functions that help to choose between them.

    Implementations, `supports` and `shape_class` take the reference's arguments.
    """

    reference: Callable[..., Any]
    example: Callable[..., tuple[Any, ...]]  # (seed, dtype, device) -> arguments
    fused: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    supports: Callable[..., str | None] | None = None  # why `triton` cannot run on them, or None
    shape_class: Callable[..., str] | None = None  # key in the table of winners
    candidate: Candidate | None = None  # a user's, in place of the others where it takes the args


class OpTable(dict[str, Op]):
    """Name -> op. Setting or removing an entry invalidates every function that was resolved."""

    def __setitem__(self, name: str, op: Op) -> None:
        super().__setitem__(name, op)
        dispatch.generation += 1

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        dispatch.generation += 1


OPS = OpTable()  # kernels/__init__.py fills it


def call(name: str, *args: Any) -> Any:
    """The op's result, by the implementation that `resolve` chooses."""
    return resolve(name, *args)(*args)


def resolve(name: str, *args: Any) -> Callable[..., Any]:
    """The implementation of an op for arguments of these shapes, dtype and device.

    Mode auto takes the fastest by measurement (choose_winner). Another mode takes its own
    implementation, or the next simpler one if the op has none (triton: fused; fused: reference).
    A Triton implementation is wrapped: for arguments that it does not support, the fused one runs
    and one warning gives the reason. The function may be cached for such arguments as long as
    `dispatch.generation` is unchanged.
    """
    chosen = dispatch.mode or current_mode()
    op = OPS[name]
    if op.candidate is not None and op.candidate.accepts(args):
        return partial(_run_candidate, name, op.candidate)
    if chosen == "auto":
        chosen = choose_winner(name, op, args)
    if chosen == "triton":
        return partial(_run_triton, name, op)
    return op.fused if chosen == "fused" and op.fused is not None else op.reference


def _run_candidate(name: str, candidate: Candidate, *args: Any) -> Any:
    """The result of a user's function, or for arguments that it does not take of the usual one."""
    if candidate.accepts(args):
        return candidate.run(args)
    return call(name, *args)


def _run_triton(name: str, op: Op, *args: Any) -> Any:
    """The result of the op's Triton kernels; of the fused implementation if they do not apply."""
    if op.triton is None:
        reason: str | None = "there is none"
    elif not HAS_TRITON:
        reason = "triton is not installed (it exists for Linux)"
    else:
        reason = op.supports(*args) if op.supports else None
    if reason is None and op.triton is not None:
        return op.triton(*args)
    if f"{name}: {reason}" not in _warned:
        _warned.add(f"{name}: {reason}")
        warnings.warn(f"op {name} runs without its triton kernel: {reason}", Notice, stacklevel=3)
    return (op.fused or op.reference)(*args)


# ---------------------------------------------------------------- the mode


def current_mode() -> str:
    """The current mode: that of the innermost `use_kernels`, else of `set_mode`, else LORA_KERNELS,
    else auto. Reads LORA_CANDIDATE with LORA_KERNELS, at the first use.

    Raises UserError for a LORA_KERNELS that is not one of MODES, and for a LORA_CANDIDATE that
    names no function.
    """
    if dispatch.mode is None:
        named = os.environ.get("LORA_KERNELS", "auto")
        _check_mode(named, "LORA_KERNELS")
        given = os.environ.get(VARIABLE, "")
        use_candidate(read_candidate(given, OPS) if given else None)
        dispatch.mode = named
    return dispatch.mode


def set_mode(mode: str | None) -> None:
    """Run every op in this mode from now on; None: LORA_KERNELS is read again at the next use."""
    if mode is not None:
        _check_mode(mode, "set_mode(...)")
    dispatch.mode = mode


def use_candidate(candidate: Candidate | None) -> None:
    """Run an op by a user's function from now on; None: every op by its own implementations."""
    for name, op in OPS.items():
        own = candidate if candidate is not None and candidate.op == name else None
        if op.candidate is not own:
            OPS[name] = replace(op, candidate=own)


def current_candidate() -> Candidate | None:
    """The user's function that an op runs by, if there is one."""
    found = [op.candidate for op in OPS.values() if op.candidate is not None]
    return found[0] if found else None


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Run every op in one mode inside the block; blocks nest."""
    _check_mode(mode, "use_kernels(...)")
    before = dispatch.mode
    dispatch.mode = mode
    try:
        yield
    finally:
        dispatch.mode = before


def _check_mode(mode: str, source: str) -> None:
    if mode not in MODES:
        known = ", ".join(MODES)
        raise UserError(f"{source} got the kernel mode {mode!r}; expected one of {known}")


# ---------------------------------------------------------------- the fastest by measurement


class _Choices:
    """The winners of one op on one device and dtype, and the shapes already looked up."""

    def __init__(self, op: Any, rows: dict[str, str]) -> None:
        self.op = op
        self.rows = rows
        names = set(rows.values())
        self.only = names.pop() if len(names) == 1 else None  # the winner for all shapes
        self.by_shapes: dict[Any, str] = {}


def choose_winner(name: str, op: Any, args: tuple[Any, ...]) -> str:
    """ "reference", "fused" or "triton": the fastest for arguments like these.

    Looked up by the first tensor's device and dtype, and the class of the shapes. For a class that
    was not measured it is the winner over all measured classes; for an op or dtype that was not,
    the device type's estimate. "triton" only for an op that has it. Under torch.compile the result
    is a constant of the graph.
    """
    x = args[0] if isinstance(args[0], Tensor) else winners.first_tensor(args)
    if torch.compiler.is_compiling():
        kind, index = x.device.type, x.device.index
        group = winners.shape_class(op, args)
        return _constant_winner(name, kind, index, str(x.dtype), op.triton is not None, group)
    key = (name, x.device, x.dtype, bool(_replayed))
    choices = _memo.get(key)
    if choices is None or choices.op is not op:  # a row of OPS can be replaced
        rows = _find_rows(name, x.device.type, x.device.index, str(x.dtype), op.triton is not None)
        choices = _memo[key] = _Choices(op, rows)
    if choices.only is not None:
        return choices.only
    shapes = _shapes(args)
    winner = choices.by_shapes.get(shapes)
    if winner is None:
        if len(choices.by_shapes) >= ENTRIES:
            choices.by_shapes.clear()
        winner = choices.rows.get(winners.shape_class(op, args), choices.rows[ANY])
        choices.by_shapes[shapes] = winner
    return winner


@contextmanager
def replayed() -> Iterator[None]:
    """Inside the block a GPU's winners are those of its CUDA graphs.

    For the calls that a graph captures, and the warm-up calls before.
    """
    _replayed.append(True)
    dispatch.generation += 1
    try:
        yield
    finally:
        _replayed.pop()
        dispatch.generation += 1


def is_replayed() -> bool:
    """Whether this is inside a block of `replayed`: what is done here, a CUDA graph repeats."""
    return bool(_replayed)


def store_winners(path: Path, device: str, part: dict[str, Any]) -> None:
    """Write a device's measurements into the table at `path`, and choose by them from now on."""
    winners.write_winners(path, device, part)
    reload_winners()


def reload_winners() -> None:
    """Read both tables again.

    Called at import, so that no traced function opens a file, and after `store_winners`.
    """
    _memo.clear()
    _warned_devices.clear()
    _tables[:] = [winners.read_winners(winners.COMMITTED)]
    dispatch.generation += 1
    path = winners.cache_file()
    if path.exists():
        try:
            _tables.insert(0, winners.read_winners(path))
        except ValueError as error:
            advice = f"delete it, or measure again with {winners.COMMAND}"
            warnings.warn(f"{error}; it is ignored: {advice}", Notice, stacklevel=2)


def _find_rows(
    name: str, kind: str, index: int | None, dtype: str, has_triton: bool
) -> dict[str, str]:
    """Class -> winner of one op, with ANY among them."""
    dtype = dtype.removeprefix("torch.")
    device = winners.device_name(kind, index, graph=bool(_replayed))
    rows = {ANY: _estimated_winner(name, kind)}
    measured = []
    for table in _tables:
        if device in table and not table[device].estimated:
            measured.append(table[device])
    for part in reversed(measured):  # the user's last: it precedes
        rows |= part.rows.get((name, dtype), {})
    if not measured and kind != "meta" and device not in _warned_devices:
        _warned_devices.add(device)
        command = f"{winners.COMMAND} --graph" if device.endswith(REPLAYED) else winners.COMMAND
        warnings.warn(
            f"no kernel was measured on {device}: ops take estimated winners, from an H100's; "
            f"{command} measures",
            Notice,
            stacklevel=3,
        )
    if not has_triton:
        rows = {group: "fused" if won == "triton" else won for group, won in rows.items()}
    return rows


def _estimated_winner(name: str, kind: str) -> str:
    """The winner of an op on a type of device that was not measured."""
    part = _tables[-1].get(kind + (REPLAYED if _replayed and kind == "cuda" else ""))
    if part is None:
        return "fused"
    rows = part.rows.get((name, ANY)) or part.rows.get((ANY, ANY), {})
    return rows.get(ANY, "fused")


def _constant_winner(
    name: str, kind: str, index: int | None, dtype: str, has_triton: bool, group: str
) -> str:
    rows = _find_rows(name, kind, index, dtype, has_triton)
    return rows.get(group, rows[ANY])


# All that torch.compiler.assume_constant_result does, after an import of 3 s.
_constant_winner._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _shapes(args: Sequence[Any]) -> tuple[Any, ...]:
    """The shapes of the tensors among the arguments, which arguments are None, and nothing else."""
    shapes: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            shapes.append(value.shape)
        elif isinstance(value, tuple | list):
            shapes.append(_shapes(value))
        else:
            shapes.append(value is None)
    return tuple(shapes)


_memo: dict[tuple[str, torch.device, torch.dtype, bool], _Choices] = {}
# A plain list: a context variable would not reach autograd's threads, where checkpointing
# recomputes.
_replayed: list[bool] = []
_warned: set[str] = set()  # sentences about ops
_warned_devices: set[str] = set()
_tables: list[dict[str, Winners]] = []  # the user's first
reload_winners()
