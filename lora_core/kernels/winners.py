"""Which twin of an op is the fastest, per device, dtype and class of shapes: two tables of measurements and a choice that costs a microsecond.

The user's table, ~/.cache/lora_core/winners.json (XDG_CACHE_HOME), which `python -m benchmarks.kernels --tune` writes,
precedes winners.json beside this module. A device is "cpu", a GPU's name, or a GPU's name and ", replayed": inside a
CUDA graph (`replayed`, measured by `--tune --graph`) a launch costs nothing, outside of one it costs more than a small
kernel does. A device that neither table names takes the estimated winner of its type, said once.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = "lora_core winners 1"
BACKENDS = ("reference", "fused", "triton")
REPLAYED = ", replayed"  # after a GPU's name: its winners inside a CUDA graph
ANY = "*"  # a class or dtype that was not measured by itself
COMMITTED = Path(__file__).with_name("winners.json")
COMMAND = "python -m benchmarks.kernels --tune"
ENTRIES = 4096  # of shapes remembered per op, device and dtype, some 1 MB; a run has as many as layers times buckets
FIELDS = {"op", "dtype", "class", "winner"}  # of a row; "seconds" of the twins are for people

WinnersByOp = dict[tuple[str, str], dict[str, str]]  # (op, dtype) -> class -> winner


class Winners(NamedTuple):
    """A device's rows and where they come from."""

    rows: WinnersByOp
    estimated: bool


class _Known:
    """What is known of one op, device and dtype."""

    def __init__(self, op: Any, rows: dict[str, str]) -> None:
        self.op = op
        self.rows = rows
        self.always = (
            next(iter(set(rows.values()))) if len(set(rows.values())) == 1 else None
        )  # whatever the shapes
        self.by_shapes: dict[Any, str] = {}


def choose_winner(name: str, op: Any, args: tuple[Any, ...]) -> str:
    """ "reference", "fused" or "triton": the fastest measured for these arguments' device, dtype (their first tensor's) and class of shapes.

    A class that was not measured takes the winner over all that were; an op or dtype that was not takes the device type's estimate. "triton" only
    for an op that has it. Under torch.compile the answer is a constant of the graph.
    """
    x = first_tensor(args)
    if torch.compiler.is_compiling():
        return _constant(
            name,
            x.device.type,
            x.device.index,
            str(x.dtype),
            op.triton is not None,
            shape_class(op, args),
        )
    key = (name, x.device, x.dtype, bool(_replayed))
    known = _memo.get(key)
    if known is None or known.op is not op:  # a row of OPS can be replaced
        known = _memo[key] = _Known(
            op, _rows(name, x.device.type, x.device.index, str(x.dtype), op.triton is not None)
        )
    if known.always is not None:
        return known.always
    shapes = _shapes(args)
    winner = known.by_shapes.get(shapes)
    if winner is None:
        if len(known.by_shapes) >= ENTRIES:
            known.by_shapes.clear()
        winner = known.by_shapes[shapes] = known.rows.get(shape_class(op, args), known.rows[ANY])
    return winner


@contextmanager
def replayed() -> Iterator[None]:
    """Inside it a GPU's winners are those of a CUDA graph: for the calls that a graph captures, and those that warm it up."""
    _replayed.append(True)
    try:
        yield
    finally:
        _replayed.pop()


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The one whose device and dtype are the row's."""
    return args[0] if isinstance(args[0], Tensor) else next(_tensors(args))


def shape_class(op: Any, args: tuple[Any, ...]) -> str:
    """The op's own class of these arguments, or every tensor's shape with its numbers rounded up to powers of two."""
    return (
        op.shape_class(*args)
        if op.shape_class
        else ",".join(_rounded(a) for a in args if isinstance(a, Tensor | tuple))
    )


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
    """The class of lora_linear's arguments: LoRA or DoRA, rows, in, out and rank, rounded up to powers of two."""
    rows, columns = x.numel() // max(1, x.shape[-1]), down.shape[1]
    kind = "alone" if weight is None else "lora" if magnitude is None else "dora"
    return f"{kind} {_up(rows)},{_up(columns)},{_up(up.shape[0])} rank {_up(down.shape[0])}"


def grouped_class(x: Tensor, members: tuple[Any, ...]) -> str:
    """The class of lora_grouped's arguments: LoRA or DoRA, rows, in, summed out and summed rank."""
    rows, out, rank = (
        x.numel() // max(1, x.shape[-1]),
        sum(m.up.shape[0] for m in members),
        sum(m.down.shape[0] for m in members),
    )
    kind = "lora" if all(m.magnitude is None for m in members) else "dora"
    return f"{kind} {len(members)} of {_up(rows)},{_up(x.shape[-1])},{_up(out)} rank {_up(rank)}"


def device_name(kind: str, index: int | None, *, graph: bool = False) -> str:
    """ "cpu", or the GPU's name, with ", replayed" for the table of its CUDA graphs."""
    return (
        (torch.cuda.get_device_name(index) + (REPLAYED if graph else ""))
        if kind == "cuda"
        else kind
    )


