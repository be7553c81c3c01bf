"""Crafted .safetensors files, images, texts, configs and models."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

DEPTH = 100_000
KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
MATRIX = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def header(text: bytes, content: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + content


def repeated_name() -> bytes:
    """60,000 names, of which the last is there twice."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [*range(60_000), 59_999]
    return header(("{" + ",".join(f'"layer{i}":{entry}' for i in names) + "}").encode())


def factors(metadata: dict[str, str] | None = None, *, out: int = 8, inner: int = 8) -> bytes:
    """A LoRA of rank 1 for one layer."""
    tensors = {KEY.format("A"): torch.ones(1, inner), KEY.format("B"): torch.ones(out, 1)}
    return save(tensors, metadata)


def matrices() -> bytes:
    """A LoHa of 3 MB for a weight of 160 GB."""
    size = 200_000
    tensors = {}
    for i in "12":
        tensors[f"{MATRIX}.hada_w{i}_a"] = torch.ones(size, 1)
        tensors[f"{MATRIX}.hada_w{i}_b"] = torch.ones(1, size)
    return save(tensors)


def names(text: str) -> bytes:
    """Two token rows, and a header entry with their names."""
    return save({"clip_l": torch.ones(2, 16)}, {"token_names": text})


def patterns(pattern: str) -> bytes:
    settings = {"unet.r": 1, "unet.lora_alpha": 1, "unet.rank_pattern": {pattern: 1}}
    return factors({"lora_adapter_metadata": json.dumps(settings)})


def png(*chunks: tuple[bytes, bytes], side: int = 16) -> bytes:
    """A grey PNG of one bit a pixel, with chunks between its head and its pixels."""
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side)
    head = (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    parts = []
    for name, content in (head, *chunks, (b"IDAT", rows), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + content))
        parts.append(struct.pack(">I", len(content)) + name + content + check)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def recipe(text: str) -> bytes:
    return png((b"tEXt", b"lora_core\0" + text.encode()))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n{} loop\n"
FILES: dict[str, Callable[[], bytes]] = {
    "repeated_name.safetensors": repeated_name,
    "announced_header.safetensors": lambda: struct.pack("<Q", 1 << 40) + b"{}",
    "long_header.safetensors": lambda: header(b"[" + b"{}," * 15_000_000 + b"{}]"),
    "deep_header.safetensors": lambda: header(b"[" * DEPTH),
    "huge_product.safetensors": lambda: factors(out=2_000_000, inner=2_000_000),
    "huge_matrix.safetensors": matrices,
    "empty_axis.safetensors": lambda: save({KEY.format("A"): torch.ones(0, 1 << 40)}),
    "slow_pattern.safetensors": lambda: patterns("(.*.*)*(down|up)+$"),
    "long_pattern.safetensors": lambda: patterns("(" * DEPTH),
    "deep_entry.safetensors": lambda: names("[" * DEPTH),
    "broken_config.safetensors": lambda: factors({"lora_core.config": "= ["}),
    "dotted_config.safetensors": lambda: factors({"lora_core.config": "a." * DEPTH + "a=1"}),
    "typed_config.safetensors": lambda: factors({"lora_core.config": "noise = 3\nclip_skip = []"}),
    "many_pixels.png": lambda: png(side=13_000),
    "inflating_text.png": lambda: png((b"zTXt", b"lora_core\0\0" + zlib.compress(bytes(10**8)))),
    "inflating_profile.png": lambda: png((b"iCCP", b"p\0\0" + zlib.compress(bytes(10**8)))),
    "deep_recipe.png": lambda: recipe("[" * DEPTH),
    "listed_recipe.png": lambda: recipe('[{"prompt": "a"}]'),
    "typed_recipe.png": lambda: recipe('{"model": 3, "prompt": {}, "seed": "x"}'),
    "long_number_recipe.png": lambda: recipe('{"model": "m", "seed": ' + "9" * 5000 + "}"),
    "program.png": lambda: POSTSCRIPT,
    "deep.toml": lambda: b"steps = " + b"[" * DEPTH,
    "dotted.toml": lambda: b"a." * DEPTH + b"a = 1",
    "long_number.toml": lambda: b"seed = " + b"9" * 5000,
    "many_megabytes.toml": lambda: b"seed = 1\n" * 200_000,
    "binary.toml": lambda: b"\xff\xfe\x00\x01" * 100,
}


def write_sparse(path: Path, size: int = 1 << 30) -> None:
    """A file of a gigabyte that takes no space on the disk."""
    with path.open("wb") as file:
        file.write(b"a photo of TOK\n")
        file.truncate(size)
