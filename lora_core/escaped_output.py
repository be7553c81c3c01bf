r"""What a script prints, with the control characters of files that strangers made written as \x1b.

A header, a key, a token, a caption or a file's name may hold escape sequences, with which a
terminal erases lines, changes its title, or types; and marks that reverse the order of letters.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# C0 without tab and line feed, DEL, C1, Unicode's marks of direction, and halves of characters.
CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
SURROGATES = re.compile(r"[\ud800-\udfff]")
# A progress bar writes a carriage return and its line, or moves up as many lines as it has.
PROGRESS = re.compile(r"\r|(\n|\x1b\[A)+(?!.)", re.DOTALL)
QUICK_BYTES = 1 << 28  # that LoRA files are read, hashed and summed of within a few seconds
# Read by the libraries when they are imported; where the user has set one, that counts.
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
}
# Of these, bitsandbytes and torchao warn where they are imported by diffusers and transformers.
LOGGERS = ("torch", "torchao", "bitsandbytes", "matplotlib", "PIL", "fsspec", "httpx", "urllib3")


def escape_controls(text: str) -> str:
    r"""The text with control characters as \x1b, directions as \u202e, half characters as \ud83d.

    A byte of a file's name that is not UTF-8 is written as \xe9. Tabs and line feeds stay.
    """
    return CONTROLS.sub(_escape, text)


def one_line(text: str) -> str:
    r"""The text with line feeds as \n, for lines that quote what a stranger wrote."""
    return text.replace("\n", r"\n")


def print_note(text: str) -> None:
    """One line on stderr about something that a user would not expect."""
    print(f"note: {one_line(text)}", file=sys.stderr)


def escape_surrogates(text: str) -> str:
    r"""The text with only half characters written out, \xe9 for a byte that is not UTF-8."""
    return SURROGATES.sub(_escape, text)


def silence_libraries() -> None:
    """Before the libraries are imported: no bars, and no logs below errors."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        hub.disable_progress_bars()  # of a program, or a gradio, that imported it before us
    loading = sys.modules.get("transformers.utils.logging")
    if loading is not None and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        loading.disable_progress_bar()
    for name in (*LOGGERS, "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hides_progress() -> bool:
    """Whether progress bars are left out: standard error, escaped or not, is no terminal."""
    stream = bottom_stream(sys.stderr)
    return stream is None or not stream.isatty()


def is_quick(size: int) -> bool:
    """Whether work on so many bytes ends before a line about its progress would be due, and no bar
    is shown.
    """
    return size < QUICK_BYTES and hides_progress()


def bottom_stream(stream: Any) -> Any:
    """The stream below those of ours that write to another one."""
    while isinstance(stream, EscapedStream):
        stream = stream.stream
    return stream


class EscapedStream:
    """A text stream that writes to another one with `escape_controls`, and what it can encode.

    It is no terminal for libraries that ask, because these would write colors.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        progress = PROGRESS.match(text)
        start = progress.end() if progress else 0
        safe = text[:start] + escape_controls(text[start:])
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """A context in which everything that is printed is escaped: output, errors, logs, warnings."""
    replaced = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, EscapedStream):
            replaced[name] = EscapedStream(stream)
            setattr(sys, name, replaced[name])
    try:
        yield
    finally:
        for name, escaped in replaced.items():
            if getattr(sys, name) is escaped:  # else it was closed, or replaced by a library
                setattr(sys, name, escaped.stream)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as Python keeps it in a file's name (PEP 383)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
