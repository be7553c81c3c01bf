"""The file of learned tokens that belongs to a LoRA file: NAME_emb.safetensors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_core.errors import UserError
from lora_core.formats.cloneofsimo import EMBED
from lora_core.formats.embeddings import PLACEHOLDERS
from lora_core.formats.known_formats import (
    CUSTOM,
    EMBEDDINGS,
    NATIVE,
    TOKEN_NAMES,
    folder_file_stem,
    run_file_names,
)
from lora_core.formats.recognition import BUNDLED, read_key_shapes, recognize_file
from lora_core.formats.training_metadata import TITLE, TOKEN_FILE, TRIGGER, list_once
from lora_core.text import SHOWN

MOST_WORDS = 4  # of a file, in a note


def token_file_of(path: str | Path) -> Path:
    """The token file that the name of a LoRA file or run folder asks for; it need not exist."""
    path = Path(path)
    if path.is_dir():
        return path / run_file_names(folder_file_stem(path.resolve()))[2]
    if path.name == NATIVE:
        return path.with_name(run_file_names(folder_file_stem(path.resolve().parent))[2])
    stem = path.name.removesuffix(CUSTOM) if path.name.endswith(CUSTOM) else path.stem
    return path.with_name(stem + EMBEDDINGS)


def find_token_file(path: str | Path) -> str:
    """The token file of a LoRA file: the one that `token_file_of` names.

    Where that is not there, the only token file of the folder, for the file that diffusers reads
    of a run, and for one whose header names it. "" without one, and for a file that has its tokens
    itself.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file() or _holds_tokens(path):
        return ""
    for own in (token_file_of(path), path.with_name(path.stem + EMBEDDINGS)):
        if is_token_file(own):
            return str(own)
    others = list(filter(is_token_file, path.parent.glob(f"[!.]*{EMBEDDINGS}")))
    if len(others) == 1 and (path.name == NATIVE or _names_token_file(path, others[0])):
        return str(others[0])
    return ""


def is_token_file(path: Path) -> bool:
    """Whether a file holds learned tokens alone; of a damaged one its name decides."""
    try:
        return path.is_file() and recognize_file(path).kind == "tokens"
    except (UserError, OSError):
        return path.name.endswith(EMBEDDINGS)


def trained_words(header: Mapping[str, str]) -> list[str]:
    """The words, tokens or token files that the header of a LoRA says it was trained with."""
    for entry in (PLACEHOLDERS, TOKEN_NAMES):
        try:
            words = json.loads(header.get(entry, "[]"))
        except (ValueError, RecursionError):
            words = [header[entry]]
        if words and isinstance(words, list | dict):
            return [str(word)[:SHOWN] for word in words]
    return [word for word in list_once([header.get(TRIGGER, "")]) if word.endswith(TOKEN_FILE)]


def list_words(words: Sequence[str]) -> str:
    """The first words between commas."""
    return ", ".join(words[:MOST_WORDS]) + (" ..." if len(words) > MOST_WORDS else "")


def _holds_tokens(path: Path) -> bool:
    """Whether a file holds learned tokens, alone or with its layers, or cannot be read."""
    try:
        shapes, header = read_key_shapes(path)
        kind = recognize_file(path).kind
    except (UserError, OSError):
        return True  # its reader says what is wrong
    is_bundle = any(key.startswith(BUNDLED) for key in shapes)
    return is_bundle or kind == "tokens" or EMBED in header.values()


def _names_token_file(path: Path, other: Path) -> bool:
    """Whether the header of a LoRA names a token file: its name or title among the trigger words,
    or without trigger words the same tokens and words.
    """
    try:
        header, own = read_key_shapes(path)[1], read_key_shapes(other)[1]
    except (UserError, OSError):
        return False
    if words := list_once([header.get(TRIGGER, "")]):
        names = {other.stem, own.get(TITLE), *list_once([own.get(TRIGGER, "")])}
        return not names.isdisjoint(words)
    return TOKEN_NAMES in header and all(
        header.get(entry) == own.get(entry) for entry in (TOKEN_NAMES, PLACEHOLDERS)
    )
