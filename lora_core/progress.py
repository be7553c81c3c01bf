"""How far a long task is: bars on a terminal, and without one a line every minute.

The only file that knows rich. Of several processes the first one shows its progress. What a bar
says may name files of strangers: control characters are escaped, and nothing in it is markup.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TextIO, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from lora_core import distributed
from lora_core.byte_sizes import format_bytes
from lora_core.errors import print_error
from lora_core.escaped_output import (
    EscapedStream,
    bottom_stream,
    escape_controls,
    hides_progress,
    one_line,
)

Item = TypeVar("Item")
LINE_SECONDS = 60.0  # between two lines of a bar without a terminal
LONG_SECONDS = 5.0  # a task that took less ends without a line
WAIT_SECONDS = 20.0  # after which a task without steps is named where there is no terminal
RATE_SECONDS = 120.0  # the newest steps, over which a rate is measured
REDRAW_SECONDS = 0.1
WIDE = 110  # columns of a terminal with long bars
BESIDE = 4  # columns of the spinner, and between the columns of a bar
BYTES = "byte"  # the unit of bars over files
_OPEN: list[ProgressBar] = []  # the bars of this process that have begun, the innermost last


def format_duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s, or 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class ProgressBar:
    """A task of a known number of steps, of which `done` are done at its beginning.

    It is shown inside its context. `unit` is one step in a word, BYTES for sizes of files. Rates
    leave out the time of other bars inside, such as those of images that a training run draws.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = _printable(title), total, unit, done
        self.values: dict[str, str] = {}  # that the newest call of `show` gave
        self.shown: _Terminal | _Lines | None = None
        self.marks: deque[tuple[float, int]] = deque()  # (second, steps done) of the newest steps
        self.began, self.first = 0.0, done
        self.inside: dict[str, float] = {}  # title of another bar inside this one -> its seconds

    def __enter__(self) -> ProgressBar:
        self.began = time.monotonic()
        self.marks.append((self.began, self.done))
        _OPEN.append(self)
        if self.total > self.done and distributed.is_main_process():
            self.shown = _Lines() if hides_progress() else TERMINAL
            self.shown.open(self)
        return self

    @property
    def between(self) -> float:
        """Seconds of other bars inside this one."""
        return sum(self.inside.values())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        whole = time.monotonic() - self.began
        if self in _OPEN:
            _OPEN.remove(self)
        _count_inside(self.title, whole)
        shown, self.shown = self.shown, None
        if shown is None:
            return
        shown.close(self)
        took = whole - self.between
        if kind is None and whole >= LONG_SECONDS:
            count = self.done - self.first
            words = f"{self._amount(count)} in {format_duration(took)}"
            rate = _rate_words(count / max(took, REDRAW_SECONDS), self.unit)
            more = ""
            if self.between >= 1:
                named = " and ".join(filter(None, self.inside))
                more = f" (in all {format_duration(whole)}{named and f', with {named}'})"
            print_error(f"{self.title}: {words}, {rate}{more}")

    def advance(self, count: int = 1) -> None:
        """Count steps as done."""
        self.done += count
        if self.shown is None:
            return
        now = time.monotonic()
        own = now - self.between
        if own - self.marks[-1][0] >= REDRAW_SECONDS:
            self.marks.append((own, self.done))
        while len(self.marks) > 2 and own - self.marks[1][0] > RATE_SECONDS:
            self.marks.popleft()
        self.shown.update(self, now)

    def show(self, **values: str) -> None:
        """Values beside the number of steps, such as the loss, from the next step on."""
        self.values = {name: _printable(value) for name, value in values.items()}

    def describe(self, now: float) -> str:
        """The steps that are done, the time that is left, the values, and the rate."""
        return ", ".join(self.describe_parts(now))

    def describe_parts(self, now: float) -> list[str]:
        """The parts of `describe`, the most wanted first."""
        if self.unit == BYTES:
            parts = [f"{format_bytes(self.done)} of {format_bytes(self.total)}"]
        else:
            parts = [f"{self.done:,} of {self._amount(self.total)}"]
        values = [f"{name} {value}" for name, value in self.values.items()]
        since, before = self.marks[0]
        seconds = now - self.between - since
        if self.done > before and seconds > 0:
            rate = (self.done - before) / seconds
            left = max(0, self.total - self.done) / rate
            return [*parts, f"{format_duration(left)} left", *values, _rate_words(rate, self.unit)]
        return [*parts, *values]

    def _amount(self, count: int) -> str:
        if self.unit == BYTES:
            return format_bytes(count)
        return f"{count:,} {self.unit}{'' if count == 1 else 's'}"


