"""The winners: the fastest implementation of each op by measurement, per device, dtype and shapes.

Two tables: the user's, ~/.cache/lora_core/winners.json (XDG_CACHE_HOME), which
`python -m benchmarks.kernels --tune` writes, precedes winners.json next to this module. A device is
"cpu", a GPU's name, or a GPU's name and ", replayed" for its CUDA graphs (measured by `--tune
--graph`), in which a launch costs nothing; outside of one it costs more than a small kernel. For a
device that is in neither table the estimated winners of its type are used, with one warning.
choice.py looks them up.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = "lora_core winners 1"
BACKENDS = ("reference", "fused", "triton")
REPLAYED = ", replayed"  # after a GPU's name: its winners inside a CUDA graph
ANY = "*"  # stands for any class or dtype that was not measured
COMMITTED = Path(__file__).with_name("winners.json")
COMMAND = "python -m benchmarks.kernels --tune"
FIELDS = {"op", "dtype", "class", "winner"}  # required in a row; its "seconds" are not read

WinnersByOp = dict[tuple[str, str], dict[str, str]]  # (op, dtype) -> class -> winner


class Winners(NamedTuple):
    """A device's rows of the table, and whether they are estimates."""

    rows: WinnersByOp
    estimated: bool


# ---------------------------------------------------------------- classes of shapes


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


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _rounded_shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(str(_power_of_two(size)) for size in value.shape)
    return "(" + ",".join(_rounded_shape(v) for v in value if isinstance(v, Tensor | tuple)) + ")"


def _power_of_two(number: int) -> int:
    """The number rounded up to a power of two."""
    return 1 << max(0, number - 1).bit_length()


# ---------------------------------------------------------------- tables


def device_name(kind: str, index: int | None, *, graph: bool = False) -> str:
    """ "cpu", or the GPU's name, with ", replayed" for the table of its CUDA graphs."""
    if kind != "cuda":
        return kind
    return torch.cuda.get_device_name(index) + (REPLAYED if graph else "")


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


def write_winners(path: Path, device: str, part: dict[str, Any]) -> None:
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
