"""An unpickler that imports nothing and calls nothing that a file names.

Python's own unpickler imports names in a file and calls them. `RestrictedUnpickler` replaces every
opcode that could: names become `Name`, calls of a few known functions (REBUILDERS: tensors, ordered
dictionaries ...) are replaced by functions of this file, and all other objects become `Inert`
records that keep their arguments. Objects of training frameworks load as such records.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

DAMAGE = (  # exceptions of the unpickler for a malformed pickle
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
    pickle.UnpicklingError,
)
UNTYPED_DTYPES = {  # dtypes without a storage class of their own
    f"torch.{name}": getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}
# Limits of a pickle. Files of torch.save have some dozens of operations for each tensor.
MOST_OPERATIONS = 500_000  # of the unpickler: half a second, and at most 216 bytes for each
MOST_COPIED = 1_000_000  # entries that calls copy: a call of 5 bytes may copy a list of megabytes
ENTRY_BYTES = 64  # of a text, which count as one entry
LONGEST_KEY = 64  # entries of a tuple that is a dictionary's key
DEEPEST_KEY = 3  # tuples in tuples
# Entries of a dictionary or set with keys other than texts and 60-bit integers. Those can be made
# to collide, and a dictionary of n keys that collide takes n^2 / 2 comparisons.
MOST_ODD_KEYS = 1_000
MOST_AXES = 64  # of a tensor, as in torch


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; only the name."""

    path: str  # module.name


