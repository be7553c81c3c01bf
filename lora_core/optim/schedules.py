"""Learning-rate schedules: multipliers of the learning rate by step, after a linear warm-up."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from lora_core.errors import UserError
from lora_core.plugins import load_from_file
from lora_core.text import nearest_names


def constant_schedule(step: int, total: int, warmup: int) -> float:
    """1 after the warm-up."""
    return _warmup_factor(step, warmup) if step < warmup else 1.0


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """Linear from 1 to 0 after the warm-up."""
    if step < warmup:
        return _warmup_factor(step, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine_schedule(step: int, total: int, warmup: int, *, cycles: float = 0.5) -> float:
    """(1 + cos(2 pi cycles progress)) / 2; the default of half a cycle ends at 0.

    arXiv 1608.03983 without restarts.
    """
    if step < warmup:
        return _warmup_factor(step, warmup)
    angle = 2 * math.pi * cycles * _progress(step, total, warmup)
    return max(0.0, 0.5 * (1 + math.cos(angle)))


def cosine_restarts_schedule(step: int, total: int, warmup: int, *, cycles: int = 1) -> float:
    """`cycles` half cosines from 1 to 0, one after another (arXiv 1608.03983)."""
    if step < warmup:
        return _warmup_factor(step, warmup)
    progress = _progress(step, total, warmup)
    if progress >= 1:
        return 0.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1))))


def polynomial_schedule(
    step: int, total: int, warmup: int, *, power: float = 1.0, end: float = 0.0
) -> float:
    """Polynomial from 1 to `end`: (1 - progress)^power (1 - end) + end.

    `end` is a fraction of the learning rate (diffusers: lr_end / lr).
    """
    if step < warmup:
        return _warmup_factor(step, warmup)
    if step > total:
        return end
    return end + (1 - end) * (1 - _progress(step, total, warmup)) ** power


# name -> fn(step, total, warmup, **args) -> multiplier of the learning rate. Steps count from 0;
# the formulas are those of diffusers.optimization.
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant_schedule,
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "cosine_restarts": cosine_restarts_schedule,
    "polynomial": polynomial_schedule,
}


def resolve_schedule(name: str, **args: Any) -> Callable[[int, int, int], float]:
    """fn(step, total, warmup) -> multiplier, with the schedule's own arguments bound.

    `name` is an entry of SCHEDULES or "path/to/file.py:function". Raises UserError for an unknown
    name or argument, and, when called, for a multiplier that is not a finite number of at least 0.
    """
    file, _, function = name.rpartition(":")
    if name not in SCHEDULES and not file.endswith(".py"):
        known = f"{', '.join(SCHEDULES)} or path/to/file.py:function"
        near = suggest_name(name, SCHEDULES)
        raise UserError(f"schedule {name!r} is unknown; expected one of {known}{near}")
    if name in SCHEDULES:
        schedule = SCHEDULES[name]
    else:
        schedule = load_from_file(file, function, "function")
    check_known_arguments(schedule, args, f"schedule {name}", given=("step", "total", "warmup"))

    def compute_multiplier(step: int, total: int, warmup: int) -> float:
        try:
            value = float(schedule(step, total, warmup, **args))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"schedule {name} is called as fn(step, total, warmup) and returns a number: "
                f"{error}"
            ) from error
        if not (math.isfinite(value) and value >= 0):
            raise UserError(
                f"schedule {name} is {value:g} at step {step} of {total}; "
                "expected a finite number of at least 0"
            )
        return value

    return compute_multiplier


def check_known_arguments(
    fn: Callable[..., Any], args: Iterable[str], owner: str, *, given: Iterable[str] = ()
) -> None:
    """Raises UserError naming the first of `args` that `fn` does not take, with the nearest name.

    `given` are the arguments that the program itself passes.
    """
    parameters = inspect.signature(fn).parameters
    for name in args:
        if name in given:
            raise UserError(
                f"{owner} has no argument {name!r} to set here: the program gives it; "
                "use the option of that name"
            )
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in given]
    for name in args:
        if name not in known:
            expected = ", ".join(known) or "none"
            near = suggest_name(name, known)
            raise UserError(f"{owner} has no argument {name!r}; expected {expected}{near}")


def suggest_name(name: str, known: Iterable[str]) -> str:
    """ " (nearest: NAME)", or nothing where no known name is near."""
    near = nearest_names(name, known, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""


def _warmup_factor(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _progress(step: int, total: int, warmup: int) -> float:
    """The completed fraction of the steps after the warm-up."""
    return (step - warmup) / max(1, total - warmup)
