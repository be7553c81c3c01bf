"""Damage to files: bits, cuts and splices of any file, and other values, keys and depths in JSON,
TOML, the headers of .safetensors files and the text chunks of PNG files.
"""

import copy
import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

DEPTH = 5_000  # of nests: five times the depth of Python's stack
VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2.5, 10**30, -(10**400), float("nan"), float("inf"), -float("inf"), 1e308,
    "", "x", "\x1b[31mred", "\u0000", "\ud800", "é" * 300, "../../etc/passwd", "a" * 100_000, "\n",
    [], [[]], [None], ["x", 1], {}, {"": {}}, {"a": None}, [0] * 1000,
)  # fmt: skip
TEXTS = (
    "",
    "x",
    "-1",
    "1e400",
    "nan",
    "[]",
    "{}",
    "null",
    "true",
    '"x"',
    "\x1b]0;x\x07",
    "9" * 5000,
)


# ---------------------------------------------------------------- bytes


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes replaced; mostly among the first ones, where headers are."""
    changed = bytearray(data)
    start = min(len(data), 600) if rng.random() < 0.7 else len(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        changed[rng.randrange(start)] = rng.choice([0, 255, 34, 44, 91, 123, rng.randrange(256)])
    return bytes(changed)


def cut_bytes(data: bytes, rng: random.Random) -> bytes:
    """The beginning, or all but some bytes in the middle."""
    start = rng.randrange(len(data))
    rest = data[start + rng.choice([1, 2, 8, 100]) :]
    return data[:start] + (rest if rng.random() < 0.5 else b"")


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 4, 8, 300])) + data[at:]


def splice_bytes(data: bytes, rng: random.Random) -> bytes:
    """A part of the file once more, in another place."""
    start, at = rng.randrange(len(data)), rng.randrange(len(data))
    return data[:at] + data[start : start + rng.randrange(1, 400)] + data[at:]


def replace_all(data: bytes, rng: random.Random) -> bytes:
    """Another kind of file under this name."""
    others = (b"", b"\n", b"\0" * 64, b"\xff\xfe\x00", b"PK\x03\x04", b"\x80\x02.", b"null", b"[]")
    return rng.choice((*others, b"[" * DEPTH, b'{"a":' * DEPTH, b"\x89PNG\r\n\x1a\n", b"((((" * 9))


BYTE_WAYS = (flip_bytes, flip_bytes, cut_bytes, insert_bytes, splice_bytes, replace_all)

# ---------------------------------------------------------------- values


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON value."""
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def change_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three of the values in it replaced, left out, moved or nested."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = places_of(value) if isinstance(value, dict | list) else []
        if not places or rng.random() < 0.05:
            return copy.deepcopy(rng.choice(VALUES))  # a later change may write into it
        holder, key = rng.choice(places)
        way = rng.randrange(6)
        if way <= 2:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif way == 3:
            del holder[key]
        elif way == 4 and isinstance(holder, dict):
            holder[rng.choice([str(key) + "x", "", "é\x1b", "$", "a.b", "\u0000"])] = holder.pop(
                key
            )
        else:
            other, name = rng.choice(places)
            if isinstance(other, list) and isinstance(name, int) and name >= len(other):
                continue
            if name in other or isinstance(other, list):
                holder[key] = json.loads(json.dumps(other[name]))
    return value


