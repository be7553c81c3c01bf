"""Timing of contenders that take turns in one process; tables and JSON files of a benchmark.

    times = alternate({"ours": ours, "peft": peft}, 9)
    print(1e3 * median_seconds(times, "ours"), median_ratio(times, "ours", "peft"))

A figure on the CPU is the median of rounds in processor seconds of this process, which other
programs change least; wall-clock seconds are recorded too.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import UserError, quiet_status
from lora_core.kernels import choice

# Seconds that a contender runs in a round: process_time ticks in microseconds, a scheduler's slice
# takes milliseconds.
FLOOR = 0.005
WARM = 2  # untimed calls: memory, caches of kernels, autotuning
LEAST = 3  # rounds that are run regardless of the time limit
# Bytes written between repeats where the device does not report the size of its L2; B200's has
# 126 MB.
# A graph's launch takes some 10 us, less than writing these bytes: by memory bandwidth 60 us on an
# H200, 32 on a B200.
FLUSH = 256 * 2**20

Call = Callable[[], object]


class Times(dict[str, list[float]]):
    """Name -> seconds of one call in each round, lists of one length.

    Wall-clock time on the CPU, time between CUDA events on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        # the same in processor seconds of this process and its threads; empty on a GPU
        self.processor: dict[str, list[float]] = {}
        # name -> why a contender could not be captured as a CUDA graph
        self.left_out: dict[str, str] = {}


def alternate(
    contenders: Mapping[str, Call],
    rounds: int = 7,
    *,
    device: str | torch.device = "cpu",
    graph: bool = False,
    floor: float | None = None,
    limit: float = math.inf,
) -> Times:
    """Seconds of one call of each contender in each of `rounds` rounds.

    Every round runs all of them, each round beginning with another one. In a round a contender is
    called as often as fills `floor` seconds (None: FLOOR, on a GPU a fifth). After `limit` seconds
    no further round starts, once there are LEAST.
    On a GPU the L2 is overwritten before each call. Without `graph` the queue is empty then, so
    that the host's launches count, as in a training loop at batch 1; with `graph` each contender is
    captured, and its replay waits in the queue while the L2 is overwritten, so that only the GPU's
    time counts. Contenders that cannot be captured are in `left_out`.
    """
    times, device = Times(), torch.device(device)
    if floor is None:
        floor = FLOOR if device.type == "cpu" else FLOOR / 5  # events tick in half microseconds
    start = time.perf_counter()
    ready = dict(contenders)
    for name in contenders:
        try:
            ready[name] = _warm(contenders[name], device, graph)
        except RuntimeError as error:
            if not graph:
                raise
            del ready[name]
            times.left_out[name] = str(error).splitlines()[0]
    run = _events(device, queued=graph) if device.type == "cuda" else _clocks
    calls = {}
    for name, call in ready.items():
        seconds = min(run(call, 1)[0], run(call, 1)[0])
        calls[name] = max(1, math.ceil(floor / seconds))
    order = list(ready)
    for done in range(rounds):
        if done >= LEAST and time.perf_counter() - start > limit:
            break
        first = done % max(1, len(order))
        for name in order[first:] + order[:first]:
            clock, processor = run(ready[name], calls[name])
            times.setdefault(name, []).append(clock)
            if device.type != "cuda":
                times.processor.setdefault(name, []).append(processor)
    return times


def _warm(call: Call, device: torch.device, graph: bool) -> Call:
    """The call, or its captured CUDA graph, after warm-up calls."""
    if graph and device.type == "cuda":
        with choice.replayed():
            return capture_graph(call)
    for _ in range(WARM):
        call()
    return call


