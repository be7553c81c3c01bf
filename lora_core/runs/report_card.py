"""The sections of a run's model card (README.md) that a page shows: trigger words, files, and the
lines that load them. The small part of Markdown that card_template.md uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

FILES = "Files"
LEFT_OUT = ("Training",)  # the page itself has these in full
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
EMPHASIS = re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])")
CODE = re.compile(r"(`+)(.+?)\1")


class Words(NamedTuple):
    """A part of a line."""

    text: str
    is_code: bool


class Block(NamedTuple):
    """A part of a section: code, a list's item, a table's row, or a paragraph."""

    kind: str  # code, item, row, text
    code: str = ""
    cells: tuple[tuple[Words, ...], ...] = ()  # of a row; else one


class CardSection(NamedTuple):
    """A section of a model card."""

    title: str
    blocks: tuple[Block, ...]


def card_sections(card: str) -> list[CardSection]:
    """The sections of a model card, without its front matter, its head and LEFT_OUT."""
    sections = []
    for part in re.split(r"^## ", _without_front_matter(card), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        blocks = tuple(_read_blocks(body))
        if blocks and title.strip() not in LEFT_OUT:
            sections.append(CardSection(title.strip(), blocks))
    return sections


def describe_files(card: str) -> dict[str, tuple[Words, ...]]:
    """Name -> description, of the files that a model card lists."""
    found = {}
    sections = [section for section in card_sections(card) if section.title == FILES]
    blocks = chain.from_iterable(section.blocks for section in sections)
    for block in blocks:
        if block.kind == "item" and block.cells[0]:
            first, *others = block.cells[0]
            name, colon, rest = first.text.partition(": ")
            if colon:
                found[name] = (Words(rest, False), *others)
    return found


def _without_front_matter(card: str) -> str:
    if card.startswith("---\n") and "\n---\n" in card:
        return card.split("\n---\n", 1)[1]
    return card


def _read_blocks(body: str) -> Iterator[Block]:
    code: list[str] | None = None
    for line in body.split("\n"):
        if code is not None:
            if line.startswith("```"):
                yield Block("code", "\n".join(code))
                code = None
            else:
                code.append(line)
        elif line.startswith("```"):
            code = []
        elif line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            if not all(re.fullmatch(r"[\s:-]*", cell) for cell in cells):
                yield Block("row", cells=tuple(_read_words(cell) for cell in cells))
        elif line.startswith("- "):
            yield Block("item", cells=(_read_words(line[2:]),))
        elif line.strip():
            yield Block("text", cells=(_read_words(line),))
    if code:
        yield Block("code", "\n".join(code))


def _read_words(text: str) -> tuple[Words, ...]:
    """The line without links and with its code marked."""
    text = LINK.sub(r"\1", text.strip()).replace("\\|", "|")
    words = []
    end = 0
    for found in CODE.finditer(text):
        words += [_plain_words(text[end : found.start()]), Words(found[2].strip(), True)]
        end = found.end()
    return tuple(word for word in [*words, _plain_words(text[end:])] if word.text)


def _plain_words(text: str) -> Words:
    return Words(EMPHASIS.sub(r"\1", text), False)
