"""Libraries are silent in our programs: what they log below an error, their bars, their warnings.

What they say is about themselves: parts that they lack on this machine, arguments that they will
rename, how they load a file. Errors are raised as ever. `progress` shows how far loading is.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from lora_core.escaped_output import one_line

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


class Notice(UserWarning):
    """A warning of ours, which the programs show in our form."""


def silence_libraries() -> None:
    """Before the libraries are imported: no bars, and no logs below errors."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        hub.disable_progress_bars()  # of a program, or a gradio, that imported it before us
    for name in (*LOGGERS, "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
