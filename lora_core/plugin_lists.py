"""`--list`: the entries of the tables that options choose from, each with a sentence of help.

The sentences are the first of the docstrings, read from the source files, so that nothing here
imports torch.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from lora_core.errors import UserError, exit_status
from lora_core.text import unknown_name

LIST_FLAG = "--list"
ROOT = Path(__file__).parent.parent
WIDTH = 80
NO_FUNCTION = "without one (the default)."
# The end of a sentence; not the point of "eq. 14" or "e.g. this".
SENTENCE_END = re.compile(r"(?<!\beq)(?<!e\.g)[.:]\s+(?=[A-Z`])|:?\s*$")
SHAPE = re.compile(r"^\[[a-z, ]+\] ")  # of the value, at the beginning of a docstring


class ListedTable(NamedTuple):
    """A table that options choose from."""

    module: str
    table: str
    choice: str  # how an entry is chosen
    own: str  # how one of your own is; empty: in no file
    arguments: str = ""  # the option with an entry's arguments


LISTED_TABLES = {
    "losses": ListedTable(
        "lora_core.diffusion.losses",
        "LOSSES",
        "--loss",
        "my_loss.py:fn, with fn(step: StepOutput) -> [b]",
        "--loss-arg",
    ),
    "weightings": ListedTable(
        "lora_core.diffusion.losses",
        "WEIGHTINGS",
        "--weighting",
        "my_weighting.py:fn, with fn(snr [b]) -> [b]",
        "--weighting-arg",
    ),
    "densities": ListedTable(
        "lora_core.diffusion.densities",
        "DENSITIES",
        "--noise.density",
        "my_density.py:fn, with fn(u [b]) -> [b], both in 0..1",
        "--noise.density-args",
    ),
    "kinds": ListedTable(
        "lora_core.adapters.kinds",
        "KINDS",
        "--adapter.kind",
        "my_adapter.py:Class, an nn.Module (lora_core/adapters/kinds.py)",
    ),
    "optimizers": ListedTable(
        "lora_core.optim.building",
        "OPTIMIZERS",
        "--optimizer.name",
        "my_optimizer.py:Class or an installed package.Class",
        "--optimizer.args",
    ),
    "schedules": ListedTable(
        "lora_core.optim.schedules",
        "SCHEDULES",
        "--optimizer.schedule",
        "my_schedule.py:fn, with fn(step, steps) -> factor of the rate",
        "--optimizer.schedule-args",
    ),
    "samplers": ListedTable(
        "lora_core.diffusion.sampling",
        "SAMPLERS",
        "--samples.sampler, infer.py --sampler",
        "my_sampler.py:fn, with fn(denoise, x, levels) -> x",
        "--samples.sampler-args, --sampler-args",
    ),
    "metrics": ListedTable(
        "training.comparisons.measures",
        "MEASURES",
        "train.py --compare --metric; also loss (recorded), clip:MODEL",
        "my_metric.py:fn, with fn(step) -> [b] or fn(images, prompts) -> [n]",
        "--metric-arg",
    ),
    "formats": ListedTable(
        "lora_core.formats.known_formats", "FORMATS", "merge.py convert --to", ""
    ),
    "kernels": ListedTable(
        "lora_core.kernels",
        "OPS",
        "benchmarks.kernels --op",
        "LORA_CANDIDATE=my_kernel.py:fn, with the arguments of the op",
    ),
}


class Entry(NamedTuple):
    """An entry of a table, with its sentence of help and its arguments as text."""

    name: str
    sentence: str
    arguments: tuple[str, ...]


def answer_list(words: Sequence[str]) -> None:
    """Prints the list and exits where the words begin with --list; else returns.

    A script calls it before it imports torch, which takes seconds.
    """
    if list(words[:1]) == [LIST_FLAG]:
        sys.exit(exit_status(partial(print_list, words[1:])))


def print_list(names: Sequence[str]) -> None:
    """Print the named tables, or what can be listed. Raises UserError for an unknown name."""
    if not names:
        print("--list takes one or more of these, or all:\n")
        width = max(map(len, LISTED_TABLES))
        for name, table in LISTED_TABLES.items():
            print(f"  {name:{width}}  {table.choice}")
        return
    chosen = list(LISTED_TABLES) if list(names) == ["all"] else list(names)
    for name in chosen:
        if name not in LISTED_TABLES:
            sentence = unknown_name(name, [*LISTED_TABLES, "all"], "list").rpartition(" or ")[0]
            raise UserError(sentence)
    print("\n\n".join(map(describe_table, chosen)))


def describe_table(name: str) -> str:
    """The text of one table in at most 80 columns."""
    table = LISTED_TABLES[name]
    lines = [f"{name}: {table.choice}"]
    for label, text in (("yours", table.own), ("arguments", table.arguments)):
        if text:
            end = " KEY=VALUE, defaults after >" if label == "arguments" else ""
            lines.append(f"  {label}: {text}{end}")
    entries = list_entries(table.module, table.table)
    indent = " " * (max(len(entry.name) for entry in entries) + 4)
    lines.append("")
    for entry in entries:
        head = f"  {entry.name}".ljust(len(indent))
        lines.append(
            textwrap.fill(
                entry.sentence, WIDTH, initial_indent=head, subsequent_indent=indent,
                break_on_hyphens=False,
            )
        )  # fmt: skip
        if entry.arguments:
            words = " ".join(entry.arguments)
            lines.append(
                textwrap.fill(
                    words, WIDTH, initial_indent=f"{indent}> ", subsequent_indent=f"{indent}  ",
                    break_on_hyphens=False,
                )
            )  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------- reading the source


def list_entries(module: str, table: str) -> list[Entry]:
    """The entries of the table of that name in a module's source."""
    found = []
    for name, value, place in _table_items(module, table):
        while isinstance(value, ast.Call):  # a row, such as Sampler(ddim, ...)
            value = value.args[0]
        found.append(_describe_entry(name, value, place))
    return found


