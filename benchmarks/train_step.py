"""Benchmark of the training step: steps per second and peak memory, ours against peft.

    python -m benchmarks.train_step [--device cpu] [--model toy sd15] [--batch 1] [--rounds 15]
                                    [--json FILE]
    python -m benchmarks.train_step --model sd15 --profile
                                    --contenders frozen "ours lora" "ours lora reference"

peft runs in the loop of diffusers' scripts; both use the same weights.
A contender is named by words: frozen; ours or peft, lora or dora; then reference, fused or triton
(kernels, else auto), compile (regional), graph (CUDA, ours), last (channels_last, the default of
ours on a GPU), and for peft bf16 (adapters) and adamw (torch's fused one). The steps of all
contenders are in benchmarks/contenders.py. Contenders take turns: "over frozen" is the median over
rounds of the ratio within a round, in processor seconds on the CPU (next to it in wall-clock time,
which other programs change more). Memory is the peak of one step above that between steps: on the
CPU resident memory, on a GPU that of torch's allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import contenders, timing
from benchmarks.contenders import FrozenStep, OurStep, PeftStep, Problem
from lora_core.errors import UserError, quiet_status
from training import cuda_graph

# Pixels on the CPU, where 512 would take four times as long; on a GPU the model's native side.
SIDES = {"sd15": 256}
MODELS = {"cpu": ("toy", "sd15"), "cuda": ("sd15", "sdxl", "flux")}
BATCHES = {("cuda", "sdxl"): (1, 4)}  # all others: 1
EAGER = ("frozen", "ours lora", "ours dora", "peft lora", "peft dora")
CONTENDERS = {"cpu": EAGER, "cuda": (*EAGER, "frozen graph", "ours lora graph", "ours dora graph")}
KERNELS = ("reference", "fused", "triton")
WORDS = (*KERNELS, "compile", "graph", "last", "bf16", "adamw")
# Steps of each contender in a round; all others: 1.
STEPS = {("cpu", "toy"): 10, ("cuda", "sd15"): 10, ("cuda", "sdxl"): 3}
MB = 2**20
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def parse_contender(name: str) -> tuple[str, str, set[str]]:
    """(frozen, ours or peft; lora, dora or ""; the other words) of a contender.

    Raises UserError for an unknown one.
    """
    who, *words = name.split()
    kind = words.pop(0) if who in ("ours", "peft") and words else ""
    known = who == "frozen" or (who in ("ours", "peft") and kind in ("lora", "dora"))
    if not known or set(words) - set(WORDS):
        raise UserError(
            f"contender {name!r} is unknown; expected frozen, or ours or peft with lora or dora, "
            f"then any of {', '.join(WORDS)}"
        )
    if "graph" in words and (who == "peft" or not torch.cuda.is_available()):
        reason = "its loop reads the loss back" if who == "peft" else "there is no CUDA device"
        raise UserError(f"contender {name!r} cannot be captured: {reason}")
    return who, kind, set(words)


def build_contender(problem: Problem, name: str) -> Callable[[], object]:
    """The step function of a named contender. Raises UserError as parse_contender does."""
    who, kind, words = parse_contender(name)
    cuda = problem.mean.device.type == "cuda"
    last = "last" in words or (cuda and who != "peft" and not problem.is_flow)
    network = contenders.clone_network(problem.network, channels_last=last)
    mode = next((word for word in words if word in KERNELS), "auto")
    graph = "graph" in words
    step: Callable[[], object]
    if who == "peft":
        step = PeftStep(problem, kind, network, bf16="bf16" in words, fused="adamw" in words)
    elif who == "ours":
        step = OurStep(problem, kind, network, mode=mode, graph=graph)
    else:
        step = FrozenStep(problem, network, graph=graph)
    if "compile" in words:
        cuda_graph.compile_blocks(network)
    return step


def measure_model(
    problem: Problem, names: Sequence[str], rounds: int, limit: float
) -> dict[str, Any]:
    """Seconds of each round, memory and ratios of every contender on one model."""
    device = problem.mean.device
    steps = {name: build_contender(problem, name) for name in names}
    many = STEPS.get((device.type, problem.name), 1)
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    calls = {name: _repeat_step(step, many) for name, step in steps.items()}
    times = timing.alternate(calls, rounds, device=device, floor=0, limit=limit)
    found = {}
    for name in names:
        base = frozen_contender(name, names)
        row: dict[str, Any] = {
            "clock": [s / many for s in times[name]],
            "processor": [s / many for s in times.processor.get(name, [])],
            "steps_per_second": many / statistics.median(times[name]),
            "peak_bytes": memory[name],
        }
        if base and base != name:
            row["over"] = base
            row["ratio"] = timing.median_ratio(times, name, base)
            row["spread"] = timing.middle_half(times, name, base)
            row["clock_ratio"] = timing.median_ratio(times, name, base, clock=True)
        if name.startswith("ours") and (peer := f"peft {name.split()[1]}") in names:
            row |= {"peer": peer, "to_peer": timing.median_ratio(times, name, peer)}
        found[name] = row
    side = problem.mean.shape[-1]
    return {
        "model": problem.name,
        "batch": len(problem.mean),
        "latents": side,
        "rank": problem.rank,
        "rounds": len(times[names[0]]),
        "contenders": found,
    }


def _repeat_step(step: Callable[[], object], many: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(many):
            step()

    return run


def frozen_contender(name: str, names: Sequence[str]) -> str:
    """The frozen contender that `name` is compared with, or "".

    The one with the same words, else the plain one.
    """
    words = name.split()[0 if name.startswith("frozen") else 2 :]
    own = " ".join(["frozen", *(word for word in words if word in ("compile", "graph"))])
    return own if own in names else "frozen" if "frozen" in names else ""


def peak_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes during a contender's second step, above those in use before it.

    On the CPU from Linux's resident memory; None where that cannot be read. A CUDA graph is not
    captured yet in its second step; it will hold as much all the time.
    """
    step()
    # Our loop frees the last step's gradients at the start of a step, the scripts at its end: they
    # are counted for neither side.
    for p in getattr(step, "parameters", ()):
        p.grad = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # memory is returned when a tensor is freed, else a pool of free pages hides the use
        libc.mallopt(MMAP_THRESHOLD, 2**16)
        libc.malloc_trim(0)
        # resets the peak to the memory that is resident now (proc(5))
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        step()
        used = _resident("VmHWM") - before
        libc.mallopt(MMAP_THRESHOLD, 2**25)  # where glibc's own threshold ends up in such a process
        return used
    return None


