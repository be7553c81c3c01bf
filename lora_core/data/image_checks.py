"""Checks of image files before training: each is decoded once, in threads, and hashed.

With a cache folder the result is kept, so that only new and changed files are decoded at the next
start. With `skips` files that cannot be read are left out with their reasons; otherwise the first
one is an error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from PIL import UnidentifiedImageError

from lora_core import distributed
from lora_core.atomic_files import atomic_write
from lora_core.data.images import READER_VERSION, has_alpha_mask, read_image
from lora_core.data.shards.stored_files import FileSource, StoredFile, path_of
from lora_core.errors import UserError, first_line, printable
from lora_core.json_files import read_object
from lora_core.progress import ProgressBar

MOST_THREADS = 16  # a decoded photograph takes up to 400 MB
AT_ONCE = 512  # files that are handed to the threads together
SHOWN = 20  # files that the printed list names
# A file that was written a moment ago may be written again within the clock's resolution.
SETTLED = 2.0  # seconds


class ImageFile(NamedTuple):
    """A file with an image, and the file of its mask."""

    image: FileSource
    mask: FileSource | None


class CheckedImage(NamedTuple):
    """What a record needs to know of an image that can be read."""

    use_alpha: bool  # its alpha is its mask
    # hash of the image's bytes, its mask's, and whether alpha is the mask
    key: str
    size: tuple[int, int]  # h, w of the file, upright


class BadImage(NamedTuple):
    """Why an image cannot be read."""

    sentence: str  # of the error
    reason: str  # without the file's name and advice


class ImageChecks:
    """Checks images, keeps the results in `cache`, and collects what is left out.

    `cache`: a folder, which several processes may use at a time. A result is that of a file as long
    as its size, inode and times of modification and change (in ns) stay the same; a copy or a
    touched file is read again. With `shares` each of the processes on a machine checks a part;
    then all of them must call `check_all`.
    """

    def __init__(
        self,
        cache: Path | str | None = None,
        *,
        skips: bool = False,
        shares: bool = False,
        threads: int | None = None,
    ) -> None:
        self.cache = Path(cache) if cache else None
        self.skips = skips
        self.shares = shares
        self.threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
        self.left_out: dict[Path, str] = {}  # file -> why it cannot be read

    @property
    def missing(self) -> dict[Path, str] | None:
        """Where readers of tables put files that do not exist; None: they are errors."""
        return self.left_out if self.skips else None

    def check_all(
        self, files: Sequence[ImageFile], masks: str, origin: Path | str
    ) -> list[CheckedImage | None]:
        """The result for each file; None for one that is left out.

        `masks` as in `scan_folder`; `origin`: the folder or dataset, which names the cached
        results. Raises UserError for the first file that cannot be read, unless it `skips` them.
        """
        cached = self._load(origin)
        stamps = [None] * len(files) if self.cache is None else _stamps(files, masks)
        found = [_from_cache(cached.get(stamp)) if stamp else None for stamp in stamps]
        wanted = [i for i, own in enumerate(found) if own is None]
        is_shared, numbers = self._agree(files, wanted)
        try:
            for i, own in self._check(files, numbers, masks, is_shared=is_shared):
                if isinstance(own, CheckedImage):
                    found[i] = own
                elif self.skips:
                    self.left_out[path_of(files[i].image)] = own.reason
                else:
                    raise UserError(own.sentence)
        finally:
            if wanted and self.cache is not None and distributed.is_main_process():
                self._save(origin, stamps, found)
        return found

    def _agree(self, files: Sequence[ImageFile], wanted: list[int]) -> tuple[bool, list[int]]:
        """(whether the processes share the checks, the files to check): they do if they are on one
        machine and have the same files; then a file is checked that any of them has no result of.
        """
        if not self.shares or distributed.process_count() == 1 or not distributed.is_one_machine():
            return False, wanted
        names = json.dumps([[os.path.abspath(path_of(f.image)), str(f.mask)] for f in files])
        digest = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        given = distributed.gather_values((digest, wanted))
        if any(other != digest for other, _ in given):
            return False, wanted
        return True, sorted(set(itertools.chain.from_iterable(own for _, own in given)))

    def leave_out(self, path: Path, error: Exception) -> None:
        """Leave a file out for an error in it; raises the error unless files are skipped."""
        if not self.skips:
            raise error
        self.left_out[path] = error_reason(path, error)

    def _check(
        self, files: Sequence[ImageFile], wanted: Sequence[int], masks: str, *, is_shared: bool
    ) -> Iterator[tuple[int, CheckedImage | BadImage]]:
        """(number, result) of the files of these numbers, in order."""
        check = partial(_check_or_error, masks=masks)
        with (
            ThreadPoolExecutor(self.threads, thread_name_prefix="images") as pool,
            ProgressBar("reading images", len(wanted), "image") as bar,
        ):
            for start in range(0, len(wanted), AT_ONCE):
                numbers = wanted[start : start + AT_ONCE]
                own = distributed.take_share(numbers) if is_shared else numbers
                results = list(pool.map(check, [files[i] for i in own]))
                if is_shared:
                    results = distributed.gather_shares(results)
                yield from zip(numbers, results, strict=True)
                bar.advance(len(numbers))

    def _file(self, origin: Path | str) -> Path:
        assert self.cache is not None
        name = hashlib.blake2b(os.path.abspath(origin).encode(), digest_size=8).hexdigest()
        return self.cache / f"checked-{name}.json"

    def _load(self, origin: Path | str) -> Mapping[str, Any]:
        """Stamp -> result, of an earlier start; nothing where there is none that can be read."""
        if self.cache is None or not self._file(origin).is_file():
            return {}
        try:
            return read_object(self._file(origin), "delete it")
        except UserError:  # a damaged one is written anew
            return {}

    def _save(
        self, origin: Path | str, stamps: Sequence[str | None], found: Sequence[CheckedImage | None]
    ) -> None:
        assert self.cache is not None
        pairs = zip(stamps, found, strict=True)
        table = {stamp: own for stamp, own in pairs if stamp is not None and own is not None}
        self.cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._file(origin)) as partial_file:
            partial_file.write_text(json.dumps(table), encoding="utf-8")


def check_image(file: ImageFile, masks: str) -> CheckedImage:
    """The result for one file, which is decoded. Raises UserError where it cannot be read."""
    image, mask = file
    use_alpha = masks == "alpha" or (masks == "any" and mask is None and has_alpha_mask(image))
    size = read_image(image, mask, use_alpha=use_alpha).original_size
    content = hashlib.blake2b(image.read_bytes(), digest_size=16)
    content.update(b"alpha" if use_alpha else b"")
    if mask is not None:
        content.update(b"mask" + hashlib.blake2b(mask.read_bytes()).digest())
    return CheckedImage(use_alpha, content.hexdigest(), size)


def error_reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read, without its name and without advice; the whole sentence where that
    is about another file, its mask or its caption.
    """
    if isinstance(error, UserError) and str(path) not in str(error):
        return first_line(error)
    cause = error.__cause__
    if path.is_file() and not path.stat().st_size:
        return "it is empty"
    if isinstance(cause, UnidentifiedImageError):
        return "no image format that is known"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return first_line(cause or error)


