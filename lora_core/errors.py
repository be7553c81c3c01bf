"""Errors that a user can fix, the exit status for them, and text that any output can encode."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress

from lora_core.escaped_output import escape_surrogates, escaped_output, one_line

CLOSED_PIPE = 128 + getattr(signal, "SIGPIPE", 13)  # as if SIGPIPE had ended the process
PRINTING = threading.Lock()  # held while the output of the process is taken
LONGEST_SENTENCE = 2_000  # characters: a damaged file's text in it would fill the screen


class UserError(ValueError):
    """One sentence that a user can act on: what was received, what was expected, what to do.

    Scripts print it and end with status 2. The middle of a sentence of more than LONGEST_SENTENCE
    characters is left out, and line feeds are written as \\n: a name in a stranger's file could
    end the sentence and begin another. `below` are further lines of ours.
    """

    def __init__(self, sentence: str, below: str = "") -> None:
        if len(sentence) > LONGEST_SENTENCE:
            half = LONGEST_SENTENCE // 2
            sentence = f"{sentence[:half]} ... {sentence[-half:]}"
        super().__init__(printable(one_line(sentence) + below))


def first_line(error: BaseException) -> str:
    """The first line of a library's error, without its full stop, for quoting in a UserError.

    The name of its class where it has no text.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def printable(text: object) -> str:
    r"""The text with bytes of file names that are not UTF-8 written as \xe9."""
    return escape_surrogates(str(text))


def print_help(show: Callable[[], object]) -> None:
    """Calls `show`, which prints a help page; quiet where the reader ends before it (| head)."""
    try:
        with suppress(SystemExit):  # tyro prints its help and ends the process
            show()
        _flush_output()
    except BrokenPipeError:
        _close_output()


@escaped_output()
def exit_status(run: Callable[[], int | None], undone: str = "nothing was saved") -> int:
    """Calls `run` and returns the status that the process ends with; what it prints is escaped.

    0: done; 2: a mistake, explained in one printed sentence; 128 + the number of the signal that
    ended it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, and 141, without a word, where the
    program that the output was piped to has ended.
    """
    try:
        return quiet_status(run)
    except UserError as error:
        print_error(f"error: {error}")
        return 2
    except OSError as error:  # a disk that is full or read-only, a file that is gone or not ours
        print_error(f"error: {printable(describe_disk_error(error))}; {undone}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error) and f" ({first_line(error).rpartition('Allocator: ')[2]})"
        print_error(f"error: there is not enough memory for this{reason}; {undone}")
        return 2
    except KeyboardInterrupt as stop:
        print_error(f"interrupted: {str(stop) or undone}")
        return 128 + getattr(stop, "number", signal.SIGINT)


def printed_by(run: Callable[[], object], undone: str = "nothing was written") -> str:
    """What `run` prints, on either stream; of a mistake the sentence that `exit_status` prints.

    For programs that show it elsewhere than on a terminal. It takes the output of the whole
    process, so that one thread waits for another.
    """

    def carry_out() -> None:
        run()

    with PRINTING, redirect_stdout(io.StringIO()) as box, redirect_stderr(box):
        exit_status(carry_out, undone)
    return box.getvalue().strip()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a GPU or the CPU, found no memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "DefaultCPUAllocator" in str(error)


def quiet_status(main: Callable[[], int | None]) -> int:
    """Calls the main function of a script and returns its status, None being 0.

    Where the program that the output is piped to ends first (| head) it is CLOSED_PIPE, and nothing
    is said.
    """
    try:
        try:
            return main() or 0
        finally:
            _flush_output()  # here, and not at exit, where an error could not be caught
    except BrokenPipeError:
        _close_output()
        return CLOSED_PIPE


def describe_disk_error(error: OSError) -> str:
    """The path and the reason of an error that the disk gave: "out.png: Permission denied"."""
    reason = error.strerror or first_line(error)
    return f"{os.fsdecode(error.filename)}: {reason}" if error.filename else reason


def _flush_output() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _close_output() -> None:
    """Keeps Python from writing to a closed pipe once more at exit."""
    sys.stdout = None


def print_error(text: str) -> None:
    """Prints a line on stderr; where nobody reads it (SIGHUP, 2>&1 | head) it is lost quietly."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = None  # at exit Python would write to it once more
