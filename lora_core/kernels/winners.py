"""The winners: the fastest implementation of each op by measurement, per device, dtype and shapes.

Two tables: the user's, ~/.cache/lora_core/winners.json (XDG_CACHE_HOME), which
`python -m benchmarks.kernels --tune` writes, precedes winners.json next to this module. A device is
"cpu", a GPU's name, or a GPU's name and ", replayed" for its CUDA graphs (measured by `--tune
--graph`), in which a launch costs nothing; outside of one it costs more than a small kernel. For a
device that is in neither table the estimated winners of its type are used, with one warning.
A choice takes about a microsecond.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.modes import dispatch

FORMAT = "lora_core winners 1"
BACKENDS = ("reference", "fused", "triton")
REPLAYED = ", replayed"  # after a GPU's name: its winners inside a CUDA graph
ANY = "*"  # stands for any class or dtype that was not measured
COMMITTED = Path(__file__).with_name("winners.json")
COMMAND = "python -m benchmarks.kernels --tune"
# Shapes remembered per op, device and dtype, some 1 MB; a run has as many as layers times buckets.
ENTRIES = 4096
FIELDS = {"op", "dtype", "class", "winner"}  # required in a row; its "seconds" are not read

WinnersByOp = dict[tuple[str, str], dict[str, str]]  # (op, dtype) -> class -> winner


class Winners(NamedTuple):
    """A device's rows of the table, and whether they are estimates."""

    rows: WinnersByOp
    estimated: bool


class _Choices:
    """The winners of one op on one device and dtype, and the shapes already looked up."""

    def __init__(self, op: Any, rows: dict[str, str]) -> None:
        self.op = op
        self.rows = rows
        winners = set(rows.values())
        self.only = winners.pop() if len(winners) == 1 else None  # the winner for all shapes
        self.by_shapes: dict[Any, str] = {}


def choose_winner(name: str, op: Any, args: tuple[Any, ...]) -> str:
    """ "reference", "fused" or "triton": the fastest for arguments like these.

    Looked up by the first tensor's device and dtype, and the class of the shapes. For a class that
    was not measured it is the winner over all measured classes; for an op or dtype that was not,
    the device type's estimate. "triton" only for an op that has it. Under torch.compile the result
    is a constant of the graph.
    """
    x = args[0] if isinstance(args[0], Tensor) else first_tensor(args)
    if torch.compiler.is_compiling():
        kind, index = x.device.type, x.device.index
        group = shape_class(op, args)
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
        winner = choices.rows.get(shape_class(op, args), choices.rows[ANY])
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


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The tensor whose device and dtype select the rows of the table."""
    return args[0] if isinstance(args[0], Tensor) else next(_tensors(args))


def shape_class(op: Any, args: tuple[Any, ...]) -> str:
    """The op's own class of these arguments, or all shapes with sizes rounded to powers of two."""
    if op.shape_class:
        return op.shape_class(*args)
    return ",".join(_rounded_shape(a) for a in args if isinstance(a, Tensor | tuple))