def describe_left_out(left_out: Mapping[Path, str], total: int) -> str:
    """The files that --data.skip-bad leaves out, a line each: all of them, or the first SHOWN."""
    if not left_out:
        return f"--data.skip-bad: all {total} images can be read, none is left out"
    lines = [f"--data.skip-bad: {len(left_out)} of {total + len(left_out)} images are left out:"]
    lines += [f"{path}: {reason}" for path, reason in list(left_out.items())[:SHOWN]]
    if len(left_out) > SHOWN:
        lines.append(f"and {len(left_out) - SHOWN} more")
    return printable("\n  ".join(lines))


def _check_or_error(file: ImageFile, masks: str) -> CheckedImage | BadImage:
    try:
        return check_image(file, masks)
    except UserError as error:
        return BadImage(str(error), error_reason(path_of(file.image), error))
    except OSError as error:  # it went between decoding and hashing
        sentence = f"cannot read the image {path_of(file.image)} ({error}); replace or remove it"
        return BadImage(sentence, str(error.strerror or error))


def _stamps(files: Sequence[ImageFile], masks: str) -> list[str | None]:
    """What tells each file from all others and from itself once it has changed; None where a
    change cannot be told.
    """
    now = time.time_ns()
    read = lru_cache(maxsize=64)(partial(_file_stamp, now=now))  # many images are in one file
    reader = f"{READER_VERSION} {PIL.__version__} {masks}"
    found: list[str | None] = []
    for file in files:
        parts = [_source_stamp(own, read) for own in file if own is not None]
        text = json.dumps([reader, len(parts), parts])
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        found.append(None if None in parts else digest)
    return found


def _source_stamp(
    source: FileSource, read: Callable[[Path], tuple[Any, ...] | None]
) -> tuple[Any, ...] | None:
    if isinstance(source, Path):
        return read(source)
    stamp = read(source.file)
    if stamp is None:
        return None
    if isinstance(source, StoredFile):
        return (*stamp, source.offset, source.length)
    return (*stamp, source.column, source.group, source.row)


def _file_stamp(path: Path, now: int) -> tuple[Any, ...] | None:
    try:
        own = path.stat()
    except OSError:
        return None
    if now - max(own.st_mtime_ns, own.st_ctime_ns) < SETTLED * 1e9:
        return None
    name = os.fsencode(os.path.abspath(path)).hex()
    return name, own.st_size, own.st_mtime_ns, own.st_ctime_ns, own.st_ino


def _from_cache(row: Any) -> CheckedImage | None:
    """A cached result; None for what is none."""
    try:
        use_alpha, key, (height, width) = row
    except (TypeError, ValueError):
        return None
    return CheckedImage(bool(use_alpha), str(key), (int(height), int(width)))
