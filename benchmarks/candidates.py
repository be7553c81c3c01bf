"""Cases that a candidate for an op has to get right before it is timed, and their check.

Each case is in fp32, bf16 and fp16, with adapters in fp32: results and gradients of everything that
trains, by the law of benchmarks/laws.py. Sizes are odd or prime, so that a kernel that assumes
whole tiles fails, and not so small that the error of the reference is small by luck. LINEAR_CASES
are those of an adapted linear layer; any op has its example, without each argument that may be
None, and with each tensor in another memory order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import laws
from benchmarks.cases import (
    Case,
    RandomTensors,
    Setting,
    copy_arguments,
    has_plain_arguments,
    mark_trained,
)
from lora_core.errors import UserError, one_line
from lora_core.kernels import OPS, reference
from lora_core.kernels.candidate import without_nones
from lora_core.kernels.reference import Drop, Member
from lora_core.plugins import describe_error

CHECKED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN_OPS = ("lora_linear", "lora_grouped")  # whose cases are of plain LoRA, DoRA and dropout
NOT_PLAIN = "DoRA and dropout"
DETACHED_OPS = ("dora_norms",)  # computed once a step, without gradients
SCALE = 0.7


class CandidateError(UserError):
    """A candidate that breaks the law, as a sentence; the exit status is 1."""


class Layer(NamedTuple):
    """A case of an adapted linear layer."""

    shape: tuple[int, ...] = (2, 13, 37)  # of x
    out: int = 43
    rank: int = 5
    bias: bool = True
    weight: bool = True
    x_trains: bool = True
    x_order: str = ""  # "transposed", or "sliced" out of a wider tensor
    factors_transposed: bool = False
    dora: str = ""  # or "detached", "full": whether the norm is in the graph
    drop: float = 0.0


LINEAR_CASES = {
    "LoRA": Layer(),
    "LoRA without bias": Layer(bias=False),
    "LoRA without weight": Layer(bias=False, weight=False),
    "x with 2 dimensions": Layer((29, 37)),
    "x with 4 dimensions": Layer((2, 3, 5, 37)),
    "one row": Layer((1, 67), out=71),
    "one row of an image": Layer((1, 1, 67), out=71),
    "rank 1": Layer((3, 41, 67), out=71, rank=1),
    "rank 3": Layer(rank=3),
    "rank 37 of 67 features": Layer((3, 41, 67), out=71, rank=37),
    "131 rows of 129 features": Layer((131, 129), out=127, rank=16),
    "x transposed in memory": Layer(x_order="transposed"),
    "x sliced out of a wider tensor": Layer(x_order="sliced"),
    "down and up transposed in memory": Layer(factors_transposed=True),
    "x without gradient": Layer(x_trains=False),
    "DoRA": Layer(dora="detached"),
    "DoRA without bias": Layer((29, 37), bias=False, dora="detached"),
    "DoRA with its norm in the graph": Layer((3, 41, 67), out=71, dora="full"),
    "dropout": Layer(drop=0.25),
    "dropout of x with 2 dimensions": Layer((29, 37), drop=0.25),
    "dropout without weight": Layer(bias=False, weight=False, drop=0.25),
    "dropout and DoRA": Layer((3, 41, 67), out=71, dora="full", drop=0.5),
}


GROUPED_CASES = (  # of lora_grouped: three such layers of different sizes
    "LoRA",
    "LoRA without bias",
    "x with 2 dimensions",
    "131 rows of 129 features",
    "DoRA",
    "dropout",
    "dropout and DoRA",
)


class CheckedCase(NamedTuple):
    """A case of a candidate: the op's arguments; `wrap` changes how the op is called on them."""

    name: str
    args: tuple[Any, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    is_plain: bool = True


# ---------------------------------------------------------------- the cases


def candidate_cases(op: str, device: str, dtype: torch.dtype) -> list[CheckedCase]:
    """The cases of an op in one dtype of base and activations."""
    setting = Setting(device, dtype, 0)
    if op == "lora_linear":
        return [linear_check(name, layer, setting) for name, layer in LINEAR_CASES.items()]
    return grouped_checks(setting) if op == "lora_grouped" else example_checks(op, device, dtype)


def linear_check(name: str, layer: Layer, setting: Setting) -> CheckedCase:
    """A case of lora_linear."""
    random, width = RandomTensors(setting), layer.shape[-1]
    x = random.base(*layer.shape)
    member = _random_member(random, layer, width)
    wrap = None
    if layer.x_order == "transposed":
        x = transposed(x)
    if layer.x_order == "sliced":
        x = random.base(*layer.shape[:-1], width + 3)
        wrap = functools.partial(_on_slice, width)
    args = list(mark_trained(reference.lora_linear, (x, *member)))
    if not layer.x_trains:
        args[0] = x
    if layer.dora == "full":
        args[7] = args[7].detach().requires_grad_()
    return CheckedCase(name, without_nones(tuple(args)), wrap, not (layer.dora or layer.drop))


def _random_member(random: RandomTensors, layer: Layer, width: int) -> tuple[Any, ...]:
    """weight, bias, down, up, scale, magnitude, norm and drop."""
    weight = random.base(layer.out, width, size=width**-0.5)
    bias = random.base(layer.out) if layer.bias else None
    down = random.adapter(layer.rank, width, size=width**-0.5)
    up = random.adapter(layer.out, layer.rank, size=layer.rank**-0.5)
    if layer.factors_transposed:
        down, up = transposed(down), transposed(up)
    magnitude = norm = drop = None
    if layer.dora:
        norm = reference.dora_norm(weight, down, up, SCALE)
        magnitude = norm * (1 + random.adapter(layer.out, size=0.2))
    if layer.drop:
        device = random.setting.device
        rows = torch.arange(layer.shape[0], device=device) * 2**33 - 5
        drop = Drop(layer.drop, 2**40 + 77, 2**32 - 1, torch.tensor(3, device=device), rows)
    return weight if layer.weight else None, bias, down, up, SCALE, magnitude, norm, drop


def _on_slice(width: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on the first features of x, which then is no block of memory."""
    return lambda x, *rest: function(x[..., :width], *rest)


def grouped_checks(setting: Setting) -> list[CheckedCase]:
    """The cases of lora_grouped."""
    found: list[CheckedCase] = []
    for name in GROUPED_CASES:
        layer = LINEAR_CASES[name]
        random = RandomTensors(setting)
        x = random.base(*layer.shape)
        members = []
        for out in (layer.out, 37, 53):
            row = _random_member(random, layer._replace(out=out), layer.shape[-1])
            members.append(Member(*row))
        args = mark_trained(reference.lora_grouped, (x, tuple(members)))
        found.append(
            CheckedCase(f"three layers, {name}", args, None, not (layer.dora or layer.drop))
        )
    return found


def example_checks(op: str, device: str, dtype: torch.dtype) -> list[CheckedCase]:
    """The op's example: as it is, without what may be None, and in other memory orders."""
    args = OPS[op].example(0, dtype, device)
    if not has_plain_arguments(args):
        # An optimizer's state cannot be cast; benchmarks.optimizer and the tests of the
        # implementations measure its error.
        raise UserError(
            f"--candidate cannot be checked as {op}, whose arguments hold more than tensors; "
            "use an op that takes tensors"
        )
    function = OPS[op].reference
    parameters = inspect.signature(function).parameters.values()
    changes = {"its example": args}
    for number, (parameter, value) in enumerate(zip(parameters, args)):
        if not isinstance(value, Tensor):
            continue
        if "None" in str(parameter.annotation):
            changes[f"its example without {parameter.name}"] = _with(args, number, None)
        if value.ndim > 1:
            moved = _with(args, number, transposed(value))
            changes[f"its example, {parameter.name} transposed in memory"] = moved
    trains = op not in DETACHED_OPS
    found = []
    for name, made in changes.items():
        found.append(CheckedCase(name, mark_trained(function, made) if trains else made))
    return found


def _with(args: Sequence[Any], number: int, value: Any) -> tuple[Any, ...]:
    return (*args[:number], value, *args[number + 1 :])


def transposed(x: Tensor) -> Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


# ---------------------------------------------------------------- the check


def check_candidate(
    op: str, function: Callable[..., Any], measured: Sequence[Case], *, only_plain: bool
) -> str:
    """The sentence that says what was checked.

    `measured` are the cases that are timed next, in which a candidate that failed is looked at
    too. `only_plain`: without DoRA and dropout. Raises CandidateError with a sentence for each
    case that fails.
    """
    device = "cpu"
    for case in measured:
        device = next(leaf.device.type for leaf in case.args if isinstance(leaf, Tensor))
    faults: dict[str, list[tuple[str, str]]] = {}  # name of the case -> (dtype, how it fails)
    checked = 0
    refused: dict[str, list[str]] = {}  # reason of `supports` -> names of cases
    for label, dtype in CHECKED_DTYPES.items():
        for case in candidate_cases(op, device, dtype):
            if only_plain and not case.is_plain:
                continue
            if reason := refusal(function, case.args):
                refused.setdefault(reason, []).append(f"{case.name} {label}")
                continue
            checked += 1
            if fault := candidate_fault(op, function, case):
                faults.setdefault(case.name, []).append((label, fault))
    if faults:
        for case in measured:
            if fault := candidate_fault(op, function, CheckedCase(case.label, case.args)):
                faults[case.label] = [("as measured", fault)]
        raise CandidateError(*_describe_faults(op, faults, offers_plain=not only_plain))
    if not checked:
        reason = next(iter(refused))
        raise CandidateError(
            f"the candidate is refused: it supports no case of {op} ({reason}); its attribute "
            "supports returns None for arguments that it takes"
        )
    dtypes = ", ".join(CHECKED_DTYPES)
    lines = [f"candidate: {checked} cases of {op} agree with the reference ({dtypes})"]
    if only_plain:
        lines.append(f"not checked: {NOT_PLAIN} (--case lora)")
    for reason, names in refused.items():
        lines.append(f"not checked, because unsupported ({reason}): {', '.join(names)}")
    return "\n".join(lines)


def refusal(function: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
    """Why a candidate does not take arguments: what its attribute `supports` returns for them."""
    supports = getattr(function, "supports", None)
    return supports(*args) if supports else None


def _describe_faults(
    op: str, faults: dict[str, list[tuple[str, str]]], *, offers_plain: bool
) -> tuple[str, str]:
    """The sentence of the first case that fails, and the lines of the others and of advice."""
    lines = []
    for name, found in faults.items():
        dtypes = ", ".join(dtype for dtype, _ in found)
        fault = one_line(found[0][1])
        lines.append(f"the candidate is refused: at {op} {name} it {fault} [{dtypes}]")
    number = "1 case fails" if len(faults) == 1 else f"{len(faults)} cases fail"
    advice = f"{number}; make it equal lora_core.kernels.reference.{op}"
    if offers_plain and op in PLAIN_OPS:
        advice += f", or leave {NOT_PLAIN} out of the check with --case lora"
    if "active drivers" in lines[0]:
        advice = "a Triton kernel runs on a GPU, or on a CPU in the interpreter: TRITON_INTERPRET=1"
    return lines[0], "".join(f"\n{line}" for line in [*lines[1:], advice])


def candidate_fault(op: str, function: Callable[..., Any], case: CheckedCase) -> str | None:
    """How a function fails a case, as the predicate of a sentence; None where it is right."""
    wrap = case.wrap or (lambda given: given)
    right = OPS[op].reference
    truth = laws.run_outcome(wrap(right), right, copy_arguments(case.args, torch.float64))
    eager = laws.run_outcome(wrap(right), right, case.args)
    try:
        got = laws.run_outcome(wrap(function), right, case.args)
    except Exception as error:  # of any type: from a user's file
        return f"raises {describe_error(error, function)}"
    fault = laws.broken_law(got, truth, laws.errors_to_truth(eager, truth))
    if fault is not None:
        return fault
    for name, value in got.values.items():
        if name not in eager.values:
            return f"gives {name}, where the reference has none"
        if value.dtype != eager.values[name].dtype:
            dtypes = f"{value.dtype}, expected {eager.values[name].dtype}"
            return f"gives {name} in {dtypes}".replace("torch.", "")
    return None
