"""Runs killed with SIGKILL at random moments and resumed: they end with the bits of the run that
was left alone.

SOAK_SEED=7 takes other moments, SOAK_KILLS another number of them, SOAK_LAUNCH a launcher.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.soak_runs import LAUNCH, differences, kill_all, start_run
from tests.test_optimizer_check import OWN

SEED = int(os.environ.get("SOAK_SEED", "0"))
KILLS = int(os.environ.get("SOAK_KILLS", "20"))
BASE = """
configs/toy_pti.toml --batch-size 2 --stages.0.steps 8 --stages.1.steps 13 --save-every 4
--keep 2 --validation.every 5 --validation.bins 2 --validation.count 2 --samples.every 10
--samples.steps 2 --log-every 3
"""
ADAMW = "--optimizer.name adamw --optimizer.lr denoiser=1e-3 tokens=1e-3"
CASES = {  # name -> options, after those of BASE; the optimizer of the file is Prodigy
    "class images, text encoder": f"{ADAMW} --prior.prompt creature --prior.count 2 "
    "--stages.1.groups denoiser text_encoder tokens",
    "prodigy, dora, bf16": "--adapter.kind dora --adapter.rank 4 --precision bf16 --accumulation 2",
    "ema, lokr": "--optimizer.name torch.optim.NAdam --ema 0.9 --adapter.kind lokr",
    "fp16": f"{ADAMW} --precision fp16 --adapter.rank 4 --adapter.dropout 0.1",
    "bitsandbytes": "--optimizer.name bitsandbytes.optim.AdamW8bit --ema 0.95",
    "torchao": "--optimizer.name torchao.optim.AdamW8bit --adapter.targets attention "
    "--adapter.rank 32",
    "schedule-free": "--optimizer.name OWN:Averaging --autocast --adapter.rank 16",
    "two processes": f"{ADAMW} --batch-size 1 --ema 0.9 --adapter.rank 8",
}
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in Linux's /proc"),
]


@dataclass
class KilledRun:
    """A run in `folder`/run that is started again and again until it has ended by itself."""

    words: list[str]
    folder: Path
    launch: list[str]

    def start(self, **settings: str) -> subprocess.Popen[bytes]:
        """Begin the run, or go on with it."""
        words = [*self.words, "--out", str(self.folder / "run")]
        if (self.folder / "run" / "config.toml").exists():
            words.append("--resume")
        settings["SOAK_BELOW"] = str(self.folder)
        return start_run(words, self.folder / "log.txt", launch=self.launch, settings=settings)

    def finish(self) -> None:
        """Go on to the end."""
        assert self.start().wait() == 0, self.log()

    def kill_at_event(self, number: int, seconds: float) -> bool:
        """Start; kill it a while after its event of that number. False where it ended before."""
        process = self.start(SOAK_KILL=f"{number}:{seconds}")
        status = process.wait()
        assert status == 0 or self.launch or status == -signal.SIGKILL, self.log()
        return status != 0

    def kill_after_seconds(self, seconds: float) -> bool:
        """Start; kill it so many seconds after it has begun to train."""
        (self.folder / "began").unlink(missing_ok=True)
        process = self.start(SOAK_EVENTS=str(self.folder / "began"))
        while process.poll() is None and not (self.folder / "began").exists():
            time.sleep(0.05)
        try:
            return process.wait(seconds) != 0
        except subprocess.TimeoutExpired:
            kill_all(process)
            return True

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()


def words_of(name: str, folder: Path) -> list[str]:
    """The command line of a case."""
    own = folder / "own.py"
    own.write_text(OWN)
    return shlex.split(BASE + CASES[name].replace("OWN", str(own)))


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_anywhere_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    for package in ("bitsandbytes", "torchao"):
        if package == name:
            pytest.importorskip(package)
    chance = random.Random(f"{SEED} {name}")
    words = words_of(name, tmp_path)
    launch = TWO if name == "two processes" else LAUNCH
    whole = KilledRun(words, tmp_path / "whole", launch)
    whole.folder.mkdir()
    events = tmp_path / "events.txt"
    assert whole.start(SOAK_EVENTS=str(events)).wait() == 0, whole.log()
    count = len(events.read_text().splitlines())
    length = json.loads((whole.folder / "run" / "summary.json").read_text())["seconds"]
    planned = [i for i in range(KILLS) if list(CASES)[i % len(CASES)] == name]
    killed = KilledRun(words, tmp_path / "killed", launch)
    killed.folder.mkdir()
    moments = []
    for i in planned:
        while not kill_somewhere(killed, chance, i % 3 == 0, (count, length), moments):
            # It ended before: it is whole, and the kill is for a new one.
            assert differences(killed.folder / "run", whole.folder / "run") == [], moments
            shutil.rmtree(killed.folder / "run")
        check_whole(killed.folder / "run")
    killed.finish()
    print(f"\n{name}: {'; '.join(moments)}")
    assert differences(killed.folder / "run", whole.folder / "run") == [], moments


def kill_somewhere(
    run: KilledRun,
    chance: random.Random,
    by_clock: bool,
    whole: tuple[int, float],
    moments: list[str],
) -> bool:
    """Kill the run after a random time, or at or soon after a random event on the disk; False where
    it ended before. `whole`: how many events and seconds the whole run has.
    """
    count, length = whole
    if by_clock:
        seconds = chance.uniform(0, 0.8 * length)
        moments.append(f"{seconds:.1f} s")
        return run.kill_after_seconds(seconds)
    number, seconds = chance.randrange(count), chance.choice([0, 0.002, 0.02, 0.2])
    moments.append(f"event {number} + {seconds} s")
    return run.kill_at_event(number, seconds)


def check_whole(run: Path) -> None:
    """Every tensor file that has its final name can be read."""
    for file in run.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in file.relative_to(run).parts):
            load_file(file)
