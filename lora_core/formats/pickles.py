"""Files of torch.save (`.ckpt`, `.pt`, `.bin`; zip, or the older form of torch < 1.6), read without executing a pickle.

Python's unpickler imports what a file names and calls it. Here a small machine of our own imports nothing: a handful of names mean something
(BUILDERS: tensors, ordered dictionaries ...), every other name becomes an `Inert` record that remembers what it was given. Objects of training
frameworks load as such records.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError

MAGIC, PROTOCOL = (
    0x1950A86A20F9469CFC6C,
    1001,
)  # how torch < 1.6 begins a file: two pickles, then the system, the object, its storages
LOCAL_HEADER = struct.Struct(
    "<4s22xHH"
)  # of a zip entry: its mark, the lengths of its name and its extra field
DTYPES = {  # storage class -> what it stores
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
    "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8,
}  # fmt: skip
STORAGES = {
    f"{module}.{kind}Storage": dtype
    for kind, dtype in DTYPES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
UNTYPED_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}  # no class of their own
DAMAGE = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    struct.error,
    EOFError,
    RuntimeError,
    AssertionError,
)


class Name(NamedTuple):
    """A class or function that a pickle names; only the name."""

    path: str  # module.name


@dataclass(eq=False)
class Inert:
    """What is left of an object that is not rebuilt: the name of what would have been called, and all it was given. It does nothing."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None  # what it would have been restored from
    items: list[Any] = field(default_factory=list)  # appended values, or (key, value) pairs

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


class Storage(NamedTuple):
    dtype: torch.dtype
    numel: int
    data: Any  # its bytes, a writable buffer; None where only the structure is looked at


