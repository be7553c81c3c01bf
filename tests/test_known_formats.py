"""The table of formats: its functions exist, and neither it nor recognition needs a library."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_core.formats import lycoris
from lora_core.formats.container import encode_header, encode_tensors
from lora_core.formats.known_formats import (
    FORMATS,
    LEAVES,
    READABLE,
    TOKEN_FORMATS,
    WRITABLE,
    find_format,
    is_adapter_key,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", READABLE)
def test_every_format_has_its_functions(name):
    row = FORMATS[name]
    assert callable(row.read)
    assert (row.write is not None) == (name in WRITABLE)
    assert row.is_token_rows == (name in TOKEN_FORMATS)


def test_one_key_tells_the_format():
    shapes = {
        "unet.a.lora_A.weight": "diffusers",
        "lora_unet_a.lora_down.weight": "kohya",
        "unet:0:up": "cloneofsimo",
        "double_blocks.0.processor.qkv_lora1.down.weight": "xlabs",
        "diffusion_model.a.lora_A.weight": "comfyui",
        "base_model.model.a.lora_B.default.weight": "peft",
        "clip_g": "embeddings",
        "a.weight": None,
        "lora_unet_a.alpha": None,  # an alpha alone is no adapter
    }
    for key, name in shapes.items():
        assert find_format({key: (4, 4)}) == name


def test_all_of_lycoris_roles_can_be_read():
    assert not lycoris.ROLES - set(LEAVES)
    assert all(is_adapter_key(f"x.{role}") for role in lycoris.ROLES)


def test_tensors_lie_as_safetensors_writes_them():
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.arange(3).to(torch.bfloat16),
        "c": torch.ones(2, dtype=torch.float16),
        "i": torch.tensor(7),
        "i32": torch.tensor([1, 2], dtype=torch.int32),
        "d": torch.ones(1, dtype=torch.float64),
        "flag": torch.tensor([True]),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "none": torch.empty(0, 3),
    }
    entries, pieces = encode_tensors(tensors)
    found = safetensors.torch.load(b"".join([encode_header(entries, {}), *pieces]))
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key].float(), tensor.float())
    theirs = safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()})
    assert theirs.endswith(b"".join(pieces))


def modules_after(code):
    """Names of the modules that a process has after running some code."""
    text = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    command = [sys.executable, "-c", text]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split())


def test_listing_the_formats_needs_no_torch():
    found = modules_after("from lora_core.formats.known_formats import FORMATS")
    assert "lora_core.formats.known_formats" in found and "torch" not in found


def test_recognizing_and_reading_a_file_needs_no_model_library(tmp_path):
    path = tmp_path / "a.safetensors"
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    down = {f"{module}.lora_down.weight": torch.ones(4, 768)}
    safetensors.torch.save_file(down | {f"{module}.lora_up.weight": torch.ones(640, 4)}, path)
    code = (
        "from models.known import recognize_path\n"
        "from lora_core import formats\n"
        f"state = formats.load({str(path)!r}, recognize_path({str(path)!r}))\n"
        "assert state.components"
    )
    found = modules_after(code)
    assert "lora_core.formats.kohya" in found
    assert not found & {"diffusers", "transformers", "huggingface_hub"}
    others = ("cloneofsimo", "comfy", "peft", "mixofshow", "pickles", "weights")
    others += ("model_files", "model_folders")
    assert not found & {f"lora_core.formats.{name}" for name in others}
    assert not found & {"models.families", "models.sd", "models.single_file"}
