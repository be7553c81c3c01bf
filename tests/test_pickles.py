"""Files of torch.save: read as torch and pickle read them; a damaged file is one sentence."""

import collections
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core.errors import UserError
from lora_core.formats.pickles import MAGIC, PROTOCOL, read_pickle
from tests.pickle_examples import assert_same_values, refusal_of, save_pickled


def tensors():
    grid = torch.arange(24.0).reshape(4, 6)
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    return {
        "state_dict": collections.OrderedDict((str(kind), (grid % 5).to(kind)) for kind in kinds),
        "rows": grid[1:3],
        "columns": grid[:, ::2],
        "turned": grid.T,
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "parameter": nn.Parameter(grid + 1),
        "sizes": [
            torch.Size((2, 3)),
            (1, "a"),
            {"b": {1, 2}},
            b"\x00\xff",
            None,
            True,
            1 << 70,
            -1.5,
        ],
    }


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_tensors_are_those_of_torch(tmp_path, container):
    path = save_pickled(tmp_path / "a.ckpt", tensors(), container)
    assert_same_values(read_pickle(path), torch.load(path, weights_only=False))


def test_narrow_dtypes_and_tensors_with_attributes(tmp_path):
    marked = torch.arange(3.0)
    marked.note = "mine"
    value = {
        "f8": torch.arange(4.0).to(torch.float8_e4m3fn),
        "u16": torch.arange(4).to(torch.uint16),
        "marked": marked,
    }
    assert_same_values(read_pickle(save_pickled(tmp_path / "a.pt", value, "zip")), value)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_those_of_pickle(tmp_path, protocol):
    shared = [1, 2]
    value = {
        "a": [shared, shared, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        2: {"é": "\u2603", b"b": bytearray(b"c")},
        (1, "t"): {3, 4},
        "f": 1e-9,
        "z": frozenset((7, 8)),
    }
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(value, protocol))
    ours = read_pickle(path)
    if protocol >= 5:  # before, a bytearray is rebuilt by a call
        assert_same_values(ours, value)
    del ours[2], value[2]
    assert_same_values(ours, value)
    assert ours["a"][0] is ours["a"][1]


def test_tensors_of_a_zip_are_mapped_and_of_one_storage(tmp_path):
    base = torch.zeros(8)
    path = save_pickled(tmp_path / "a.pt", [base[:4], base[4:]], "zip")
    before = path.read_bytes()
    first, second = read_pickle(path)
    first += 1
    assert second.data_ptr() - first.data_ptr() == 16 and not second.any()
    assert path.read_bytes() == before


def test_bombs_are_refused_quickly(tmp_path):
    path = tmp_path / "a.pt"
    nest = b"\x80\x02)" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(200))
    path.write_bytes(nest + b"}q\xffq\xfe0h\xfeh\xc7K\x01s.")  # a key made of 2^200 empty tuples
    refusal_of(path)
    path.write_bytes(
        b"\x80\x02Nr\xfe\xff\xff\xff."
    )  # place 2^32 of the memo; Python's own machine allocates all below
    assert read_pickle(path) is None
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"a.")
    refusal_of(path)
    path.write_bytes(b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".")  # a deep nest is only that
    read_pickle(path)


def test_damage_is_one_sentence(tmp_path):
    path = tmp_path / "a.ckpt"
    assert "does not exist" in refusal_of(path)
    path.write_bytes(b"")
    assert "empty" in refusal_of(path)
    for data in (
        b"PK\x03\x04",
        b"no pickle at all",
        b"\x80\x02",
        b"\x80\x02.",
        b"{" * 100,
        b"\x80\x02t.",
        b"\x80\x02N(.",
        b"\x80\x02Nh\x05.",
        b"\x82\x01.",
    ):
        path.write_bytes(data)
        assert "fetch or write it again" in refusal_of(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"a": "b" * 1000}))
    assert "compressed" in refusal_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(1))
        archive.writestr("a/constants.pkl", pickle.dumps(1))
    assert "TorchScript" in refusal_of(path)
    for names in (["b"], ["a/data.pkl", "b/data.pkl"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, pickle.dumps(1))
        assert "entries data.pkl" in refusal_of(path)
    path.write_bytes(
        pickle.dumps(MAGIC, 2)
        + pickle.dumps(PROTOCOL, 2)
        + pickle.dumps({"little_endian": False}, 2)
    )
    assert "machine" in refusal_of(path)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_truncated_and_mutated_files_end_in_a_sentence_or_a_value(tmp_path, container):
    path = save_pickled(
        tmp_path / "a.ckpt",
        {"state_dict": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3)}, "step": 3},
        container,
    )
    data, rng = path.read_bytes(), random.Random(0)
    cuts = [data[:n] for n in range(1, len(data) - 1, 17)]
    mutants = []
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        mutants.append(bytes(changed))
    refused = 0
    for i, case in enumerate(cuts + mutants):
        path.write_bytes(case)
        try:
            read_pickle(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert i >= len(cuts)
    assert refused > len(cuts)


def test_files_from_elsewhere_are_read(tmp_path):
    """The list form of cloneofsimo's .pt files, and an A1111 embedding."""
    loras = [
        nn.Parameter(torch.randn(4, 2, dtype=torch.float16)),
        nn.Parameter(torch.randn(2, 4, dtype=torch.float16)),
    ]
    assert_same_values(
        read_pickle(save_pickled(Path(tmp_path) / "lora.pt", loras, "zip")), [p.data for p in loras]
    )
    embedding = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": {"*": torch.randn(2, 8)},
        "name": "cat",
        "step": None,
    }
    assert_same_values(
        read_pickle(save_pickled(tmp_path / "emb.pt", embedding, "legacy")), embedding
    )
