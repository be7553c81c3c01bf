"""Runs every benchmark in its own process and writes one file with all their numbers.

    python -m benchmarks.all [--out benchmarks/results/MACHINE.json] [--device cpu|cuda]
                             [--quick] [--only PART ...]
    python -m benchmarks.plot benchmarks/results/MACHINE.json --out docs/benchmarks.png

The file also has the machine, versions, commit and commands. Each part has a time limit; a part
that fails or exceeds it is in the file with its error and its numbers up to then, and the exit
status is 1. On a GPU the limits add up to nine minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import timing
from lora_core.errors import quiet_status

HERE = Path(__file__).parent
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "prodigyopt")


class BenchmarkPart(NamedTuple):
    """One benchmark: python -m benchmarks.`words` --json FILE, with a limit of `seconds`."""

    words: str
    seconds: int


PARTS: dict[
    str, dict[str, BenchmarkPart]
] = {  # device -> part; the sum of a GPU's seconds is 9 minutes
    "cpu": {
        "step cost": BenchmarkPart("step_cost", 600),
        "kernels": BenchmarkPart("kernels --device cpu", 900),
        "optimizer": BenchmarkPart("optimizer --device cpu", 600),
        "train step": BenchmarkPart("train_step --device cpu --limit 600", 1500),
        "merge": BenchmarkPart("merge --quick --threads 1", 300),
    },
    "cuda": {
        "kernels": BenchmarkPart("kernels --device cuda --no-compile --rounds 5", 80),
        "kernels, graph": BenchmarkPart(
            "kernels --device cuda --graph --no-compile --rounds 5", 60
        ),
        "optimizer": BenchmarkPart("optimizer --device cuda --networks sd15", 50),
        "train step sd15": BenchmarkPart(
            "train_step --device cuda --model sd15 --rounds 7 --limit 25", 110
        ),  # more than 45 on an H100, and less than 116
        "train step sdxl": BenchmarkPart(
            "train_step --device cuda --model sdxl --rounds 5 --limit 25", 200
        ),
        "merge": BenchmarkPart("merge --quick --threads 1", 30),
    },
}
QUICK: dict[
    str, dict[str, BenchmarkPart]
] = {  # a short run of each: a few minutes of one CPU thread, or two minutes on a GPU
    "cpu": {
        "step cost": BenchmarkPart("step_cost --model sd15", 200),
        "kernels": BenchmarkPart("kernels --device cpu --quick", 300),
        "optimizer": BenchmarkPart("optimizer --device cpu", 300),
        "train step": BenchmarkPart(
            "train_step --device cpu --model toy --rounds 5 --limit 60", 120
        ),
        "merge": BenchmarkPart("merge --quick --threads 1", 200),
    },
    "cuda": {
        "kernels": BenchmarkPart("kernels --device cuda --quick", 60),
        "train step": BenchmarkPart(
            "train_step --device cuda --model sd15 --rounds 3 --limit 20", 90
        ),
    },
}


def run_part(part: BenchmarkPart, file: Path) -> dict[str, Any]:
    """The part's command, seconds, and "results" or "error" or both; its output passes through."""
    module, *words = part.words.split()
    command = [sys.executable, "-m", f"benchmarks.{module}", *words, "--json", str(file)]
    begin = time.perf_counter()
    record: dict[str, Any] = {"command": f"python -m benchmarks.{part.words}"}
    print(f"\n== {record['command']}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, timeout=part.seconds, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            record["error"] = f"exit status {done.returncode}: {_last_line(done.stderr)}"
    except subprocess.TimeoutExpired:
        record["error"] = f"not done after {part.seconds} s"
    record["seconds"] = round(time.perf_counter() - begin, 1)
    try:
        # a part that failed or exceeded its limit has the numbers up to then
        record["results"] = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        record.setdefault("error", f"it wrote no numbers: {error}")
    if "error" in record:
        print(f"failed: {record['error']}", flush=True)
    return record


def _last_line(text: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def package_versions() -> dict[str, str]:
    """Python's and each package's version, or "missing"."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def measured_commit() -> str:
    """The commit of the measured code, with "+" for local changes; empty outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=HERE, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def default_out(device: str) -> Path:
    """results/<the processor's or the GPU's name>.json"""
    name = timing.describe_machine(device).split(",")[0]
    return HERE / "results" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def collect(device: str, parts: dict[str, BenchmarkPart], out: Path) -> int:
    """Run the parts one after another; returns how many failed.

    Writes `out` after each, so that an interruption keeps the numbers up to then.
    """
    began, head = datetime.now(UTC).isoformat(timespec="seconds"), measured_commit()
    report: dict[str, Any] = {
        "machine": timing.describe_machine(device),
        "device": device,
        "began": began,
        "commit": head,
        "versions": package_versions(),
        "parts": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, part) in enumerate(parts.items()):
            report["parts"][name] = run_part(part, Path(folder) / f"{i}.json")
            timing.write_json(out, report)
    failed = [name for name, record in report["parts"].items() if "error" in record]
    seconds = sum(record["seconds"] for record in report["parts"].values())
    line = f"\n{out}: {len(parts) - len(failed)} of {len(parts)} parts in {seconds:.0f} s"
    print(line + (f"; failed: {', '.join(failed)}" if failed else ""))
    return len(failed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", "--json", type=Path, help="default: benchmarks/results/ and the machine's name"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    names = dict.fromkeys(itertools.chain(*PARTS.values()))
    parser.add_argument("--quick", action="store_true", help="fewer models and rounds")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of " + "; ".join(names))
    args = parser.parse_args(argv)
    parts = (QUICK if args.quick else PARTS)[args.device]
    if unknown := set(args.only or ()) - set(parts):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; expected {'; '.join(parts)}")
    chosen = {name: part for name, part in parts.items() if not args.only or name in args.only}
    return 1 if collect(args.device, chosen, args.out or default_out(args.device)) else 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