def _resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def result_table(result: Mapping[str, Any]) -> str:
    """The table of one model."""
    heads = ["", "steps/s", "ms", "over frozen", "middle half", "by the clock", "to peft"]
    rows = []
    for name, row in result["contenders"].items():
        ms = 1e3 * statistics.median(row["processor"] or row["clock"])
        spread = "-".join(f"{value:.3f}" for value in row["spread"]) if "spread" in row else None
        keys = ("ratio", "clock_ratio", "to_peer")
        ratio, clock, peer = (f"{row[key]:.3f}" if key in row else None for key in keys)
        memory = None if row["peak_bytes"] is None else f"{row['peak_bytes'] / MB:.0f}"
        cells = [name, f"{row['steps_per_second']:.3g}", f"{ms:.4g}"]
        rows.append([*cells, ratio, spread, clock, peer, memory])
    title = f"{result['model']}, batch {result['batch']}, latents {result['latents']}"
    title += f", medians of {result['rounds']} rounds"
    return f"{title}\n{timing.text_table([*heads, 'peak MB'], rows)}"


def profile_difference(
    problem: Problem, names: Sequence[str], steps: int = 3, rows: int = 14
) -> str:
    """A table of the operations that are called more often than in the first contender.

    Wall-clock milliseconds a step; the time of all other operations together is noise.
    """
    found = {name: _profile_step(build_contender(problem, name), steps) for name in names}
    base, lines = found[names[0]], []
    for name in names[1:]:
        more = {}
        for key in {*found[name], *base}:
            ms, calls = found[name].get(key, (0.0, 0.0))
            base_ms, base_calls = base.get(key, (0.0, 0.0))
            more[key] = ms - base_ms, calls - base_calls
        new = sorted((key for key in more if more[key][1]), key=lambda key: -more[key][0])
        total = sum(more[key][0] for key in new)
        rest = sum(ms for ms, calls in more.values() if not calls)
        lines.append(
            f"\n{name} beyond {names[0]}: {total:.1f} ms a step; "
            f"operations called as often: {rest:+.1f} ms, noise"
        )
        for key in new[:rows]:
            lines.append(f"  {key[:56]:58}{more[key][0]:+8.2f} ms{more[key][1]:+8.0f} calls")
    return "\n".join(lines)


