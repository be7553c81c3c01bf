"""Safetensors files of adapters: the same bytes each time, damage is refused, dtypes are exact."""

import hashlib
import json
import math
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats import layout_of
from lora_core.formats.container import is_finite
from tests.adapter_checks import header
from tests.adapter_examples import save_file, save_good_file
from tests.manager_readers import tensor_hash
from tests.tiny_pipeline import random_state


def test_same_state_same_bytes_and_aligned_tensors(pipe, pipe_layout, tmp_path):
    state, more = random_state(pipe), {f"k{i}": "ü" * i for i in range(9)}
    for name in ("a", "b"):
        formats.save(
            state,
            tmp_path / name / "x.safetensors",
            format="kohya",
            layout=pipe_layout,
            metadata=more,
        )
    data = (tmp_path / "a/x.safetensors").read_bytes()
    assert data == (tmp_path / "b/x.safetensors").read_bytes()
    assert (
        struct.unpack("<Q", data[:8])[0] % 8 == 0
        and header(tmp_path / "a/x.safetensors")["k3"] == "üüü"
    )


def twice(data):
    """The file with the name of its first tensor on the second as well."""
    size = struct.unpack("<Q", data[:8])[0]
    names = [name for name in json.loads(data[8 : 8 + size]) if name.endswith("lora_down.weight")]
    header = data[8 : 8 + size].replace(f'"{names[1]}"'.encode(), f'"{names[0]}"'.encode())
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def test_bad_files_are_refused(pipe, pipe_layout, tmp_path):
    save_good_file(tmp_path, pipe, pipe_layout)
    data = (tmp_path / "good.safetensors").read_bytes()
    torch.save({"a": 1, "b": torch.ones(1, 1, 1)}, tmp_path / "none.pt")
    files = {
        "empty.safetensors": (b"", "is empty"),
        "cut.safetensors": (data[:-100], "truncated"),
        "stump.safetensors": (data[:5], "truncated"),
        "text.safetensors": (b"<html>404 not found</html>", "truncated, damaged or no safetensors"),
        "none.pt": (
            (tmp_path / "none.pt").read_bytes(),
            "is a pickle with an int under 'a', expected tensors only; nothing in it was executed",
        ),
        "code.pt": (
            pickle.dumps({"a.lora_A.weight": Path("x")}),
            "is a pickle with an object of pathlib.* under 'a.lora_A.weight'",
        ),
        "void.safetensors": (struct.pack("<Q", 0), "truncated"),
        "twice.safetensors": (twice(data), "has .*lora_down.weight twice in its header"),
        "old.safetensors": (pickle.dumps([1, 2]), "a pickle or damaged"),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} .*{expected}"):
            formats.load(tmp_path / name, pipe_layout)
    with pytest.raises(UserError, match="does not exist"):
        formats.load(tmp_path / "absent.safetensors", pipe_layout)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void has no .safetensors file"):
        formats.load(tmp_path / "void", pipe_layout)
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no tensors"):
        formats.load(tmp_path / "none.safetensors", pipe_layout)
    with pytest.raises(
        UserError, match="kohya's names, which can only be read against a model's layout"
    ):
        formats.load(tmp_path / "good.safetensors")
    other = layout_of(
        {"unet": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1)}), "text_encoder": pipe.text_encoder}
    )
    with pytest.raises(UserError, match=r"unknown key\(s\): lora_unet_"):
        formats.load(tmp_path / "good.safetensors", other)


def test_eight_bit_floats_are_read_exactly(tmp_path):
    layout = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(6, 4)})})
    down, up = (
        (torch.randn(2, 6) * 3).to(torch.float8_e4m3fn),
        torch.randn(4, 2).to(torch.float8_e5m2),
    )
    file = save_file(
        {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    lr = formats.load(file, layout).components["unet"]["a"]
    assert (
        lr.down.dtype == torch.float16
        and torch.equal(lr.down.float(), down.float())
        and torch.equal(lr.up.float(), up.float())
    )
    save_file(
        {
            "lora_unet_a.lora_down.weight": down.to(torch.complex64),
            "lora_unet_a.lora_up.weight": up,
        },
        file,
    )
    with pytest.raises(UserError, match="complex64, expected floating point"):
        formats.load(file, layout)


def test_a_single_integer_is_an_alpha_but_no_factor(tmp_path):
    layout = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(1, 1),
        "lora_unet_a.lora_up.weight": torch.ones(1, 1),
        "lora_unet_a.alpha": torch.tensor(3),
    }
    file = save_file(tensors, tmp_path / "a.safetensors")
    assert formats.load(file, layout).components["unet"]["a"].scale == 3
    save_file(tensors | {"lora_unet_a.lora_up.weight": torch.ones(1, 1, dtype=torch.int32)}, file)
    with pytest.raises(
        UserError, match=r"lora_up.weight in .* is torch.int32, expected floating point"
    ):
        formats.load(file, layout)


def test_hashes_are_those_that_kohya_computes(tmp_path):
    """sd-scripts hashes the bytes after a header of ss_ entries, and 64 KB from 1 MB on."""
    layout = layout_of(
        {"unet": nn.ModuleDict({f"l{i}": nn.Linear(900, 700) for i in range(9)})},
        base_model_version="v",
    )
    state = AdapterState(
        {
            "unet": {
                f"l{i}": LowRank(torch.randn(40, 900), torch.randn(700, 40).half(), 0.5)
                for i in range(9)
            }
        }
    )
    formats.save(
        state,
        tmp_path / "a.safetensors",
        format="kohya",
        layout=layout,
        metadata={"config": "x" * 999, "ss_steps": "7 ü"},
    )
    header = safetensors.safe_open(tmp_path / "a.safetensors", "pt").metadata()
    data = safetensors.torch.save(
        load_file(tmp_path / "a.safetensors"),
        {key: value for key, value in header.items() if key.startswith("ss_")},
    )
    assert header["ss_steps"] == "7 ü" and len(data) > 0x110000
    assert (
        header["sshs_model_hash"]
        == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    )
    assert header["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    formats.save(
        formats.load(tmp_path / "a.safetensors", layout),
        tmp_path / "b.safetensors",
        format="diffusers",
        layout=layout,
    )
    other = safetensors.safe_open(tmp_path / "b.safetensors", "pt").metadata()
    assert other["sshs_model_hash"] == tensor_hash(tmp_path / "b.safetensors")  # of its own tensors
    assert other["sshs_model_hash"] != header["sshs_model_hash"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(dtype) -> None:
    largest = torch.finfo(dtype).max
    for values in ([largest] * 40, [largest, -largest] * 40, [0.0], []):
        assert is_finite(torch.tensor(values, dtype=dtype))
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 1, 63, 998):
            numbers = torch.full((999,), largest, dtype=dtype)
            numbers[place] = value
            assert not is_finite(numbers) and not is_finite(numbers.reshape(27, 37).T)
    assert not is_finite(torch.tensor([math.inf, -math.inf], dtype=dtype))
