"""Measurement of one benchmark case: its contenders' errors to float64, times, bytes and memory.

`measure_case` returns the row that benchmarks/kernels.py prints and stores.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import laws, timing
from benchmarks.candidates import CandidateError
from benchmarks.cases import Case, Setting, copy_arguments, has_plain_arguments, trained_tensors
from benchmarks.counting import Counter, touched_bytes
from lora_core import kernels
from lora_core.kernels import OPS
from lora_core.memory.saved_tensors import saved_activations

NO_INPUT = ("keyed_dropout",)  # whose backward needs none of its arguments
Call = tuple[Callable[[], Any], list[Tensor]]  # and the tensors that it trains


class MeasurementPlan(NamedTuple):
    """Settings of the measurement of a case."""

    setting: Setting
    rounds: int
    limit: float  # seconds of a case's rounds
    graph: bool = False  # replay CUDA graphs
    compiled: bool = False  # torch.compile of the reference as a contender
    quick: bool = False  # ours, peft and the frozen layer only
    candidate: Callable[..., Any] | None = None


class DeviceRates(NamedTuple):
    """The device's fastest copy and product, measured in this run."""

    bandwidth: float  # bytes a second of a copy, read and written
    products: float  # FLOP a second of a large matrix product in the run's dtype


def implementations(case: Case, plan: MeasurementPlan) -> dict[str, Callable[..., Any]]:
    """Name -> implementation of the op, for those that run on this device."""
    op = OPS[case.op]
    found: dict[str, Callable[..., Any]] = {"reference": op.reference}
    if op.fused:
        found["fused"] = op.fused
    if op.triton and plan.setting.device == "cuda":
        refused = op.supports(*case.args) if op.supports else None
        if refused is None:
            found["triton"] = op.triton
        else:
            print(f"{case.op} {case.label}: triton does not support it: {refused}")
    if plan.compiled:
        torch._dynamo.reset()  # else the ninth shape of a function is refused
        found["compile"] = torch.compile(op.reference, fullgraph=True, dynamic=False)
    if plan.candidate:
        found["candidate"] = plan.candidate
    return found


def measure_case(case: Case, plan: MeasurementPlan, rates: DeviceRates) -> dict[str, Any]:
    """The row of results of one case. Raises CandidateError for a candidate that breaks the law."""
    functions = implementations(case, plan)
    checked, broken = check_implementations(case, functions)
    if "compile" in functions and (why := compile_failure(case, functions["compile"])):
        print(f"{case.op} {case.label}: torch.compile of the reference is left out, it {why}")
        del functions["compile"]
    calls = _calls(case, functions, plan)
    times = time_calls(calls, plan)
    floor = minimum_cost(case, rates)
    contenders = {}
    for name, call in calls.items():
        if name in times:
            row = measure_call(name, call, case, times, plan) | checked.get(name, {})
            row["roofline"] = row["over minimum"] = None
            if floor and name != "frozen":
                row["roofline"] = 100 * floor["seconds"] / (row["forward"] + row["backward"])
                if row["bytes"] is not None:
                    row["over minimum"] = row["bytes"] / floor["bytes"]
            contenders[name] = row
    found = {
        "op": case.op,
        "case": case.label,
        "count": case.count,
        "contenders": contenders,
        "minimum": floor,
        "broken": broken,
    }
    for other in ("frozen", "peft", "torch", "compile"):
        if other in times:
            for key, clock in ((f"to {other}", False), (f"to {other}, clock", True)):
                found[key] = {
                    name: timing.median_ratio(times, name, other, clock=clock)
                    for name in contenders
                }
    found["rounds"] = len(times[next(iter(contenders))])
    return found


def _calls(
    case: Case, functions: dict[str, Callable[..., Any]], plan: MeasurementPlan
) -> dict[str, Call]:
    """The contenders: every implementation, `kernels.call`, and the case's others."""
    trains = trained_tensors(case.args)
    calls: dict[str, Call] = {}
    for name, function in functions.items():
        if not plan.quick or name == "candidate":
            calls[name] = functools.partial(function, *case.args), trains
    calls["ours"] = functools.partial(kernels.call, case.op, *case.args), trains
    return calls | case.others