def capture_graph(call: Call) -> Callable[[], None]:
    """A function that replays the CUDA graph of one call.

    The call has to read and write the same tensors each time. Raises RuntimeError where it cannot
    be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # as in torch.cuda.graph's documentation: libraries make their workspaces before the capture
    with torch.cuda.stream(side):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> None:
        _ = kept  # the graph's memory must live as long as it is replayed
        graph.replay()

    return replay


def _clocks(call: Call, calls: int) -> tuple[float, float]:
    """(wall-clock, processor) seconds of one call, without garbage collection."""
    collects = gc.isenabled()
    gc.disable()
    try:
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        end, spent = time.perf_counter(), time.process_time()
    finally:
        if collects:
            gc.enable()
    return (end - clock) / calls, (spent - processor) / calls


def _events(device: torch.device, *, queued: bool) -> Callable[[Call, int], tuple[float, float]]:
    """The counterpart of `_clocks` on a GPU: (seconds between CUDA events, 0).

    `queued`: the call is issued while the GPU still overwrites its L2, which hides the time of a
    graph's launch.
    """
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    buffer = torch.empty(FLUSH if queued else 2 * size or FLUSH, dtype=torch.uint8, device=device)

    def run(call: Call, calls: int) -> tuple[float, float]:
        total = 0.0
        for _ in range(calls):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            buffer.zero_()
            if not queued:
                torch.cuda.synchronize(device)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            total += begin.elapsed_time(end) / 1e3
        return total / calls, 0.0

    return run


def median_seconds(times: Times, name: str) -> float:
    """Seconds of one call: the median of rounds, in processor seconds on the CPU."""
    return statistics.median((times.processor or times)[name])


def median_ratio(times: Times, name: str, other: str, *, clock: bool = False) -> float:
    """Median over the rounds of name / other in the same round.

    In processor seconds on the CPU, unless `clock` is set.
    """
    return statistics.median(_ratios(times, name, other, clock=clock))


def middle_half(times: Times, name: str, other: str) -> tuple[float, float]:
    """(first, third) quartile of the rounds' name / other, whose median is `median_ratio`."""
    ratios = _ratios(times, name, other)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


def _ratios(times: Times, name: str, other: str, *, clock: bool = False) -> list[float]:
    seconds = times if clock or not times.processor else times.processor
    return [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; values above 0."""
    return statistics.geometric_mean(values)


def check_positive(args: argparse.Namespace, *counts: str) -> None:
    """Raises UserError for an option among `counts` below 1, and for a GPU that does not exist."""
    for name in counts:
        given = getattr(args, name)
        values = given if isinstance(given, list) else [given]
        if any(value is not None and value < 1 for value in values):
            received = " ".join(map(str, values))
            raise UserError(f"--{name} is {received}; expected a number from 1 on")
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no GPU; use --device cpu")


def describe_machine(device: str | torch.device = "cpu") -> str:
    """The machine in one line: processor or GPU, torch, triton, threads, load of other programs."""
    name = _processor()
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda}), {name}"
    try:
        triton = f"triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        triton = "no triton"
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores"
    if hasattr(os, "getloadavg"):
        cores += f", load {os.getloadavg()[0]:.1f}"
    used = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{name}, {cores}, {used}, torch {torch.__version__}, {triton}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def text_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with aligned columns: text left, numbers right with three digits, None as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(*cells)) if cells else [()] * len(heads)
    lines = [""] * (1 + len(cells))
    for head, column in zip(heads, columns, strict=True):
        whole = [head, *column]
        width = max(map(len, whole))
        is_text = bool(column) and not any(map(_is_number, column))
        for i, cell in enumerate(whole):
            lines[i] += "  " + (cell.ljust(width) if is_text else cell.rjust(width))
    return "\n".join(line[2:].rstrip() for line in lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-.<"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1e3 else f"{value:.3g}"


def write_json(path: Path | str, results: Mapping[str, Any]) -> None:
    """Write the results as JSON, with the command and the date.

    Raises ValueError for a number that is not finite.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    origin = {"command": " ".join([program, *sys.argv[1:]]), "date": date.today().isoformat()}
    Path(path).write_text(json.dumps(origin | dict(results), indent=1, allow_nan=False) + "\n")


def main() -> None:
    print(describe_machine("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(quiet_status(main))