def read_pickle(path: str | Path) -> Any:
    """What the file holds: dictionaries, lists, tuples, sets, strings, numbers, CPU tensors, and `Inert` records for everything else.

    Nothing in the file is executed. Tensors of zip files are mapped from the disk, read when they are used; those of older files are in memory.
    Bytes are not compared with the zip's checksums. Raises UserError for a file that is missing, empty, truncated, damaged, compressed,
    TorchScript, or whose tensors are larger than the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there; give a file written by torch.save")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty; it was probably cut off while being written or copied")
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        return _zipped(path, view) if view[:2] == b"PK" else _older(view)
    except (*DAMAGE, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path} {error}") from None
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"{path} is truncated, damaged or no file of torch.save ({reason}); fetch or write it again"
        ) from None


# ---------------------------------------------------------------- the two containers


def _zipped(path: Path, view: mmap.mmap) -> Any:
    """torch >= 1.6: NAME/data.pkl beside NAME/data/KEY, all uncompressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    pickles = [
        name
        for name in entries
        if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)
    ]
    if len(pickles) != 1:
        raise UserError(
            f"is a zip with {len(pickles)} entries data.pkl, expected one; is it a file of torch.save?"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise UserError("is a TorchScript program; expected tensors written by torch.save")

    def content(name: str) -> memoryview:
        info = entries[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"has a compressed entry {name}, which torch.save never writes; fetch or write it again"
            )
        mark, *lengths = LOCAL_HEADER.unpack_from(view, info.header_offset)
        start = info.header_offset + LOCAL_HEADER.size + sum(lengths)
        if mark != b"PK\x03\x04" or start + info.file_size > len(view):
            raise UserError(f"is truncated: {name} lies beyond its end; fetch or write it again")
        return memoryview(view)[start : start + info.file_size]

    if f"{root}byteorder" in entries and bytes(content(f"{root}byteorder")).strip() == b"big":
        raise UserError(
            "was written on a big-endian machine, which is not read; write it again on a common one"
        )
    contents: dict[str, memoryview] = {}

    def persistent(pid: Any) -> Storage:
        dtype, key, numel, _ = _storage(pid)
        data = contents[key] = contents[key] if key in contents else content(f"{root}data/{key}")
        return Storage(dtype, numel, _checked(data, dtype, numel, key))

    return Machine(persistent).run(io.BytesIO(content(pickles[0])))


def _older(view: mmap.mmap) -> Any:
    """torch < 1.6: pickles one after the other, then the storages' bytes. A file that begins otherwise is one plain pickle."""
    first = Machine(_no_storage).run(view)
    if first != MAGIC:
        return first
    protocol, system = (Machine(_no_storage).run(view) for _ in range(2))
    if protocol != PROTOCOL or not system.get("little_endian", True):
        raise UserError(
            "is of a torch or a machine that is not read here; write it again with a common one"
        )
    start = view.tell()
    found: dict[str, tuple[torch.dtype, int]] = {}

    def look(pid: Any) -> Storage:
        dtype, key, numel, _ = _storage(pid)
        found[key] = dtype, numel
        return Storage(dtype, 0, None)

    Machine(look).run(
        view
    )  # which storages there are; where they lie is known only after their list
    data: dict[str, bytearray] = {}
    for key in Machine(_no_storage).run(view):
        position = view.tell()
        dtype, numel = found[key]
        (count,) = struct.unpack_from("<q", view, position)
        if count != numel:
            raise UserError(
                f"has {count} numbers in storage {key}, expected {numel}; fetch or write it again"
            )
        end = position + 8 + numel * dtype.itemsize
        data[key] = bytearray(
            _checked(memoryview(view)[position + 8 : end], dtype, numel, key)
        )  # copied: not aligned
        view.seek(end)

    def persistent(pid: Any) -> Storage:
        dtype, key, numel, part = _storage(pid)
        if part is None:
            return Storage(dtype, numel, data[key])
        _, offset, numel = part  # a storage that is a piece of another
        size = dtype.itemsize
        return Storage(
            dtype,
            numel,
            _checked(
                memoryview(data[key])[offset * size : (offset + numel) * size], dtype, numel, key
            ),
        )

    view.seek(start)
    return Machine(persistent).run(view)


def _storage(pid: Any) -> tuple[torch.dtype, str, int, Any]:
    """(dtype, key, numel, piece of another storage) from a persistent id; ValueError where it names no storage."""
    kind, name, key, _, numel, *rest = pid
    if (
        kind != "storage"
        or not isinstance(name, Name)
        or name.path not in STORAGES
        or not isinstance(key, str)
    ):
        raise ValueError(f"{getattr(name, 'path', name)!s:.80} is no storage that is known here")
    if type(numel) is not int or numel < 0:
        raise ValueError("a storage has no valid size")
    return STORAGES[name.path], key, numel, rest[0] if rest else None


def _checked(data: memoryview, dtype: torch.dtype, numel: int, key: str) -> memoryview:
    if numel * dtype.itemsize > len(data):
        raise UserError(
            f"says that storage {key} has {numel} numbers of {dtype}, but holds only {len(data)} bytes of it; fetch or write it again"
        )
    return data


def _no_storage(pid: Any) -> Storage:
    raise ValueError("a storage where none belongs")


# ---------------------------------------------------------------- what is rebuilt


def _tensor(
    storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> Tensor:
    """A view of a storage. ValueError unless it lies within it; numbers are not repeated without end, either."""
    if (
        not isinstance(storage, Storage)
        or any(type(n) is not int or n < 0 for n in (offset, *size, *stride))
        or len(size) != len(stride)
    ):
        raise ValueError("a tensor is not described by a storage, an offset, sizes and strides")
    if storage.data is None:
        return torch.empty(0)
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0
    if count > storage.numel or last >= max(storage.numel, 1):
        raise ValueError(f"a tensor of {count} numbers does not fit its storage of {storage.numel}")
    flat = (
        torch.frombuffer(storage.data, dtype=storage.dtype, count=storage.numel)
        if storage.numel
        else torch.empty(0, dtype=storage.dtype)
    )
    return flat.as_strided(size, stride, offset if count else 0)


def _narrow(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    grad: Any,
    hooks: Any,
    dtype: Name,
    *rest: Any,
) -> Tensor:
    """A tensor of a dtype that has no storage class; its storage is untyped, in bytes."""
    kind = UNTYPED_DTYPES[dtype.path]
    return _tensor(
        Storage(kind, storage.numel // kind.itemsize, storage.data), offset, size, stride
    )


def _typed(function: Name, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """A tensor with Python attributes, without them."""
    return rebuild(function, args)


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    return {
        _key(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)
    }


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 2 protocols spell bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unusual spelling")
    return text.encode("latin-1")


REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _narrow,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda factory=None, pairs=(): _mapping(pairs),
    "_codecs.encode": _encoded,
    **dict.fromkeys(
        ("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"),
        lambda values=(): {_key(v) for v in values},
    ),
}


def rebuild(called: Any, args: Any) -> Any:
    """What calling something would give: a rebuilt value where its name is known, else a record. Nothing foreign is called."""
    args = args if isinstance(args, tuple) else (args,)
    if isinstance(called, Name) and called.path in REBUILDERS:
        return REBUILDERS[called.path](*args)
    return Inert(
        called.path
        if isinstance(called, Name)
        else f"result of {called!r:.80}"
        if isinstance(called, Inert)
        else "no name",
        args,
    )


def _key(value: Any, depth: int = 3) -> Any:
    """The value, if it may be a key: no nest of tuples, whose hash can take for ever."""
    if isinstance(value, Name) or not isinstance(value, tuple):
        hash(value)
        return value
    if not depth or len(value) > 64:
        raise ValueError("a key is a deep nest of tuples")
    for part in value:
        _key(part, depth - 1)
    return value


# ---------------------------------------------------------------- the machine


class Machine:
    """Runs one pickle: a stack, the positions of its marks, a memo. Opcodes are decoded by the standard library's `pickletools`."""

    def __init__(self, persistent: Callable[[Any], Any]):
        self.persistent, self.stack, self.marks, self.memo = (
            persistent,
            list[Any](),
            list[int](),
            dict[int, Any](),
        )

    def run(self, file: BinaryIO | mmap.mmap) -> Any:
        """The value; the file stands behind the pickle. Raises one of DAMAGE for anything malformed."""
        for op, arg, _ in pickletools.genops(file):  # type: ignore[arg-type]
            if op.name in LITERALS:
                self.stack.append(arg)
            elif op.name in ACTIONS:
                ACTIONS[op.name](self, arg)
            else:
                raise ValueError(f"the opcode {op.name} is not read")
        return self.pop()

    def pop(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise ValueError("a value is missing")
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def drop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(_key(value) for value in values)
        elif isinstance(target, Inert | list):
            (target.items if isinstance(target, Inert) else target).extend(values)
        else:
            raise ValueError("a value is appended to something that is no list")

    def assign(self, values: list[Any]) -> None:
        pairs, target = list(zip(values[::2], values[1::2], strict=True)), self.stack[-1]
        if isinstance(target, Inert):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        else:
            raise ValueError("an item is set on something that is no dictionary")

    def dictionary(self, values: list[Any]) -> None:
        self.push({})
        self.assign(values)

    def build(self) -> None:
        """State goes to records; dictionaries and tensors are whole without theirs (`_metadata`, hooks)."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state

    def load(self, pid: Any) -> None:
        """A storage; the older form also puts classes here, beside their source."""
        self.push(
            pid[1]
            if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module"
            else self.persistent(pid)
        )

    def instance(self, values: list[Any]) -> None:
        self.push(rebuild(values[0], tuple(values[1:])))


def _memoize(machine: Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _called(machine: Machine, _: Any, count: int = 2) -> None:
    called, *args = machine.last(count)
    machine.push(rebuild(called, args[0] if count == 2 else (*args[0], *args[1].values())))


def _global(machine: Machine, arg: str) -> None:
    machine.push(Name(".".join(arg.split(" ", 1))))


def _stack_global(machine: Machine, _: Any) -> None:
    module, name = machine.last(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name is no string")
    machine.push(Name(f"{module}.{name}"))


LITERALS = frozenset([  # opcodes that push their argument
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
])  # fmt: skip
ACTIONS: Mapping[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push(m.last(1)),
    "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "DICT": lambda m, _: m.dictionary(m.since_mark()),
    "FROZENSET": lambda m, _: m.push({_key(value) for value in m.since_mark()}),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.assign(list(m.last(2))),
    "SETITEMS": lambda m, _: m.assign(m.since_mark()),
    "POP": lambda m, _: m.drop(),
    "POP_MARK": lambda m, _: m.since_mark().clear(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _called,
    "NEWOBJ": _called,
    "NEWOBJ_EX": partial(_called, count=3),
    "OBJ": lambda m, _: m.instance(m.since_mark()),
    "INST": lambda m, arg: m.instance([Name(".".join(arg.split(" ", 1))), *m.since_mark()]),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, arg: m.load(arg),
    "BINPERSID": lambda m, _: m.load(m.pop()),
}
