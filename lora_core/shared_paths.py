"""Paths in files that people share: recipes of images, headers of LoRA files, published configs.

An absolute path tells a user's name and folders, so these files name it from their own folder, from
the current one, or from the home folder as ~.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_core.text import hide_home, nearest_names

CACHED_FILES = ("model_index.json", "config.json")  # of a whole model, of one network


def shorten_path(path: str, folder: Path | str) -> str:
    """The path as a file in `folder` names it: without its absolute part, where it has one.

    Relative to the current folder or to `folder` where it lies below one of them, else from ~ below
    the home folder. Hub ids, relative paths, and other absolute ones such as /data/models/base are
    returned unchanged.
    """
    if not os.path.isabs(path):
        return path
    for start in (Path.cwd(), Path(os.path.abspath(folder))):
        if len(start.parts) > 1 and Path(path).is_relative_to(start):
            return Path(path).relative_to(start).as_posix()
    return hide_home(path)


def path_from(folder: Path, name: str) -> str:
    """A file or folder that is named from the current one, as a command in `folder` names it.

    "../../toy/model" in runs/anna. Hub ids and absolute paths are returned unchanged, and so is a
    name in a folder outside the current one: the way from there would tell this one's name.
    """
    if os.path.isabs(name) or not os.path.exists(name):
        return name
    here, there = os.path.realpath(folder), os.path.realpath(".")
    if not Path(here).is_relative_to(there):
        return name
    return Path(os.path.relpath(os.path.join(there, name), here)).as_posix()


def nearest_path(path: Path | str) -> str:
    """The existing path whose parts resemble those of a missing one; "" where one part has none."""
    found = Path()
    for part in Path(path).parts:
        step = found / part
        if not step.exists():
            near = nearest_names(part, _names_in(found))
            if not near:
                return ""
            step = found / near[0]
        found = step
    return str(found)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # a file, or no permission
        return []


def is_in_hub_cache(name: str) -> bool:
    """Whether a model of the hub was fetched before. Asks no server."""
    from huggingface_hub import try_to_load_from_cache  # a merge names paths, and no model

    try:
        found = [try_to_load_from_cache(name, file) for file in CACHED_FILES]
    except ValueError:  # no repository has such a name
        return False
    return any(isinstance(path, str) for path in found)


def lies_within(path: Path | str, folder: Path | str) -> bool:
    """Whether a path that a file in `folder` names lies in the folder, links of folders followed.

    The last part may itself be a link: so the hub's cache keeps files, and so do users.
    """
    parent = os.path.realpath(os.path.dirname(path) or ".")
    return Path(parent).is_relative_to(os.path.realpath(folder))


def find_shared_path(name: str, folder: Path | str) -> str | None:
    """The file or folder on this disk that a file in `folder` names; None where there is none.

    The current folder is searched first. Devices, pipes and addresses of other machines
    (//server/share, which Windows would log in to) are no files.
    """
    if not name or "\0" in name or name.startswith(("//", "\\\\")):
        return None
    for path in (os.path.expanduser(name), os.path.join(folder, name)):
        if os.path.isdir(path) or os.path.isfile(path):
            return path
    return None
