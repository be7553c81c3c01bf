"""Progress: lines without a terminal, bars on one, and what is printed meanwhile."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_core import distributed, progress
from lora_core.progress import BYTES, ProgressBar, format_duration, phase, track

ROOT = Path(__file__).parent.parent


class Clock:
    """A clock that goes on by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    return lambda: capsys.readouterr().err.splitlines()


# ---------------------------------------------------------------- lines


def test_a_line_every_minute_has_step_values_rate_and_time_left(
    clock: Clock, said: Callable[[], list[str]]
) -> None:
    with ProgressBar("training", 1000, "step") as bar:
        for _ in range(150):
            clock.now += 1
            bar.advance()
            bar.show(loss=f"{clock.now:.0f}")
    first, second, last = said()
    assert first == "training: 60 of 1,000 steps, 15 min 40 s left, loss 1059, 1 steps/s"
    assert second == "training: 120 of 1,000 steps, 14 min 40 s left, loss 1119, 1 steps/s"
    assert last == "training: 150 steps in 2 min 30 s, 1 steps/s"


def test_the_rate_is_that_of_the_newest_steps(clock: Clock, said: Callable[[], list[str]]) -> None:
    """A first step that compiles for ten minutes is soon forgotten."""
    with ProgressBar("training", 10_000, "step") as bar:
        clock.now += 600
        bar.advance()
        for _ in range(1300):
            clock.now += 0.1
            bar.advance()
    assert "s per step" in said()[0]
    with ProgressBar("training", 10_000, "step") as bar:
        clock.now += 600
        bar.advance()
        for _ in range(3000):
            clock.now += 0.1
            bar.advance()
    assert "10 steps/s" in said()[-2]


def test_a_run_that_goes_on_begins_where_it_was(
    clock: Clock, said: Callable[[], list[str]]
) -> None:
    with ProgressBar("training", 100, "step", 90) as bar:
        clock.now += 61
        bar.advance()
    line, end = said()
    assert line == "training: 91 of 100 steps, 9 min 9 s left, 61 s per step"
    assert end == "training: 1 step in 1 min 1 s, 61 s per step"


def test_what_is_short_says_nothing(clock: Clock, said: Callable[[], list[str]]) -> None:
    assert list(track("abc", "letters", "letter", 3)) == ["a", "b", "c"]
    with phase("loading"):
        clock.now += 4
    with ProgressBar("nothing", 0, "step") as bar:
        clock.now += 100
        bar.advance(0)
    ProgressBar("never begun", 3, "step").advance()
    assert said() == []


def test_what_took_long_ends_with_a_line(clock: Clock, said: Callable[[], list[str]]) -> None:
    with phase("loading the model"):
        clock.now += 75
    with ProgressBar("reading", 3_000_000, BYTES) as bar:
        clock.now += 6
        bar.advance(3_000_000)
    assert said() == ["loading the model: 1 min 15 s", "reading: 3 MB in 6 s, 500 kB/s"]


def test_an_error_ends_without_a_line(clock: Clock, said: Callable[[], list[str]]) -> None:
    with pytest.raises(ValueError), phase("loading"), ProgressBar("training", 3, "step"):
        clock.now += 100
        raise ValueError
    assert said() == []


def test_a_phase_that_lasts_is_named_while_it_does(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.01)
    with phase("loading a\x1b[2Jb\nc"):
        time.sleep(0.2)
    assert said() == [r"loading a\x1b[2Jb\nc ..."]


