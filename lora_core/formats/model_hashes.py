"""Hashes by which A1111 and its followers name the file of a whole model."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lora_core.formats.container import LEGACY_HASHED

CHUNK = 1 << 24  # bytes that are read at once


class ModelHashes(NamedTuple):
    """The older hash of 8 digits, over a range of the file's bytes, and SHA-256 of all of it."""

    legacy: str
    sha256: str


def hash_model(path: str | Path) -> ModelHashes | None:
    """The hashes of a model that is one file; None for folders and hub ids, which have none.

    A gigabyte took 6.6 s on a busy CPU; a process hashes a file once.
    """
    file = Path(path)
    if not file.is_file():
        return None
    found = file.stat()
    return _hash_file(str(file), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _hash_file(path: str, changed: int, size: int) -> ModelHashes:
    with open(path, "rb") as opened:
        opened.seek(LEGACY_HASHED.start)
        part = opened.read(LEGACY_HASHED.stop - LEGACY_HASHED.start)
        opened.seek(0)
        whole = hashlib.sha256()
        while chunk := opened.read(CHUNK):
            whole.update(chunk)
    return ModelHashes(hashlib.sha256(part).hexdigest()[:8], whole.hexdigest())
