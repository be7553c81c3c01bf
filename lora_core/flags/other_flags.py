"""The answer to a flag of another tool: a sentence with our flag, and the user's value in it.

Nothing here imports torch: a script asks before it does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from lora_core.errors import UserError
from lora_core.flags.flag_values import OtherFlag
from lora_core.text import is_number

FALSE = ("false", "0", "no")  # of a switch that takes a value in other tools
VALUE = "VALUE"  # stands for a value that was not given, or that does not carry over
MOST_WORDS = 40  # of a value that is quoted


def refuse_other_flags(
    words: Sequence[str], table: Sequence[OtherFlag], own: Collection[str]
) -> None:
    """Raises UserError where some words are flags of other tools, with a line for each of them.

    `own` are the names of our flags, which are no one else's: batch_size, with _ for -.
    """
    rows: dict[str, OtherFlag] = {}
    for row in table:
        rows |= dict.fromkeys(row.names.split(), row)
    sentences = []
    for flag, values in split_flags(words):
        name = flag.removeprefix("--").replace("-", "_")
        if name in rows and name not in own:
            sentences.append(explain_flag(flag, values, rows[name]))
    if sentences:
        first, *others = dict.fromkeys(sentences)
        raise UserError(first, "".join(f"\n       {sentence}" for sentence in others))


def split_flags(words: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(flag, its values) of a command line; a value may stand behind = or in the next words."""
    flag = ""
    values: list[str] = []
    for word in words:
        if word.startswith("-") and len(word) > 1 and not is_number(word):
            if flag:
                yield flag, tuple(values)
            flag, equals, value = word.partition("=")
            values = [value] if equals else []
        else:
            values.append(word)
    if flag:
        yield flag, tuple(values)


def explain_flag(flag: str, values: Sequence[str], row: OtherFlag) -> str:
    """The sentence about one flag: whose name it is, and what to write here."""
    *others, last = [tool + ("'" if tool.endswith("s") else "'s") for tool in row.tools]
    whose = f"{', '.join(others)} and {last}" if others else last
    start = f"{flag} is {whose} name"
    if not row.here:
        return f"{start}; {row.remark}"
    takes_value = "{}" in row.here
    if not takes_value and values and values[0].lower() in FALSE:
        return f"{start}; leave it out for {values[0]}, or write {row.here} for True"
    value = row.read(values[:MOST_WORDS]) if takes_value and values else ""
    return f"{start}; here it is {row.here.replace('{}', value or VALUE)}" + (
        f" ({row.remark})" if row.remark else ""
    )
