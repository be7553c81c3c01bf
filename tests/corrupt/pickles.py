"""Files of torch.save whose few bytes announce years of work, or memory that no machine has."""

import io
import struct
import zipfile

import torch

PRIME = (1 << 61) - 1  # Python hashes an integer by its remainder
COUNT = 60_000
EXECUTED = "/tmp/lora_core_executed"  # what a pickle that is executed would write


def integer(number: int) -> bytes:
    return b"\x8a\x0c" + number.to_bytes(12, "little")


def nested_lists() -> bytes:
    """Sixty lists, each of which holds the one before twice: 2^60 when written out."""
    lists = b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60))
    return b"\x80\x02]q\x00" + lists + b"."


def nested_tuples() -> bytes:
    tuples = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    return b"\x80\x02)q\x00" + tuples + b"."


def nested_names() -> bytes:
    """The nested lists as the names of an embedding's tokens."""
    inner = nested_lists()[2:-1]
    rows = b"U\x0fstring_to_param}U\x01*K\x01s"
    return b"\x80\x02}q\xf0(" + rows + b"U\x0btoken_names" + inner + b"u."


def keys(kind: str) -> bytes:
    """A dictionary or set of 60,000 keys with one hash."""
    ends = {"integers": b"K\x01", "tuples": b"\x85K\x01", "set": b""}
    items = b"".join(integer(i * PRIME) + ends[kind] for i in range(1, COUNT))
    return b"\x80\x04\x8f(" + items + b"\x90." if kind == "set" else b"\x80\x02}(" + items + b"u."


def floats() -> bytes:
    items = b"".join(b"G" + struct.pack(">d", i * 2.0**900) + b"K\x01" for i in range(1, COUNT))
    return b"\x80\x02}(" + items + b"u."


def copies() -> bytes:
    """A list of 100,000 numbers that 20,000 calls copy."""
    call = b"h\x01h\x00\x85R"
    listed = b"(" + b"K\x01" * 100_000 + b"lq\x00"
    return b"\x80\x02(" + listed + b"ctorch\nSize\nq\x01h\x00\x85R" + call * 20_000 + b"l."


def empty_sets() -> bytes:
    """Four million bytes, each a set of 216."""
    return b"\x80\x04(" + b"\x8f" * 4_000_000 + b"l."


def long_integer() -> bytes:
    """A key of 240,000 digits, which Python refuses to write."""
    return b"\x80\x02}\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b"K\x01s."


def code() -> bytes:
    """A call of a shell, where an object of numpy would be."""
    return b"cposix\nsystem\n(S'touch " + EXECUTED.encode() + b"'\ntR."


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def shared_tensor() -> bytes:
    """One megabyte under 20,000 names."""
    tensor = torch.zeros(250_000)
    return saved({f"layer{i}": tensor for i in range(20_000)})


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tensor_pickle(numel: int, size: int, stride: int) -> bytes:
    """A zip whose tensor has another size than its storage of 16 bytes."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + integer(numel) + b"tQ"
    shape = integer(size) + b"\x85" + integer(stride) + b"\x85"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape
    pickled = b"\x80\x02}U\x01a" + rebuilt + b"\x89NtRs."
    return zipped({"a/data.pkl": pickled, "a/data/0": b"\0" * 16})


FILES = {
    "nested_lists.ckpt": nested_lists,
    "nested_lists.pt": nested_lists,
    "nested_tuples.bin": nested_tuples,
    "nested_names.pt": nested_names,
    "colliding_integers.pt": lambda: keys("integers"),
    "colliding_tuples.ckpt": lambda: keys("tuples"),
    "colliding_set.bin": lambda: keys("set"),
    "colliding_floats.pt": floats,
    "copied_lists.pt": copies,
    "empty_sets.pt": empty_sets,
    "long_integer.pt": long_integer,
    "code.pt": code,
    "shared_tensor.pt": shared_tensor,
    "stride_zero.pt": lambda: tensor_pickle(4, 1 << 40, 0),
    "announced_storage.ckpt": lambda: tensor_pickle(1 << 40, 1 << 40, 1),
    "inflating.ckpt": lambda: zipped({"a/data.pkl": bytes(50_000_000)}, zipfile.ZIP_DEFLATED),
    "many_entries.pt": lambda: zipped({f"a/{i}{'x' * 250}": b"" for i in range(COUNT)}),
}
