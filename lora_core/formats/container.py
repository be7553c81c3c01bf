"""Safetensors files of adapters: checked when they are read, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.text import SHOWN

PICKLE, ZIP = b"\x80", b"PK\x03\x04"  # how a torch.save file begins: a pickle, or a zip of pickles
# Bytes of a header. safetensors reads 100 MB, which Python's objects make 2 GB; a LoRA of 1,700
# tensors has 0.3 MB, and kohya's tag counts of a large data set some MB.
LONGEST_HEADER = 1 << 25
# Bytes of a file that is read at once: 700 tensors of 3 MB take 14 ms, mapped into memory 24 ms;
# of 40 MB they take 56 and 31 ms.
SMALL_FILE = 1 << 24
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LEGACY_HASHED = slice(0x100000, 0x110000)  # the bytes that sd-webui-additional-networks once hashed
# safetensors' names of dtypes, in the reverse of the order in which it writes them.
DTYPE_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}

Shape = tuple[int, ...]


def is_pickle(path: Path) -> bool:
    """Whether a file was written by torch.save. Raises UserError for a missing or empty file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file or a run's folder")
    with path.open("rb") as file:
        start = file.read(len(ZIP))
    if not start:
        raise UserError(f"{path} is empty; it was probably cut off while being written or copied")
    if path.suffix == ".safetensors":  # where 0x80 may be the low byte of a header's size
        return start == ZIP
    return start == ZIP or start[:1] == PICKLE


def read_tensors(path: Path, *, mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors on the CPU and the header's metadata, of a .safetensors file.

    With `mapped`, and of a large file, they stay on the disk, in pages that the machine reads when
    they are used and may drop again. Raises UserError for a truncated or foreign file, a name that
    occurs twice in the header, a file without tensors, and as `check_tensors` does.
    """
    _refuse_repeated_names(path)
    is_small = path.stat().st_size <= SMALL_FILE
    backend = "pread" if is_small and not mapped else "mmap"
    with _read_errors(path), safe_open(path, "pt", backend=backend) as opened:
        found = opened.get_tensors()
        tensors = {key: found[key] for key in opened.keys()}  # noqa: SIM118 - it is no dictionary
        header = dict(opened.metadata() or {})
    return check_tensors(tensors, str(path)), header


def read_shapes(path: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """The shapes of all tensors and the header's metadata; no tensor is read.

    Raises UserError for a truncated or foreign file, and for a name that occurs twice.
    """
    _refuse_repeated_names(path)
    shapes = {}
    with _read_errors(path), safe_open(path, "np") as opened:
        for key in opened.keys():  # noqa: SIM118 - it is no dictionary
            shapes[key] = tuple(opened.get_slice(key).get_shape())
        return shapes, dict(opened.metadata() or {})


def check_tensors(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors, 8-bit floats widened to fp16, which holds them exactly.

    Raises UserError for none, NaN, Inf, and a tensor that is not floating point (an alpha may be an
    integer).
    """
    if not tensors:
        raise UserError(
            f"{source} holds no tensors; expected the factors of an adapter or token rows"
        )
    for key, tensor in tensors.items():
        if tensor.dtype in FLOAT8:
            tensors[key] = tensor.half()
        elif tensor.dtype not in READABLE:
            is_integer = not (tensor.is_floating_point() or tensor.is_complex())
            if tensor.numel() != 1 or not is_integer:
                raise UserError(
                    f"{key} in {source} is {tensor.dtype}, expected floating point; "
                    "quantized adapters are not read"
                )
    check_finite(tensors, source)
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf.

    A finite sum shows it, in a fifteenth of the time of a look at every number; only the sum of
    large numbers overflows though all of them are finite.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    is_sum_finite = math.isfinite(tensor.sum(dtype=wide).item())
    return is_sum_finite or bool(torch.isfinite(tensor).all())


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming the first tensor with NaN or Inf."""
    total = 0.0
    for tensor in tensors.values():
        wide = torch.promote_types(tensor.dtype, torch.float32)
        total += tensor.sum(dtype=wide).item()
    if math.isfinite(total):  # see is_finite
        return
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{key} in {source} holds NaN or Inf; its training diverged, "
                f"or the numbers overflow {tensor.dtype}"
            )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, hashes: bool = False
) -> None:
    """Writes the file whole or not at all. The same input gives the same bytes.

    Tensors are in safetensors' order; the header is sorted, because safetensors 0.8.0 shuffles it.
    With `hashes` the header gets kohya's sshs_model_hash and sshs_legacy_hash, and the former as
    the model spec's hash_sha256. Raises UserError for
    NaN or Inf (an overflow in a narrow dtype), ValueError for a header value that is not a string.
    """
    for key, value in header.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise ValueError(
                f"header entry {key} is a {kind}; safetensors headers hold strings only"
            )
    check_finite(tensors, f"what should become {path}")
    entries, pieces = encode_tensors(tensors)
    if hashes:
        training = {key: value for key, value in header.items() if key.startswith("ss_")}
        header = {**header, **_kohya_hashes(entries, training, pieces)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(encode_header(entries, header))
        file.writelines(pieces)


def read_header(path: Path) -> dict[str, str]:
    """The header's metadata of a .safetensors file. Raises UserError as `read_shapes` does."""
    return read_shapes(path)[1]


def add_header_entries(path: Path, entries: Mapping[str, str]) -> None:
    """Writes a file anew with further entries in its header, whole or not at all; the tensors'
    bytes stay as they are. Raises UserError as `read_shapes` does.
    """
    header = read_header(path) | dict(entries)
    with path.open("rb") as file, atomic_write(path) as temporary:
        start = _rewrite_header(file, header)
        with temporary.open("wb") as written:
            written.write(start)
            shutil.copyfileobj(file, written, SMALL_FILE)


def with_header(path: Path, header: Mapping[str, str]) -> bytes:
    """The content of a file with another header; the file itself stays as it is."""
    with path.open("rb") as file:
        return _rewrite_header(file, header) + file.read()


def _rewrite_header(file: BinaryIO, header: Mapping[str, str]) -> bytes:
    """The bytes before the tensors with another header; leaves the file at its tensors."""
    size = int.from_bytes(file.read(8), "little")
    tensors = json.loads(file.read(size))
    tensors.pop("__metadata__", None)
    return encode_header(tensors, header)


def encode_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[memoryview]]:
    """(name -> its entry in a header, the bytes of every tensor in the order of a file).

    The bytes are those of the tensors themselves, not copies, where these are contiguous. Wide
    dtypes come first, so that every tensor is aligned; then names in order.
    """
    widest_first = {dtype: place for place, dtype in enumerate(reversed(DTYPE_CODES))}
    order = sorted([(widest_first[tensor.dtype], key) for key, tensor in tensors.items()])
    entries = {}
    pieces = []
    end = 0
    for _, key in order:
        tensor = tensors[key].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        start, end = end, end + data.nbytes
        entries[key] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        pieces.append(data.data)
    return entries, pieces


