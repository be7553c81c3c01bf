"""A user's function in place of an op's implementations: LORA_CANDIDATE=OP=FILE.py:FUNCTION.

The function gets the arguments of the op's reference, without those at the end that are None. An
attribute `supports` of it, a function of the same arguments, returns None or the reason why it does
not take them; those, and more arguments than it has parameters, go to the usual implementation.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection
from typing import Any

from lora_core.errors import UserError
from lora_core.plugins import describe_error, find_plugin
from lora_core.text import nearest_hint

VARIABLE = "LORA_CANDIDATE"


class Candidate:
    """A user's implementation of one op."""

    def __init__(self, op: str, function: Callable[..., Any], name: str) -> None:
        self.op = op
        self.function = function
        self.name = name  # FILE.py:FUNCTION
        self.supports = getattr(function, "supports", None)
        self.most = most_arguments(function)
        self.calls = 0
        self.reasons: set[str] = set()  # that were printed

    def accepts(self, args: tuple[Any, ...]) -> bool:
        """Whether the function takes these arguments; a reason why not is printed once."""
        args = without_nones(args)
        reason = None
        if len(args) > self.most:
            reason = f"it takes {self.most:g} arguments, and some calls have {len(args)}"
        elif self.supports is not None:
            reason = self.supports(*args)
        if reason is not None and reason not in self.reasons:
            self.reasons.add(reason)
            print(
                f"note: {self.op} runs without {self.name} where that does not support the "
                f"arguments: {reason}",
                file=sys.stderr,
            )
        return reason is None

    def run(self, args: tuple[Any, ...]) -> Any:
        """The op's result. Raises UserError, with the line, where the function raises."""
        self.calls += 1
        try:
            return self.function(*without_nones(args))
        except Exception as error:  # of any type: from a user's file
            raise UserError(
                f"{VARIABLE}: {self.name} raises {describe_error(error, self.function)}; correct "
                "it, or give it an attribute supports that refuses such arguments"
            ) from error

    def describe_calls(self) -> str:
        """How often the function was called, as a sentence."""
        if not self.calls:
            return f"warning: {self.op} was never computed by {self.name} ({VARIABLE})"
        return f"{self.op} was computed by {self.name} in {self.calls} calls ({VARIABLE})"


def read_candidate(text: str, ops: Collection[str]) -> Candidate:
    """The candidate that LORA_CANDIDATE names: OP=FILE.py:FUNCTION, or FILE.py:OP.

    Raises UserError for an unknown op and a function that is not found.
    """
    op, equals, name = text.rpartition("=")
    if not equals:
        op = name.rpartition(":")[2]
    if op not in ops:
        near = nearest_hint(op, ops, ", the nearest is {!r}")
        raise UserError(
            f"{VARIABLE} is {text}, for the op {op!r}{near}; expected "
            f"OP=FILE.py:FUNCTION with one of {', '.join(ops)}"
        )
    found = Candidate(op, find_plugin(name, {}, "candidate"), name)
    print(f"note: {op} is computed by {name} ({VARIABLE})", file=sys.stderr)
    return found


def most_arguments(function: Callable[..., Any]) -> float:
    """The number of positional arguments that a function takes; infinite with *rest."""
    count = 0
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return math.inf
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            count += 1
    return count


def without_nones(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments without those at the end that are None: DoRA's and dropout's of a LoRA."""
    count = len(args)
    while count and args[count - 1] is None:
        count -= 1
    return args[:count]
