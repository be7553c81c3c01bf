"""One process per folder: the lock keeps others out while its process lives, and a killed process
leaves none.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.runs.lock import LOCK, FolderLock, check_lock_free
from lora_core.runs.run_folder import Run

HOLD = """
import sys, time
from pathlib import Path
from lora_core.runs.lock import FolderLock
lock = FolderLock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def start(folder: Path) -> subprocess.Popen:
    """Another process that holds the lock on a folder."""
    root = str(Path(__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_process_is_refused_until_the_first_is_gone(
    tmp_path: Path, ending: signal.Signals
) -> None:
    other = start(tmp_path)
    try:
        for ask in (check_lock_free, FolderLock.hold):
            with pytest.raises(UserError, match=f"in use by process {other.pid} on .*--out"):
                ask(tmp_path)
        other.send_signal(ending)
    finally:
        other.wait()
        other.stdout.close()
    assert (tmp_path / LOCK).exists()  # what a killed process leaves
    check_lock_free(tmp_path)
    FolderLock.hold(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    first = FolderLock.hold(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        FolderLock.hold(tmp_path / "run")
    FolderLock.hold(tmp_path / "other").release()
    first.release()
    first.release()
    FolderLock.hold(tmp_path / "run").release()


def test_a_half_written_holder_is_another_process(tmp_path: Path) -> None:
    lock = FolderLock.hold(tmp_path)
    for text in ("", "[]", '{"process": 1}', "\xff"):
        (tmp_path / LOCK).write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="in use by another process"):
            check_lock_free(tmp_path)
    lock.release()


def test_the_lock_is_no_file_of_a_run_and_stays_out_of_backups(tmp_path: Path) -> None:
    out = tmp_path / "run"
    lock = FolderLock.hold(out)
    assert json.loads((out / LOCK).read_text())["process"] == os.getpid()
    assert Run.check_folder(out, resume=False, overwrite=False) == (out, False)
    with pytest.raises(UserError, match="no run in"):
        Run.check_folder(out, resume=True, overwrite=False)
    assert lock.follow(out) is lock
    (out / "config.toml").write_text("")
    Run.open(out, overwrite=True)
    moved = lock.follow(out)
    assert moved is not lock and [p.name for p in (tmp_path / "run.bak").iterdir()] == [
        "config.toml"
    ]
    with pytest.raises(UserError, match="in use"):
        check_lock_free(out)
    moved.release()
    assert not list(out.iterdir())


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    FolderLock.hold(tmp_path).release()
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err
