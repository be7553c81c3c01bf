"""Pairs of images of which one is preferred to the other: winners and losers.

They come from two folders, or from two columns of a metadata table. A pair is the record of its
winner with the record of its loser in it, and has one key: all that is random for the pair is drawn
once. The captions are the winner's.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_core.data.captions import FALLBACK, CaptionMode, Captions, normalize_captions
from lora_core.data.concept_folders import list_images
from lora_core.data.listing import FolderContents, file_stem, list_one_folder
from lora_core.data.metadata_tables import read_image_table
from lora_core.data.records import Record, loser_key, make_record, scan_folder
from lora_core.errors import UserError
from lora_core.text import normalize_unicode

EXAMPLE = "winner_file_name,loser_file_name"  # two columns of a table
BY_TABLE: tuple[CaptionMode, ...] = ("auto", "metadata")  # captions that a table's pairs can have


def names_columns(pairs: str) -> bool:
    """Whether --data.pairs names two columns of a table, and not a folder."""
    return "," in pairs and not Path(pairs).is_dir()


def scan_pairs(
    folder: Path | str,
    pairs: str,
    *,
    captions: CaptionMode = "auto",
    caption: str | None = None,
    caption_column: str | None = None,
    repeats: int = 1,
) -> tuple[list[Record], list[Record]]:
    """(the winners as images of their own, the pairs), in the same order.

    `pairs` is the folder of the losers, which have the names of the winners in `folder` (with any
    ending, and in the same sub-folders where the winners are in several); or it names two columns
    with file names, WINNER,LOSER, of the metadata table in `folder`. Captions and repeats are those
    of `scan_folder`, and a table's rows with the same two images add their captions up. Raises
    UserError for an image without a partner, a pair of the same image twice, and where
    `scan_folder` does.
    """
    if names_columns(pairs):
        if captions not in BY_TABLE:
            raise UserError(
                f"--data.pairs {pairs} names columns of a metadata table, whose rows have the "
                f"captions, too; --data.captions {captions} has no effect there, leave it out"
            )
        found = _read_tables(Path(folder), pairs, caption, caption_column) * repeats
        return [winner for winner, _ in found], [_join_pair(*images) for images in found]
    winners = scan_folder(
        folder, captions=captions, caption=caption, caption_column=caption_column,
        repeats=repeats, masks="none",
    )  # fmt: skip
    losers = _find_losers([winner.path for winner in winners], Path(pairs))
    made = {path: _open_image(path, Captions((), "")) for path in losers.values()}
    return winners, [_join_pair(winner, made[losers[winner.path]]) for winner in winners]


def _join_pair(winner: Record, loser: Record) -> Record:
    """The pair of two images, with the winner's captions and a key of both contents."""
    if winner.key == loser.key:
        raise UserError(
            f"{winner.path} and {loser.path} are the same image, so that neither can be preferred; "
            "correct one or take both out"
        )
    content = f"{winner.key} is preferred to {loser.key}".encode()
    key = hashlib.blake2b(content, digest_size=16).hexdigest()
    own = replace(loser, captions=winner.captions, source=winner.source, key=loser_key(key))
    return replace(winner, key=key, loser=own)


def _open_image(path: Path, captions: Captions) -> Record:
    return make_record(path, captions, None, masks="none", is_prior=False)


# ---------------------------------------------------------------- two folders


def _find_losers(winners: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Winner -> its loser. Raises UserError for an image of either folder without a partner."""
    if not folder.is_dir():
        raise UserError(
            f"--data.pairs {folder} is no folder; give the folder with the losers, or two columns "
            f"of the metadata table such as {EXAMPLE}"
        )
    by_folder: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(winners):
        by_folder.setdefault(path.parent, []).append(path)
    root = os.path.commonpath(map(os.path.abspath, by_folder))
    found: dict[Path, Path] = {}
    missing: list[tuple[Path, Path]] = []  # winner, and where its loser should be
    for parent, own in by_folder.items():
        place = folder / os.path.relpath(os.path.abspath(parent), root)
        losers = list_one_folder(place).images if place.is_dir() else ()
        matched, spare = _match_names(own, losers)
        if spare:
            raise UserError(
                f"the loser {spare[0]} belongs to no image in {parent} that has none yet: winner "
                "and loser have the same name, whatever its ending; rename it or remove it"
            )
        missing += [(path, place / path.stem) for path in own if path not in matched]
        found |= matched
    if missing:
        winner, place = missing[0]
        raise UserError(
            f"{len(missing)} of {len(found) + len(missing)} winners have no loser, first {winner}: "
            f"no image {place} with any ending; add it or take the winner out"
        )
    return found


def _match_names(
    winners: Sequence[Path], losers: Sequence[Path]
) -> tuple[dict[Path, Path], Sequence[Path]]:
    """(winner -> the loser of its name, or else of its name with another ending; other losers)."""
    found: dict[Path, Path] = {}

    def full_name(path: Path) -> str:
        return normalize_unicode(path.name)

    for name in (full_name, file_stem):
        named = {name(path): path for path in winners if path not in found}
        spare = []
        for loser in losers:
            winner = named.pop(name(loser), None)
            if winner is None:
                spare.append(loser)
            else:
                found[winner] = loser
        losers = spare
    return found, losers


# ---------------------------------------------------------------- a table


def _read_tables(
    folder: Path, pairs: str, caption: str | None, column: str | None
) -> list[tuple[Record, Record]]:
    """(winner, loser) of each pair in the tables of a folder, repeats included."""
    columns = tuple(name.strip() for name in pairs.split(","))
    if len(columns) != 2 or not all(columns):
        raise UserError(
            f"--data.pairs is {pairs!r}, expected a folder, or two columns such as {EXAMPLE}"
        )
    if not folder.exists():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    found: list[tuple[Record, Record]] = []
    for part in list_images(folder).parts:
        found += _read_table(part, columns, caption, column) * part.repeats
    if caption is not None and all(winner.source != FALLBACK for winner, _ in found):
        raise UserError(
            f"the caption {caption!r} has no use, because every pair has one in its table; "
            "leave --data.caption out"
        )
    return found


def _read_table(
    part: FolderContents, columns: tuple[str, ...], caption: str | None, column: str | None
) -> list[tuple[Record, Record]]:
    if part.table is None:
        raise UserError(
            f"--data.pairs names the columns {' and '.join(columns)} of a metadata table, and "
            f"{part.folder} has none; add metadata.jsonl, or give the folder with the losers"
        )
    rows = read_image_table(part.table, columns, column, may_be_empty=caption is not None)
    made: dict[Path, Record] = {}
    found = []
    for (winner, loser), texts in rows.items():
        own = Captions(texts, part.table) if texts else Captions((caption or "",), FALLBACK)
        own = normalize_captions(winner, own)
        for path in (winner, loser):
            if path not in made:
                made[path] = _open_image(path, own)
        of_pair = replace(made[winner], captions=own.texts, source=own.source)
        found.append((of_pair, made[loser]))
    return found