def write_value(value: Any, rng: random.Random) -> str:
    """JSON, at times with a key twice, a nest, or a long number in it."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    way = rng.random()
    if way < 0.05:
        return text.replace('":', '": [' + "[" * DEPTH + "]" * DEPTH + '],"a":', 1)
    if way < 0.1 and (names := re.findall(r'"[^"\\]*":', text)):
        return text.replace(rng.choice(names), names[0], 1)
    if way < 0.15:
        return re.sub(r"\d+", lambda found: "9" * 6000, text, count=1)
    return text


def change_json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    return write_value(change_value(value, rng), rng).encode("utf-8", "surrogatepass")


def change_json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    way = rng.random()
    if way < 0.7:
        lines[at] = change_json(lines[at], rng)
    elif way < 0.8:
        lines[at] = rng.choice([b"", b"[]", b"1", b"null", b"\xff", b"{", b'"x"', b"[" * DEPTH])
    elif way < 0.9:
        del lines[at]
    else:
        lines.insert(at, rng.choice(lines))
    return b"\n".join(lines) + b"\n"


def change_toml(data: bytes, rng: random.Random) -> bytes:
    """A line of TOML with another value or name, or another line."""
    lines = data.decode().splitlines()
    values = (
        "0", "-1", "1e400", "nan", "inf", "99999999999999999999", '"x"', "true", "[]", "{}", '""',
        
        "[" * DEPTH + "]" * DEPTH, "1979-05-27", '"' + "x" * 100_000 + '"', '"\\u001b[31m"', 
        "9" * 6000, '["a", 1]', "{a = 1}", "0x7fffffffffffffff", '"\\u0000"',
    )  # fmt: skip
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(lines))
        name, equals, _ = lines[at].partition("=")
        if equals and rng.random() < 0.8:
            lines[at] = f"{name}= {rng.choice(values)}"
        else:
            lines[at] = rng.choice(
                ["", "[x]", "[[stages]]", "x = 1", "a." * DEPTH + "a = 1", "=", "["]
            )
    return ("\n".join(lines) + "\n").encode()


def change_text(data: bytes, rng: random.Random) -> bytes:
    """Other text: control characters, words of many letters, no UTF-8."""
    words = (
        "",
        "\0",
        "\x1b[2J",
        "TOK",
        "é",
        "\u202e",
        "(" * DEPTH,
        "x" * 200_000,
        "<lora:a:1>",
        "{",
    )
    word = rng.choice(words).encode()
    return rng.choice([word, data + word, word + data, data + b"\xff", data.upper()])


# ---------------------------------------------------------------- containers


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Another header over the tensors of a .safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    way = rng.random()
    if way < 0.5 and metadata:
        _change_entry(metadata, rng)
        text = json.dumps(header)
    else:
        text = write_value(change_value(header, rng), rng)
    content = text.encode("utf-8", "surrogatepass")
    length = len(content)
    if rng.random() < 0.1:
        length = rng.choice([0, length - 1, length + 1, 2**31, 2**63, len(data)])
    return struct.pack("<Q", length % 2**64) + content + data[8 + size :]


def _change_entry(metadata: dict[str, str], rng: random.Random) -> None:
    """Another text in a header entry: other JSON or TOML, where it is one of them."""
    name = rng.choice(list(metadata))
    text = metadata[name]
    if rng.random() < 0.2:
        metadata[name] = rng.choice(TEXTS)
    elif "\n" in text or " = " in text:
        metadata[name] = change_toml(text.encode(), rng).decode()
    elif text[:1] in '{["':
        metadata[name] = change_json(text.encode(), rng).decode("utf-8", "replace")
    else:
        metadata[name] = rng.choice(TEXTS)


def change_png_text(data: bytes, rng: random.Random) -> bytes:
    """Another recipe in a PNG's text, another size in its head, or another chunk."""
    chunks = list(_png_chunks(data))
    way = rng.random()
    for i, (name, content) in enumerate(chunks):
        if name in (b"tEXt", b"iTXt") and b"lora_core\0" in content and way < 0.8:
            start = content.index(b"{")
            chunks[i] = (name, content[:start] + change_json(content[start:], rng))
        elif name == b"IHDR" and way >= 0.9:
            side = struct.pack(">I", rng.choice([0, 1, 20_000, 2**31 - 1, 2**32 - 1]))
            chunks[i] = (name, side + side + content[8:])
    if 0.8 <= way < 0.9:
        text = b"lora_core\0\0" + zlib.compress(b"[" * 3_000_000)
        chunks.insert(1, (rng.choice([b"zTXt", b"iCCP"]), text))
    return data[:8] + b"".join(_png_chunk(name, content) for name, content in chunks)


def _png_chunks(data: bytes) -> Any:
    at = 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def _png_chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": change_json,
    ".jsonl": change_json_lines,
    ".toml": change_toml,
    ".txt": change_text,
    ".safetensors": change_header,
    ".png": change_png_text,
}


def damage_file(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """The bytes of a file with one damage, or two."""
    if suffix in STRUCTURED and data and rng.random() < 0.75:
        data = STRUCTURED[suffix](data, rng)
        if rng.random() < 0.9:
            return data
    return rng.choice(BYTE_WAYS)(data, rng) if data else b"x"
