"""The unpickler: objects are inert, nothing runs, tensors lie in their storages."""

import collections
import io
import os
import pickle
import sys
import zipfile

import pytest
import torch
from torch import nn

from lora_core.errors import UserError
from lora_core.formats.pickles import read_pickle
from lora_core.formats.unpickler import Inert
from tests.pickle_examples import assert_same_values, refusal_of, save_pickled

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


@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
def test_objects_of_a_framework_are_inert(tmp_path, container):
    BUILT.clear()
    tree = {
        "callbacks": {Callback: Callback(3)},
        "hyper": Settings({"lr": 1e-3}),
        "state_dict": {"w": torch.ones(2)} if container != "plain" else {},
    }
    tree["callbacks"][Callback].best = 4.0  # plain pickles of tensors call torch's own reader
    path = save_pickled(tmp_path / "a.ckpt", tree, container)
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
    assert_same_values(ours["state_dict"], tree["state_dict"])
    assert (
        Callback.__setstate__ and torch.load(path, weights_only=False)
        if container != "plain"
        else pickle.loads(path.read_bytes())
    )
    assert BUILT  # the library's reader does build them


def test_a_parameter_dict_of_an_embedding_keeps_its_tensors(tmp_path):
    rows = nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 4))})
    record = read_pickle(save_pickled(tmp_path / "a.pt", {"string_to_param": rows}, "legacy"))[
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
        path = save_pickled(tmp_path / f"{name.replace(' ', '_')}.pt", value, container)
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
        refusal_of(path)
