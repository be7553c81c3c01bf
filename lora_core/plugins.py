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
    """The function or class `name` of the Python file `path`, which is run.

    `what` ("function", "class") is the word for it in errors. Raises UserError for a file that is
    not there, that raises when run, or that has nothing callable of that name.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}:{name} names no Python file; expected path/to/file.py:{what}")
    try:
        module = _run_file(os.path.abspath(path), Path(path).read_bytes())
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if module is None:
        raise UserError(f"{path}:{name} names no Python file; expected path/to/file.py:{what}")
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path} has no {what} {name!r}")
    return getattr(module, name)


@functools.lru_cache(maxsize=64)
def _run_file(path: str, content: bytes) -> ModuleType | None:
    """The module of a Python file; None for a file of another kind.

    A content is run once, so that its classes are the same objects everywhere.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_function(fn: Callable[..., Any], table: Mapping[str, Any] | None = None) -> str:
    """How a config names a function: its key in `table`, or "path/to/file.py:name".

    The path is relative to the working folder where the file is inside it. A function that cannot
    be loaded from a file by name gives a description in "<...>", which `load_function` refuses.
    """
    for key, value in (table or {}).items():
        if value is fn:
            return key
    name = getattr(fn, "__name__", "")
    scope = getattr(inspect.unwrap(fn), "__globals__", {})
    file = str(scope.get("__file__") or "")
    if scope.get(name) is fn and scope.get("__name__") != "__main__" and file.endswith(".py"):
        return f"{_short_path(file)}:{name}"
    what = getattr(fn, "__qualname__", "") or f"{type(fn).__name__} object"
    what = what.replace("<lambda>", "lambda").replace("<locals>.", "")
    module = scope.get("__name__") or type(fn).__module__
    return f"<{what} of {_short_path(file) if file else module}>"


def function_name(function: Callable[..., Any]) -> str:
    """The name of a loss or a step in error messages."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def load_function(spec: str, option: str) -> Any:
    """The function of a "path/to/file.py:name".

    Raises UserError where the function existed only in the Python program that ran it.
    """
    check_names_file(spec, option)
    path, _, name = spec.rpartition(":")
    return load_from_file(path, name, "function")


def check_names_file(spec: str, option: str) -> None:
    """Raises UserError for a description in "<...>" (see `name_function`), which names no file."""
    if spec.startswith("<"):
        raise UserError(
            f"--{option} is {spec}, which was passed in Python and is in no file; "
            f"call train(config, {option}=...) again, or put it into a file and give --{option} "
            "path/to/file.py:function"
        )


def _short_path(file: str) -> str:
    """The path from the working folder, where the file is inside it, else the whole one."""
    path = Path(os.path.abspath(file))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