def compile_failure(case: Case, compiled: Callable[..., Any]) -> str:
    """Why torch.compile cannot compile the op; empty where it can."""
    try:
        compiled(*case.args)
    except Exception as error:  # of dynamo, inductor or the compiler that it calls
        return f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def check_implementations(
    case: Case, functions: dict[str, Callable[..., Any]]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """(name -> errors to float64, name -> how it breaks the law)

    The errors are the largest of results and the largest of gradients.
    """
    reference = OPS[case.op].reference
    if not has_plain_arguments(case.args):
        # An optimizer's state cannot be cast; benchmarks.optimizer and the tests of the
        # implementations measure its error.
        return {}, {}
    truth = laws.run_outcome(reference, reference, copy_arguments(case.args, torch.float64))
    eager = laws.run_outcome(reference, reference, case.args)
    own = laws.errors_to_truth(eager, truth)
    rows: dict[str, dict[str, float]] = {}
    broken: dict[str, str] = {}
    for name, function in functions.items():
        try:
            got = eager if name == "reference" else laws.run_outcome(function, reference, case.args)
            fault = laws.broken_law(got, truth, own)
        except Exception as error:  # of any type: from a user's file
            if name == "compile":  # `compile_failure` reports it
                continue
            if name != "candidate":
                raise
            fault = f"raises {type(error).__name__}: {error}"
        if fault is None:
            rows[name] = _largest_errors(laws.errors_to_truth(got, truth))
        elif name == "candidate":
            raise CandidateError(
                f"the candidate is refused: at {case.op} {case.label} it {fault}; "
                f"make it equal lora_core.kernels.reference.{case.op}"
            )
        elif name == "compile":
            print(f"{case.op} {case.label}: the reference under torch.compile {fault}")
        else:
            broken[name] = fault
            print(f"{case.op} {case.label}: THE IMPLEMENTATION {name} IS WRONG, it {fault}")
    return rows, broken


def _largest_errors(found: dict[str, laws.Error]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for key, error in found.items():
        kind = "gradient error" if key.startswith("gradient") else "error"
        errors[kind] = max(errors.get(kind, 0.0), error.norm)
    return errors


def time_calls(calls: dict[str, Call], plan: MeasurementPlan) -> timing.Times:
    """Seconds of forward and backward together; those of forward alone under "forward NAME"."""
    contenders = {name: forward_and_backward(*call) for name, call in calls.items()}
    contenders |= {f"forward {name}": call for name, (call, trains) in calls.items() if trains}
    times = timing.alternate(
        contenders, plan.rounds, device=plan.setting.device, graph=plan.graph, limit=plan.limit
    )
    for name, why in times.left_out.items():
        print(f"{name} cannot be captured as a CUDA graph: {why}")
    return times


def forward_and_backward(call: Callable[[], Any], trains: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward for fixed gradients; forward alone where nothing is trained."""
    if not trains:
        return call
    slopes = [laws.output_gradient(result) for result in _smooth_results(call())]

    def run() -> Any:
        return torch.autograd.grad(_smooth_results(call()), trains, slopes, allow_unused=True)

    return run


def result_tensors(out: Any) -> list[Tensor]:
    """The tensors in a result, in order."""
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _smooth_results(out: Any) -> list[Tensor]:
    return [result for result in result_tensors(out) if result.requires_grad]


def measure_call(
    name: str, call: Call, case: Case, times: timing.Times, plan: MeasurementPlan
) -> dict[str, Any]:
    """Seconds, bytes moved and memory of one contender."""
    whole = forward = timing.median_seconds(times, name)
    if f"forward {name}" in times:
        forward = timing.median_seconds(times, f"forward {name}")
    row: dict[str, Any] = {"forward": forward, "backward": max(0.0, whole - forward)}
    step = forward_and_backward(*call)
    if plan.setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        row["memory"] = torch.cuda.max_memory_allocated() - before
    else:
        with saved_activations(case.args[1:], call[1][1:]) as kept:
            out = call[0]()
        row["memory"] = kept.bytes
        del out
    # a dispatch mode would decompose compiled kernels, and does not see loops over pointers
    if name == "compile" or not has_plain_arguments(case.args):
        return row | {"bytes": None}
    with Counter() as counter:
        step()
    return row | {"bytes": counter.tally.bytes, "operations": counter.tally.ops}


def minimum_cost(case: Case, rates: DeviceRates) -> dict[str, float]:
    """The least bytes and FLOP of a case, and the seconds that they take at the device's rates.

    Every argument and result once forward, and again with their gradients backward; FLOP of the
    reference. Empty for arguments that hold objects, whose tensors are not known.
    """
    if not has_plain_arguments(case.args):
        return {}
    tensors = result_tensors(case.args)
    trains = trained_tensors(case.args)
    call = functools.partial(OPS[case.op].reference, *case.args)
    made = result_tensors(call())
    size = sum(map(touched_bytes, tensors)) + sum(map(touched_bytes, made))
    if trains:
        again = trains if case.op in NO_INPUT else [*trains, *tensors]
        size += sum(map(touched_bytes, again)) + sum(map(touched_bytes, made))
    with FlopCounterMode(display=False) as counter:
        forward_and_backward(call, trains)()
    flops = counter.get_total_flops()
    seconds = max(size / rates.bandwidth, flops / rates.products)
    return {"bytes": size, "flops": flops, "seconds": seconds}


def measure_device_rates(setting: Setting) -> DeviceRates:
    """Rates of a copy of 128 MB (1 GB on a GPU) and of a product of 2048 (8192) squared.

    Each at its fastest of seven. A CPU without instructions for the dtype, which would take over a
    second, does a smaller product.
    """
    large = setting.device == "cuda"
    source = torch.zeros(2**30 if large else 2**27, dtype=torch.uint8, device=setting.device)
    target = torch.zeros_like(source)
    n = 8192 if large else _affordable_side(setting.dtype)
    a = torch.randn(n, n, device=setting.device).to(setting.dtype)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
    times = timing.alternate(calls, 7, device=setting.device)
    copy, product = (min((times.processor or times)[name]) for name in ("copy", "product"))
    return DeviceRates(2 * source.numel() / copy, 2 * n**3 / product)


def _affordable_side(dtype: torch.dtype) -> int:
    """2048, or its largest half whose square product takes a CPU under a second.

    Estimated from the time of a product of 256.
    """
    small, side = torch.randn(256, 256).to(dtype), 2048
    small @ small  # libraries initialize themselves
    began = time.perf_counter()
    small @ small
    seconds = time.perf_counter() - began
    while side > 256 and seconds * (side / 256) ** 3 > 1:
        side //= 2
    return side
