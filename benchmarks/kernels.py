"""Every op's twins over true layer shapes: error to float64, time, bytes, roofline, memory; beside torch.compile, peft and the frozen layer.

    python -m benchmarks.kernels                          the six shapes of the targets, bf16 base, fp32 adapters of rank 16
    python -m benchmarks.kernels --model sdxl             the adapted layers of a model, and what they add to the frozen model
    python -m benchmarks.kernels --op lora_linear --candidate my_kernel.py:fn    checks a kernel of yours and times it beside the twins
    python -m benchmarks.kernels --tune                   measures the twins and stores the winners that training then takes on this machine

Contenders take turns in one process; a figure is the median of the rounds, on the CPU in processor seconds. README.md here explains the columns.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import DEFAULT_SHAPES, LAYERS, Case, Setting, make_cases, trained_tensors
from benchmarks.measure import (
    DeviceRates,
    MeasurementPlan,
    check_implementations,
    forward_and_backward,
    implementations,
    measure_case,
    measure_device_rates,
)
from benchmarks.model_cost import model_cost
from lora_core import kernels
from lora_core.errors import UserError
from lora_core.kernels import OPS, winners
from lora_core.plugins import load_from_file

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SMALL = (
    (256, 64, 64),
    (4096, 64, 64),
)  # --tune measures these as well: layers of the embedded model and of tests
QUICK = ("lora_linear", "dora_norm")
LAYER_OPS = ("lora_linear", "lora_grouped", "lora_conv")  # where "ours" and "peft" are whole layers
SLACK = 0.03  # by so much a twin has to beat the fused one to be the winner: less is noise


def main(argv: list[str] | None = None) -> int:
    args = kernels_parser().parse_args(argv)
    try:
        return run_kernels(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def kernels_parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n\n")[0]
    )
    new.add_argument("--model", choices=list(LAYERS), help="its adapted layers, with their counts")
    new.add_argument(
        "--shape", nargs="+", metavar="ROWS,IN,OUT", help="layers to measure instead of the six"
    )
    new.add_argument(
        "--op", nargs="+", choices=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}; default all"
    )
    new.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    new.add_argument("--rank", type=int, default=16, help="of the adapters; default 16")
    new.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of base and activations; default bf16, and for --tune bf16 and fp32",
    )
    new.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of the CPU; a second one waits at every barrier for a core that a neighbour has",
    )
    new.add_argument(
        "--rounds", type=int, default=9, help="of which the median is taken; default 9"
    )
    new.add_argument(
        "--quick", action="store_true", help="only ours, peft and the frozen layer, three rounds"
    )
    new.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile of the reference too; default on CUDA",
    )
    new.add_argument(
        "--graph",
        action="store_true",
        help="CUDA: time replays of CUDA graphs, without the host's launches",
    )
    new.add_argument(
        "--candidate",
        metavar="FILE.py:FUNCTION",
        help="a function with the op's arguments, checked and timed beside the twins",
    )
    new.add_argument(
        "--profile",
        action="store_true",
        help="torch.profiler's table of the first case instead of times",
    )
    new.add_argument(
        "--tune",
        action="store_true",
        help="measure reference, fused and triton and store the winners",
    )
    new.add_argument(
        "--winners",
        type=Path,
        help="the table that --tune writes; default the user's, which precedes the one of the repository",
    )
    new.add_argument("--json", type=Path, help="file for all the numbers")
    return new


def run_kernels(args: argparse.Namespace) -> int:
    plan = read_plan(args)
    torch.set_num_threads(args.threads)
    shapes: list[tuple[int, ...]] = (
        [parse_shape(text) for text in args.shape]
        if args.shape
        else list(DEFAULT_SHAPES[args.device])
    )
    names = args.op or (
        ["lora_linear"] if args.candidate else list(QUICK) if args.quick else list(OPS)
    )
    print(timing.describe_machine(args.device), flush=True)
    if args.tune:
        return tune_kernels(
            args, plan, names, shapes + ([] if args.shape or args.model else list(SMALL))
        )
    found = [case for name in names for case in make_cases(name, plan.setting, args.model, shapes)]
    if args.profile:
        profile_case(found[0], plan)
        return 0
    if args.device == "cpu" and not args.quick:
        print(
            "triton twins are left out: on the CPU they run in an interpreter, whose time says nothing"
        )
    rates = measure_device_rates(plan.setting)
    copy, product = rates.bandwidth / 1e9, rates.products / 1e9
    print(
        f"{plan.setting.dtype}, rank {args.rank}; in this run a copy moves {copy:.1f} GB/s and a product does {product:.0f} GFLOP/s\n",
        flush=True,
    )
    rows = []
    for case in found:
        rows.append(measure_case(case, plan, rates))
        print_case(rows[-1])
        write_results(args, rates, rows, {})  # what an interruption leaves
    write_results(args, rates, rows, summarise(rows, args.model, plan))
    return 1 if any(row["broken"] for row in rows) else 0


def write_results(
    args: argparse.Namespace,
    rates: DeviceRates,
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    if args.json:
        where = {
            "machine": timing.describe_machine(args.device),
            "device": args.device,
            "dtype": args.dtype or "bf16",
            "rank": args.rank,
            "graph": args.graph,
        }
        timing.write_json(
            args.json, where | {"rates": rates._asdict(), "cases": rows, "summary": summary}
        )


def read_plan(args: argparse.Namespace) -> MeasurementPlan:
    """Raises UserError for what does not go together."""
    timing.check_positive(args, "rank", "rounds", "threads")
    if args.graph and args.device == "cpu":
        raise UserError("--graph is given with --device cpu; CUDA graphs need a GPU, leave it out")
    mode, idle = (
        ("--tune", ("json", "profile", "candidate", "compile"))
        if args.tune
        else ("--profile", ("json", "winners", "compile", "graph"))
    )
    for option in idle if args.tune or args.profile else ("winners",):
        if getattr(args, option):
            raise UserError(
                f"--{option} has no effect {f'with {mode}' if args.tune or args.profile else 'without --tune'}; leave it out"
            )
    if args.quick and args.compile:
        raise UserError(
            "--quick leaves torch.compile out, and --compile asks for it; choose one of the two"
        )
    if args.shape and args.model:
        raise UserError(
            "--shape and --model are both given; they choose the same thing, leave one out"
        )
    candidate = None
    if args.candidate:
        if args.op and len(args.op) > 1:
            raise UserError(
                f"--candidate is measured as one op, got --op {' '.join(args.op)}; name one"
            )
        file, _, name = args.candidate.rpartition(":")
        candidate = load_from_file(file, name, "function")
    setting = Setting(args.device, DTYPES[args.dtype or "bf16"], args.rank)
    compiled = args.device == "cuda" and not args.quick if args.compile is None else args.compile
    return MeasurementPlan(
        setting,
        3 if args.quick else args.rounds,
        1.0 if args.quick else 5.0,
        args.graph,
        compiled,
        args.quick,
        candidate,
    )


def parse_shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shape got {text!r}; expected rows,in,out such as 1024,640,640")
    return tuple(int(part) for part in parts)


def print_case(row: dict[str, Any]) -> None:
    """The table of one case."""
    floor, line = row["minimum"], f"{row['op']} {row['case']}, {row['rounds']} rounds"
    if floor:
        line += f"; at least {floor['bytes'] / 1e6:.3g} MB and {floor['flops'] / 1e9:.3g} GFLOP, {1e3 * floor['seconds']:.3g} ms at the rates above"
    print(line + (f"; {row['count']} of them" if row["count"] > 1 else ""))
    to = [key for key in ("frozen", "peft", "torch") if f"to {key}" in row]
    heads = [
        "",
        "forward ms",
        "backward ms",
        *(f"to {key}" for key in to),
        "roofline %",
        "MB moved",
        "over min.",
        "MB kept",
        "error",
        "of gradients",
    ]
    lines = []
    for name, found in row["contenders"].items():
        ratios = [row[f"to {key}"][name] for key in to]
        moved = None if found["bytes"] is None else found["bytes"] / 1e6
        tail = [
            found["roofline"],
            moved,
            found["over minimum"],
            found["memory"] / 1e6,
            found.get("error"),
            found.get("gradient error"),
        ]
        lines.append([name, 1e3 * found["forward"], 1e3 * found["backward"], *ratios, *tail])
    print(timing.text_table(heads, lines) + "\n", flush=True)


def summarise(
    rows: list[dict[str, Any]], model: str | None, plan: MeasurementPlan
) -> dict[str, Any]:
    """Geometric means of ours over peft and over the frozen layer, by op and kind, the norm's figures, and a model's cost; printed and returned."""
    summary: dict[str, Any] = {}
    for key in dict.fromkeys(
        (row["op"], row["case"].split()[0] if row["op"] in LAYER_OPS[:2] else "") for row in rows
    ):
        group = [
            row
            for row in rows
            if row["op"] == key[0]
            and (not key[1] or row["case"].startswith(key[1]))
            and "ours" in row["contenders"]
        ]
        means = {
            f"ours / {other}{clock}": timing.geometric_mean(
                row[f"to {other}{clock}"]["ours"] for row in group
            )
            for other in ("peft", "compile", "torch", "frozen")
            for clock in ("", ", clock")
            if group and all(f"to {other}" in row for row in group)
        }
        if means:
            name = " ".join(filter(None, key))
            summary[name] = means
            said = ", ".join(
                f"{label} {value:.3f}" for label, value in means.items() if "clock" not in label
            )
            print(f"{name}: {said} (geometric mean of {len(group)})")
    for row in rows:
        if row["op"] == "dora_norm" and row["case"] == "1280 x 1280" and "to peft" in row:
            faster, error = (
                1 / row["to peft"]["ours"],
                row["contenders"].get("fused", row["contenders"]["ours"]).get("error"),
            )
            summary["dora_norm 1280 x 1280"] = {"times as fast as peft": faster, "error": error}
            print(
                f"dora_norm 1280 x 1280: {faster:.2f} times as fast as peft's"
                + ("" if error is None else f", error to float64 {error:.1e}")
            )
    if model:
        summary["model"] = model_cost(model, rows, plan.setting, graph=plan.graph)
    return summary


def tune_kernels(
    args: argparse.Namespace, plan: MeasurementPlan, names: list[str], shapes: list[tuple[int, ...]]
) -> int:
    """Times reference, fused and triton forward and backward, and stores a row for every op, dtype and class of shapes."""
    path = args.winners or winners.cache_file()
    if path.exists():
        try:
            winners.read_winners(path)
        except ValueError as error:
            raise UserError(f"{error}; delete it, or give --winners another file") from error
    rows: list[dict[str, Any]] = []
    device = winners.device_name(args.device, None, graph=plan.graph)
    command = " ".join(["python -m benchmarks.kernels", *sys.argv[1:]])
    origin = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": timing.describe_machine(args.device),
    }
    for dtype in [args.dtype] if args.dtype else ["bf16", "fp32"]:
        setting = plan.setting._replace(dtype=DTYPES[dtype])
        for name in names:
            rows += tune_op(
                name,
                make_cases(name, setting, args.model, shapes),
                plan._replace(setting=setting, compiled=False, candidate=None),
            )
            winners.store_winners(
                path, device, origin | {"rows": rows}
            )  # an interruption leaves what was measured
    print(f"{len(rows)} rows for {device} in {path}")
    return 0


def tune_op(name: str, found: list[Case], plan: MeasurementPlan) -> list[dict[str, Any]]:
    """The rows of one op in one dtype; that of winners.ANY is the fastest over all its cases and their counts."""
    op, rows = OPS[name], []
    sums: dict[str, list[float]] = {}
    dtype = str(winners.first_tensor(found[0].args).dtype).removeprefix("torch.")
    for case in found:
        functions = implementations(case, plan)
        wrong = check_implementations(case, functions)[1]
        calls = {
            key: forward_and_backward(
                lambda f=f, case=case: f(*case.args), trained_tensors(case.args)
            )
            for key, f in functions.items()
            if key not in wrong
        }  # type: ignore[misc]
        times = timing.alternate(
            calls, plan.rounds, device=plan.setting.device, graph=plan.graph, limit=plan.limit
        )
        seconds = {key: timing.median_seconds(times, key) for key in times}
        for key, value in seconds.items():
            sums.setdefault(key, []).append(value * case.count)
        ratios = {
            key: timing.median_ratio(times, key, "fused") if "fused" in times else 1.0
            for key in times
        }
        group = winners.shape_class(op, case.args)
        rows.append(
            {
                "op": name,
                "dtype": dtype,
                "class": group,
                "winner": fastest_implementation(ratios),
                "seconds": {key: float(f"{value:.4g}") for key, value in seconds.items()},
            }
        )
        took = ", ".join(f"{key} {1e3 * value:.3g} ms" for key, value in seconds.items())
        print(f"{name} {dtype} {case.label}: {fastest_implementation(ratios)}; {took}", flush=True)
    totals = {key: sum(values) for key, values in sums.items() if len(values) == len(found)}
    every = {key: value / totals.get("fused", value) for key, value in totals.items()}
    return [
        *rows,
        {
            "op": name,
            "dtype": dtype,
            "class": winners.ANY,
            "winner": fastest_implementation(every),
            "seconds": totals,
        },
    ]


def fastest_implementation(ratios: dict[str, float]) -> str:
    """The fastest by its time over the fused twin's, which keeps its place unless it is beaten by more than SLACK."""
    first = min(ratios, key=lambda key: ratios[key])
    return "fused" if "fused" in ratios and ratios[first] > 1 - SLACK else first


def profile_case(case: Case, plan: MeasurementPlan) -> None:
    """torch.profiler's table of forward and backward of the reference and of what `kernels.call` takes, or of the candidate."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = plan.setting.device == "cuda"
    contenders = (
        {"reference": OPS[case.op].reference, "candidate": plan.candidate}
        if plan.candidate
        else {"reference": OPS[case.op].reference}
    )
    contenders["ours"] = lambda *args: kernels.call(case.op, *args)
    for name, function in contenders.items():
        assert function is not None
        step = forward_and_backward(lambda f=function: f(*case.args), trained_tensors(case.args))  # type: ignore[misc]
        step()
        with profiler(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        ) as prof:
            for _ in range(5):
                step()
        print(f"{case.op} {case.label}, {name}, five times forward and backward")
        print(
            prof.key_averages().table(
                sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=15
            )
        )


if __name__ == "__main__":
    sys.exit(main())
