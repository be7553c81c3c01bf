"""A disk that is full in any phase of a run: one sentence and status 2, and every file that has its
name is whole. Once there is room, --resume ends with the bits of the run that had it.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from lora_core.runs.run_folder import is_run
from tests.soak_child import fill_disk
from tests.soak_runs import differences, start_run

WORDS = """
configs/toy_pti.toml --batch-size 2 --stages.0.steps 5 --stages.1.steps 7 --save-every 4
--validation.every 4 --validation.bins 2 --validation.count 2 --samples.every 6 --samples.steps 2
--log-every 3 --data.variants 2 --prior.prompt creature --prior.count 2
"""
# Phase -> the event before whose first occurrence the disk is filled (tests/soak_child.py).
PHASES = {
    "opening": r"open run/\.lock",
    "class images": r"open run/class_images/\.00001",
    "config": r"open run/\.config",
    "cached latents": r"os.mkdir cache",
    "first validation": r"open run/val.jsonl",
    "metrics": r"os.remove cache/.*",
    "checkpoint": r"os.mkdir run/checkpoints/\.8",
    "checkpoint's json": r"open run/checkpoints/\.8.tmp/state.json",
    "checkpoint's checksums": r"open run/checkpoints/\.8.tmp/checksums",
    "checkpoint's LoRA": r"open run/checkpoints/8/\.pytorch_lora",
    "checkpoint's tokens": r"open run/checkpoints/8/\.run-000008_emb",
    "samples": r"open run/samples/\.step_000006",
    "last checkpoint": r"os.mkdir run/checkpoints/\.12",
    "LoRA": r"open run/\.run\.",
    "tokens": r"open run/\.run_emb",
    "before and after": r"open run/\.before_after",
    "plots": r"open run/\.loss",
    "summary": r"open run/\.summary",
    "model card": r"open run/\.README",
    "report": r"open run/\.report",
}
SIZE = "size=96m"
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk in memory. Skips where this user may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", SIZE, "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a full disk is a small tmpfs, which only root may mount on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def run_on(folder: Path, log: Path, **settings: str) -> int:
    """The exit status of the run in `folder`/run, begun or resumed."""
    out = folder / "run"
    words = [*shlex.split(WORDS), "--out", str(out), "--data.cache", str(folder / "cache")]
    if out.exists() and is_run(out):
        words.append("--resume")
    return start_run(words, log, settings={"SOAK_BELOW": str(folder), **settings}).wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that had room."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_on(folder, folder / "log.txt") == 0, (folder / "log.txt").read_text()
    return folder / "run"


@pytest.mark.parametrize("phase", PHASES)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_when_there_is_room(
    phase: str, disk: Path, whole: Path, tmp_path: Path
) -> None:
    folder, log = disk / "here", tmp_path / "log.txt"
    folder.mkdir()
    filler = disk / "filler"
    try:
        status = run_on(folder, log, SOAK_FILL=f"{PHASES[phase]}:{filler}")
        said = log.read_text()
        assert filler.exists(), f"no event is {PHASES[phase]}:\n{said}"
        assert status == 2 and "the disk is full: " in said and "Traceback" not in said, said
        read_all(folder)
        filler.unlink()
        assert run_on(folder, log) == 0, log.read_text()
        assert differences(folder / "run", whole) == []
    finally:
        filler.unlink(missing_ok=True)
        subprocess.run(["rm", "-r", str(folder)], check=True)


def test_a_run_that_is_resumed_on_a_full_disk_loses_nothing(
    disk: Path, whole: Path, tmp_path: Path
) -> None:
    folder, log = disk / "again", tmp_path / "log.txt"
    run = Path(shutil.copytree(whole, folder / "run"))
    shutil.rmtree(run / "checkpoints" / "12")
    fill_disk(str(disk / "filler"))
    assert run_on(folder, log) == 2 and "the disk is full: " in log.read_text(), log.read_text()
    read_all(folder)
    (disk / "filler").unlink()
    assert run_on(folder, log) == 0, log.read_text()
    assert differences(run, whole) == []


def read_all(folder: Path) -> None:
    """Reads every file under its final name. No temporary file is left."""
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        assert ".tmp" not in file.name, file
        if file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".jsonl":
            text = file.read_text()
            assert not text or text.endswith("\n")
            assert all(json.loads(line) for line in text.splitlines())
        elif file.suffix == ".json":
            json.loads(file.read_text())