def _describe_entry(name: str, value: ast.expr, module: str) -> Entry:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):  # a module beside this one
        text = ast.get_docstring(_parse_module(f"{module.rpartition('.')[0]}.{value.value}"))
        return Entry(name, first_sentence(text or ""), ())
    if isinstance(value, ast.Constant):
        return Entry(name, NO_FUNCTION, ())
    definition = _find_definition(ast.unparse(value), module)
    text = first_sentence(ast.get_docstring(definition) or "")
    arguments: list[str] = []
    if isinstance(definition, ast.FunctionDef):
        arguments = list(_arguments(definition.args))
    return Entry(name, text, tuple(arguments))


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, without the shape of the value, with a full stop."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.start()] if end else paragraph
    sentence = SHAPE.sub("", sentence)
    return sentence.rstrip(".") + "."


def _arguments(args: ast.arguments) -> Iterator[str]:
    """NAME=DEFAULT of the arguments that a user may set: those with a plain default."""
    given = args.args[len(args.args) - len(args.defaults) :] if args.defaults else []
    for arg, default in zip([*given, *args.kwonlyargs], [*args.defaults, *args.kw_defaults]):
        if isinstance(default, ast.Constant) and default.value is not None:
            yield f"{arg.arg}={ast.unparse(default)}"


@cache
def _parse_module(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _table_items(module: str, table: str) -> list[tuple[str, ast.expr, str]]:
    """(name, value, its module) of TABLE = {name: value, **OTHER} or TABLE.update(name=value)."""
    items: list[tuple[str, ast.expr, str]] = []
    for node in _parse_module(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if ast.unparse(targets[0]) == table:
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if key is None:  # ** of another module's table
                        items += _table_items(*_find_place(ast.unparse(value), module))
                    else:
                        items.append((ast.literal_eval(key), value, module))
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{table}.update":
            for keyword in call.keywords:
                items.append((str(keyword.arg), keyword.value, module))
    return items


def _find_place(name: str, module: str) -> tuple[str, str]:
    """(module, name there) of what a module imports and calls `name`, such as losses.LOSSES."""
    first, _, rest = name.partition(".")
    for node in _parse_module(module).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                if (alias.asname or alias.name) == first:
                    inner = f"{node.module}.{alias.name}"
                    return (inner, rest) if rest else (node.module, alias.name)
    raise KeyError(f"{module} has no {name}")


def _find_definition(name: str, module: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class that a module calls `name`, wherever it is defined."""
    for node in _parse_module(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    place, own_name = _find_place(name, module)
    return _find_definition(own_name, place)
