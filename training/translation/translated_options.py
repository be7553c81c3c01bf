"""What became of each option of another tool's config or command line, and the table of it.

record = TranslatedOptions("kohya", {"network_dim": 4, "xformers": False}, {"network_dim": 32})
record.take("network_dim", {"adapter.rank": record["network_dim"]})
record.ignore("xformers", "attention always uses torch's SDPA")
config = record.to_config(Config)      # after a check that every given option has an entry
print(record.format_table())
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, TypeVar

from lora_core.errors import UserError, printable
from lora_core.text import nearest_hint
from lora_core.toml import from_table

C = TypeVar("C")

Outcome = Literal["taken", "changed", "left out", "ignored"]
HEADINGS: dict[Outcome, str] = {  # in the order of the table
    "taken": "taken",
    "changed": "changed",
    "left out": "cannot be taken",
    "ignored": "without effect on the result here",
}
WIDTHS = (36, 33, 25)  # columns of the table; with what stands between them at most 100
SEPARATOR = " | "
INDENT = "  "  # of the further lines of a cell
PARTS = re.compile(r"(?<=[/._])(?!\d)")  # where a long word is broken; numbers stay whole


class TranslatedOption(NamedTuple):
    """One line of the table: an option of the other tool and what it became."""

    name: str  # as the other tool spells it
    value: Any
    outcome: Outcome
    ours: dict[str, Any]  # dotted name -> value of each of our options that it sets
    remark: str
    is_default: bool  # not given: the other tool's own default

    @property
    def is_unset(self) -> bool:
        """Whether it was taken as it is by default, without a value, and sets nothing here."""
        is_bare = self.is_default and self.value is None and not self.ours
        return is_bare and self.outcome == "taken"


class TranslatedOptions:
    """The options of another tool, given or its defaults, and what became of them.

    `defaults` has every option that the tool knows, with the value that it has when it is not
    given; None where there is none. Raises UserError for a given option that is not among them,
    which names the nearest. `spell` writes a name as users type it: "--{}" for flags.
    """

    def __init__(
        self, tool: str, defaults: Mapping[str, Any], given: Mapping[str, Any], *, spell: str = "{}"
    ) -> None:
        self.tool, self.defaults, self.given, self.spell = tool, defaults, given, spell
        self.entries: list[TranslatedOption] = []
        for name in given:
            if name not in defaults:
                near = nearest_hint(name, defaults, f"; the nearest is {spell}")
                raise UserError(
                    f"{spell.format(name)} is no option of {tool}{near}: correct it or leave it out"
                )

    def __getitem__(self, name: str) -> Any:
        """The value of an option: as given, else the tool's default."""
        return self.given[name] if name in self.given else self.defaults[name]

    def is_given(self, name: str) -> bool:
        """Whether the user gave the option."""
        return name in self.given

    def take(self, name: str, ours: Mapping[str, Any], remark: str = "") -> None:
        """Record that an option of ours with the same meaning takes the value.

        `ours`: dotted name, such as optimizer.lr.denoiser or stages.0.steps -> value. Later entries
        win over earlier ones. A default that nobody gave is in the table, too.
        """
        self._add(name, "taken", ours, remark)

    def change(self, name: str, ours: Mapping[str, Any], remark: str) -> None:
        """Record that ours differs in meaning or value, and why."""
        self._add(name, "changed", ours, remark)

    def leave_out(self, name: str, remark: str) -> None:
        """Record that it cannot be taken: why, and what to do instead. The run goes on without."""
        self._add(name, "left out", {}, remark)

    def ignore(self, name: str, remark: str) -> None:
        """Record an option that has no effect on the result here, with the reason."""
        self._add(name, "ignored", {}, remark)

    def refuse(self, name: str, reason: str) -> UserError:
        """The error for an option without which the run would be another one; to be raised."""
        return UserError(f"{self._spelled(name, self[name])} of {self.tool}: {reason}")

    def _add(self, name: str, outcome: Outcome, ours: Mapping[str, Any], remark: str) -> None:
        default = name not in self.given
        entry = TranslatedOption(name, self[name], outcome, dict(ours), remark, default)
        self.entries.append(entry)

    def check_complete(self) -> None:
        """Raises ValueError for a given option without an entry: a gap in the translation."""
        told = {entry.name for entry in self.entries}
        missing = [name for name in self.given if name not in told]
        if missing:
            raise ValueError(f"nothing was recorded for {', '.join(missing)} of {self.tool}")

    @property
    def options(self) -> dict[str, Any]:
        """Dotted name -> value, of all our options that are set."""
        options: dict[str, Any] = {}
        for entry in self.entries:
            options |= entry.ours
        return options

    def to_config(self, cls: type[C]) -> C:
        """The config of these options. Raises UserError for values of a wrong type."""
        self.check_complete()
        return from_table(nest_options(self.options), cls)

    def format_table(self) -> str:
        """The table: theirs = value | ours = value | remark, at most 100 columns.

        Taken options first, then changed ones, those that cannot be taken, and those without effect
        here; in each the given ones before the tool's defaults, which are marked; those without a
        value that set nothing here are left out. The value of an option with several rows is in the
        first of them.
        """
        lines = _format_row(self.tool, "here", "remark")
        shown: set[str] = set()
        for outcome, heading in HEADINGS.items():
            entries = [entry for entry in self.entries if entry.outcome == outcome]
            entries = [entry for entry in entries if not entry.is_unset]
            if entries:
                lines += ["", f"{heading}:", "-" * len(heading)]
            for entry in sorted(entries, key=lambda entry: entry.is_default):
                remark = entry.remark
                if entry.is_default:
                    remark = f"default of {self.tool}" + (f"; {remark}" if remark else "")
                ours = "\n".join(f"{n} = {show_value(v)}" for n, v in entry.ours.items())
                theirs = self._spelled(entry.name, entry.value)
                if entry.name in shown:
                    theirs = f"{self.spell.format(entry.name)} = ..."
                shown.add(entry.name)
                lines += _format_row(theirs, ours, remark)
        return printable("\n".join(lines))

    def _spelled(self, name: str, value: Any) -> str:
        spelled = self.spell.format(name)
        return f"{spelled} (not given)" if value is None else f"{spelled} = {show_value(value)}"


