"""Files of torch.save (`.ckpt`, `.pt`, `.bin`), read without executing anything in them.

Both containers are read: the zip of torch 1.6 and later, and the older sequence of pickles. The
pickles inside go through `RestrictedUnpickler`.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.formats.container import check_tensors
from lora_core.formats.unpickler import DAMAGE, Inert, Name, RestrictedUnpickler, Storage
from lora_core.text import shorten_value

MAGIC = 0x1950A86A20F9469CFC6C  # how torch < 1.6 begins a file
PROTOCOL = 1001  # its second pickle; then come the system, the object and its storages
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: mark, lengths of name and extra field
DTYPES = {  # storage class -> dtype of its elements
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}
# Limits of what a small file may announce.
LARGEST_DIRECTORY = 1 << 24  # bytes of a zip's directory: 100,000 entries
MOST_VIEWS = 16  # times the file's size, of all its tensors: tied weights are stored once
# Ends of a zip's directory, with its size in bytes; the second is of archives of 4 GB and more.
ZIP_MARK, ZIP_END = b"PK\x05\x06", struct.Struct("<12xI6x")
ZIP64_LOCATOR, ZIP64_MARK, ZIP64_END = b"PK\x06\x07", b"PK\x06\x06", struct.Struct("<40xQ8x")
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


class StorageId(NamedTuple):
    """A storage as a pickle refers to it."""

    dtype: torch.dtype
    key: str
    numel: int
    view: Any  # (key, offset, numel) of a storage that is a part of another; else None


def read_pickle(path: str | Path) -> Any:
    """The value in a file: dictionaries, lists, tuples, sets, strings, numbers and CPU tensors.

    Everything else is an `Inert` record; nothing in the file is executed. Tensors of zip files are
    mapped from the disk and read when they are used, those of older files are in memory. Bytes are
    not compared with the zip's checksums. Raises UserError for a file that is missing, empty,
    truncated, damaged, compressed, TorchScript, or whose tensors are larger than the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file written by torch.save")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty; it was probably cut off while being written or copied")
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        value = _read_zip(path, view) if view[:2] == b"PK" else _read_sequence(view)
        if _total_bytes(value) > MOST_VIEWS * len(view):
            raise UserError(
                f"has tensors of more than {MOST_VIEWS} times its size, views of the same numbers; "
                "write the tensors that are needed"
            )
        return value
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except (*DAMAGE, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"{path} is truncated, damaged or not a file of torch.save ({reason}); "
            "fetch or write it again"
        ) from None


def write_pickle(path: Path, value: Any) -> None:
    """Writes a file with torch.save, whole or not at all. Raises UserError as `atomic_write`."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's own, in the place of what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def own_storage(tensor: Tensor) -> Tensor:
    """A copy on the CPU with a storage of its own, which is what torch.save writes."""
    return tensor.detach().cpu().contiguous().clone()


def pickled_tensors(data: Any, source: str) -> dict[str, Tensor]:
    """The tensors of a state dict, from the result of `read_pickle`.

    Raises UserError for anything else in it.
    """
    if isinstance(data, dict) and set(data) == {"state_dict"}:
        data = data["state_dict"]
    if not isinstance(data, dict):
        raise UserError(
            f"{source} is a pickle of {_describe_value(data)}, expected a dictionary of tensors; "
            "nothing in it was executed"
        )
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{source} is a pickle with {_describe_value(value)} under {shorten_value(key)}, "
                "expected tensors only; nothing in it was executed"
            )
    return check_tensors(dict(data), source)


def _total_bytes(value: Any) -> int:
    """Bytes of the tensors in a pickle's value, as often as they occur in a list or dictionary."""
    total = 0
    seen: set[int] = set()  # lists in a file may hold one another
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            total += item.numel() * item.element_size()
        elif id(item) in seen:
            continue
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, Inert):
            waiting += (item.args, item.state, item.items)
        else:
            continue
        seen.add(id(item))
    return total


def _describe_value(value: Any) -> str:
    if isinstance(value, Inert):
        return f"an object of {value.name}"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


# ---------------------------------------------------------------- the two containers


