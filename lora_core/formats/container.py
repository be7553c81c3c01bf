"""Safetensors files, read with suspicion and written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core.errors import UserError
from lora_core.runs.run_folder import atomic_write

PICKLE, ZIP = b"\x80", b"PK\x03\x04"  # how a torch.save file begins: a pickle, or a zip of pickles
LONGEST_HEADER = 100_000_000  # bytes of a header that safetensors reads
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LEGACY_HASHED = slice(
    0x100000, 0x110000
)  # the bytes of a file that sd-webui-additional-networks once hashed


def is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save's do. Raises UserError for a missing or empty file."""
    if not path.is_file():
        raise UserError(f"{path} is not there; give a file or a run's folder")
    with path.open("rb") as file:
        start = file.read(len(ZIP))
    if not start:
        raise UserError(f"{path} is empty; it was probably cut off while being written or copied")
    return start == ZIP or (
        start[:1] == PICKLE and path.suffix != ".safetensors"
    )  # 0x80 may also be the low byte of a header's size


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors on the CPU and the header, of a .safetensors file.

    Raises UserError for a truncated or foreign file, a name that stands twice in the header, a file without tensors, and as `checked` does.
    """
    _refuse_repeated_names(path)
    try:
        with safe_open(path, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no dictionary)
            header = dict(opened.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        with path.open("rb") as file:
            kind = (
                "a pickle or damaged"
                if file.read(1) == PICKLE
                else "truncated, damaged or no safetensors file"
            )
        raise UserError(
            f"{path} cannot be read, it is {kind} ({error}); fetch or write it again"
        ) from None
    return check_tensors(tensors, str(path)), header


def check_tensors(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors, 8-bit floats widened to fp16, which holds them exactly. Raises UserError for none, NaN, Inf, and a tensor that is not floating
    point (an alpha may be an integer).
    """
    if not tensors:
        raise UserError(
            f"{source} holds no tensors; expected the factors of an adapter or token rows"
        )
    for key, tensor in tensors.items():
        if tensor.dtype in FLOAT8:
            tensors[key] = tensor.half()
        elif tensor.dtype not in READABLE and (
            tensor.numel() != 1 or tensor.is_floating_point() or tensor.is_complex()
        ):
            raise UserError(
                f"{key} in {source} is {tensor.dtype}, expected floating point; quantised adapters are not read"
            )
    check_finite(tensors, source)
    return tensors


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, hashes: bool = False
) -> None:
    """Writes the file whole or not at all. The same input gives the same bytes: safetensors 0.8.0 shuffles the header, so it is sorted here.

    With `hashes` the header gets kohya's sshs_model_hash and sshs_legacy_hash. Raises UserError for NaN or Inf (an overflow in a narrow dtype),
    ValueError for a header value that is not a string.
    """
    for key, value in header.items():
        if not isinstance(value, str):
            raise ValueError(
                f"header entry {key} is a {type(value).__name__}; safetensors headers hold strings only"
            )
    check_finite(tensors, f"what should become {path}")
    data = safetensors.torch.save(
        {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    )
    size = 8 + int.from_bytes(data[:8], "little")
    entries, body = json.loads(data[8:size]), memoryview(data)[size:]
    if hashes:
        header = {
            **header,
            **_kohya_hashes(
                entries,
                {key: value for key, value in header.items() if key.startswith("ss_")},
                body,
            ),
        }
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(_encode_header(entries, header))
        file.write(body)


def _encode_header(entries: Mapping[str, Any], header: Mapping[str, str]) -> bytes:
    """The file up to its tensors: the length of the JSON, then the JSON, padded so that the tensors are aligned."""
    every = {**entries, "__metadata__": dict(header)} if header else entries
    text = json.dumps(every, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _kohya_hashes(
    entries: Mapping[str, Any], training: Mapping[str, str], body: memoryview
) -> dict[str, str]:
    """kohya's hashes: of the tensors' bytes, and 8 digits of that of a stretch of the file as it were with the ss_ entries alone in its header."""
    head = _encode_header(entries, training)
    start, stop = (max(0, edge - len(head)) for edge in (LEGACY_HASHED.start, LEGACY_HASHED.stop))
    legacy = hashlib.sha256(head[LEGACY_HASHED])
    legacy.update(body[start:stop])
    return {
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "sshs_legacy_hash": legacy.hexdigest()[:8],
    }


def _refuse_repeated_names(path: Path) -> None:
    """Raises UserError for a name that stands twice in the header, of which safetensors takes one. Whatever else is wrong is left to it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            key = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise UserError(
                f"{path} has {key} twice in its header, so what it means is open; fetch or write it again"
            )
        return found

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= LONGEST_HEADER else b""
    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        json.loads(text, object_pairs_hook=unique)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming the first tensor with NaN or Inf."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{key} in {source} holds NaN or Inf; its training diverged, or the numbers overflow {tensor.dtype}"
            )
