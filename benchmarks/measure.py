"""One op in one case: its contenders checked against float64, timed in turns, and counted.

`report` gives the row that benchmarks/kernels.py prints and stores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import laws, timing
from benchmarks.cases import Case, Setting, copy_arguments, is_plain, trained_tensors
from benchmarks.counting import Counter, saved_activations, touched_bytes
from lora_core import kernels
from lora_core.errors import UserError
from lora_core.kernels import OPS

NO_INPUT = ("keyed_dropout",)  # whose backward needs none of its arguments
Call = tuple[Callable[[], Any], list[Tensor]]  # and what it trains


class MeasurementPlan(NamedTuple):
    """How a case is measured."""

    setting: Setting
    rounds: int
    limit: float  # seconds of a case's rounds
    graph: bool = False  # replay CUDA graphs
    compiled: bool = False  # torch.compile of the reference as a contender
    quick: bool = False  # ours, peft and the frozen layer only
    candidate: Callable[..., Any] | None = None


class DeviceRates(NamedTuple):
    """What the device can do, measured in this run."""

    bandwidth: float  # bytes a second of a copy, read and written
    products: float  # FLOP a second of a large matrix product in the run's dtype


def implementations(case: Case, plan: MeasurementPlan) -> dict[str, Callable[..., Any]]:
    """The op's implementations that run here."""
    op = OPS[case.op]
    found: dict[str, Callable[..., Any]] = {"reference": op.reference}
    if op.fused:
        found["fused"] = op.fused
    if op.triton and plan.setting.device == "cuda":
        refused = op.supports(*case.args) if op.supports else None
        if refused is None:
            found["triton"] = op.triton
        else:
            print(f"{case.op} {case.label}: triton refuses: {refused}")
    if plan.compiled:
        torch._dynamo.reset()  # else the ninth shape of a function is refused
        found["compile"] = torch.compile(op.reference, fullgraph=True, dynamic=False)
    if plan.candidate:
        found["candidate"] = plan.candidate
    return found


def measure_case(case: Case, plan: MeasurementPlan, rates: DeviceRates) -> dict[str, Any]:
    """The row of one case. Raises UserError for a candidate that breaks the law."""
    functions = implementations(case, plan)
    checked, broken = check_implementations(case, functions)
    if "compile" in functions and (why := compile_failure(case, functions["compile"])):
        print(f"{case.op} {case.label}: torch.compile of the reference is left out, it {why}")
        del functions["compile"]
    calls: dict[str, Call] = {
        name: (lambda f=f: f(*case.args), trained_tensors(case.args))
        for name, f in functions.items()
    }  # type: ignore[misc]
    calls |= {
        "ours": (lambda: kernels.call(case.op, *case.args), trained_tensors(case.args))
    } | case.others
    if plan.quick:
        calls = {
            name: call
            for name, call in calls.items()
            if name in ("ours", "candidate") or name in case.others
        }
    times = time_calls(calls, plan)
    contenders = {
        name: measure_call(name, call, case, times, plan)
        for name, call in calls.items()
        if name in times
    }
    floor = minimum_cost(case, rates)
    for name, row in contenders.items():
        row.update(checked.get(name, {}))
        bounded = floor and name != "frozen"
        row["roofline"] = (
            100 * floor["seconds"] / (row["forward"] + row["backward"]) if bounded else None
        )
        row["over minimum"] = (
            row["bytes"] / floor["bytes"] if bounded and row["bytes"] is not None else None
        )
    row = {
        "op": case.op,
        "case": case.label,
        "count": case.count,
        "contenders": contenders,
        "minimum": floor,
        "broken": broken,
    }
    for other in ("frozen", "peft", "torch", "compile"):
        if other in times:
            row[f"to {other}"] = {
                name: timing.median_ratio(times, name, other) for name in contenders
            }
            row[f"to {other}, clock"] = {
                name: timing.median_ratio(times, name, other, clock=True) for name in contenders
            }
    row["rounds"] = len(times[next(iter(contenders))])
    return row


