"""Valid files with bytes or keys changed: a state or one sentence. CASES=2000 pytest ...

Never a traceback, a partial output or a changed input.
"""

import json
import os
import random
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank, scaled_product
from lora_core.errors import UserError
from lora_core.formats import layout_of

CASES = int(os.environ.get("CASES", 300))  # the figure of acceptance is 2,000
HEAD = 8
DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
    "F4": 1,
    "X": 4,
}


def small():
    """A network and a text encoder of a few layers, and the layout of both."""
    unet = nn.ModuleDict(
        {"to_q": nn.Linear(6, 6), "proj": nn.Conv2d(6, 4, 1), "conv": nn.Conv2d(4, 6, 3)}
    )
    text = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 8)])})})
    return layout_of({"unet": unet, "text_encoder": text}, base_model_version="x")


def state(layout, *, dora=False):
    def factors(shape):
        up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
        return LowRank(
            torch.randn(2, *shape[1:]), up, 0.5, torch.rand(shape[0]) + 0.5 if dora else None
        )

    components = {
        name: {path: factors(shape) for path, shape in part.shapes.items()}
        for name, part in layout.components.items()
    }
    return AdapterState(components, metadata={"config": "seed = 1"})


@cache
def seeds():
    """Name -> bytes of a valid file of every kind."""
    folder, layout = Path(tempfile.mkdtemp()), small()
    torch.manual_seed(0)
    for format in ("diffusers", "kohya"):
        for dora in (False, True):
            formats.save(
                state(layout, dora=dora),
                folder / f"{format}{dora}.safetensors",
                format=format,
                layout=layout,
            )
    native = load_file(folder / "diffusersFalse.safetensors")
    rows = AdapterState(tokens={"clip_l": torch.randn(2, 6)}, token_names=("<a>", "<b>"))
    formats.save(rows, folder / "rows.safetensors", format="embeddings")
    told = {
        "lora_adapter_metadata": json.dumps(
            {"unet.r": 2, "unet.lora_alpha": 1, "unet.rank_pattern": {"to_q": 2}}
        )
    }
    torch.save(native, folder / "dict.bin")
    torch.save(native, folder / "older.bin", _use_new_zipfile_serialization=False)
    torch.save({"<a>": torch.randn(6)}, folder / "rows.pt")
    lycoris = {}
    for i in "12":
        lycoris[f"lora_unet_to_q.hada_w{i}_a"] = torch.randn(6, 2)
        lycoris[f"lora_unet_to_q.hada_w{i}_b"] = torch.randn(2, 6)
    lycoris |= {
        "lora_unet_proj.lokr_w1": torch.randn(2, 2),
        "lora_unet_proj.lokr_w2": torch.randn(2, 3, 1, 1),
        "lora_unet_to_q.dora_scale": torch.rand(1, 6),
    }
    made = {
        "told": (native, told),
        "lycoris": (lycoris, {"ss_network_args": json.dumps({"wd_on_output": "False"})}),
    }
    comfy = {
        f"diffusion_model.{key.removeprefix('unet.')}": tensor
        for key, tensor in native.items()
        if key.startswith("unet.")
    }
    made["comfy"] = (comfy, {})
    made["peft"] = (
        {
            f"base_model.model.{key.removeprefix('unet.')}": tensor
            for key, tensor in native.items()
            if key.startswith("unet.")
        },
        {},
    )
    for name, (tensors, header) in made.items():
        formats.container.write_tensors(folder / f"{name}.safetensors", tensors, header)
    found = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    shutil.rmtree(folder)
    return found


def flipped(data, rng):
    data = bytearray(data)
    where = (
        range(min(len(data), 600)) if rng.random() < 0.7 else range(len(data))
    )  # the header is where it hurts
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        data[rng.choice(where)] = rng.choice([0, 255, 34, 44, 48, 91, 123, rng.randrange(256)])
    return bytes(data)


def cut(data, rng):
    start = rng.randrange(len(data))
    return (
        data[:start]
        if rng.random() < 0.5
        else data[:start] + data[start + rng.choice([1, 2, 8, 100]) :]
    )


def grown(data, rng):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 4, 8, 300])) + data[at:]


def resized(data, rng):
    """Another length of the header."""
    size = struct.unpack("<Q", data[:HEAD])[0]
    other = rng.choice(
        [0, 1, 2, size - 1, size + 1, size + 8, len(data), 2**31, 2**40, 2**63 - 1, 2**64 - 1]
    )
    return struct.pack("<Q", other % 2**64) + data[HEAD:]


def renamed(header, key, rng):
    names = [
        "",
        "x",
        key + "x",
        key[1:],
        key.upper(),
        key.replace("up", "down"),
        key.replace("_A", "_B"),
        "clip_l",
        "\u0000é",
        "unet:0:up",
    ]
    header[rng.choice(names)] = header.pop(key)


