"""The table of merge.py's commands, and the one place that calls the file of a command.

Nothing here imports torch: the file of a command is imported when it runs.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from merging import options


class Command(NamedTuple):
    """A command of merge.py. The file merging/NAME.py carries it out, by its function run_NAME."""

    options: type  # the dataclass of its flags
    required: tuple[str, ...]  # fields that a command line has to give
    example: str  # words after its name
    words: str = ""  # the field that takes any number of words


EXAMPLE_SUM = '"0.7*a.safetensors + 0.3*b.safetensors@attn"'
COMMANDS = {
    "mix": Command(options.Mix, ("sum",), f"{EXAMPLE_SUM} --out c.safetensors --rank 16"),
    "fold": Command(
        options.Fold, ("base", "sum", "out"), 'toy/model "0.8*runs/demo" merged.safetensors'
    ),
    "add": Command(options.Add, (), "toy/model a.safetensors merged 0.8 --mode upl", words="words"),
    "distill": Command(
        options.Distill, ("base", "tuned", "out"), "base tuned a.safetensors --rank 16"
    ),
    "resize": Command(
        options.Resize, ("file", "out"), "big.safetensors small.safetensors --energy 0.99"
    ),
    "convert": Command(options.Convert, ("file", "out"), "a.safetensors b.safetensors --to kohya"),
    "info": Command(options.Info, ("file",), "a.safetensors --plot spectrum.png"),
    "diff": Command(options.Diff, ("first", "second"), "a.safetensors b.safetensors --top 20"),
    "explain": Command(
        options.Explain, ("checkpoint", "base", "loras"), "tuned base a.safetensors", words="loras"
    ),
    "redo": Command(options.Redo, ("file",), "c.safetensors"),
}


def run_command(name: str, chosen: Any) -> None:
    """Carries out a command with an instance of its options. Raises UserError."""
    module = importlib.import_module(f"merging.{name}")
    getattr(module, f"run_{name}")(chosen)
