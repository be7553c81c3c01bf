"""A run in a process of its own: stopped and resumed it ends as one that nobody watched, and what
is said about it is what its files say.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import Config, Stage
from tests.conftest import final, merged, same
from training.run_process import AVERAGED, LONGEST_OUTPUT, Progress, RunProcess

SLOW = """
import os, time

def slow(step):
    time.sleep(float(os.environ.get("SECONDS_OF_A_STEP", "0")))
    return ((step.out - step.target) ** 2).mean(dim=(1, 2, 3))
"""


def wait_until(run: RunProcess, is_reached: Callable[[Progress], bool]) -> Progress:
    """The first progress for which this is true; fails after four minutes."""
    end = time.monotonic() + 240
    while not is_reached(now := run.progress()):
        assert time.monotonic() < end and now.is_running, (now.sentence, now.output)
        time.sleep(0.05)
    return now


def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    config: Config, tmp_path: Path, without_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is train.train in this process, which nobody interrupts."""
    (tmp_path / "slow.py").write_text(SLOW)
    config = merged(config, {"loss": f"{tmp_path / 'slow.py'}:slow", "samples": {"every": 5}})
    config = replace(config, stages=(Stage(steps=12),))
    whole = train.train(replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as watched:
        watched.setenv("SECONDS_OF_A_STEP", "0.3")  # so that it can be stopped in time
        run = RunProcess.start(config, tmp_path)
    first = wait_until(run, lambda now: now.step > 0)
    assert first.sentence.startswith(f"step {first.step} of 12, loss ")
    run.stop()
    run.stop()  # a second click is the same request
    ended = wait_until(run, lambda now: not now.is_running)
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert first.step <= saved < 12
    assert ended.sentence.startswith(f"interrupted: the run is saved after step {saved}, go on")
    assert run.process.returncode == 128 + 15
    again = RunProcess.resume(config, tmp_path)
    done = wait_until(again, lambda now: not now.is_running)
    assert done.sentence.startswith("finished in ") and done.step == 12
    assert f"resumed after step {saved}" in done.output
    assert done.images == tmp_path / "run" / "before_after.png" and done.images.is_file()
    assert (tmp_path / "run" / "samples" / "step_000010.png").is_file()
    assert same(final(whole), final(tmp_path / "run"))


def test_a_mistake_is_the_sentence_that_train_prints(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = merged(config, {"data": {"images": str(tmp_path / "nowhere")}})
    run = RunProcess.start(config, tmp_path)
    ended = wait_until(run, lambda now: not now.is_running)
    assert train.main([str(tmp_path / "train.toml")]) == 2
    assert ended.sentence == capsys.readouterr().err.splitlines()[-1]
    assert ended.sentence.startswith("error: ") and ended.images is None


class Ended:
    """A process with a status: None while it runs."""

    def __init__(self, status: int | None) -> None:
        self.status = status

    def poll(self) -> int | None:
        return self.status


@pytest.fixture
def watched(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The run of a process that is none, whose files a test writes."""
    monkeypatch.setattr("subprocess.Popen", lambda *words, **settings: Ended(None))
    (tmp_path / "run" / "samples").mkdir(parents=True)
    return RunProcess(replace(config, stages=(Stage(steps=400),)), [], tmp_path / "output.txt")


def test_a_log_that_is_being_written_is_read_as_far_as_it_goes(
    watched: RunProcess, tmp_path: Path
) -> None:
    assert watched.progress().sentence.startswith("preparing the model and the images, 0 s")
    log = tmp_path / "run" / "metrics.jsonl"
    rows = [{"step": step, "loss": 100.0 if step <= 30 else float(step)} for step in range(1, 101)]
    rows[40]["loss"] = float("nan")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 101, "lo')
    now = watched.progress()
    steps, means = now.losses
    assert now.step == 100 and 41 not in steps and len(steps) == 99
    assert means[0] == 100 and means[-1] == pytest.approx(sum(range(81, 101)) / AVERAGED)
    assert now.sentence == f"step 100 of 400, loss {means[-1]:.4f}"
    watched.first_look = (time.monotonic() - 50, 50)  # a second each
    assert watched.progress().sentence.endswith("about 5 min 0 s left")
    with log.open("a") as file:
        file.write('ss": 1.0}\n{"step": 400, "loss": 1.0}\n')
    assert watched.progress().sentence == "all 400 steps are done; drawing the last images"


def test_the_newest_sheet_is_shown(watched: RunProcess, tmp_path: Path) -> None:
    samples = tmp_path / "run" / "samples"
    for step in (100, 20, 3):
        (samples / f"step_{step:06d}.png").touch()
        assert watched.progress().images == samples / "step_000100.png"


@pytest.mark.parametrize(
    ("status", "output", "said"),
    [
        (-15, "device: cpu\n", "ended by signal 15 before the first step; nothing was saved"),
        (-9, "", "ended by signal 9 before the first step; nothing was saved"),
        (2, "device: cpu\nerror: no\n", "error: no"),
        (143, "error: no\ninterrupted: it is saved\nx\n", "interrupted: it is saved"),
        (1, "Traceback ...\n", "ended with status 1; what it printed says why"),
    ],
)
def test_how_a_run_ended_is_a_sentence(
    watched: RunProcess, tmp_path: Path, status: int, output: str, said: str
) -> None:
    watched.process = Ended(status)  # type: ignore[assignment]
    (tmp_path / "output.txt").write_text(output)
    now = watched.progress()
    assert (now.sentence, now.output, now.is_running) == (said, output, False)


def test_a_long_output_is_read_at_its_end(watched: RunProcess, tmp_path: Path) -> None:
    (tmp_path / "output.txt").write_bytes(b"a" * LONGEST_OUTPUT + "é, the end".encode())
    assert watched.progress().output.endswith("aé, the end")
    assert len(watched.progress().output.encode()) == LONGEST_OUTPUT