def encode_header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The file up to its tensors: the length of the JSON, then the JSON, padded to 8 bytes."""
    every = {**entries, "__metadata__": dict(metadata)} if metadata else entries
    text = json.dumps(every, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turns safetensors' errors into a UserError of one sentence."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        with path.open("rb") as file:
            pickled = file.read(1) == PICKLE
        kind = "a pickle or damaged" if pickled else "truncated, damaged or no safetensors file"
        raise UserError(
            f"{path} cannot be read, it is {kind} ({error}); fetch or write it again"
        ) from None


def _kohya_hashes(
    entries: Mapping[str, Any], training: Mapping[str, str], pieces: Sequence[memoryview]
) -> dict[str, str]:
    """kohya's hash of the tensors' bytes, and the first 8 digits of its older hash.

    The older hash is over a range of bytes of the file as it would be with only the ss_ entries in
    its header.
    """
    head = encode_header(entries, training)
    whole, legacy = hashlib.sha256(), hashlib.sha256(head[LEGACY_HASHED])
    place = len(head)
    for piece in pieces:
        whole.update(piece)
        first = max(0, LEGACY_HASHED.start - place)
        stop = max(0, LEGACY_HASHED.stop - place)
        legacy.update(piece[first:stop])
        place += piece.nbytes
    return {
        "sshs_model_hash": whole.hexdigest(),
        "sshs_legacy_hash": legacy.hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{whole.hexdigest()}",
    }


def _refuse_repeated_names(path: Path) -> None:
    """Raises UserError for a name that occurs twice in the header: safetensors would keep one.

    Also for a header of more than LONGEST_HEADER bytes. All other errors are left to safetensors.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if LONGEST_HEADER < size <= path.stat().st_size:
            raise UserError(
                f"{path} has a header of {size:,} bytes, expected at most {LONGEST_HEADER:,}; "
                "it is damaged, or not an adapter or model"
            )
        text = file.read(size) if size <= LONGEST_HEADER else b""
    try:
        header = json.loads(text, object_pairs_hook=list)  # objects as lists of (name, value)
    except (ValueError, RecursionError):
        return
    objects = [header]
    if isinstance(header, list):
        objects += [pair[1] for pair in header if isinstance(pair, tuple)]
    for pairs in objects:
        is_object = isinstance(pairs, list) and pairs and isinstance(pairs[0], tuple)
        if not is_object or len(dict(pairs)) == len(pairs):
            continue
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise UserError(
                    f"{path} has {key[:SHOWN]} twice in its header, so its meaning is open; "
                    "fetch or write it again"
                )
            seen.add(key)