def track(items: Iterable[Item], title: str, unit: str, total: int) -> Iterator[Item]:
    """The items, `total` of them, each counted as a step when the next one is asked for."""
    with ProgressBar(title, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def phase(title: str) -> Iterator[None]:
    """A task whose steps cannot be counted: its name on a terminal while it lasts, without one
    after WAIT_SECONDS and every LINE_SECONDS; and a line with its time at the end if it took long.
    """
    if not distributed.is_main_process():
        yield
        return
    bar, began = ProgressBar(title, 0, ""), time.monotonic()
    ended = threading.Event()
    hidden = hides_progress()
    if hidden:
        speaker = partial(_name_until, ended, f"{bar.title} ...")
        threading.Thread(target=speaker, name="progress", daemon=True).start()
    else:
        TERMINAL.open(bar)
    try:
        yield
    finally:
        ended.set()
        if not hidden:
            TERMINAL.close(bar)
    took = time.monotonic() - began
    _count_inside(bar.title, took)
    if took >= LONG_SECONDS:
        print_error(f"{bar.title}: {format_duration(took)}")


def _count_inside(title: str, seconds: float) -> None:
    """Count the seconds of a task that has ended as none of the innermost bar around it."""
    if _OPEN:
        inside = _OPEN[-1].inside
        inside[title] = inside.get(title, 0.0) + seconds


def _name_until(ended: threading.Event, sentence: str) -> None:
    """Print the sentence after WAIT_SECONDS and every LINE_SECONDS from then on, until the end."""
    wait = WAIT_SECONDS
    while not ended.wait(wait):
        print_error(sentence)
        wait = LINE_SECONDS


def _printable(text: str) -> str:
    return one_line(escape_controls(text))


def _rate_words(rate: float, unit: str) -> str:
    """Steps per second as "2.31 steps/s", or below one "4.2 s per step"."""
    if unit == BYTES:
        return f"{format_bytes(round(rate))}/s"
    return f"{rate:.3g} {unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s per {unit}"


# ---------------------------------------------------------------- where there is no terminal


class _Lines:
    """A bar as a line every LINE_SECONDS."""

    def open(self, bar: ProgressBar) -> None:
        self.newest = time.monotonic()

    def update(self, bar: ProgressBar, now: float) -> None:
        if now - self.newest >= LINE_SECONDS:
            self.newest = now
            print_error(f"{bar.title}: {bar.describe(now)}")

    def close(self, bar: ProgressBar) -> None:
        pass


# ---------------------------------------------------------------- on a terminal


def bar_width(columns: int) -> int:
    """The length of the drawn bars on a terminal of so many columns."""
    return 30 if columns >= WIDE else 10


def fit_parts(parts: Sequence[str], room: int) -> str:
    """As many parts, from the first, as fit into so many columns; the first in any case."""
    for count in range(len(parts), 1, -1):
        words = ", ".join(parts[:count])
        if cell_len(words) <= room:
            return words
    return "".join(parts[:1])


class _PartsColumn(ProgressColumn):
    """The words beside a bar, those that fit."""

    def __init__(self, room: Callable[[], int]) -> None:
        super().__init__(Column(no_wrap=True))
        self.room = room

    def render(self, task: Task) -> Text:
        return Text(fit_parts(task.fields["parts"], self.room()))


class _Terminal:
    """The bars that are on the terminal now, below everything that is printed meanwhile."""

    def __init__(self) -> None:
        self.rich: Progress | None = None
        self.tasks: dict[ProgressBar, Any] = {}  # bar -> its number in rich
        self.replaced: dict[str, TextIO] = {}  # name of a stream -> the stream below ours
        self.drawn = 0.0

    def open(self, bar: ProgressBar) -> None:
        if self.rich is None:
            stream = bottom_stream(sys.stderr)  # ours would escape what rich draws
            console = Console(file=stream, highlight=False)
            self.rich = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=bar_width(console.width)),
                _PartsColumn(self.room),
                console=console,
                redirect_stdout=False,
                redirect_stderr=False,
                transient=True,
                refresh_per_second=4,
            )
            self._print_above(self.rich.console)
            self.rich.start()
        total = bar.total or None  # None: rich shows that it is not known
        parts = bar.describe_parts(bar.began) if total else []
        self.tasks[bar] = self.rich.add_task(
            bar.title, total=total, completed=bar.done, parts=parts
        )

    def room(self) -> int:
        """The columns that are left for words, beside the longest title and the bars."""
        if self.rich is None:
            return 0
        width = self.rich.console.width
        titles = [cell_len(task.description) for task in self.rich.tasks]
        return width - max(titles, default=0) - bar_width(width) - BESIDE

    def update(self, bar: ProgressBar, now: float) -> None:
        is_due = now - self.drawn >= REDRAW_SECONDS or bar.done >= bar.total
        if is_due and self.rich is not None and bar in self.tasks:
            self.drawn = now
            self.rich.update(self.tasks[bar], completed=bar.done, parts=bar.describe_parts(now))

    def close(self, bar: ProgressBar) -> None:
        if self.rich is None or bar not in self.tasks:
            return
        self.rich.remove_task(self.tasks.pop(bar))
        if not self.tasks:
            self.stop()

    def stop(self) -> None:
        """Take all bars from the terminal and show its cursor again."""
        if self.rich is None:
            return
        live, self.rich, self.tasks = self.rich, None, {}
        live.stop()
        for name, stream in self.replaced.items():
            above = getattr(sys, name)
            if isinstance(above, _AboveBars):
                above.finish()
                setattr(sys, name, stream)
        self.replaced = {}

    def _print_above(self, console: Console) -> None:
        """Lets what is printed on this terminal appear above the bars."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and bottom_stream(stream).isatty():
                self.replaced[name] = stream
                setattr(sys, name, _AboveBars(stream, console))


class _AboveBars(EscapedStream):
    """A text stream whose lines are printed above the bars of a terminal, escaped."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        super().__init__(stream)
        self.console, self.line = console, ""

    def write(self, text: str) -> int:
        *lines, self.line = f"{self.line}{text}".split("\n")
        for line in lines:
            self.console.print(Text(escape_controls(line)), soft_wrap=True)
        return len(text)

    def finish(self) -> None:
        """Print the beginning of a line that was not ended."""
        if self.line:
            self.stream.write(self.line)

    def flush(self) -> None:
        pass


TERMINAL = _Terminal()  # a process has one
atexit.register(TERMINAL.stop)  # a bar that an error left open would keep the cursor hidden
