"""Files of torch.save: read as torch and pickle read them, but nothing in them runs.

A damaged file is one sentence.
"""

import collections
import io
import os
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core.errors import UserError
from lora_core.formats.pickles import MAGIC, PROTOCOL, read_pickle
from lora_core.formats.unpickler import Inert

BUILT = []  # notes of the classes below


class Callback:
    """An object as training frameworks leave it in a checkpoint; it is noted when it is built."""

    def __init__(self, patience):
        self.patience, self.best = patience, torch.tensor(3.0)

    def __setstate__(self, state):
        BUILT.append(state)


class Settings(dict):
    def __setitem__(self, key, value):
        BUILT.append(key)


def save(path, value, container):
    if container == "plain":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=container == "zip")
    return path


def sentence(path):
    with pytest.raises(UserError) as info:
        read_pickle(path)
    text = str(info.value)
    assert str(path) in text and "\n" not in text
    return text


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.stride() == theirs.stride()
        )
        wide = torch.float32 if theirs.is_floating_point() else theirs.dtype
        assert torch.equal(ours.to(wide), theirs.to(wide))
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list) == isinstance(theirs, list) and len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            same(a, b)
    else:
        assert ours == theirs


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
    path = save(tmp_path / "a.ckpt", tensors(), container)
    same(read_pickle(path), torch.load(path, weights_only=False))


def test_narrow_dtypes_and_tensors_with_attributes(tmp_path):
    marked = torch.arange(3.0)
    marked.note = "mine"
    value = {
        "f8": torch.arange(4.0).to(torch.float8_e4m3fn),
        "u16": torch.arange(4).to(torch.uint16),
        "marked": marked,
    }
    same(read_pickle(save(tmp_path / "a.pt", value, "zip")), value)


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
        same(ours, value)
    del ours[2], value[2]
    same(ours, value)
    assert ours["a"][0] is ours["a"][1]


def test_tensors_of_a_zip_are_mapped_and_of_one_storage(tmp_path):
    base = torch.zeros(8)
    path = save(tmp_path / "a.pt", [base[:4], base[4:]], "zip")
    before = path.read_bytes()
    first, second = read_pickle(path)
    first += 1
    assert second.data_ptr() - first.data_ptr() == 16 and not second.any()
    assert path.read_bytes() == before


@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
def test_objects_of_a_framework_are_inert(tmp_path, container):
    BUILT.clear()
    tree = {
        "callbacks": {Callback: Callback(3)},
        "hyper": Settings({"lr": 1e-3}),
        "state_dict": {"w": torch.ones(2)} if container != "plain" else {},
    }
    tree["callbacks"][Callback].best = 4.0  # plain pickles of tensors call torch's own reader
    path = save(tmp_path / "a.ckpt", tree, container)
    ours = read_pickle(path)
    assert not BUILT
    ((key, record),) = ours["callbacks"].items()
    assert (
        key.path.endswith("Callback")
        and isinstance(record, Inert)
        and record.state == {"patience": 3, "best": 4.0}
    )
    assert (
        isinstance(ours["hyper"], Inert)
        and ours["hyper"].items == [("lr", 1e-3)]
        and "Settings" in repr(ours["hyper"])
    )
    same(ours["state_dict"], tree["state_dict"])
    assert (
        Callback.__setstate__ and torch.load(path, weights_only=False)
        if container != "plain"
        else pickle.loads(path.read_bytes())
    )
    assert BUILT  # the library's reader does build them


def test_a_parameter_dict_of_an_embedding_keeps_its_tensors(tmp_path):
    rows = nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 4))})
    record = read_pickle(save(tmp_path / "a.pt", {"string_to_param": rows}, "legacy"))[
        "string_to_param"
    ]
    found = {**record.state, **record.state.get("_parameters", {})}
    assert torch.equal(found["*"], torch.ones(2, 4))


class Evil:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """So that pickle agrees to write it as a callable."""


def payloads(mark):
    shell, code = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    opens = Evil(getattr, (Evil(__import__, ("os",)), "system"))
    yield "system", Evil(os.system, (shell,))
    yield "eval", Evil(eval, (code,))
    yield "exec", Evil(exec, (code,))
    yield "getattr", Evil(Evil(getattr, (Evil(__import__, ("os",)), "system")), (shell,))
    yield "partial", Evil(map, (opens, [shell]))
    yield "nested", {"state_dict": {"w": [1, (Evil(eval, (code,)),)]}}
    yield "as a key", {Evil(eval, (code,)): 1}
    yield "as state", Evil(Callback.__new__, (Callback,), {"a": Evil(eval, (code,))})
    yield (
        "as items",
        Evil(collections.OrderedDict, (), None, None, iter([("a", Evil(eval, (code,)))])),
    )
    yield "as factory", Evil(collections.defaultdict, (eval, {"a": Evil(eval, (code,))}))
    yield "state setter", Evil(Settings, (), code, None, None, eval)
    yield "rebuild", Evil(torch._tensor._rebuild_from_type_v2, (eval, str, (code,), None))
    yield (
        "hooks",
        Evil(
            torch._utils._rebuild_parameter, (Evil(eval, (code,)), True, collections.OrderedDict())
        ),
    )


