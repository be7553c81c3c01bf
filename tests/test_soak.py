"""A long run of the embedded model: memory and open files do not grow, and steps stay as fast."""

import os
import sys
from pathlib import Path

import pytest

from tests.soak_runs import Watcher, follow_run, kill_all, start_run, sum_up

STEPS = int(os.environ.get("SOAK_STEPS", "20000"))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


@pytest.mark.soak
def test_memory_files_and_speed_are_those_of_the_beginning(tmp_path: Path) -> None:
    words = ["configs/toy_pti.toml", "--batch-size", "2", "--keep", "3"]
    words += ["--stages.0.steps", str(STEPS // 20), "--stages.1.steps", str(STEPS - STEPS // 20)]
    words += ["--save-every", str(STEPS // 80), "--validation.every", str(STEPS // 80)]
    words += ["--samples.every", str(STEPS // 20), "--samples.steps", "5", "--log-every", "10"]
    out, said = tmp_path / "run", tmp_path / "run.txt"
    process = start_run([*words, "--out", str(out)], said)
    try:
        readings = follow_run(Watcher(process, out / "metrics.jsonl"))
    finally:
        kill_all(process)
    assert process.returncode == 0, said.read_text()
    (tmp_path / "readings.csv").write_text("".join(",".join(map(str, r)) + "\n" for r in readings))
    soaked = sum_up(readings, STEPS)
    print(f"\n{STEPS} steps: {soaked}")
    early, late = soaked.memory
    assert abs(late - early) <= 0.01 * early
    assert soaked.files[1] <= soaked.files[0]
    early, late = soaked.speed  # a machine that is busier in the end slows the run, too
    assert late >= 0.95 * early
