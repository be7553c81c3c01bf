"""Measures the ops' implementations and stores the winners (`benchmarks.kernels --tune`)."""

from __future__ import annotations

import argparse
import functools
import sys
from datetime import date
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import Case, make_cases, trained_tensors
from benchmarks.measure import (
    MeasurementPlan,
    check_implementations,
    forward_and_backward,
    implementations,
)
from lora_core.errors import UserError
from lora_core.kernels import OPS, choice, winners

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SLACK = 0.03  # an implementation must be faster than the fused one by this share to win


def tune_kernels(
    args: argparse.Namespace, plan: MeasurementPlan, names: list[str], shapes: list[tuple[int, ...]]
) -> int:
    """Time reference, fused and triton, forward and backward, and store the winners.

    There is one row for every op, dtype and class of shapes. Returns the exit status.
    """
    path = args.winners or winners.cache_file()
    if path.exists():
        try:
            winners.read_winners(path)
        except ValueError as error:
            raise UserError(f"{error}; delete it, or give --winners another file") from error
    rows: list[dict[str, Any]] = []
    device = winners.device_name(args.device, None, graph=plan.graph)
    origin = {
        "command": " ".join(["python -m benchmarks.kernels", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": timing.describe_machine(args.device),
    }
    for dtype in [args.dtype] if args.dtype else ["bf16", "fp32"]:
        setting = plan.setting._replace(dtype=DTYPES[dtype])
        tuned = plan._replace(setting=setting, compiled=False, candidate=None)
        for name in names:
            rows += tune_op(name, make_cases(name, setting, args.model, shapes), tuned)
            # an interruption keeps the rows up to here
            choice.store_winners(path, device, origin | {"rows": rows})
    print(f"{len(rows)} rows for {device} in {path}")
    return 0


def tune_op(name: str, cases: list[Case], plan: MeasurementPlan) -> list[dict[str, Any]]:
    """The rows of one op in one dtype.

    The row of winners.ANY has the fastest over all cases, weighted by their counts.
    """
    dtype = str(winners.first_tensor(cases[0].args).dtype).removeprefix("torch.")
    row = {"op": name, "dtype": dtype}
    rows = []
    sums: dict[str, list[float]] = {}
    for case in cases:
        times = _time_implementations(case, plan)
        seconds = {key: timing.median_seconds(times, key) for key in times}
        for key, value in seconds.items():
            sums.setdefault(key, []).append(value * case.count)
        ratios = dict.fromkeys(times, 1.0)
        if "fused" in times:
            ratios = {key: timing.median_ratio(times, key, "fused") for key in times}
        winner = fastest_implementation(ratios)
        group = winners.shape_class(OPS[name], case.args)
        rounded = {key: float(f"{value:.4g}") for key, value in seconds.items()}
        rows.append(row | {"class": group, "winner": winner, "seconds": rounded})
        took = ", ".join(f"{key} {1e3 * value:.3g} ms" for key, value in seconds.items())
        print(f"{name} {dtype} {case.label}: {winner}; {took}", flush=True)
    totals = {key: sum(values) for key, values in sums.items() if len(values) == len(cases)}
    ratios = {key: value / totals.get("fused", value) for key, value in totals.items()}
    winner = fastest_implementation(ratios)
    return [*rows, row | {"class": winners.ANY, "winner": winner, "seconds": totals}]


def _time_implementations(case: Case, plan: MeasurementPlan) -> timing.Times:
    """Seconds of forward and backward of the implementations that keep the law (laws.py)."""
    functions = implementations(case, plan)
    _, broken = check_implementations(case, functions)
    calls = {}
    for key, function in functions.items():
        if key not in broken:
            call = functools.partial(function, *case.args)
            calls[key] = forward_and_backward(call, trained_tensors(case.args))
    return timing.alternate(
        calls, plan.rounds, device=plan.setting.device, graph=plan.graph, limit=plan.limit
    )


def fastest_implementation(ratios: dict[str, float]) -> str:
    """The fastest by the ratio of its time to the fused one's, which wins within SLACK."""
    first = min(ratios, key=lambda key: ratios[key])
    return "fused" if "fused" in ratios and ratios[first] > 1 - SLACK else first
