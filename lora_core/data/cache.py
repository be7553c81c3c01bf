"""Cache of computed tensors (latent mean and std, text embeddings) by key and settings."""

import hashlib
import json
import shutil
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_core.atomic_files import TEMPORARY, atomic_write
from lora_core.byte_sizes import format_bytes
from lora_core.errors import UserError
from lora_core.memory.host_memory import available_memory
from lora_core.runs.run_folder import nonfinite_names

Row = dict[str, Tensor]
KEEP_BYTES = 2**30  # of rows in memory, where the disk has them as well
CHECKSUM = "crc32"  # key in the header of a file
ABANDONED_AFTER = 86_400  # seconds after which a file that is being written has no writer any more


class TensorCache:
    """Rows of named tensors on the CPU, in memory and, with a folder, on disk.

    A row is computed by itself, so its bits do not depend on the batch that it is first read in.
    On disk a row is one safetensors file. Its name is a hash of `settings` (everything that the
    tensors depend on: model, dtype, length ...) and its key (an image's content and crop, a
    prompt), never a position: a cache that is read in another order than it was filled pairs
    captions with the wrong images (a public defect, diffusers #14430).

    The files lie in 256 sub-folders, by the first two digits of the hash; a file in the folder
    itself, where earlier versions wrote them, is read as well. Any number of processes may share
    the folder: a file appears whole under its name, and processes that compute one row at the same
    time write the same file, one after the other. A file that is not whole after a loss of power is
    made anew, with a printed line. Without a folder all rows stay in memory, with
    one those read last, up to `keep_bytes`.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        folder: Path | str | None = None,
        *,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self.settings = json.dumps(settings, sort_keys=True, default=str)
        self.folder = None if folder is None else Path(folder)
        self.keep_bytes = keep_bytes
        self.rows: OrderedDict[Hashable, Row] = OrderedDict()  # in memory, the latest read last
        self.bytes_in_memory = 0
        self._tidied: set[Path] = set()  # sub-folders without abandoned files
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def has_row(self, key: Hashable, *, disk_key: str | None = None) -> bool:
        """Whether a row is in memory, or a file of it on disk, which is not read."""
        return key in self.rows or self._find_file(_disk_key(key, disk_key)) is not None

    def row(
        self,
        key: Hashable,
        compute: Callable[[], Mapping[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        disk_key: str | None = None,
    ) -> Row:
        """The row of one key; from now on it is in `rows`.

        `compute()` makes a row that is neither in memory nor on disk, and one whose file is
        damaged, about which a line is printed. `shapes` are those of its tensors. `disk_key` is the
        row's key on disk, where `key` has a meaning in this process only. Raises UserError naming
        the file of a row on disk that is not finite or of other names or shapes.
        """
        if key in self.rows:
            self.rows.move_to_end(key)
            return self.rows[key]
        row = self._read_or_compute(_disk_key(key, disk_key), compute, shapes)
        self.rows[key] = row
        self.bytes_in_memory += _count_bytes(row)
        if self.folder is not None:
            while self.bytes_in_memory > self.keep_bytes and len(self.rows) > 1:
                self.bytes_in_memory -= _count_bytes(self.rows.popitem(last=False)[1])
        return row

    def check_room(self, row: Mapping[str, Tensor], count: int, noun: str) -> None:
        """Raises UserError where `count` rows of the size of this one cannot be kept.

        Without a folder they would fill the memory, with one the disk.
        """
        need = _count_bytes(row) * count
        if self.folder is None:
            room, where = available_memory(), "in memory"
            advice = "keep them on the disk with --data.cache FOLDER"
        else:
            room, where = shutil.disk_usage(self.folder).free, f"on the disk of {self.folder}"
            advice = "free some space, or give --data.cache a folder on a larger disk"
        if room is not None and need > room:
            raise UserError(
                f"{count:,} {noun} take {format_bytes(need)} when they are encoded, and "
                f"{format_bytes(room)} are free {where}; {advice}"
            )

    def clear(self) -> None:
        """Forget the rows in memory."""
        self.rows.clear()
        self.bytes_in_memory = 0

    def _read_or_compute(
        self,
        key: str,
        compute: Callable[[], Mapping[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]] | None,
    ) -> Row:
        """A row from the disk, else computed and, with a folder, written."""
        if self.folder is None:
            return _on_cpu(compute())
        found = self._find_file(key)
        row = None if found is None else _load_row(found, shapes)
        if row is not None:
            return row
        row = _on_cpu(compute())
        path = found or self._file(key)
        if found is None and path.is_file():  # another process was faster
            return row
        self._remove_abandoned(path.parent)
        with atomic_write(path, durable=False) as partial:  # the checksum tells what was lost
            save_file(row, partial, metadata={CHECKSUM: checksum(row)})
        return row

    def _file(self, key: str) -> Path:
        """The file of a key: FOLDER/ab/ab12....safetensors."""
        assert self.folder is not None
        content = json.dumps([self.settings, key]).encode()
        name = hashlib.blake2b(content, digest_size=20).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _find_file(self, key: str) -> Path | None:
        """The file of a key that is on disk, in its sub-folder or in the folder itself."""
        if self.folder is None:
            return None
        path = self._file(key)
        for place in (path, self.folder / path.name):
            if place.is_file():
                return place
        return None

    def _remove_abandoned(self, folder: Path) -> None:
        """Remove the unfinished files of killed processes from a sub-folder, once in a process."""
        if folder in self._tidied:
            return
        self._tidied.add(folder)
        for file in folder.glob(".*.tmp*"):
            try:
                age = time.time() - file.stat().st_mtime
                if TEMPORARY.fullmatch(file.name) and age > ABANDONED_AFTER:
                    file.unlink()
            except FileNotFoundError:  # its writer renamed it, or another process removed it
                continue


def checksum(row: Mapping[str, Tensor]) -> str:
    """CRC-32 of the names and numbers of a row on the CPU: 1 ms for 3 MB."""
    found = 0
    for name in sorted(row):
        numbers = row[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(numbers.data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _disk_key(key: Hashable, disk_key: str | None) -> str:
    return str(key) if disk_key is None else disk_key


def _on_cpu(row: Mapping[str, Tensor]) -> Row:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in row.items()}


def _count_bytes(row: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in row.values())


def _shapes(row: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in row.items()}


def _load_row(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Row | None:
    """The row in a file; None, with a printed line, for a file that is cut off, empty or has other
    numbers than were written.

    The file is read through a memory map and copied out of it: a process may hold some 65,000 maps.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            row = {name: file.get_tensor(name).clone() for name in names}
            written = (file.metadata() or {}).get(CHECKSUM)  # None: of an earlier version
        if written is not None and written != checksum(row):
            raise SafetensorError("its checksum does not fit its numbers")
    except FileNotFoundError:  # removed since it was found
        return None
    except SafetensorError as error:  # after a loss of power, or of the disk
        print(
            f"warning: the cache file {path} is damaged ({error}); it is made anew", file=sys.stderr
        )
        return None
    except OSError as error:
        raise UserError(
            f"the cache file {path} cannot be read ({error}); delete it and run again"
        ) from error
    found = _shapes(row)
    if shapes is not None and found != dict(shapes):
        raise UserError(
            f"the cache file {path} holds {_format_shapes(found)}, expected "
            f"{_format_shapes(shapes)}; "
            "delete it and run again"
        )
    if bad := nonfinite_names(row):
        raise UserError(
            f"the cache file {path} holds NaN or infinity in {bad[0]}; delete it and run again"
        )
    return row


def _format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
