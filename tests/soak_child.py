"""train.py as `make soak` starts it, also by a launcher: python tests/soak_child.py WORDS

Variables: SOAK_EVENTS=FILE lists what is done to files below the folder SOAK_BELOW. SOAK_KILL=N:S
kills the process S seconds after the N-th of these events begins. SOAK_FILL=PATTERN:FILE fills the
disk with FILE when the first event that PATTERN matches begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys

BELOW = os.path.abspath(os.environ.get("SOAK_BELOW", "/nowhere")) + os.sep
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")  # names of audit events
RANDOM = re.compile(r"\.[0-9a-f]{8}\.tmp")  # in a temporary name


class DiskEvents:
    """An audit hook that counts what is done to files below a folder, and acts at one of them."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.count = 0
        self.acts = True
        listed = settings.get("SOAK_EVENTS")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.listing = os.open(listed, flags) if listed else None
        self.kill = settings.get("SOAK_KILL", "").split(":")
        self.fill = settings.get("SOAK_FILL", "").rpartition(":")

    def __call__(self, event: str, given: tuple[object, ...]) -> None:
        is_write = event == "open" and isinstance(given[2], int) and given[2] & os.O_ACCMODE
        if not self.acts or not (is_write or event in CHANGES):
            return
        if not isinstance(given[0], str | os.PathLike):
            return
        path = os.path.abspath(os.fspath(given[0]))
        if path.startswith(BELOW):
            self.acts = False  # what follows is not the run's
            self._act(f"{event} {RANDOM.sub('.tmp', path.removeprefix(BELOW))}")
            self.acts = True

    def _act(self, name: str) -> None:
        if self.listing is not None:
            os.write(self.listing, f"{name}\n".encode())
        if self.kill[0] == str(self.count):
            kill_after(float(self.kill[1]))
        if self.fill[0] and re.search(self.fill[0], name):
            fill_disk(self.fill[2])
        self.count += 1


def kill_after(seconds: float) -> None:
    """SIGKILL to this process, now or in a while."""
    if not seconds:
        os.kill(os.getpid(), 9)
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {os.getpid()}"])


def fill_disk(file: str) -> None:
    """Writes zeros to a file until the disk has no byte left."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (1 << 20, 4096, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(handle, bytes(size))
    os.close(handle)


if __name__ == "__main__":
    import train

    if "SOAK_BELOW" in os.environ:
        sys.addaudithook(DiskEvents(dict(os.environ)))
    sys.exit(train.main())
