"""Where a run may be written: what its folder must not hold, and names that its file system takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_core.errors import UserError
from lora_core.formats import run_file_names
from lora_core.runs.run_folder import MARKS, first_names, is_run, temporary_name

# The longest path below OUT, beside those with the run's own name.
LONGEST_WITHIN = "checkpoints/.1000000.01234567.tmp/state.safetensors"


def check_apart_from_inputs(out: Path | str, inputs: Mapping[str, str], *, overwrite: bool) -> None:
    """Raises UserError naming the option whose file or folder a run in `out` would be mixed with
    or, by `overwrite`, would move away.

    `inputs` is option -> path; "" and what is not there (a hub id) is passed over.
    """
    folder = Path(os.path.abspath(out))
    for option, given in inputs.items():
        if given and (place := _relation(folder, Path(os.path.abspath(given)))):
            if place == "lies in" and not overwrite:
                continue  # a run below the images is not read as one of them
            done = "--overwrite would move what the run needs" if overwrite else "the run's files would be mixed with it"
            raise UserError(f"--out {out} {place} {option} {given}: {done}; name another --out")


def check_overwritten(out: Path | str) -> None:
    """Raises UserError where --overwrite would move something else than one run."""
    folder = Path(os.path.abspath(out))
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not held:
        return
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"--overwrite would move {out}, in which this command runs; start it from another folder")
    if folder.is_symlink():
        raise UserError(f"--overwrite would move the link {out}, not the run that it leads to; name {folder.resolve()} or another --out")
    if os.path.ismount(folder):
        raise UserError(f"--overwrite would move {out}, where a disk or a volume is mounted; name a folder in it, or another --out")
    if not is_run(folder):
        raise UserError(
            f"--overwrite moves runs only, and {out} is none: it holds {first_names(folder)} and none of {', '.join(MARKS[:3])}; name another --out"
        )
    runs = sorted(name for name in held if name != MARKS[2] and is_run(folder / name))
    if runs:
        raise UserError(f"--overwrite would move {out} with the other runs in it ({', '.join(runs[:3])}); name another --out")


def check_writable(out: Path | str) -> None:
    """Raises UserError where no folder can be made at `out`, or nothing written to the one that is
    there.
    """
    folder = Path(os.path.abspath(out))
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.exists():
        raise UserError(
            f"--out {out} is no place for a run: {there} is a link to {os.readlink(there)}, which is not there; make it or name another --out"
        )
    if not there.is_dir():
        raise UserError(f"--out {out} is no place for a run: {there} is a file; name another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be written: {there} is read-only or another user's; name another --out or mend its permissions")


def check_file_names(out: Path | str) -> None:
    """Raises UserError where a file of the run in `out`, temporary names included, has a name or a
    path too long for the file system."""
    folder = Path(os.path.abspath(out))
    files = [temporary_name(folder / name) for name in run_file_names(folder.name)]
    check_path_lengths("--out", [*files, folder / LONGEST_WITHIN, folder.with_name(folder.name + ".bak")])


def check_path_lengths(option: str, files: Iterable[Path]) -> None:
    """Raises UserError for the first of `files` whose name or path is too long where it is to be
    written; `option` is what named it."""
    for file in files:
        path = Path(os.path.abspath(file))
        there = next(parent for parent in path.parents if os.path.isdir(parent))
        name_limit, path_limit = _limit(there, "PC_NAME_MAX"), _limit(there, "PC_PATH_MAX")
        for part in path.relative_to(there).parts:
            if name_limit and len(os.fsencode(part)) > name_limit:
                size = len(os.fsencode(part))
                wanted = f"the file system takes {name_limit}; shorten the name by {size - name_limit} bytes"
                raise UserError(f"{option} leads to a file name of {size} bytes ({part[:40]}...), and {wanted}")
        if path_limit and len(os.fsencode(path)) >= path_limit:  # the limit counts the zero at the end
            raise UserError(f"{option} leads to a path of {len(os.fsencode(path))} bytes, and the system takes {path_limit - 1}; name a shorter one")


def _relation(folder: Path, path: Path) -> str:
    """How a folder stands to a path, as words of a sentence: "is", "holds", "lies in"; "" where
    neither holds the other.

    Compared by the names and, through links, by what they lead to.
    """
    if _same(folder, path):
        return "is"
    if any(_same(folder, parent) for parent in (*path.parents, *path.resolve().parents)) and os.path.exists(path):
        return "holds"
    if os.path.isdir(path) and any(_same(path, parent) for parent in (*folder.parents, *folder.resolve().parents)):
        return "lies in"
    return ""


def _same(a: Path, b: Path) -> bool:
    try:
        return a == b or a.samefile(b)
    except OSError:  # one is not there
        return False


def _limit(folder: Path, name: str) -> int | None:
    """A limit in bytes of the file system at `folder`; None where there is none or nobody says
    (Windows).
    """
    try:
        limit = os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):
        return None
    return limit if limit > 0 else None
