"""Tar shards as WebDataset writes them: members NAME.jpg, NAME.txt, NAME.json, NAME.mask.png.

Members of one name, up to the first dot of its last part, are one example, wherever they lie in the
file: WebDataset wants them side by side, and plain `tar` packs a folder in any order. Only the
headers and the captions are read; images and masks stay where they are. tarfile of the standard
library does this, so that neither webdataset nor datasets is needed.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lora_core.data.images import IMAGE_SUFFIXES, MASK_SUFFIX
from lora_core.data.listing import CAPTION_SUFFIXES
from lora_core.data.shards.stored_files import StoredFile
from lora_core.errors import UserError

TAR = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarExample(NamedTuple):
    """The members of one name."""

    image: StoredFile
    mask: StoredFile | None
    texts: tuple[StoredFile, ...]  # that may hold captions, in the order of CAPTION_SUFFIXES


def expand_ranges(pattern: str) -> list[str]:
    """The names that a pattern means: a{000..002} is a000, a001, a002, as in WebDataset's urls."""
    parts = RANGE.split(pattern)
    choices: list[list[str]] = [[parts[0]]]
    for first, last, after in zip(parts[1::3], parts[2::3], parts[3::3]):
        width = len(first)
        choices.append([f"{i:0{width}d}" for i in range(int(first), int(last) + 1)])
        choices.append([after])
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def list_tar_examples(file: Path, image_ending: str = "") -> Iterator[TarExample]:
    """The examples with an image in a tar file, in its order.

    `image_ending`: that of the members with the image, such as jpg; empty: any image's. Raises
    UserError for a file that is no uncompressed tar, and two images of one name.
    """
    for name, members in _group_members(file):
        masks = [own for own in members if own.path.name.endswith(MASK_SUFFIX)]
        images = [own for own in members if _is_image(own, name, image_ending) and own not in masks]
        if len(images) > 1:
            raise UserError(_describe_two(file, name, images))
        texts = [own for own in members if own.suffix.lower() in CAPTION_SUFFIXES]
        texts.sort(key=lambda own: CAPTION_SUFFIXES.index(own.suffix.lower()))
        if images:
            yield TarExample(images[0], masks[0] if masks else None, tuple(texts))


def _describe_two(file: Path, name: str, images: list[StoredFile]) -> str:
    """Why two images of one name are an error, and what to do."""
    names = " and ".join(own.path.name for own in images[:2])
    endings = [own.path.name.removeprefix(f"{name}.") for own in images]
    if plain := [ending for ending in endings if "." not in ending]:
        advice = f"say which is trained on with --data.image-column {plain[0]}"
    else:
        advice = "a name ends at its first dot, so write the shard with no other dots in its names"
    return f"{file} has two images of the name {name}, {names}; {advice}"


def _is_image(member: StoredFile, name: str, ending: str) -> bool:
    if ending:
        return member.path.name == f"{name}.{ending}"
    return member.suffix.lower() in IMAGE_SUFFIXES


def _group_members(file: Path) -> Iterator[tuple[str, list[StoredFile]]]:
    """(name without its endings, members) of each example, in the order of their first members.
    Raises UserError for a member that is there twice.
    """
    groups: dict[tuple[Path, str], dict[str, StoredFile]] = {}
    for member in _members(file):
        name = member.path.name
        group = groups.setdefault((member.path.parent, name.split(".")[0]), {})
        if name in group:
            raise UserError(
                f"{file} has the member {member.path.relative_to(file)} twice; write the shard "
                "again with each name once"
            )
        group[name] = member
    for (_, name), group in groups.items():
        yield name, list(group.values())


def _members(file: Path) -> Iterator[StoredFile]:
    """The files in a tar, without hidden ones; links and devices are none."""
    try:
        with tarfile.open(file, "r:") as archive:  # "r:": a compressed one cannot be read by offset
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined] # it would keep every header
                is_whole = member.isreg() and not member.issparse() and member.size >= 0
                if is_whole and not Path(member.name).name.startswith("."):
                    name = file / member.name
                    yield StoredFile(name, file, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError, LookupError) as error:
        kind = "a compressed tar" if file.name.endswith(COMPRESSED) else str(error)
        raise UserError(
            f"cannot read the shard {file} ({kind}); write it again, as an uncompressed tar"
        ) from error