def nest_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a TOML file nests them: {"stages.0.steps": 5} is {"stages": [{"steps": 5}]}.

    Numbers in a name must count from 0 without a gap.
    """
    table: dict[str, Any] = {}
    for name, value in options.items():
        *sections, last = name.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return _number_lists(table)


def _number_lists(table: dict[str, Any]) -> Any:
    inner = {}
    for name, value in table.items():
        inner[name] = _number_lists(value) if isinstance(value, dict) else value
    if inner and all(name.isdigit() for name in inner):
        return [inner[str(number)] for number in range(len(inner))]
    return inner


def show_value(value: Any) -> str:
    """A value as the table shows it: true, 1e-4, "a text", [1, 2], {a = 1}, none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str | PurePath):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {show_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Iterable):
        return "[" + ", ".join(map(show_value, value)) + "]"
    return str(value)


def wrap_words(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` characters, broken between words; a word that is longer
    than a line is broken behind / . and _.
    """
    room = width - len(INDENT)
    lines = [""]
    for word in text.split():
        parts = [word] if len(word) <= room else _split_word(word, room)
        for number, part in enumerate(parts):
            gap = " " if number == 0 and lines[-1].strip() else ""
            if len(lines[-1]) + len(gap) + len(part) <= width:
                lines[-1] += gap + part
            elif lines == [""]:
                lines = [part]
            else:
                lines.append(INDENT + part)
    return lines


def _split_word(word: str, room: int) -> list[str]:
    """The parts of a word, each of at most `room` characters."""
    parts = []
    for part in PARTS.split(word):
        parts += [part[start : start + room] for start in range(0, len(part), room)]
    return parts


def _format_row(*cells: str) -> list[str]:
    """The lines of a row, whose cells are wrapped to the widths of their columns."""
    columns = []
    for cell, width in zip(cells, WIDTHS, strict=True):
        wrapped: list[str] = []
        for line in cell.split("\n"):
            wrapped += wrap_words(line, width)
        columns.append(wrapped)
    height = max(map(len, columns))
    lines = []
    for number in range(height):
        parts = [column[number] if number < len(column) else "" for column in columns]
        padded = [part.ljust(width) for part, width in zip(parts, WIDTHS, strict=True)]
        lines.append(SEPARATOR.join(padded).rstrip())
    return lines