def linear_class(
    x: Tensor,
    weight: Tensor | None,
    bias: Any,
    down: Tensor,
    up: Tensor,
    scale: Any,
    magnitude: Any = None,
    *rest: Any,
) -> str:
    """The class of lora_linear's arguments.

    LoRA or DoRA, rows, in, out and rank, rounded up to powers of two.
    """
    rows = _power_of_two(x.numel() // max(1, x.shape[-1]))
    width, out = _power_of_two(down.shape[1]), _power_of_two(up.shape[0])
    kind = "alone" if weight is None else "lora" if magnitude is None else "dora"
    return f"{kind} {rows},{width},{out} rank {_power_of_two(down.shape[0])}"


def grouped_class(x: Tensor, members: tuple[Any, ...]) -> str:
    """The class of lora_grouped's arguments.

    LoRA or DoRA, the number of members, rows, in, summed out and summed rank, rounded up to powers
    of two.
    """
    rows, width = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    out, rank = sum(m.up.shape[0] for m in members), sum(m.down.shape[0] for m in members)
    kind = "lora" if all(m.magnitude is None for m in members) else "dora"
    sizes = ",".join(str(_power_of_two(size)) for size in (rows, width, out))
    return f"{kind} {len(members)} of {sizes} rank {_power_of_two(rank)}"


def conv_class(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    *geometry: Any,
) -> str:
    """The class of lora_conv's arguments.

    The kernel's size, input pixels, in, out and rank, rounded up to powers of two, and the stride.
    """
    kernel = "x".join(map(str, down.shape[2:]))
    sizes = len(x) * math.prod(x.shape[2:]), x.shape[1], len(up), len(down)
    pixels, width, out, rank = (_power_of_two(size) for size in sizes)
    stride = "x".join(map(str, geometry[0]))
    return f"{kernel} {pixels},{width},{out} rank {rank} stride {stride}"


def device_name(kind: str, index: int | None, *, graph: bool = False) -> str:
    """ "cpu", or the GPU's name, with ", replayed" for the table of its CUDA graphs."""
    if kind != "cuda":
        return kind
    return torch.cuda.get_device_name(index) + (REPLAYED if graph else "")


# ---------------------------------------------------------------- tables


def cache_file() -> Path:
    """Path of the user's table."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "lora_core" / "winners.json"


def read_winners(path: Path) -> dict[str, Winners]:
    """Device -> its winners. Raises ValueError for a file that is not a table of winners."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    is_table = isinstance(content, dict) and content.get("format") == FORMAT
    if not is_table or not isinstance(content.get("devices"), dict):
        raise ValueError(f"{path} is not a table of winners (expected the format {FORMAT!r})")
    tables = {}
    for device, part in content["devices"].items():
        rows: WinnersByOp = {}
        entries: list[Any] = part.get("rows", [None]) if isinstance(part, dict) else [None]
        for row in entries:
            if not _is_winner_row(row):
                expected = f"{', '.join(sorted(FIELDS))}, winner of {BACKENDS}"
                raise ValueError(
                    f"{path} has an invalid row for {device}: {row!r} (expected {expected})"
                )
            rows.setdefault((row["op"], row["dtype"]), {})[row["class"]] = row["winner"]
        tables[device] = Winners(rows, bool(part.get("estimated")))
    return tables


def _is_winner_row(row: Any) -> bool:
    return isinstance(row, dict) and row.keys() >= FIELDS and row["winner"] in BACKENDS


def store_winners(path: Path, device: str, part: dict[str, Any]) -> None:
    """Write a device's measurements (command, date, machine, rows) into the table.

    A row replaces the one of its op, dtype and class.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    devices: dict[str, Any] = {}
    if path.exists():
        read_winners(path)  # nothing is written over a file that is not ours
        devices = json.loads(path.read_text())["devices"]
    rows = {}
    for row in [*devices.get(device, {}).get("rows", []), *part["rows"]]:
        rows[row["op"], row["dtype"], row["class"]] = row
    devices[device] = part | {"rows": list(rows.values())}
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(_to_json(devices))
    scratch.replace(path)
    reload_winners()


def reload_winners() -> None:
    """Read both tables again.

    Called at import, so that no traced function opens a file, and after `store_winners`.
    """
    _memo.clear()
    _warned_devices.clear()
    _tables[:] = [read_winners(COMMITTED)]
    dispatch.generation += 1
    path = cache_file()
    if path.exists():
        try:
            _tables.insert(0, read_winners(path))
        except ValueError as error:
            advice = f"delete it, or measure again with {COMMAND}"
            warnings.warn(f"{error}; it is ignored: {advice}", stacklevel=2)


def _to_json(devices: dict[str, Any]) -> str:
    """The table as JSON with one row on each line, so that diffs are readable."""
    parts = []
    for device, part in devices.items():
        rows = ",\n   ".join(json.dumps(row) for row in part["rows"])
        origin = ""
        for key, value in part.items():
            if key != "rows":
                origin += f"{json.dumps(key)}: {json.dumps(value)},\n   "
        parts.append(f' {json.dumps(device)}: {{\n   {origin}"rows": [\n   {rows}\n  ]}}')
    return f'{{"format": {json.dumps(FORMAT)}, "devices": {{\n' + ",\n".join(parts) + "\n}}\n"


# ---------------------------------------------------------------- look-up


def _find_rows(
    name: str, kind: str, index: int | None, dtype: str, has_triton: bool
) -> dict[str, str]:
    """Class -> winner of one op, with ANY among them."""
    dtype = dtype.removeprefix("torch.")
    device = device_name(kind, index, graph=bool(_replayed))
    rows = {ANY: _estimated_winner(name, kind)}
    measured = []
    for table in _tables:
        if device in table and not table[device].estimated:
            measured.append(table[device])
    for winners in reversed(measured):  # the user's last: it precedes
        rows |= winners.rows.get((name, dtype), {})
    if not measured and kind != "meta" and device not in _warned_devices:
        _warned_devices.add(device)
        command = f"{COMMAND} --graph" if device.endswith(REPLAYED) else COMMAND
        warnings.warn(
            f"no kernel was measured on {device}: ops take estimated winners, from an H100's; "
            f"{command} measures",
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


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


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


def _rounded_shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(str(_power_of_two(size)) for size in value.shape)
    return "(" + ",".join(_rounded_shape(v) for v in value if isinstance(v, Tensor | tuple)) + ")"


def _power_of_two(number: int) -> int:
    """The number rounded up to a power of two."""
    return 1 << max(0, number - 1).bit_length()


_memo: dict[tuple[str, torch.device, torch.dtype, bool], _Choices] = {}
# A plain list: a context variable would not reach autograd's threads, where checkpointing
# recomputes.
_replayed: list[bool] = []
_warned_devices: set[str] = set()
_tables: list[dict[str, Winners]] = []  # the user's first
reload_winners()
