"""Safetensors files, read with suspicion and written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core.errors import UserError
from lora_core.run import atomic

PICKLE, ZIP = b"\x80", b"PK\x03\x04"  # how a torch.save file begins: a pickle, or a zip of pickles


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors on the CPU and the header. Nothing in the file is executed.

    Raises UserError for a missing, empty, truncated or foreign file, a pickle, a file without tensors, a tensor that is not floating point
    (an alpha may be an integer), NaN or Inf.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; give a .safetensors file or a run's folder")
    with path.open("rb") as file:
        start = file.read(len(ZIP))
    if not start:
        raise UserError(f"{path} is empty; it was probably cut off while being written or copied")
    if start == ZIP or (start[:1] == PICKLE and path.suffix != ".safetensors"):  # 0x80 may also be the low byte of a header's size
        raise UserError(f"{path} is a pickle, which could run code and is never opened; convert it to .safetensors where you trust it")
    try:
        with safe_open(path, "pt") as opened:
            keys = opened.keys()
            tensors = {key: opened.get_tensor(key) for key in keys}
            header = dict(opened.metadata() or {})
    except (SafetensorError, OSError, RuntimeError) as error:
        kind = "a pickle or damaged" if start[:1] == PICKLE else "truncated, damaged or no safetensors file"
        raise UserError(f"{path} cannot be read, it is {kind} ({error}); fetch or write it again") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors; expected the factors of an adapter or token rows")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.numel() != 1:
            raise UserError(f"{key} in {path} is {tensor.dtype}, expected floating point; quantised adapters are not read")
    check_finite(tensors, str(path))
    return tensors, header


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes the file whole or not at all. The same input gives the same bytes: safetensors 0.8.0 shuffles the header, so it is sorted here.

    Raises UserError for NaN or Inf (an overflow in a narrow dtype), ValueError for a header value that is not a string.
    """
    for key, value in header.items():
        if not isinstance(value, str):
            raise ValueError(f"header entry {key} is a {type(value).__name__}; safetensors headers hold strings only")
    check_finite(tensors, f"what should become {path}")
    data = safetensors.torch.save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, dict(header))
    size = int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming the first tensor with NaN or Inf."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{key} in {source} holds NaN or Inf; its training diverged, or the numbers overflow {tensor.dtype}")
