"""Learning-rate schedules: multipliers of the learning rate by step, after a linear warm-up.

Write your own as `def my_schedule(step, steps)` and train with
`--optimizer.schedule my_schedule.py:my_schedule`: `step` counts from 0 at the end of the warm-up,
`steps` are those from there to the end of the stage. The program multiplies by the warm-up. A
function with a third parameter, `fn(step, steps, warmup)`, gets the stage's own numbers and does
its warm-up itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from lora_core.errors import UserError
from lora_core.plugins import describe_error, find_plugin


def constant_schedule(step: int, steps: int) -> float:
    """1 in all steps."""
    return 1.0


def linear_schedule(step: int, steps: int) -> float:
    """Linear from 1 to 0."""
    return max(0.0, (steps - step) / steps)


def cosine_schedule(step: int, steps: int, *, cycles: float = 0.5) -> float:
    """(1 + cos(2 pi cycles progress)) / 2; the default of half a cycle ends at 0.

    arXiv 1608.03983 without restarts.
    """
    angle = 2 * math.pi * cycles * (step / steps)
    return max(0.0, 0.5 * (1 + math.cos(angle)))


def cosine_restarts_schedule(step: int, steps: int, *, cycles: int = 1) -> float:
    """`cycles` half cosines from 1 to 0, one after another (arXiv 1608.03983)."""
    if step >= steps:
        return 0.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (cycles * (step / steps) % 1))))


def polynomial_schedule(step: int, steps: int, *, power: float = 1.0, end: float = 0.0) -> float:
    """Polynomial from 1 to `end`: (1 - progress)^power (1 - end) + end.

    `end` is a fraction of the learning rate (diffusers: lr_end / lr).
    """
    return end + (1 - end) * max(0.0, 1 - step / steps) ** power


def wsd_schedule(
    step: int, steps: int, *, decay: float = 0.1, end: float = 0.0, power: float = 1.0
) -> float:
    """1, and in the last share `decay` of the steps from there to `end` (arXiv 2404.06395).

    Warm-up, stable, decay: the paper decays in the last tenth. `end` is a fraction of the learning
    rate. With x from 0 to 1 over the decay, the factor is (1 - x)^power (1 - end) + end; the
    paper's own decay is exponential.
    """
    if not 0 < decay <= 1:
        raise UserError(
            f"schedule wsd decays in a share of {decay:g} of the steps; expected a number in (0, 1]"
        )
    tail = max(1, round(decay * steps))
    return polynomial_schedule(max(0, step - (steps - tail)), tail, power=power, end=end)


def rex_schedule(step: int, steps: int) -> float:
    """(1 - p) / (1 - p / 2) at progress p: above linear, to 0 at the end (arXiv 2107.04197)."""
    progress = min(1.0, step / steps)
    return (1 - progress) / (1 - progress / 2)


def inverse_sqrt_schedule(step: int, steps: int, warmup: int, *, timescale: int = 0) -> float:
    """sqrt(timescale / (timescale + step)) after the warm-up (arXiv 1706.03762, 2106.04560).

    `timescale` in steps; 0: the warm-up's steps, or 10,000 without one (transformers). With the
    first it is the Transformer's own sqrt(warmup / step).
    """
    if step < warmup:
        return step / warmup
    length = timescale or warmup or 10_000
    return math.sqrt(length / (step - warmup + length))


# name -> fn(step, steps, **args) -> multiplier of the learning rate; the formulas are those of
# diffusers.optimization and transformers.optimization.
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant_schedule,
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "cosine_restarts": cosine_restarts_schedule,
    "polynomial": polynomial_schedule,
    "wsd": wsd_schedule,
    "rex": rex_schedule,
    "inverse_sqrt": inverse_sqrt_schedule,
}


def resolve_schedule(name: str, /, **args: Any) -> Callable[[int, int, int], float]:
    """fn(step, total, warmup) -> multiplier, with the schedule's own arguments bound.

    `name` is an entry of SCHEDULES or "path/to/file.py:function". In the warm-up a function of two
    parameters counts with its first value, so that the learning rate rises to it from 0. Raises
    UserError where `find_plugin` does, and, when called, for a function that fails and for a
    multiplier that is not a finite number of at least 0.
    """
    plain = find_plugin(name, SCHEDULES, "schedule")
    warms_up = _takes_warmup(plain)
    schedule = find_plugin(name, SCHEDULES, "schedule", args, given=3 if warms_up else 2)

    def compute_multiplier(step: int, total: int, warmup: int) -> float:
        try:
            if warms_up:
                value = float(schedule(step, total, warmup))
            else:
                value = float(schedule(max(0, step - warmup), max(1, total - warmup)))
        except UserError:
            raise
        except Exception as error:  # whatever the user's file raises
            form = "fn(step, steps, warmup)" if warms_up else "fn(step, steps)"
            raise UserError(
                f"schedule {name} is called as {form} and returns a number: "
                f"{describe_error(error, plain)}"
            ) from error
        if not (math.isfinite(value) and value >= 0):
            raise UserError(
                f"schedule {name} is {value:g} at step {step} of {total}; "
                "expected a finite number of at least 0"
            )
        return value * step / warmup if step < warmup and not warms_up else value

    return compute_multiplier


def _takes_warmup(schedule: Callable[..., Any]) -> bool:
    """Whether a schedule has a third positional parameter without default, or named warmup."""
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(schedule).parameters.values()
    names = []
    for parameter in parameters:
        is_required = parameter.default is inspect.Parameter.empty
        if parameter.kind in positional and (is_required or parameter.name == "warmup"):
            names.append(parameter.name)
    return len(names) > 2
