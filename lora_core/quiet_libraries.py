"""Libraries are silent in our programs: what they log below an error, their bars, their warnings.

What they say is about themselves: parts that they lack on this machine, arguments that they will
rename, how they load a file. Errors are raised as ever. `progress` shows how far loading is.
"""

from __future__ import annotations

import sys
import warnings

from lora_core.escaped_output import one_line, silence_libraries


class Notice(UserWarning):
    """A warning of ours, which the programs show in our form."""


def speak_alone() -> None:
    """In a program: the libraries are silent, and a warning of ours is a line of ours.

    Python's own switches, -W and PYTHONWARNINGS, show the libraries' warnings again.
    """
    silence_libraries()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", Notice)


def _show_warning(message: object, category: type, filename: str, *more: object) -> None:
    """One line: ours without the place in our code, which tells a user nothing."""
    place = "" if issubclass(category, Notice) else f" ({category.__name__}, {filename})"
    print(f"warning: {one_line(str(message))}{place}", file=sys.stderr)