def cache_file() -> Path:
    """The user's table."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "lora_core"
        / "winners.json"
    )


def read_winners(path: Path) -> dict[str, Winners]:
    """Device -> its winners. ValueError, a sentence, where the file is not such a table."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("devices"), dict)
    ):
        raise ValueError(f"{path} is no table of kernels' winners (expected the format {FORMAT!r})")
    tables = {}
    for device, part in content["devices"].items():
        rows: WinnersByOp = {}
        for row in part.get("rows", [None]) if isinstance(part, dict) else [None]:
            if (
                not isinstance(row, dict)
                or not row.keys() >= FIELDS
                or row["winner"] not in BACKENDS
            ):
                raise ValueError(
                    f"{path} has a row for {device} that is none: {row!r} (expected {', '.join(sorted(FIELDS))}, winner of {BACKENDS})"
                )
            rows.setdefault((row["op"], row["dtype"]), {})[row["class"]] = row["winner"]
        tables[device] = Winners(rows, bool(part.get("estimated")))
    return tables


def store_winners(path: Path, device: str, part: dict[str, Any]) -> None:
    """Puts a device's measurements (command, date, machine, rows) into the table: a row replaces the one of its op, dtype and class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    devices: dict[str, Any] = {}
    if path.exists():
        read_winners(path)  # nothing is written over a file that is not ours
        devices = json.loads(path.read_text())["devices"]
    rows = {
        (row["op"], row["dtype"], row["class"]): row
        for row in [*devices.get(device, {}).get("rows", []), *part["rows"]]
    }
    devices[device] = part | {"rows": list(rows.values())}
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(_written(devices))
    scratch.replace(path)
    reload_winners()


def reload_winners() -> None:
    """Reads both tables again: at import, so that no traced function opens a file, and after `store`."""
    _memo.clear()
    _said.clear()
    _tables[:] = [read_winners(COMMITTED)]
    path = cache_file()
    if path.exists():
        try:
            _tables.insert(0, read_winners(path))
        except ValueError as error:
            warnings.warn(
                f"{error}; it is ignored: delete it, or measure again with {COMMAND}", stacklevel=2
            )


def _written(devices: dict[str, Any]) -> str:
    """The table as JSON with a row on a line, so that a diff of it can be read."""
    parts = []
    for device, part in devices.items():
        rows = ",\n   ".join(json.dumps(row) for row in part["rows"])
        origin = "".join(
            f"{json.dumps(key)}: {json.dumps(value)},\n   "
            for key, value in part.items()
            if key != "rows"
        )
        parts.append(f' {json.dumps(device)}: {{\n   {origin}"rows": [\n   {rows}\n  ]}}')
    return f'{{"format": {json.dumps(FORMAT)}, "devices": {{\n' + ",\n".join(parts) + "\n}}\n"


def _rows(name: str, kind: str, index: int | None, dtype: str, has_triton: bool) -> dict[str, str]:
    """Class -> winner of one op, with ANY among them."""
    dtype, device = dtype.removeprefix("torch."), device_name(kind, index, graph=bool(_replayed))
    estimate = _estimate(name, kind)
    found = {ANY: estimate}
    measured = [
        table[device] for table in _tables if device in table and not table[device].estimated
    ]
    for table in reversed(measured):  # the user's last: it precedes
        found |= table.rows.get((name, dtype), {})
    if not measured and kind != "meta" and device not in _said:
        _said.add(device)
        command = f"{COMMAND} --graph" if device.endswith(REPLAYED) else COMMAND
        warnings.warn(
            f"no kernel was measured on {device}: ops take estimated winners, from an H100's; {command} measures",
            stacklevel=3,
        )
    return {
        group: winner if winner != "triton" or has_triton else "fused"
        for group, winner in found.items()
    }


def _estimate(name: str, kind: str) -> str:
    """The winner of an op on a type of device that nobody measured."""
    part = _tables[-1].get(kind + (REPLAYED if _replayed and kind == "cuda" else ""))
    if part is None:
        return "fused"
    rows = part.rows.get((name, ANY)) or part.rows.get((ANY, ANY), {})
    return rows.get(ANY, "fused")


def _constant(
    name: str, kind: str, index: int | None, dtype: str, has_triton: bool, group: str
) -> str:
    rows = _rows(name, kind, index, dtype, has_triton)
    return rows.get(group, rows[ANY])


_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that torch.compiler.assume_constant_result does, after an import of 3 s


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _shapes(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        [
            a.shape
            if isinstance(a, Tensor)
            else _shapes(a)
            if isinstance(a, tuple | list)
            else a is None
            for a in args
        ]
    )


def _rounded(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(str(_up(n)) for n in value.shape)
    return "(" + ",".join(_rounded(v) for v in value if isinstance(v, Tensor | tuple)) + ")"


def _up(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


_memo: dict[tuple[str, torch.device, torch.dtype, bool], _Known] = {}
_replayed: list[
    bool
] = []  # a plain list, as kernels._forced: checkpointing recomputes in autograd's threads
_said: set[str] = set()
_tables: list[dict[str, Winners]] = []  # the user's first
reload_winners()
