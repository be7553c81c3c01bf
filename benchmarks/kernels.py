"""Benchmark of every op's implementations at real layer shapes: error, time, bytes, memory.

    python -m benchmarks.kernels
        the six shapes of the targets, bf16 base, fp32 adapters of rank 16
    python -m benchmarks.kernels --model sdxl
        the adapted layers of a model, and their cost over the frozen model
    python -m benchmarks.kernels --op lora_linear --candidate my_kernel.py:fn
        checks a kernel of yours and times it next to the others; --case lora: for a first kernel,
        without DoRA and dropout
    python -m benchmarks.kernels --tune
        measures the implementations and stores the winners that training on this machine then takes

Errors are to float64; torch.compile, peft and the frozen layer are timed too. Contenders take turns
in one process; a figure is the median of the rounds, on the CPU in processor seconds. README.md
here explains the columns.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.candidates import NOT_PLAIN, PLAIN_OPS, CandidateError, check_candidate
from benchmarks.cases import DEFAULT_SHAPES, LAYERS, Case, Setting, make_cases, trained_tensors
from benchmarks.measure import (
    DeviceRates,
    MeasurementPlan,
    forward_and_backward,
    measure_case,
    measure_device_rates,
)
from benchmarks.model_cost import model_cost
from benchmarks.tuning import DTYPES, tune_kernels
from lora_core import kernels
from lora_core.errors import UserError, quiet_status
from lora_core.kernels import OPS
from lora_core.plugins import find_plugin

# --tune adds these: layers of the embedded model and of tests.
SMALL: tuple[tuple[int, ...], ...] = ((256, 64, 64), (4096, 64, 64))
QUICK = ("lora_linear", "dora_norm")
NAMED_KINDS = ("lora_linear", "lora_grouped")  # ops whose cases begin with LoRA or DoRA


def main(argv: list[str] | None = None) -> int:
    args = kernels_parser().parse_args(argv)
    try:
        return run_kernels(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CandidateError) else 2


def kernels_parser() -> argparse.ArgumentParser:
    """The options."""
    new = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = new.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = f"of {', '.join(OPS)}; default all"
    option("--model", choices=list(LAYERS), help="its adapted layers, with their counts")
    option("--shape", nargs="+", metavar="ROWS,IN,OUT", help="layers to measure, not the six")
    option("--op", nargs="+", choices=list(OPS), metavar="OP", help=ops)
    option("--device", choices=("cpu", "cuda"), default=device)
    option("--rank", type=int, default=16, help="of the adapters; default 16")
    option(
        "--dtype",
        choices=list(DTYPES),
        help="of base and activations; default bf16, and for --tune bf16 and fp32",
    )
    option(
        "--threads",
        type=int,
        default=1,
        help="of the CPU; a second one waits at every barrier for a core that a neighbor has",
    )
    option("--rounds", type=int, default=9, help="of which the median is taken; default 9")
    option(
        "--quick", action="store_true", help="only ours, peft and the frozen layer, three rounds"
    )
    option(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile of the reference too; default on CUDA",
    )
    option(
        "--graph",
        action="store_true",
        help="CUDA: time replays of CUDA graphs, without the host's launches",
    )
    option(
        "--candidate",
        metavar="FILE.py:FUNCTION",
        help="a function with the op's arguments, checked and timed next to the others",
    )
    option(
        "--case",
        choices=("all", "lora"),
        default="all",
        help=f"lora: check and time plain LoRA only, without {NOT_PLAIN}",
    )
    option(
        "--profile",
        action="store_true",
        help="torch.profiler's table of the first case instead of times",
    )
    option(
        "--tune",
        action="store_true",
        help="measure reference, fused and triton and store the winners",
    )
    option(
        "--winners",
        type=Path,
        help="the table that --tune writes; default the user's, which precedes the repository's",
    )
    option("--json", type=Path, help="file for all the numbers")
    return new


def run_kernels(args: argparse.Namespace) -> int:
    """Measure and print the cases; returns the exit status: 1 where an implementation is wrong."""
    plan = read_plan(args)
    torch.set_num_threads(args.threads)
    shapes: list[tuple[int, ...]] = list(DEFAULT_SHAPES[args.device])
    if args.shape:
        shapes = [parse_shape(text) for text in args.shape]
    names = args.op
    if not names:
        names = list(QUICK if args.quick else OPS)
        if args.candidate:
            names = ["lora_linear"]
    print(timing.describe_machine(args.device), flush=True)
    if args.tune:
        small = [] if args.shape or args.model else list(SMALL)
        return tune_kernels(args, plan, names, shapes + small)
    found: list[Case] = []
    for name in names:
        found += make_cases(name, plan.setting, args.model, shapes)
    if args.case == "lora":
        found = [case for case in found if case.label.startswith("LoRA")]
    if args.profile:
        profile_case(found[0], plan)
        return 0
    if args.device == "cpu" and not args.quick:
        print(
            "triton implementations are left out: "
            "on the CPU they run in an interpreter, whose time means nothing"
        )
    if plan.candidate:
        only_plain = args.case == "lora"
        print(check_candidate(names[0], plan.candidate, found, only_plain=only_plain))
    rates = measure_device_rates(plan.setting)
    copy, product = rates.bandwidth / 1e9, rates.products / 1e9
    print(
        f"{plan.setting.dtype}, rank {args.rank}; in this run a copy moves {copy:.1f} GB/s "
        f"and a product does {product:.0f} GFLOP/s\n",
        flush=True,
    )
    rows = []
    for case in found:
        rows.append(measure_case(case, plan, rates))
        print_case(rows[-1])
        write_results(args, rates, rows, {})  # for an interruption
    write_results(args, rates, rows, summarize(rows, args.model, plan))
    if args.case == "lora":
        print(f"--case lora: {NOT_PLAIN} were neither checked nor timed")
    return 1 if any(row["broken"] for row in rows) else 0


def write_results(
    args: argparse.Namespace,
    rates: DeviceRates,
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    """Write the --json file, if the option is given."""
    if args.json:
        results = {
            "machine": timing.describe_machine(args.device),
            "device": args.device,
            "dtype": args.dtype or "bf16",
            "rank": args.rank,
            "graph": args.graph,
            "rates": rates._asdict(),
            "cases": rows,
            "summary": summary,
        }
        timing.write_json(args.json, results)


def read_plan(args: argparse.Namespace) -> MeasurementPlan:
    """The plan from the options. Raises UserError for options that exclude each other."""
    timing.check_positive(args, "rank", "rounds", "threads")
    if args.graph and args.device == "cpu":
        raise UserError("--graph is given with --device cpu; CUDA graphs need a GPU, leave it out")
    _check_idle_options(args)
    if args.quick and args.compile:
        raise UserError(
            "--quick leaves torch.compile out, and --compile adds it; choose one of the two"
        )
    if args.shape and args.model:
        raise UserError(
            "--shape and --model are both given; they choose the same thing, leave one out"
        )
    if args.case == "lora":
        others = [name for name in args.op or ["lora_linear"] if name not in PLAIN_OPS]
        if others or not (args.op or args.candidate):
            raise UserError(
                f"--case lora is for the ops {' and '.join(PLAIN_OPS)}, whose other cases are "
                f"{NOT_PLAIN}; name one of them with --op"
            )
    candidate = None
    if args.candidate:
        if args.op and len(args.op) > 1:
            raise UserError(
                f"--candidate is measured as one op, got --op {' '.join(args.op)}; name one"
            )
        candidate = find_plugin(args.candidate, {}, "candidate")
    compiled = args.compile
    if compiled is None:
        compiled = args.device == "cuda" and not args.quick
    return MeasurementPlan(
        setting=Setting(args.device, DTYPES[args.dtype or "bf16"], args.rank),
        rounds=3 if args.quick else args.rounds,
        limit=1.0 if args.quick else 5.0,
        graph=args.graph,
        compiled=compiled,
        quick=args.quick,
        candidate=candidate,
    )


def _check_idle_options(args: argparse.Namespace) -> None:
    """Raises UserError for an option that has no effect in the mode of the others."""
    mode, idle = "without --tune", ["winners"]
    if args.tune:
        mode, idle = "with --tune", ["json", "profile", "candidate", "compile"]
    elif args.profile:
        mode, idle = "with --profile", ["json", "winners", "compile", "graph"]
    for option in idle:
        if getattr(args, option):
            raise UserError(f"--{option} has no effect {mode}; leave it out")


def parse_shape(text: str) -> tuple[int, ...]:
    """(rows, in, out)"""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shape got {text!r}; expected rows,in,out such as 1024,640,640")
    return tuple(int(part) for part in parts)


def print_case(row: dict[str, Any]) -> None:
    """Print the table of one case."""
    floor, line = row["minimum"], f"{row['op']} {row['case']}, {row['rounds']} rounds"
    if floor:
        line += f"; at least {floor['bytes'] / 1e6:.3g} MB and {floor['flops'] / 1e9:.3g} GFLOP, "
        line += f"{1e3 * floor['seconds']:.3g} ms at the rates above"
    print(line + (f"; {row['count']} of them" if row["count"] > 1 else ""))
    to = [key for key in ("to frozen", "to peft", "to torch") if key in row]
    heads = ["", "forward ms", "backward ms", *to, "roofline %", "MB moved", "over min."]
    heads += ["MB kept", "error", "of gradients"]
    lines = []
    for name, found in row["contenders"].items():
        cells = [name, 1e3 * found["forward"], 1e3 * found["backward"]]
        cells += [row[key][name] for key in to]
        moved = None if found["bytes"] is None else found["bytes"] / 1e6
        cells += [found["roofline"], moved, found["over minimum"], found["memory"] / 1e6]
        lines.append([*cells, found.get("error"), found.get("gradient error")])
    print(timing.text_table(heads, lines) + "\n", flush=True)


def summarize(
    rows: list[dict[str, Any]], model: str | None, plan: MeasurementPlan
) -> dict[str, Any]:
    """Print and return the summary.

    It has geometric means of ours over peft and over the frozen layer, by op and kind, the figures
    of the norm, and a model's cost.
    """
    summary: dict[str, Any] = {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind = f" {row['case'].split()[0]}" if row["op"] in NAMED_KINDS else ""
        groups.setdefault(row["op"] + kind, []).append(row)
    for name, group in groups.items():
        means = _geometric_means([row for row in group if "ours" in row["contenders"]])
        if means:
            summary[name] = means
            shown = {label: value for label, value in means.items() if "clock" not in label}
            line = ", ".join(f"{label} {value:.3f}" for label, value in shown.items())
            print(f"{name}: {line} (geometric mean of {len(group)})")
    for row in rows:
        if row["op"] == "dora_norm" and row["case"] == "1280 x 1280" and "to peft" in row:
            faster = 1 / row["to peft"]["ours"]
            contenders = row["contenders"]
            error = contenders.get("fused", contenders["ours"]).get("error")
            summary["dora_norm 1280 x 1280"] = {"times as fast as peft": faster, "error": error}
            line = f"dora_norm 1280 x 1280: {faster:.2f} times as fast as peft's"
            print(line + ("" if error is None else f", error to float64 {error:.1e}"))
    if model:
        summary["model"] = model_cost(model, rows, plan.setting, graph=plan.graph)
    return summary


def _geometric_means(group: list[dict[str, Any]]) -> dict[str, float]:
    """ "ours / OTHER" -> geometric mean, for the others that every row has; by the clock too."""
    means = {}
    for other in ("peft", "compile", "torch", "frozen"):
        if group and all(f"to {other}" in row for row in group):
            for key in (other, f"{other}, clock"):
                ratios = [row[f"to {key}"]["ours"] for row in group]
                means[f"ours / {key}"] = timing.geometric_mean(ratios)
    return means


def profile_case(case: Case, plan: MeasurementPlan) -> None:
    """Print torch.profiler's tables of forward and backward.

    For the reference, the candidate if there is one, and the implementation of `kernels.call`.
    """
    from torch.profiler import ProfilerActivity, profile

    activities, key = [ProfilerActivity.CPU], "self_cpu_time_total"
    if plan.setting.device == "cuda":
        activities, key = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
    contenders = {"reference": OPS[case.op].reference}
    if plan.candidate:
        contenders["candidate"] = plan.candidate
    contenders["ours"] = functools.partial(kernels.call, case.op)
    for name, function in contenders.items():
        call = functools.partial(function, *case.args)
        step = forward_and_backward(call, trained_tensors(case.args))
        step()
        with profile(activities=activities) as seen:
            for _ in range(5):
                step()
        print(f"{case.op} {case.label}, {name}, five times forward and backward")
        print(seen.key_averages().table(sort_by=key, row_limit=15))


if __name__ == "__main__":
    sys.exit(quiet_status(main))