def _read_zip(path: Path, view: mmap.mmap) -> Any:
    """torch >= 1.6: NAME/data.pkl and NAME/data/KEY for each storage, all uncompressed."""
    _check_directory(view)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if _is_data_pickle(name)]
    if len(pickles) != 1:
        raise UserError(
            f"is a zip with {len(pickles)} entries data.pkl, expected one; "
            "is it a file of torch.save?"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise UserError("is a TorchScript program; expected tensors written by torch.save")
    order = f"{root}byteorder"
    if order in entries and bytes(_zip_entry(view, entries[order])).strip() == b"big":
        raise UserError(
            "was written on a big-endian machine, which is not read; write it again on a common one"
        )
    contents: dict[str, memoryview] = {}

    def load_storage(pid: Any) -> Storage:
        dtype, key, numel, _ = _parse_storage(pid)
        if key not in contents:
            contents[key] = _zip_entry(view, entries[f"{root}data/{key}"])
        return Storage(dtype, numel, _check_size(contents[key], dtype, numel, key))

    data = io.BytesIO(_zip_entry(view, entries[pickles[0]]))
    return RestrictedUnpickler(data, load_storage).load()


def _check_directory(view: mmap.mmap) -> None:
    """Raises UserError for a zip with so many entries that listing them would fill the memory."""
    tail = max(0, len(view) - (1 << 17))
    place = view.rfind(ZIP_MARK, tail)
    if place < 0 or place + ZIP_END.size > len(view):
        return  # no zip, which zipfile says
    (size,) = ZIP_END.unpack_from(view, place)
    if view[max(0, place - 20) : max(0, place - 16)] == ZIP64_LOCATOR:
        place = view.rfind(ZIP64_MARK, tail, place)
        if place >= 0:
            (size,) = ZIP64_END.unpack_from(view, place)
    if size > LARGEST_DIRECTORY:
        raise UserError(
            f"is a zip with a directory of {size:,} bytes, expected at most "
            f"{LARGEST_DIRECTORY:,}; is it a file of torch.save?"
        )


def _is_data_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _zip_entry(view: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed entry, mapped."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(
            f"has a compressed entry {info.filename}, which torch.save never writes; "
            "fetch or write it again"
        )
    mark, *lengths = LOCAL_HEADER.unpack_from(view, info.header_offset)
    start = info.header_offset + LOCAL_HEADER.size + sum(lengths)
    if mark != b"PK\x03\x04" or start + info.file_size > len(view):
        raise UserError(f"is truncated: {info.filename} lies beyond its end; fetch it again")
    return memoryview(view)[start : start + info.file_size]


def _read_sequence(view: mmap.mmap) -> Any:
    """torch < 1.6: pickles one after the other, then the storages' bytes.

    A file that begins otherwise is one plain pickle.
    """
    first = _load(view, _refuse_storage)
    if first != MAGIC:
        return first
    protocol = _load(view, _refuse_storage)
    system = _load(view, _refuse_storage)
    if protocol != PROTOCOL or not system.get("little_endian", True):
        raise UserError(
            "is of a torch or a machine that is not read here; write it again with a common one"
        )
    start = view.tell()
    found: dict[str, StorageId] = {}

    def note_storage(pid: Any) -> Storage:
        storage = _parse_storage(pid)
        found[storage.key] = storage
        return Storage(storage.dtype, 0, None)

    _load(view, note_storage)  # lists the storages; their bytes follow the list of their keys
    keys = _load(view, _refuse_storage)
    data = {key: _read_storage(view, found[key]) for key in keys}

    def load_storage(pid: Any) -> Storage:
        dtype, key, numel, part = _parse_storage(pid)
        if part is None:
            return Storage(dtype, numel, data[key])
        _, offset, numel = part
        piece = memoryview(data[key])[offset * dtype.itemsize : (offset + numel) * dtype.itemsize]
        return Storage(dtype, numel, _check_size(piece, dtype, numel, key))

    view.seek(start)
    return _load(view, load_storage)


def _load(view: mmap.mmap, load_storage: Any) -> Any:
    return RestrictedUnpickler(cast(IO[bytes], view), load_storage).load()


def _read_storage(view: mmap.mmap, storage: StorageId) -> bytearray:
    """A copy of the bytes at the current position, which is not aligned."""
    position = view.tell()
    (count,) = struct.unpack_from("<q", view, position)
    if count != storage.numel:
        raise UserError(
            f"has {count} numbers in storage {storage.key}, expected {storage.numel}; "
            "fetch or write it again"
        )
    start = position + 8
    end = start + storage.numel * storage.dtype.itemsize
    data = memoryview(view)[start:end]
    copy = bytearray(_check_size(data, storage.dtype, storage.numel, storage.key))
    view.seek(end)
    return copy


def _parse_storage(pid: Any) -> StorageId:
    """The storage that a persistent id names. Raises ValueError where it names none."""
    kind, name, key, _, numel, *rest = pid
    path = getattr(name, "path", name)
    dtype = _storage_dtype(name)
    if kind != "storage" or dtype is None or not isinstance(key, str):
        raise ValueError(f"{path!s:.80} is no storage that is known here")
    if type(numel) is not int or numel < 0:
        raise ValueError("a storage has no valid size")
    return StorageId(dtype, key, numel, rest[0] if rest else None)


def _storage_dtype(name: Any) -> torch.dtype | None:
    """The dtype of a storage class, such as torch.FloatStorage."""
    if not isinstance(name, Name):
        return None
    module, _, kind = name.path.rpartition(".")
    known = module in STORAGE_MODULES and kind.endswith("Storage")
    return DTYPES.get(kind.removesuffix("Storage")) if known else None


def _check_size(data: memoryview, dtype: torch.dtype, numel: int, key: str) -> memoryview:
    if numel * dtype.itemsize > len(data):
        raise UserError(
            f"announces {numel} numbers of {dtype} in storage {key}, "
            f"but holds only {len(data)} bytes of it; fetch or write it again"
        )
    return data


def _refuse_storage(pid: Any) -> Storage:
    raise ValueError("a storage where none belongs")
