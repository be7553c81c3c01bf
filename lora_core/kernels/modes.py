"""The kernel mode: which implementations run, from LORA_KERNELS, `set_mode` or `use_kernels`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_core.errors import UserError

MODES = ("auto", "reference", "fused", "triton")


class Dispatch:
    """State that the choice of an implementation depends on, beyond the op and its arguments.

    A plain object: a context variable would not reach autograd's threads, where checkpointing
    recomputes.
    """

    mode: str | None  # one of MODES; None until LORA_KERNELS is read, at the first use
    generation: int  # grows when the mode, an entry of OPS or the winners change

    def __init__(self) -> None:
        vars(self).update(mode=None, generation=0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode" and value != self.mode:
            self.generation += 1
        super().__setattr__(name, value)


dispatch = Dispatch()


def current_mode() -> str:
    """The current mode: that of the innermost `use_kernels`, else of `set_mode`, else LORA_KERNELS,
    else auto.

    Raises UserError for a LORA_KERNELS that is not one of MODES.
    """
    if dispatch.mode is None:
        named = os.environ.get("LORA_KERNELS", "auto")
        _check_mode(named, "LORA_KERNELS")
        dispatch.mode = named
    return dispatch.mode


def set_mode(mode: str | None) -> None:
    """Run every op in this mode from now on; None: LORA_KERNELS is read again at the next use."""
    if mode is not None:
        _check_mode(mode, "set_mode(...)")
    dispatch.mode = mode


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Run every op in one mode inside the block; blocks nest."""
    _check_mode(mode, "use_kernels(...)")
    before = dispatch.mode
    dispatch.mode = mode
    try:
        yield
    finally:
        dispatch.mode = before


def _check_mode(mode: str, source: str) -> None:
    if mode not in MODES:
        known = ", ".join(MODES)
        raise UserError(f"{source} got the kernel mode {mode!r}; expected one of {known}")
