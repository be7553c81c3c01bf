"""Ctrl-C, SIGTERM (Slurm, docker stop, spot instances) and SIGHUP (a closed terminal): a run ends
between two steps, after a checkpoint.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lora_core import distributed

SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
# Seconds in which a further signal is the same request: `timeout` and a closed terminal send theirs
# twice, systemd a SIGHUP after the SIGTERM.
REPEAT_SECONDS = 1.0
LAUNCHER_SECONDS = 10.0  # the same where torchrun hands a signal on that the process got as well


class Stopped(KeyboardInterrupt):
    """A signal ended the run; `number` is that of the signal."""

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number

    def __str__(self) -> str:
        return str(self.args[0])


class Signals:
    """Context manager in which each of the signals raises Stopped at once; inside `deferred` the
    first one only makes this object true.

    Further signals within a second of the first are the same request, and change nothing. A
    signal that the process was started to ignore (nohup) stays ignored, and outside of the main
    thread nothing changes.
    """

    def __enter__(self) -> Signals:
        self.number = 0  # of the first signal
        self.stopped_by = 0  # number of the signal that several processes agreed to end at
        self.repeat_seconds = REPEAT_SECONDS
        self.agreed: distributed.AgreedNumber | None = None  # of several processes
        self.since = 0.0  # when it came
        self.waits = False  # whether it may wait for the end of a step
        self.before: dict[int, Any] = {}  # signal -> its handler before
        for number in [getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)]:
            handler = signal.getsignal(number)
            try:
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._receive)
                    self.before[number] = handler
            except ValueError:  # not in the main thread: signals are not ours
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return bool(self.number)

    @contextmanager
    def deferred(self) -> Iterator[Signals]:
        """Inside the block the first signal waits until the training loop checks for it between two
        steps; a second one ends the run at once.
        """
        self.waits = True
        if distributed.process_count() > 1:
            self.repeat_seconds = LAUNCHER_SECONDS
        self.agreed = distributed.AgreedNumber() if distributed.process_count() > 1 else None
        try:
            yield self
            if self.agreed is not None:
                self.agreed.finish()
        finally:
            self.waits = False

    def received(self) -> bool:
        """Whether the run is to end after this step; called once in each step.

        Several processes agree: all of them end after the step that follows a signal to one.
        """
        if self.agreed is None:
            return bool(self.number)
        self.stopped_by = self.agreed.exchange(self.number)
        return bool(self.stopped_by)

    def raise_if_received(self) -> None:
        """Raises Stopped if a signal came; with several processes, if `received` was true."""
        number = self.number if self.agreed is None else self.stopped_by
        if number:
            raise Stopped("", number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = not self.number
        if first:
            self.number = number
            self.since = time.monotonic()
        elif time.monotonic() - self.since < self.repeat_seconds:
            return
        if not (first and self.waits):
            raise Stopped("", number)
