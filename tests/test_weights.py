"""Weights on the disk: one tensor at a time, as the library reads them, larger than memory."""

import json
import weakref

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_core.formats.weights import (
    TensorInfo,
    Weights,
    cast_weights,
    open_weights,
    weights_in_memory,
    write_weights,
)


def test_only_a_tensor_at_a_time_is_in_memory(tmp_path):
    alive, most = [], []

    def read(key):
        most.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(tensor := torch.full((1000,), float(key[1:]))))
        return tensor

    weights = cast_weights(
        Weights("made up", {f"t{i}": TensorInfo((1000,), torch.float32) for i in range(50)}, read),
        torch.float16,
    )
    write_weights(tmp_path / "a.safetensors", weights, {"format": "pt"})
    assert max(most) <= 1
    assert all(
        bool((t == float(key[1:])).all()) and t.dtype == torch.float16
        for key, t in load_file(tmp_path / "a.safetensors").items()
    )


def test_what_is_written_is_what_the_library_reads_and_always_the_same(tmp_path):
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.arange(3).to(torch.bfloat16),
        "é": torch.tensor(1.5),
        "i": torch.tensor([[1, 2]]),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 3),
        "yes": torch.tensor([True]),
    }
    path = tmp_path / "a.safetensors"
    write_weights(path, weights_in_memory(tensors, "here"), {"b": "1", "a": "ü"})
    first = path.read_bytes()
    for key, tensor in load_file(path).items():
        assert tensor.dtype == tensors[key].dtype and torch.equal(
            tensor.float(), tensors[key].float()
        )
    assert set(load_file(path)) == set(tensors) and int.from_bytes(first[:8], "little") % 8 == 0
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"a": "ü", "b": "1"}
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert all(
        header[key]["data_offsets"][0] % tensor.element_size() == 0
        for key, tensor in tensors.items()
    )
    write_weights(
        path, weights_in_memory(dict(reversed(tensors.items())), "here"), {"a": "ü", "b": "1"}
    )
    assert path.read_bytes() == first
    opened = open_weights(path)
    assert opened.infos == weights_in_memory(tensors, "here").infos


def test_a_file_larger_than_memory_is_read(tmp_path):
    """A terabyte that takes no place on disk: its tensors are read one by one.

    A tensor that was read is not a view of the file.
    """
    path, names, size = tmp_path / "large.safetensors", [f"t{i}" for i in range(1024)], 2**30
    text = {
        name: {"dtype": "F16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    last = 1024 * size
    text["end"] = {"dtype": "BF16", "shape": [2, 1], "data_offsets": [last, last + 4]}
    header = json.dumps(text).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + last + 4)
        file.seek(8 + len(header) + last)
        file.write(
            torch.tensor([1.5, -2.0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        )
    opened = open_weights(path)
    found = opened.read("end")
    path.unlink()
    assert (
        len(opened.infos) == 1025
        and found.dtype == torch.bfloat16
        and found.tolist() == [[1.5], [-2.0]]
    )