@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
def test_nothing_runs(tmp_path, container):
    mark = tmp_path / "it_ran"
    for name, value in payloads(mark):
        path = save(tmp_path / f"{name.replace(' ', '_')}.pt", value, container)
        try:
            read_pickle(path)
        except UserError as error:
            assert str(path) in str(error)
        assert not mark.exists(), name
    pickle.loads(pickle.dumps(Evil(os.system, (f"touch {mark}",))))
    assert mark.exists()  # so the mark would have been seen


@pytest.mark.parametrize(
    "code",
    [
        b"cposix\nsystem\n(S'touch MARK'\ntR.",
        b"(S'touch MARK'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch MARK'\no.",
        b"\x80\x02cposix\nsystem\n(X\x0a\x00\x00\x00touch MARKt\x81.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",
        b"\x80\x02cposix\nsystem\n(X\x0a\x00\x00\x00touch MARKt}\x92.",
        b"\x80\x02ccollections\nOrderedDict\nN}X\x03\x00\x00\x00popcposix\nsystem\ns\x86b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__code__K\x01s\x86b.",
    ],
)
def test_every_opcode_that_calls_lies_still(tmp_path, code, monkeypatch):
    mark = tmp_path / "M"
    path = tmp_path / "a.pt"
    monkeypatch.chdir(tmp_path)
    path.write_bytes(code.replace(b"MARK", b"MMMM"))
    names = [read_pickle(path)]
    assert not (tmp_path / "MMMM").exists() and not mark.exists()
    assert "inert" in repr(names) or "Name" in repr(names)
    assert torch._utils._rebuild_tensor_v2.__code__.co_name == "_rebuild_tensor_v2"


def test_a_named_module_is_not_imported(tmp_path):
    (tmp_path / "trap_module.py").write_text("raise SystemExit")
    sys.path.insert(0, str(tmp_path))
    (tmp_path / "a.pt").write_bytes(b"ctrap_module\nThing\n(tR.")
    assert read_pickle(tmp_path / "a.pt").name == "trap_module.Thing"
    assert "trap_module" not in sys.modules


def pickled_tensor(numel, size, stride, offset=0, *, held=16):
    """A zip with one tensor of that description, over a storage of `held` bytes."""
    text = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
    text += b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    text += (
        pickle.dumps(numel, 2)[2:-1]
        + b"tQ"
        + b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride))
        + b"\x89NtR."
    )
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a/data.pkl", text)
        archive.writestr("a/data/0", bytes(held))
    return data.getvalue()


def test_a_tensor_must_lie_in_its_storage(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickled_tensor(4, (2, 2), (2, 1)))
    assert torch.equal(read_pickle(path), torch.zeros(2, 2))
    bad = [
        (1 << 40, (4,), (1,)),
        (5, (5,), (1,)),
        (4, (5,), (1,)),
        (4, (2, 2), (3, 1)),
        (4, (4,), (1,), 1),
        (4, (4,), (-1,), 3),
        (4, (1 << 40,), (0,)),
        (4, (2, 2), (1,)),
        (-1, (1,), (1,)),
        (4, (1 << 70, 0), (1, 1)),
        (4, ("a",), (1,)),
        (4, 3, 1),
        (0, (1,), (1,)),
    ]
    for case in bad:
        path.write_bytes(pickled_tensor(*case))
        sentence(path)


def test_bombs_are_refused_quickly(tmp_path):
    path = tmp_path / "a.pt"
    nest = b"\x80\x02)" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(200))
    path.write_bytes(nest + b"}q\xffq\xfe0h\xfeh\xc7K\x01s.")  # a key made of 2^200 empty tuples
    sentence(path)
    path.write_bytes(
        b"\x80\x02Nr\xfe\xff\xff\xff."
    )  # place 2^32 of the memo; Python's own machine allocates all below
    assert read_pickle(path) is None
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"a.")
    sentence(path)
    path.write_bytes(b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".")  # a deep nest is only that
    read_pickle(path)


def test_damage_is_one_sentence(tmp_path):
    path = tmp_path / "a.ckpt"
    assert "does not exist" in sentence(path)
    path.write_bytes(b"")
    assert "empty" in sentence(path)
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
        assert "fetch or write it again" in sentence(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"a": "b" * 1000}))
    assert "compressed" in sentence(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(1))
        archive.writestr("a/constants.pkl", pickle.dumps(1))
    assert "TorchScript" in sentence(path)
    for names in (["b"], ["a/data.pkl", "b/data.pkl"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, pickle.dumps(1))
        assert "entries data.pkl" in sentence(path)
    path.write_bytes(
        pickle.dumps(MAGIC, 2)
        + pickle.dumps(PROTOCOL, 2)
        + pickle.dumps({"little_endian": False}, 2)
    )
    assert "machine" in sentence(path)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_truncated_and_mutated_files_end_in_a_sentence_or_a_value(tmp_path, container):
    path = save(
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
    same(read_pickle(save(Path(tmp_path) / "lora.pt", loras, "zip")), [p.data for p in loras])
    embedding = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": {"*": torch.randn(2, 8)},
        "name": "cat",
        "step": None,
    }
    same(read_pickle(save(tmp_path / "emb.pt", embedding, "legacy")), embedding)