def compile_failure(case: Case, compiled: Callable[..., Any]) -> str:
    """Why torch.compile cannot have the op; empty where it can."""
    try:
        compiled(*case.args)
    except Exception as error:  # of dynamo, inductor or the compiler that it calls
        return f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def check_implementations(
    case: Case, functions: dict[str, Callable[..., Any]]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Per twin its errors to float64 (of results; the largest of gradients), and how those that break the law do."""
    reference = OPS[case.op].reference
    if not is_plain(
        case.args
    ):  # there is no casting an optimiser's state; benchmarks.optimizer and the twins' tests measure its error
        if "candidate" in functions:
            raise UserError(
                f"--candidate cannot be checked as {case.op}, whose arguments hold more than tensors; use an op that takes tensors"
            )
        return {}, {}
    truth, eager = (
        laws.run_outcome(reference, reference, copy_arguments(case.args, torch.float64)),
        laws.run_outcome(reference, reference, case.args),
    )
    own, rows, broken = laws.errors_to_truth(eager, truth), {}, {}
    for name, function in functions.items():
        try:
            got = eager if name == "reference" else laws.run_outcome(function, reference, case.args)
            said = laws.broken_law(got, truth, own)
        except Exception as error:  # whatever a user's file raises
            if name == "compile":  # `untraceable` says so
                continue
            if name != "candidate":
                raise
            said = f"raises {type(error).__name__}: {error}"
        if said is None:
            found = laws.errors_to_truth(got, truth)
            gradients = [error.norm for key, error in found.items() if key.startswith("gradient")]
            rows[name] = {
                "error": max(
                    error.norm for key, error in found.items() if not key.startswith("gradient")
                )
            }
            rows[name] |= {"gradient error": max(gradients)} if gradients else {}
        elif name == "candidate":
            raise UserError(
                f"the candidate is refused: at {case.op} {case.label} it {said}; make it equal lora_core.kernels.reference.{case.op}"
            )
        elif name == "compile":
            print(f"{case.op} {case.label}: what torch.compile makes of the reference {said}")
        else:
            broken[name] = said
            print(f"{case.op} {case.label}: THE {name} TWIN IS WRONG, it {said}")
    return rows, broken


def time_calls(calls: dict[str, Call], plan: MeasurementPlan) -> timing.Times:
    """Seconds of forward and backward together under the contender's name, of forward alone under "forward NAME"."""
    whole = {name: forward_and_backward(*call) for name, call in calls.items()}
    forward = {f"forward {name}": call for name, (call, trains) in calls.items() if trains}
    times = timing.alternate(
        whole | forward, plan.rounds, device=plan.setting.device, graph=plan.graph, limit=plan.limit
    )
    for name, why in times.left_out.items():
        print(f"{name} cannot be captured as a CUDA graph: {why}")
    return times


def forward_and_backward(call: Callable[[], Any], trains: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward for a fixed slope; forward alone where nothing is trained."""
    if not trains:
        return call
    slopes = [
        laws.output_gradient(result) for result in result_tensors(call()) if result.requires_grad
    ]
    return lambda: torch.autograd.grad(
        [result for result in result_tensors(call()) if result.requires_grad],
        trains,
        slopes,
        allow_unused=True,
    )


def result_tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def measure_call(
    name: str, call: Call, case: Case, times: timing.Times, plan: MeasurementPlan
) -> dict[str, Any]:
    """Seconds, bytes moved, memory."""
    whole = timing.median_seconds(times, name)
    forward = (
        timing.median_seconds(times, f"forward {name}") if f"forward {name}" in times else whole
    )
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
    if name == "compile" or not is_plain(
        case.args
    ):  # a dispatch mode would take its kernels apart, and does not see loops over pointers
        return row | {"bytes": None}
    with Counter() as counter:
        step()
    return row | {"bytes": counter.tally.bytes, "operations": counter.tally.ops}


def minimum_cost(case: Case, rates: DeviceRates) -> dict[str, float]:
    """Bytes (every argument and result once forward, and again with their gradients backward), FLOP of the reference, and the seconds they take.

    Empty for arguments that hold objects, whose tensors are not known.
    """
    if not is_plain(case.args):
        return {}
    tensors = [leaf for leaf in tree_leaves(case.args) if isinstance(leaf, Tensor)]
    trains, call = trained_tensors(case.args), lambda: OPS[case.op].reference(*case.args)
    made = result_tensors(call())
    size = sum(map(touched_bytes, tensors)) + sum(map(touched_bytes, made))
    if trains:
        again = trains if case.op in NO_INPUT else [*trains, *tensors]
        size += sum(map(touched_bytes, again)) + sum(map(touched_bytes, made))
    with FlopCounterMode(display=False) as counter:
        forward_and_backward(call, trains)()
    flops = counter.get_total_flops()
    return {
        "bytes": size,
        "flops": flops,
        "seconds": max(size / rates.bandwidth, flops / rates.products),
    }


def measure_device_rates(setting: Setting) -> DeviceRates:
    """Of a copy of 128 MB (1 GB on a GPU) and a product of 2048 (8192) squared, each at its fastest of seven.

    A CPU without instructions for the dtype, which would take over a second, does a smaller product.
    """
    large = setting.device == "cuda"
    source = torch.zeros(2**30 if large else 2**27, dtype=torch.uint8, device=setting.device)
    target = torch.zeros_like(source)
    n = 8192 if large else _affordable_side(setting.dtype)
    a = torch.randn(n, n, device=setting.device).to(setting.dtype)
    times = timing.alternate(
        {"copy": lambda: target.copy_(source), "product": lambda: a @ a}, 7, device=setting.device
    )
    copy, product = (min((times.processor or times)[name]) for name in ("copy", "product"))
    return DeviceRates(2 * source.numel() / copy, 2 * n**3 / product)


def _affordable_side(dtype: torch.dtype) -> int:
    """2048, or the largest half of it whose square product takes a CPU under a second, from the time of one of 256."""
    small, side = torch.randn(256, 256).to(dtype), 2048
    small @ small  # libraries initialise themselves
    began = time.perf_counter()
    small @ small
    seconds = time.perf_counter() - began
    while side > 256 and seconds * (side / 256) ** 3 > 1:
        side //= 2
    return side
