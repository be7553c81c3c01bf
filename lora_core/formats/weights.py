"""Tensors of a model on the disk, read and written one at a time.

Only one tensor has to fit into memory, not the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.formats.container import DTYPE_CODES, Shape, is_pickle
from lora_core.formats.known_formats import PICKLED
from lora_core.formats.pickles import read_pickle
from lora_core.json_files import OBJECT, read_object
from lora_core.text import shorten_value

DTYPES_BY_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}
LENGTH_BYTES = 8  # of the header's length, in front of it


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor that is not read yet."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Weights:
    """Named tensors, each read when it is needed."""

    source: str  # for error sentences
    infos: Mapping[str, TensorInfo]
    # Reads a tensor as `infos` describes it, on the CPU; not to be changed in place.
    read: Callable[[str], Tensor]

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: info.shape for key, info in self.infos.items()}


def weights_in_memory(tensors: Mapping[str, Tensor], source: str) -> Weights:
    """Tensors that are in memory, or mapped into it."""
    infos = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    return Weights(source, infos, lambda key: tensors[key].detach().cpu())


def cast_weights(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """The weights with floating-point tensors in `dtype`.

    Reading raises UserError for a number that overflows it.
    """
    if dtype is None:
        return weights

    def read(key: str) -> Tensor:
        tensor = weights.read(key)
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        narrow = tensor.to(dtype)
        if not torch.isfinite(narrow).all():
            raise UserError(
                f"{key} of {weights.source} holds NaN or Inf as {dtype}; "
                "write it in a wider dtype or fix it"
            )
        return narrow

    infos = dict(weights.infos)
    for key, info in infos.items():
        if info.dtype.is_floating_point:
            infos[key] = TensorInfo(info.shape, dtype)
    return Weights(weights.source, infos, read)


# ---------------------------------------------------------------- reading


def open_weights(path: str | Path) -> Weights:
    """The tensors of a .safetensors file, or of a pickle, of which nothing is executed.

    Of a pickle those in its `state_dict`, where there is one; entries that are no tensors are left
    out. Raises UserError for a missing, empty, truncated or foreign file.
    """
    path = Path(path)
    if is_pickle(path) or path.suffix in PICKLED:
        return weights_in_memory(_named_tensors(read_pickle(path), path), str(path))
    try:
        # The header alone; "pt" maps the file writable, which fails above the machine's memory.
        opened = safe_open(path, "np")
        infos = {}
        for key in opened.keys():  # noqa: SIM118 - not a dictionary
            part = opened.get_slice(key)
            if part.get_dtype() not in DTYPES_BY_CODE:
                raise UserError(
                    f"{key} in {path} is {part.get_dtype()}, expected one of "
                    f"{', '.join(DTYPES_BY_CODE)}; quantized checkpoints are not read"
                )
            infos[key] = TensorInfo(tuple(part.get_shape()), DTYPES_BY_CODE[part.get_dtype()])
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{path} is truncated, damaged or no safetensors file ({error}); "
            "fetch or write it again"
        ) from None
    if not infos:
        raise UserError(f"{path} holds no tensors; expected the weights of a model")
    return Weights(str(path), infos, _tensor_reader(path, infos))


def open_network_weights(folder: str | Path, stem: str) -> Weights:
    """The weights of one network in the diffusers layout: whole or in shards.

    .safetensors is taken before .bin, full before half precision. `stem` is
    diffusion_pytorch_model or model. Raises UserError where there are none.
    """
    folder = Path(folder)
    older = f"pytorch_{stem}" if stem == "model" else stem
    for name in (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{older}.bin",
        f"{stem}.fp16.safetensors",
        f"{older}.fp16.bin",
    ):
        if (folder / name).is_file():
            path = folder / name
            return _open_shards(path) if path.suffix == ".json" else open_weights(path)
    raise UserError(
        f"{folder} has no weights: expected {stem}.safetensors or {older}.bin; "
        "is it a folder in the diffusers layout?"
    )


def _tensor_reader(path: Path, infos: Mapping[str, TensorInfo]) -> Callable[[str], Tensor]:
    """A function that reads a tensor of a valid .safetensors file into memory of its own.

    A mapped file would count as resident, all of it in the end.
    """
    file = path.open("rb")
    size = int.from_bytes(file.read(LENGTH_BYTES), "little")
    header = json.loads(file.read(size))

    def read(key: str) -> Tensor:
        start, end = header[key]["data_offsets"]
        data = bytearray(end - start)
        file.seek(LENGTH_BYTES + size + start)
        if file.readinto(data) != len(data):
            raise UserError(f"{path} has become shorter while it was read; fetch or write it again")
        shape, dtype = infos[key]
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    return read


def _open_shards(index: Path) -> Weights:
    advice = "fetch the folder again"
    places = read_object(index, advice, {"weight_map": OBJECT})["weight_map"]
    if not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} names files that are no texts; {advice}")
    names = [name for name in sorted(set(places.values())) if Path(name).name == name]
    files = {name: open_weights(index.parent / name) for name in names}
    try:
        infos = {key: files[name].infos[key] for key, name in places.items()}
    except KeyError as error:
        raise UserError(
            f"{index} does not fit the files next to it ({error}); fetch the folder again"
        ) from None
    return Weights(str(index.parent), infos, lambda key: files[places[key]].read(key))


def _named_tensors(tree: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, by name."""
    found = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(found, dict):
        raise UserError(
            f"{path} holds no named tensors but {shorten_value(found)}; expected a checkpoint"
        )
    tensors = {
        key: value
        for key, value in found.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        keys = ", ".join(map(shorten_value, list(found)[:3])) or "nothing"
        raise UserError(
            f"{path} holds no named tensors but a dictionary of {keys}; expected a checkpoint"
        )
    return tensors


# ---------------------------------------------------------------- writing


def write_weights(path: Path, weights: Weights, header: Mapping[str, str]) -> None:
    """A .safetensors file, whole or not at all, with one tensor in memory at a time.

    The same input gives the same bytes. Wide dtypes come first so that every tensor is aligned,
    then keys in order. Raises UserError where the disk is full or not writable.
    """
    order = sorted(weights.infos, key=lambda key: (-weights.infos[key].dtype.itemsize, key))
    text: dict[str, Any] = {"__metadata__": dict(sorted(header.items()))} if header else {}
    end = 0
    for key in order:
        shape, dtype = weights.infos[key]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entry = {"data_offsets": [start, end], "dtype": DTYPE_CODES[dtype], "shape": list(shape)}
        text[key] = entry
    data = json.dumps(text, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        for key in order:
            tensor = weights.read(key)
            if (tuple(tensor.shape), tensor.dtype) != weights.infos[key]:
                raise ValueError(
                    f"{key} of {weights.source} is {list(tensor.shape)} {tensor.dtype}, "
                    f"announced as {weights.infos[key]}"
                )
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
