"""Checks of --out: apart from the inputs, a run that may be moved, writable, names that fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_core.atomic_files import temporary_name
from lora_core.errors import UserError
from lora_core.formats import run_file_names
from lora_core.formats.known_formats import CHECKPOINTS, folder_file_stem
from lora_core.runs.run_folder import MARKS, first_names, is_run

LONGEST_STEP = "1000000"  # of a checkpoint, whose files are called RUN-STEP
# The longest path below OUT, apart from the paths with the run's own name.
LONGEST_WITHIN = "checkpoints/.1000000.01234567.tmp/state.safetensors"


def check_apart_from_inputs(out: Path | str, inputs: Mapping[str, str], *, overwrite: bool) -> None:
    """Raises UserError for an input that a run in `out` would mix with, or --overwrite would move.

    `inputs` is option -> path; "" and paths that do not exist (hub ids) are skipped.
    """
    folder = Path(os.path.abspath(out))
    harm = "the run's files would be mixed with it"
    if overwrite:
        harm = "--overwrite would move files that the run needs"
    for option, given in inputs.items():
        relation = _relation(folder, Path(os.path.abspath(given))) if given else ""
        if relation == "lies in" and not overwrite:
            continue  # a run below the images is not read as one of them
        if relation:
            raise UserError(f"--out {out} {relation} {option} {given}: {harm}; name another --out")


def check_overwritten(out: Path | str) -> None:
    """Raises UserError where --overwrite would move something else than one run."""
    folder = Path(os.path.abspath(out))
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not held:
        return
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"--overwrite would move {out}, in which this command runs; "
            "start it from another folder"
        )
    if folder.is_symlink():
        raise UserError(
            f"--overwrite would move the link {out}, not the run that it leads to; "
            f"name {folder.resolve()} or another --out"
        )
    if os.path.ismount(folder):
        raise UserError(
            f"--overwrite would move {out}, where a disk or a volume is mounted; "
            "name a folder in it, or another --out"
        )
    if not is_run(folder):
        raise UserError(
            f"--overwrite moves runs only, and {out} is not a run: it holds {first_names(folder)} "
            f"and none of {', '.join(MARKS[:3])}; name another --out"
        )
    runs = sorted(name for name in held if name != MARKS[2] and is_run(folder / name))
    if runs:
        raise UserError(
            f"--overwrite would move {out} with the other runs in it ({', '.join(runs[:3])}); "
            "name another --out"
        )


def check_writable(out: Path | str) -> None:
    """Raises UserError where no folder can be made at `out`, or an existing one is read-only."""
    folder = Path(os.path.abspath(out))
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.exists():
        raise UserError(
            f"--out {out} cannot be a run folder: {there} is a link to {os.readlink(there)}, "
            "which does not exist; create it or name another --out"
        )
    if not there.is_dir():
        raise UserError(
            f"--out {out} cannot be a run folder: {there} is a file; name another --out"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"--out {out} cannot be written: {there} is read-only or another user's; "
            "name another --out or fix its permissions"
        )


def check_file_names(out: Path | str) -> None:
    """Raises UserError if a file name or path of the run in `out` is too long for the file system.

    Temporary names are included.
    """
    folder = Path(os.path.abspath(out))
    files = [folder / name for name in run_file_names(folder.name)]
    checkpoint = folder / CHECKPOINTS / LONGEST_STEP
    files += [checkpoint / name for name in run_file_names(folder_file_stem(checkpoint))]
    files = [temporary_name(file) for file in files]
    backup = folder.with_name(folder.name + ".bak")
    check_path_lengths("--out", [*files, folder / LONGEST_WITHIN, backup])


def check_path_lengths(option: str, files: Iterable[Path]) -> None:
    """Raises UserError for the first of `files` whose name or path is too long for its file system.

    `option` is the one that the names come from.
    """
    for file in files:
        path = Path(os.path.abspath(file))
        there = next(parent for parent in path.parents if os.path.isdir(parent))
        limit = _limit(there, "PC_NAME_MAX")
        for part in path.relative_to(there).parts:
            size = len(os.fsencode(part))
            if limit and size > limit:
                raise UserError(
                    f"{option} leads to a file name of {size} bytes ({part[:40]}...), and the file "
                    f"system takes {limit}; shorten the name by {size - limit} bytes"
                )
        limit, size = _limit(there, "PC_PATH_MAX"), len(os.fsencode(path))
        if limit and size >= limit:  # the limit counts the zero at the end
            raise UserError(
                f"{option} leads to a path of {size} bytes, and the system takes {limit - 1}; "
                "name a shorter one"
            )


def check_free_names(option: str, files: Iterable[Path], *, overwrite: bool) -> None:
    """Raises UserError for the first of `files` that exists, unless it may be replaced.

    A folder of that name is never replaced. `option` is the one that the names come from.
    """
    for file in files:
        if file.is_dir():
            raise UserError(f"{option}: {file} is a folder; name a file")
        if os.path.lexists(file) and not overwrite:
            raise UserError(
                f"{option}: {file} is there already; pass --overwrite to replace it, or name "
                "another output"
            )


def _relation(folder: Path, path: Path) -> str:
    """Whether a folder "is", "holds" or "lies in" a path; "" where neither holds the other.

    Compared by the names and, through links, by the files that they lead to.
    """
    if _is_same(folder, path):
        return "is"
    if os.path.exists(path) and _is_in(path, folder):
        return "holds"
    if os.path.isdir(path) and _is_in(folder, path):
        return "lies in"
    return ""


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path, or the file that it leads to, lies in a folder."""
    parents = (*path.parents, *path.resolve().parents)
    return any(_is_same(folder, parent) for parent in parents)


def _is_same(a: Path, b: Path) -> bool:
    try:
        return a == b or a.samefile(b)
    except OSError:  # one is not there
        return False


def _limit(folder: Path, name: str) -> int | None:
    """A limit in bytes of the file system at `folder`; None if there is none or on Windows."""
    try:
        limit = os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):
        return None
    return limit if limit > 0 else None
