"""Hashes of a model's file, as A1111 computes them."""

import hashlib
from pathlib import Path

import torch

from lora_core.formats.model_hashes import hash_model


def test_hashes_are_those_of_the_web_ui(tmp_path: Path) -> None:
    """Its old one is of 64 KB from 1 MB on, its new one of the whole file."""
    data = torch.randint(256, (0x150000,), dtype=torch.uint8).numpy().tobytes()
    file = tmp_path / "a.safetensors"
    file.write_bytes(data)
    old = hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert hash_model(file) == (old, hashlib.sha256(data).hexdigest())
    file.write_bytes(data[:-1])  # another file of the same name
    assert hash_model(str(file)) == (old, hashlib.sha256(data[:-1]).hexdigest())
    file.write_bytes(b"short")
    assert hash_model(file) == ("e3b0c442", hashlib.sha256(b"short").hexdigest())


def test_folders_and_hub_ids_have_none(tmp_path: Path) -> None:
    assert hash_model(tmp_path) is None and hash_model("org/model") is None
