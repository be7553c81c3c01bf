"""Errors that a user can fix, the exit status for them, and text that any output can encode."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

LONGEST_SENTENCE = 2_000  # characters: a damaged file's text in it would fill the screen


class UserError(ValueError):
    """One sentence that a user can act on: what was received, what was expected, what to do.

    Scripts print it and end with status 2. The middle of a sentence of more than LONGEST_SENTENCE
    characters is left out.
    """

    def __init__(self, sentence: str) -> None:
        if len(sentence) > LONGEST_SENTENCE:
            half = LONGEST_SENTENCE // 2
            sentence = f"{sentence[:half]} ... {sentence[-half:]}"
        super().__init__(printable(sentence))


def first_line(error: BaseException) -> str:
    """The first line of a library's error, without its full stop, for quoting in a UserError.

    The name of its class where it has no text.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def printable(text: object) -> str:
    r"""The text with bytes of file names that are not UTF-8 written as \xe9."""
    name = str(text)
    try:
        name.encode()
    except UnicodeEncodeError:
        return "".join(map(_escape_surrogate, name))
    return name


def _escape_surrogate(character: str) -> str:
    r"""A lone surrogate as the byte that it encodes (PEP 383), else as \ud800.

    Other characters are returned unchanged.
    """
    code = ord(character)
    if not 0xD800 <= code <= 0xDFFF:
        return character
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def print_help(show: Callable[[], object]) -> None:
    """Calls `show`, which prints a help page; quiet where the reader ends before it (| head)."""
    try:
        with suppress(SystemExit):  # tyro prints its help and ends the process
            show()
        _flush_output()
    except BrokenPipeError:
        sys.stdout = None  # at exit Python would write to it once more


def describe_disk_error(error: OSError) -> str:
    """The path and the reason of an error that the disk gave: "out.png: Permission denied"."""
    reason = error.strerror or first_line(error)
    return f"{os.fsdecode(error.filename)}: {reason}" if error.filename else reason


def _flush_output() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def exit_status(run: Callable[[], None], undone: str = "nothing was saved") -> int:
    """Calls `run` and returns the status that the process ends with.

    0: done; 2: a mistake, explained in one printed sentence; 128 + the number of the signal that
    ended it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    try:
        run()
        _flush_output()  # here, and not at exit, where an error could not be caught
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stdout = None  # at exit Python would write to it once more
        with suppress(OSError):
            print(
                "error: the program that this output was piped to has ended (| head?); "
                "write the output to a file",
                file=sys.stderr,
            )
        return 2
    except OSError as error:  # a disk that is full or read-only, a file that is gone or not ours
        print(f"error: {printable(describe_disk_error(error))}; {undone}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"error: there is not enough memory for this; {undone}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # SIGHUP: the terminal is gone
            print(f"interrupted: {str(stop) or undone}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 0