@dataclass(eq=False)
class Inert:
    """An object that is not rebuilt: the name of what would have been called, and its arguments.

    It does nothing.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None  # the value that it would have been restored from
    items: list[Any] = field(default_factory=list)  # appended values, or (key, value) pairs

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


class Storage(NamedTuple):
    """The block of memory that tensors are views of."""

    dtype: torch.dtype
    numel: int
    data: Any  # its bytes, a writable buffer; None where only the structure of a file is read


class CountedOperations:
    """A table of opcodes that counts how often it was asked.

    ValueError after MOST_OPERATIONS: a byte of a pickle can make an object of 216 bytes.
    """

    def __init__(self, table: Mapping[int, Callable[[Any], None]]) -> None:
        self.table, self.left = table, MOST_OPERATIONS

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MOST_OPERATIONS:,} operations")
        return self.table[opcode]


class RestrictedUnpickler(pickle._Unpickler):
    """Reads one pickle as plain values; the file's position is then at the end of the pickle.

    It is the standard library's unpickler in its Python form: the C form allocates memory for
    whatever index of its memo a file names, and hashes whatever key a file builds.
    `load_storage` maps a persistent id of torch to a `Storage`. `load` raises one of DAMAGE.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # the standard library's own attributes, which its stubs leave out
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], load_storage: Callable[[Any], Storage]):
        super().__init__(file, encoding="latin1")  # of strings that Python 2 wrote
        self.load_storage = load_storage
        # An instance's own, which counts.
        self.__dict__["dispatch"] = CountedOperations(RestrictedUnpickler.dispatch)
        self.copied = 0  # entries of the arguments of calls

    def find_class(self, module: str, name: str) -> Any:
        return Name(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        raise ValueError("extension codes are not read")

    def persistent_load(self, pid: Any) -> Any:
        """A storage; the older form of torch also puts classes here, with their source."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        return self.load_storage(pid)

    def _instantiate(self, called: Any, args: Sequence[Any]) -> None:
        self.append(self._rebuild(called, tuple(args)))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        called = self.stack.pop()
        self.append(self._rebuild(called, args))

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        args = self.stack.pop()
        called = self.stack.pop()
        self._instantiate(called, (*args, *keywords.values()))

    def load_build(self) -> None:
        """State goes to records; dictionaries and tensors are whole without it."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # first: it replaces the stack that `append` appends to
        self.append(to_set(items))

    def load_bytearray8(self) -> None:
        """Append a bytearray of the bytes in the file, not of the size that it announces."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def _rebuild(self, called: Any, args: Any) -> Any:
        """`rebuild`, with the entries of its arguments counted, which it may copy."""
        for arg in args if isinstance(args, tuple) else (args,):
            if isinstance(arg, str):
                self.copied += len(arg) // ENTRY_BYTES
            else:
                self.copied += len(arg) if isinstance(arg, list | tuple | dict | set) else 1
        if self.copied > MOST_COPIED:
            raise ValueError(f"its calls copy more than {MOST_COPIED:,} entries")
        return rebuild(called, args)

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target |= to_set(values, len(target))
        elif isinstance(target, Inert):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise ValueError("a value is appended to something that is no list")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, Inert):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(to_dictionary(pairs, len(target)))
        else:
            raise ValueError("an item is set on something that is no dictionary")


REPLACED: dict[bytes, Callable[[Any], None]] = {
    pickle.REDUCE: RestrictedUnpickler.load_reduce,
    pickle.NEWOBJ: RestrictedUnpickler.load_reduce,
    pickle.NEWOBJ_EX: RestrictedUnpickler.load_newobj_ex,
    pickle.BUILD: RestrictedUnpickler.load_build,
    pickle.APPEND: RestrictedUnpickler.load_append,
    pickle.APPENDS: RestrictedUnpickler.load_appends,
    pickle.ADDITEMS: RestrictedUnpickler.load_appends,
    pickle.SETITEM: RestrictedUnpickler.load_setitem,
    pickle.SETITEMS: RestrictedUnpickler.load_setitems,
    pickle.DICT: RestrictedUnpickler.load_dict,
    pickle.FROZENSET: RestrictedUnpickler.load_frozenset,
    pickle.BYTEARRAY8: RestrictedUnpickler.load_bytearray8,
}
RestrictedUnpickler.dispatch |= {opcode[0]: load for opcode, load in REPLACED.items()}


# ---------------------------------------------------------------- rebuilt values


def rebuild(called: Any, args: Any) -> Any:
    """The value that a call would give where the name is known, else a record of the call."""
    args = args if isinstance(args, tuple) else (args,)
    if isinstance(called, Name) and called.path in REBUILDERS:
        return REBUILDERS[called.path](*args)
    if isinstance(called, Name):
        return Inert(called.path, args)
    return Inert(f"result of {called!r:.80}" if isinstance(called, Inert) else "no name", args)


def to_dictionary(pairs: Any = (), filled: int = 0) -> dict[Any, Any]:
    """A dictionary of (key, value) pairs or of another dictionary, its keys checked.

    It is to be added to one of `filled` entries.
    """
    items = pairs.items() if isinstance(pairs, dict) else pairs
    return {check_key(key, at): value for at, (key, value) in enumerate(items, filled)}


def to_set(values: Any = (), filled: int = 0) -> set[Any]:
    return {check_key(value, at) for at, value in enumerate(values, filled)}


def check_key(value: Any, filled: int = 0) -> Any:
    """The value, if it may be a key of a dictionary of `filled` entries. Raises ValueError.

    Hashing a nest of tuples or sets may never end, and numbers and tuples can be made to collide.
    """
    if isinstance(value, str | bytes | None | Name | Inert | Tensor):
        return value
    if type(value) is int and abs(value) < 1 << 60:  # its hash is the number itself
        return value
    if filled >= MOST_ODD_KEYS:
        kind = type(value).__name__
        raise ValueError(f"a dictionary has more than {MOST_ODD_KEYS} keys, one is a {kind}")
    return _check_odd_key(value, DEEPEST_KEY)


def _check_odd_key(value: Any, depth: int) -> Any:
    if not isinstance(value, tuple):
        if isinstance(value, frozenset):
            raise ValueError("a key is a set")
        hash(value)
        return value
    if not depth or len(value) > LONGEST_KEY:
        raise ValueError("a key is a deep nest of tuples")
    for part in value:
        _check_odd_key(part, depth - 1)
    return value


def _rebuild_tensor(
    storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> Tensor:
    """A view of a storage. ValueError unless it lies within it and has no more numbers than it."""
    described = isinstance(storage, Storage) and len(size) == len(stride) <= MOST_AXES
    if not described or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor is not described by a storage, an offset, sizes and strides")
    if storage.data is None:
        return torch.empty(0)
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0
    if count > storage.numel or last >= max(storage.numel, 1):
        raise ValueError(f"a tensor of {count} numbers does not fit its {storage.numel} numbers")
    if not storage.numel:
        return torch.empty(0, dtype=storage.dtype).as_strided(size, stride)
    flat = torch.frombuffer(storage.data, dtype=storage.dtype, count=storage.numel)
    return flat.as_strided(size, stride, offset if count else 0)


def _rebuild_untyped(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: Any,
    hooks: Any,
    dtype: Name,
    *rest: Any,
) -> Tensor:
    """A tensor of a dtype that has no storage class; its storage counts bytes."""
    kind = UNTYPED_DTYPES[dtype.path]
    typed = Storage(kind, storage.numel // kind.itemsize, storage.data)
    return _rebuild_tensor(typed, offset, size, stride)


def _rebuild_subclass(function: Name, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """A tensor with Python attributes, without them."""
    return rebuild(function, args)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _rebuild_size(sizes: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(sizes)


def _rebuild_ordered(pairs: Any = ()) -> dict[Any, Any]:
    return to_dictionary(pairs)


def _rebuild_default(factory: Any = None, pairs: Any = ()) -> dict[Any, Any]:
    return to_dictionary(pairs)


def _rebuild_set(values: Any = ()) -> set[Any]:
    return to_set(values)


def _rebuild_bytes(text: str, encoding: str) -> bytes:
    """Bytes as pickles of Python 2's protocols have them."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unusual encoding")
    return text.encode("latin-1")


REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "torch.Size": _rebuild_size,
    "collections.OrderedDict": _rebuild_ordered,
    "collections.defaultdict": _rebuild_default,
    "_codecs.encode": _rebuild_bytes,
    "builtins.set": _rebuild_set,
    "__builtin__.set": _rebuild_set,
    "builtins.frozenset": _rebuild_set,
    "__builtin__.frozenset": _rebuild_set,
}
