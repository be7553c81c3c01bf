"""Runs in processes of their own, for the tests of `make soak`: started, watched, killed, compared.

SOAK_LAUNCH="torchrun --nproc-per-node 2" puts a launcher in front of the runs that are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LAUNCH = shlex.split(os.environ.get("SOAK_LAUNCH", ""))


def start_run(
    words: Sequence[str],
    log: Path,
    *,
    launch: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """`python train.py WORDS`, or `LAUNCH train.py WORDS`, in a session of its own, writing its
    output to `log`. `settings`: variables of tests/soak_child.py.
    """
    command = [*(launch or [sys.executable]), str(ROOT / "tests" / "soak_child.py"), *words]
    inherited = dict(os.environ, PYTHONPATH=str(ROOT))
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | dict(settings or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


# ---------------------------------------------------------------- what a process uses


class Reading(NamedTuple):
    """What a process has used, at a moment."""

    seconds: float  # of the wall clock, without those in which it waited for a free processor
    steps: int  # done and logged
    resident: int  # bytes of memory
    files: int  # open ones


@dataclass
class Watcher:
    """Reads what a running process uses, from Linux's /proc."""

    process: subprocess.Popen[bytes]
    metrics: Path  # the log, whose last whole line has the steps done

    def read(self) -> Reading | None:
        """None before the first step is logged, and where the process has ended."""
        folder = Path("/proc", str(self.process.pid))
        try:
            steps = last_step(self.metrics)
            pages = int((folder / "statm").read_text().split()[1])
            waited = int((folder / "schedstat").read_text().split()[1]) / 1e9
            count = len(os.listdir(folder / "fd"))
        except (OSError, IndexError):
            return None
        seconds = time.monotonic() - waited
        return Reading(seconds, steps, pages * os.sysconf("SC_PAGE_SIZE"), count)


def follow_run(run: Watcher) -> list[Reading]:
    """Readings of a run, two in a second, until it ends."""
    found = []
    while run.process.poll() is None:
        time.sleep(0.5)
        if (reading := run.read()) is not None:
            found.append(reading)
    return found


def last_step(log: Path) -> int:
    """The step of the last whole line of a log in JSON lines; IndexError where it has none."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 4096))
        line = file.read().split(b"\n")[-2]
    return int(line.split(b'"step": ')[1].split(b",")[0])


class Soaked(NamedTuple):
    """What happened to memory, open files and speed over a long run."""

    memory: tuple[float, float]  # mean resident bytes in the second and in the last quarter
    files: tuple[int, int]  # most open files in the second and in the last quarter
    speed: tuple[float, float]  # steps per second in the second tenth and in the last


def sum_up(readings: Sequence[Reading], steps: int) -> Soaked:
    """Memory, open files and speed early and late in a run of so many steps."""

    def between(first: float, last: float) -> list[Reading]:
        return [r for r in readings if first * steps <= r.steps < last * steps]

    def speed(part: Sequence[Reading]) -> float:
        return (part[-1].steps - part[0].steps) / (part[-1].seconds - part[0].seconds)

    early, late = between(1 / 4, 2 / 4), between(3 / 4, 1)
    return Soaked(
        (mean(r.resident for r in early), mean(r.resident for r in late)),
        (max(r.files for r in early), max(r.files for r in late)),
        (speed(between(0.1, 0.2)), speed(between(0.9, 1.0))),
    )


# ---------------------------------------------------------------- what a run has written


def differences(run: Path, other: Path) -> list[str]:
    """Names of the files that only one of two finished runs has, or that differ in a byte.

    The seconds and the memory that a run took are left out, and its folders in config.toml;
    checksums of state.json, and report.html, are not compared.
    """
    found = []
    names = {file.relative_to(run) for file in run.rglob("*") if file.is_file()}
    others = {file.relative_to(other) for file in other.rglob("*") if file.is_file()}
    for name in sorted(names | others):
        if name not in names or name not in others:
            found.append(f"{name} (missing)")
        elif name.name in ("checksums.b2", "report.html"):
            continue
        elif _content(run / name) != _content(other / name):
            found.append(str(name))
    return found


def _content(file: Path) -> object:
    """The bytes of a file; of those with measurements or folders what is left without them."""
    left_out = {"config.toml": ("out = ", "cache = "), "README.md": ("| peak memory",)}
    if file.name in left_out:
        lines = file.read_text().splitlines()
        return [line for line in lines if not line.startswith(left_out[file.name])]
    if file.name not in ("state.json", "summary.json"):
        return file.read_bytes()
    table = json.loads(file.read_text())
    (table["meta"] if file.name == "state.json" else table).pop("seconds")
    table.pop("peak_memory", None)
    return table


# ---------------------------------------------------------------- the end of a process


def descendants(number: int) -> list[int]:
    """The numbers of a process's children, their children and so on, from Linux's /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = (folder / "stat").read_text().rpartition(")")[2]
            parents[int(folder.name)] = int(after_name.split()[1])
    return list(_below(number, parents))


def _below(number: int, parents: Mapping[int, int]) -> Iterator[int]:
    for child in [child for child, parent in parents.items() if parent == number]:
        yield child
        yield from _below(child, parents)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all processes that it has started, as a power cut would end them."""
    if process.poll() is None:  # else its number may be another's by now
        for number in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    process.wait()