def test_only_the_first_process_says_something(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    with phase("loading"), ProgressBar("training", 9, "step") as bar:
        clock.now += 100
        bar.advance()
    assert said() == []


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (18720, "5 h 12 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


# ---------------------------------------------------------------- a terminal

ON_A_TERMINAL = r"""
import sys, time
from lora_core import progress
from lora_core.errors import exit_status
from lora_core.progress import ProgressBar, phase, track
progress.REDRAW_SECONDS = progress.LONG_SECONDS = 0
def run():
    with ProgressBar("training [bold]", 40, "step") as bar:
        for i in range(40):
            time.sleep(0.02)
            bar.show(loss=f"{i / 100:.2f}")
            bar.advance()
            if i == 10:
                print("a line of a stranger: \x1b[31mred\x1b[0m \u202e")
            if i == 20:
                with phase("validation"):
                    time.sleep(0.3)
                list(track(range(2), "drawing", "image", 2))
    print("done")
sys.exit(exit_status(run))
"""


def run_on_a_terminal(code: str, columns: int = 100) -> tuple[int, str]:
    """Exit status and all that a program writes on a terminal of so many columns."""
    terminal, other = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": str(columns)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment, close_fds=True
    )
    os.close(other)
    written = b""
    while True:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux: the program has ended
                break
            written += part
            if not part:
                break
        elif process.poll() is not None:
            break
    os.close(terminal)
    return process.wait(), written.decode()


def test_bars_are_drawn_and_lines_appear_above_them_escaped() -> None:
    status, written = run_on_a_terminal(ON_A_TERMINAL)
    assert status == 0
    assert written.index("\x1b[?25l") < written.rindex("\x1b[?25h")  # the cursor comes back
    assert "\x1b[31m" not in written and "\u202e" not in written
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    assert r"a line of a stranger: \x1b[31mred\x1b[0m \u202e" in plain
    assert "training [bold]" in plain and re.search(r"of 40 steps, \d s left, loss 0\.", plain)
    assert "validation" in plain and "drawing: 2 images in" in plain
    left = written.rpartition("\x1b[2K")[2]  # after the last line that was erased
    assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", left).splitlines()[-1] == "done"
    assert re.search(r"training \[bold\]: 40 steps in 1 s, [\d.]+ steps/s\r\n(.*)done", left)


def test_80_columns_have_the_title_the_time_left_and_the_loss_whole() -> None:
    """Even with a long title below, which makes all bars narrower."""
    code = ON_A_TERMINAL.replace(
        "loss=", 'loss="0.1948", d_denoiser="1.00e-06", d_tokens="1.00e-06", other='
    ).replace('"drawing", "image"', '"drawing the base model", "image"')
    code = code.replace('40, "step"', '4000, "step", 3960').replace("[bold]", "")
    status, written = run_on_a_terminal(code, 80)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    lines = [line for line in re.split(r"[\r\n]+", plain) if "of 4,000 steps" in line]
    assert status == 0 and lines and all(len(line) <= 80 for line in lines)
    assert all(re.match(r". training +\S+ +3,9\d\d of 4,000 steps", line) for line in lines[:-2])
    assert any(re.search(r"s left, loss 0\.1948 *$", line) for line in lines)
    assert "…" not in plain and "..." not in plain


def test_an_error_below_a_bar_leaves_the_terminal_as_it_was() -> None:
    code = ON_A_TERMINAL.replace('print("done")', "").replace(
        'print("a line of a stranger: \\x1b[31mred\\x1b[0m \\u202e")',
        'next(track(range(9), "open", "x", 9)); raise progress.threading.ThreadError("broken")',
    )
    status, written = run_on_a_terminal(code)
    assert status == 1 and "broken" in written
    assert written.rindex("\x1b[?25l") < written.rindex("\x1b[?25h")


@pytest.mark.parametrize(("title", "named"), [("drawing", ", with drawing"), ("", "")])
def test_a_rate_leaves_out_the_bars_inside(monkeypatch, capsys, title: str, named: str) -> None:
    """Ten steps of a second with a minute of drawing between: a step a second, not seven."""
    clock = [100.0]
    monkeypatch.setattr(progress, "_OPEN", [])
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.ProgressBar("training", 20, "step") as bar:
        for number in range(10):
            clock[0] += 1
            bar.advance()
            if number == 4:
                with progress.ProgressBar(title, 4 if title else 0, "image") as inner:
                    clock[0] += 60
                    inner.advance(4)
        assert "10 s left, 1 steps/s" in bar.describe(clock[0])
    said = capsys.readouterr().err
    assert f"training: 10 steps in 10 s, 1 steps/s (in all 1 min 10 s{named})" in said
    assert ("drawing: 4 images in 1 min 0 s" in said) == bool(title) and not progress._OPEN
