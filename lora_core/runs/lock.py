"""A lock on a run folder, so that one process writes to it: the system's lock on OUT/.lock."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import BinaryIO

from lora_core.errors import UserError
from lora_core.json_files import parse_object

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
LONGEST_HOLDER = 10_000  # bytes of the file of a lock
LOCKED_BYTE = 2**30  # the byte that Windows locks: one that nobody reads


class FolderLock:
    """The lock on a run folder, held from `hold` to `release` or to the end of the process.

    A killed run leaves a file without a lock. On NFS Linux turns flock into a lock of the server,
    which other machines see, unless the file system is mounted with nolock or local_lock. With
    these, and on file systems without locks, two machines can write to one folder.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path

    @classmethod
    def hold(cls, folder: Path) -> FolderLock:
        """Locks a folder, which is created if missing.

        Raises UserError, naming process and machine, where another process has it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        while True:
            # It stays open as long as the lock is held; without a buffer, which a full disk would
            # refuse once more when it is closed.
            file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115
            if not _try_lock(file):
                raise _in_use_error(file, folder)
            if _is_at(file, path):
                break
            file.close()  # its last holder removed it between our opening and our locking
        lock = cls(file, path)
        lock._write_holder()
        return lock

    def follow(self, folder: Path) -> FolderLock:
        """The lock on the current folder at `folder`.

        That is this lock, or a new one after --overwrite has moved the old folder with its lock.
        """
        path = folder / LOCK
        if _is_at(self.file, path):
            return self
        lock = FolderLock.hold(folder)
        self.path = folder.with_name(folder.name + ".bak") / LOCK
        self.release()
        return lock

    def release(self) -> None:
        """Removes the file and releases the lock; a second call does nothing."""
        if self.file.closed:
            return
        # Windows removes no open file: it stays, and locks nothing.
        with contextlib.suppress(OSError):
            if _is_at(self.file, self.path):
                self.path.unlink()
        self.file.close()

    def _write_holder(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: the lock holds anyway
            self.file.truncate(0)
            holder = {"process": os.getpid(), "machine": socket.gethostname()}
            self.file.write(json.dumps(holder).encode())
            self.file.flush()


def check_lock_free(folder: Path) -> None:
    """Raises UserError, naming process and machine, where another process holds the folder's lock.

    Changes nothing.
    """
    path = folder / LOCK
    try:
        file = open(path, "r+b")  # noqa: SIM115
    except OSError:  # no such file, or one that is not ours to write: `hold` raises the error
        return
    with file:
        if not _try_lock(file):
            raise _in_use_error(file, folder)


def _try_lock(file: BinaryIO) -> bool:
    """Locks an open file, until it is closed; False where another process holds the lock."""
    try:
        if sys.platform == "win32":
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        print(
            f"warning: {file.name} cannot be locked ({error.strerror}); "
            "start no second run in its folder",
            file=sys.stderr,
        )
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _in_use_error(file: BinaryIO, folder: Path) -> UserError:
    """The error that names the process which has the lock. Closes the file."""
    with file:
        file.seek(0)
        try:
            holder = parse_object(file.read(LONGEST_HOLDER).decode(), "the lock", "")
            who = f"process {holder['process']} on {holder['machine']}"
        except (OSError, ValueError, KeyError, TypeError):  # it is being written
            who = "another process"
    return UserError(f"{folder} is in use by {who}; wait for it or end it, or name another --out")