def _profile_step(step: Callable[[], object], steps: int) -> dict[str, tuple[float, float]]:
    """Operation -> (ms, calls) of a step."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    found = {}
    for event in seen.key_averages():
        found[event.key] = event.self_cpu_time_total / 1e3 / steps, event.count / steps
    return found


def train_step_parser() -> argparse.ArgumentParser:
    """The options."""
    new = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    new.add_argument(
        "--model",
        nargs="+",
        choices=("toy", "sd15", "sdxl", "flux"),
        help="default: toy sd15 on the CPU, sd15 sdxl flux on a GPU",
    )
    new.add_argument("--batch", nargs="+", type=int, help="default: 1, on a GPU also 4 for sdxl")
    new.add_argument(
        "--side",
        type=int,
        default=0,
        help="pixels; default: 256 for sd15 on the CPU, else the model's own",
    )
    new.add_argument(
        "--rank", type=int, default=contenders.RANK, help="of the adapters; default 16"
    )
    new.add_argument(
        "--rounds", type=int, default=15, help="of which medians are taken; default 15"
    )
    new.add_argument(
        "--limit",
        type=float,
        default=600,
        help="seconds after which a model gets no further round, once it has three",
    )
    new.add_argument("--threads", type=int, default=1, help="of the CPU; default 1")
    new.add_argument(
        "--contenders",
        nargs="+",
        help=f"default: {', '.join(EAGER)}; on a GPU also {', '.join(CONTENDERS['cuda'][5:])}",
    )
    new.add_argument(
        "--profile",
        action="store_true",
        help="print instead which operations cost more than in the first contender",
    )
    new.add_argument("--json", type=Path, help="file for all the numbers")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    args = train_step_parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    names, results = args.contenders or CONTENDERS[args.device], []
    try:
        timing.check_positive(args, "batch", "rank", "rounds", "threads")
        if args.json and args.profile:
            raise UserError("--json has no effect with --profile; leave it out")
        torch.set_num_threads(args.threads)
        for name in names:
            parse_contender(name)
        print(timing.describe_machine(args.device))
        for model in args.model or MODELS[args.device]:
            for batch in args.batch or BATCHES.get((args.device, model), (1,)):
                side = args.side or (SIDES.get(model, 0) if args.device == "cpu" else 0)
                problem = contenders.open_problem(
                    model, batch=batch, side=side, device=args.device, rank=args.rank
                )
                if args.profile:
                    print(profile_difference(problem, names))
                    continue
                results.append(measure_model(problem, names, args.rounds, args.limit))
                print(f"\n{result_table(results[-1])}", flush=True)
                if args.json:  # for an interruption
                    machine = timing.describe_machine(args.device)
                    origin = {"machine": machine, "device": args.device}
                    timing.write_json(args.json, {**origin, "results": results})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
