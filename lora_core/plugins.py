"""Functions and classes that options name: entries of tables, or path/to/file.py:name.

`find_plugin` finds losses, weightings, densities, adapter kinds, optimizers, schedules, samplers
and measures.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_core.errors import UserError, is_out_of_memory
from lora_core.text import suggest_name, unknown_name

# ---------------------------------------------------------------- finding


def find_plugin(
    spec: str,
    table: Mapping[str, Any],
    what: str,
    args: Mapping[str, Any] | None = None,
    *,
    noun: str = "function",
    given: int = 1,
) -> Any:
    """The entry `spec` of a table, or the function or class of "path/to/file.py:name", with `args`
    bound to it.

    `what` ("loss", "schedule" ...) and `noun` ("function", "class") are the words for it in errors,
    `given` the number of positional arguments that the program passes. Raises UserError for an
    unknown name (naming the nearest), a file or function that does not exist, a file that cannot be
    run, and arguments that the function does not take.
    """
    check_names_file(spec, what)
    path, colon, name = spec.rpartition(":")
    if colon:
        found = load_from_file(path, name, noun)
    elif spec in table:
        found = table[spec]
    else:
        raise UserError(unknown_name(spec, table, what, noun))
    return bind_arguments(found, f"{what} {spec}", args or {}, given=given)


def load_from_file(path: str, name: str, what: str) -> Any:
    """The function, class or other object `name` of the Python file `path`, which is run.

    `what` ("function", "class", "family") is the word for it in errors. Raises UserError for a file
    that is not there, that raises when run (with the line), or that has nothing of that name (with
    the nearest one).
    """
    if not Path(path).is_file():
        raise UserError(f"{path}:{name} names no Python file; expected path/to/file.py:{what}")
    file = os.path.abspath(path)
    try:
        module = _run_file(file, Path(path).read_bytes())
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"{path} cannot be run: {describe_error(error, file)}") from error
    if module is None:
        raise UserError(f"{path}:{name} names no Python file; expected path/to/file.py:{what}")
    found = getattr(module, name, None)
    if found is None or (what in ("function", "class") and not callable(found)):
        defined = [key for key, value in vars(module).items() if callable(value)]
        near = suggest_name(name, defined)
        raise UserError(f"{path} has no {what} {name!r}{near}")
    return found


@functools.lru_cache(maxsize=64)
def _run_file(path: str, content: bytes) -> ModuleType | None:
    """The module of a Python file; None for a file of another kind.

    A content is run once, so that its classes are the same objects everywhere. The module is found
    by its name, as dataclasses and torch.compile do, under one that no installed module has.
    """
    name = f"{Path(path).stem}_{zlib.crc32(path.encode() + content):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def describe_error(error: BaseException, source: str | Callable[..., Any]) -> str:
    """An error's class and text, with its line in a user's file; `source` is the file, or a
    function or class in it.
    """
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    file = source if isinstance(source, str) else source_file(source)
    line = line_in_file(error, file)
    return f"{text} ({_short_path(file)}, line {line})" if line else text


def line_in_file(error: BaseException, file: str) -> int:
    """The innermost line of a file in an error's traceback; 0 where it does not pass the file."""
    found = 0
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == file:
            found = line
    return found


@contextmanager
def explain_errors(owner: str, function: Callable[..., Any]) -> Iterator[None]:
    """A context in which an error in a function's file is a UserError with its line."""
    try:
        yield
    except Exception as error:
        is_known = isinstance(error, UserError) or is_out_of_memory(error)
        if is_known or not line_in_file(error, source_file(function)):
            raise
        raise UserError(f"{owner} fails: {describe_error(error, function)}") from error


def source_file(function: Callable[..., Any]) -> str:
    """The file that defines a function or class; empty for one that no Python file defines.

    Of a function that wraps another (`__wrapped__`, functools.partial) it is that of the other.
    """
    inner: Any = function
    while isinstance(inner, functools.partial) or hasattr(inner, "__wrapped__"):
        inner = inner.func if isinstance(inner, functools.partial) else inner.__wrapped__
    members = list(vars(inner).values()) if isinstance(inner, type) else [inner]
    codes = [code for member in members if (code := getattr(member, "__code__", None))]
    return str(codes[0].co_filename) if codes else ""


def check_call(function: Callable[..., Any], owner: str, form: str, *given: str) -> None:
    """Raises UserError unless a function can be called with the arguments that the program gives.

    `form` shows the call ("fn(step)"), `given` has a text for each positional argument.
    """
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        raise UserError(f"{owner} is called as {form}, and cannot be: {error}") from error


# ---------------------------------------------------------------- arguments


def bind_arguments(function: Any, owner: str, args: Mapping[str, Any], *, given: int = 1) -> Any:
    """`function` with `args` bound to it; a partial function also gets its function's attributes.

    Raises UserError as `check_arguments` does; the first `given` parameters are the program's.
    """
    if isinstance(function, functools.partial):  # one that the user has bound
        vars(function).update({**vars(function.func), **vars(function)})
    if not args:
        return function
    names = list(inspect.signature(function).parameters) if function else []
    check_arguments(function, args, owner, given=names[:given])
    bound = functools.partial(function, **args)
    vars(bound).update(vars(function))  # capturable, reads_attention
    return bound


def check_arguments(
    function: Callable[..., Any] | None,
    args: Mapping[str, Any],
    owner: str,
    *,
    given: Collection[str] = (),
) -> None:
    """Raises UserError for the first of `args` that a function or class does not take, with the
    nearest name, and for a text where its default is a number or true or false.

    `given` are the arguments that the program itself passes. None takes no arguments.
    """
    parameters = inspect.signature(function).parameters if function else {}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = []
    for name, parameter in parameters.items():
        if name not in given and parameter.kind in _KEYWORDS:
            known.append(name)
    for name, value in args.items():
        listed = ", ".join(known) or "none"
        if name in given:
            raise UserError(
                f"{owner} takes no argument {name!r} to set here: the program gives it (look for "
                f"an option of that name); it takes {listed}"
            )
        if name not in known:
            if takes_any:
                continue
            near = suggest_name(name, known)
            raise UserError(f"{owner} takes no argument {name!r}; it takes {listed}{near}")
        default = parameters[name].default
        if type(default) in (int, float) and isinstance(value, str):
            raise UserError(f"argument {name} of {owner} is {value!r}, expected a number")
        if type(default) is bool and not isinstance(value, bool):
            raise UserError(f"argument {name} of {owner} is {value!r}, expected true or false")


_KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


# ---------------------------------------------------------------- names, for configs


def name_and_arguments(
    function: Callable[..., Any], table: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """(name, arguments) with which `find_plugin` finds a function again.

    For a function that is in no file the name is in "<...>", which `find_plugin` refuses. Arguments
    bound by name with functools.partial are included, if a config can hold them.
    """
    inner: Any = function
    if isinstance(function, functools.partial):
        values = function.keywords.values()
        is_plain = all(isinstance(value, bool | int | float | str) for value in values)
        if is_plain and not function.args:
            inner = function.func
    name = name_function(inner, table)
    if inner is function or name.startswith("<"):
        return name, {}
    return name, dict(function.keywords)  # type: ignore[attr-defined]


def name_function(fn: Callable[..., Any], table: Mapping[str, Any] | None = None) -> str:
    """How a config names a function: its key in `table`, or "path/to/file.py:name".

    The path is relative to the working folder where the file is inside it. A function that cannot
    be loaded from a file by name gives a description in "<...>", which `find_plugin` refuses.
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