def dropped(header, key, rng):
    del header[key]


def reshaped(header, key, rng):
    shape = header[key]["shape"]
    header[key]["shape"] = rng.choice(
        [[], [0], [1], shape[::-1], [*shape, 1], [-1], [2**40, 2**40], "x", shape[:1], [1, *shape]]
    )


def retyped(header, key, rng):
    header[key]["dtype"] = rng.choice(list(DTYPES))


def reinterpreted(header, key, rng):
    """As many bytes under another dtype and a fitting shape."""
    start, stop = header[key]["data_offsets"]
    name = rng.choice(list(DTYPES))
    header[key] |= {
        "dtype": name,
        "shape": rng.choice(
            [[(stop - start) // DTYPES[name]], [1, (stop - start) // DTYPES[name]]]
        ),
    }


def moved(header, key, rng):
    offsets = header[key]["data_offsets"]
    header[key]["data_offsets"] = rng.choice(
        [[0, 0], [0, 2**62], [8, 4], offsets[::-1], [], [0, 4, 8], "x", None]
    )


def exchanged(header, key, rng):
    other = rng.choice([key for key in header if key != "__metadata__"])
    header[key], header[other] = header[other], header[key]


def copied(header, key, rng):
    header[key + rng.choice([".alpha", ".dora_scale", ".hada_w1_a", "_lora.alpha"])] = dict(
        header[key]
    )


def told(header, key, rng):
    words = [
        "",
        "{",
        "[]",
        "null",
        '{"unet.r": -1}',
        '{"unet.r": 2, "unet.rank_pattern": 3}',
        "é",
        '["<a>"]',
        "1e999",
        "[" * 3000,
    ]
    name = rng.choice(
        [
            "lora_adapter_metadata",
            "token_names",
            "placeholders",
            "ss_network_args",
            "unet",
            "format",
        ]
    )
    header["__metadata__"] = rng.choice(
        [{name: rng.choice(words)}, {name: rng.choice(words)}, {name: 3}, [], None]
    )


KEY_WAYS = (
    renamed,
    renamed,
    dropped,
    reshaped,
    retyped,
    reinterpreted,
    moved,
    exchanged,
    copied,
    told,
)


def rekeyed(data, rng):
    """Another header over the same bytes."""
    size = struct.unpack("<Q", data[:HEAD])[0]
    header = json.loads(data[HEAD : HEAD + size])
    keys = [key for key in header if key != "__metadata__"]
    for key in rng.sample(keys, min(len(keys), rng.choice([1, 1, 2, 4]))):
        if key in header:
            rng.choice(KEY_WAYS)(header, key, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[HEAD + size :]


def renumbered(data, rng):
    """NaN, Inf or anything else in a tensor's place."""
    at = rng.randrange(len(data) // 2, len(data))
    return (
        data[:at]
        + struct.pack("<f", rng.choice([float("nan"), float("inf"), -1e38, 0.0]))
        * rng.choice([1, 6])
        + data[at + 4 :]
    )


WAYS = (flipped, cut, grown, resized, renumbered)


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(which=st.integers(0, 10**6), seed=st.integers(0, 2**32))
def test_a_damaged_file_is_read_or_refused_in_one_sentence(which, seed):
    layout, rng = small(), random.Random(seed)
    name = list(seeds())[which % len(seeds())]
    data = seeds()[name]
    keys = name.endswith(".safetensors") and rng.random() < 0.6
    data = rekeyed(data, rng) if keys else data
    for _ in range(rng.choice([0, 0, 1] if keys else [1, 1, 2])):
        data = rng.choice(WAYS)(data, rng) if len(data) > HEAD else data
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, name), Path(folder, "out.safetensors")
        file.write_bytes(data)
        out.write_bytes(b"old")
        try:
            read = formats.load(
                file,
                layout if rng.random() < 0.8 else None,
                allow_extra=rng.random() < 0.3,
                merging=True,
            )
            for modules in (*read.components.values(), *read.dense.values()):
                for update in modules.values():
                    scaled_product(update)
            formats.save(
                read,
                out,
                format=rng.choice(["kohya", "diffusers", "embeddings", "cloneofsimo"]),
                layout=layout,
            )
        except UserError as error:
            assert "\n" not in str(error) and str(error)
            assert out.read_bytes() == b"old"
        assert file.read_bytes() == data and sorted(os.listdir(folder)) == sorted(
            [name, "out.safetensors"]
        )


def test_the_seeds_are_valid(tmp_path):
    for name, data in seeds().items():
        (tmp_path / name).write_bytes(data)
        read = formats.load(tmp_path / name, small(), merging=True)
        assert read.components or read.dense or read.tokens
