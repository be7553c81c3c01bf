"""A user's own function or class, named as path/to/file.py:name."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_core.errors import UserError


def load_from_file(path: str, name: str, what: str) -> Any:
    """What `name` is in the Python file `path`, which is run; `what` it should be ("function", "class") is said in errors.

    Raises UserError for a file that is not there, that raises when run, or that has nothing callable of that name.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}:{name} names no Python file; expected path/to/file.py:{what}")
    try:
        module = _run(os.path.abspath(path), Path(path).read_bytes())
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if module is None:
        raise UserError(f"{path}:{name} names no Python file; expected path/to/file.py:{what}")
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no {what} {name!r}")
    return getattr(module, name)


@functools.lru_cache(maxsize=64)
def _run(path: str, content: bytes) -> ModuleType | None:
    """The module of a Python file, run once for each content, so that its classes are the same wherever they are asked for; None for no Python."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_function(fn: Callable[..., Any], table: Mapping[str, Any] | None = None) -> str:
    """How a config names a function: its row of `table`, "path/to/file.py:name", or in "<...>" what it is, where no file gives it back by name.

    The path is relative to the working folder where the file is inside it.
    """
    if row := next((name for name, value in (table or {}).items() if value is fn), ""):
        return row
    name, scope = getattr(fn, "__name__", ""), getattr(inspect.unwrap(fn), "__globals__", {})
    file = str(scope.get("__file__") or "")
    if scope.get(name) is fn and scope.get("__name__") != "__main__" and file.endswith(".py"):
        return f"{_short(file)}:{name}"
    what = getattr(fn, "__qualname__", "") or f"{type(fn).__name__} object"
    what = what.replace("<lambda>", "lambda").replace("<locals>.", "")
    return f"<{what} of {_short(file) if file else scope.get('__name__') or type(fn).__module__}>"


def load_function(spec: str, option: str) -> Any:
    """The function that `spec`, "path/to/file.py:name", names. Raises UserError where only the Python program that ran it has the function."""
    check_names_file(spec, option)
    path, _, name = spec.rpartition(":")
    return load_from_file(path, name, "function")


def check_names_file(spec: str, option: str) -> None:
    """Raises UserError for what `file_and_name` wrote of a function that no file gives back."""
    if spec.startswith("<"):
        raise UserError(
            f"--{option} is {spec}, which was handed over in Python and which no file gives back; "
            f"call train(config, {option}=...) again, or put it into a file and give --{option} path/to/file.py:function"
        )


def _short(file: str) -> str:
    """The path from the working folder, where the file is inside it, else the whole one."""
    path = Path(os.path.abspath(file))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
