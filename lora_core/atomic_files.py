"""Files that are written whole or not at all; errors of the disk are a sentence with advice."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lora_core.errors import UserError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\..+)?")  # names of `temporary_name`


@contextlib.contextmanager
def atomic_write(path: Path | str, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name in `path`'s folder, renamed to `path` once it is complete and on the disk.

    Without `durable` nothing waits for the disk, which takes milliseconds a file: after a loss of
    power the file may be missing, or have zeros in it.

    After an error it is removed, and an old `path` is unchanged. The name keeps the suffix, by
    which image writers choose their format. Raises UserError where the disk refuses: it is full or
    read-only, a limit of a file's size, a name too long, a folder in the place of a file.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if durable:
                sync_to_disk(temporary)
            os.replace(temporary, path)
            if durable:
                sync_to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):  # its folder could not be made
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A fresh name in the folder of `path` for a file while it is written."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


def sync_to_disk(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of the disk into a UserError that names the path and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _error_number(error)
        if code is None:
            raise
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {path} was not written, existing files are untouched; "
                "free some space and try again"
            ) from error
        advice = "choose another folder or fix its permissions"
        if code == errno.EFBIG:
            advice = "raise the limit for a file's size (ulimit -f), or write to another disk"
        elif code not in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "existing files are untouched; choose another place"
        raise UserError(f"{path} cannot be written ({os.strerror(code)}); {advice}") from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors writes it as "... (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
