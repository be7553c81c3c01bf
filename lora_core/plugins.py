"""A user's own function or class, named as path/to/file.py:name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lora_core.errors import UserError


def from_file(path: str, name: str, what: str) -> Any:
    """What `name` is in the Python file `path`, which is run; `what` it should be ("function", "class") is said in errors.

    Raises UserError for a file that is not there, that raises when run, or that has nothing callable of that name.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"{path}:{name} names no Python file; expected path/to/file.py:{what}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no {what} {name!r}")
    return getattr(module, name)
