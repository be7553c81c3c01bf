"""The LoRAs below a folder of runs, for programs in which a stranger chooses among them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_core.errors import UserError
from lora_core.formats.recognition import is_adapter_file

MERGED, UPLOADED = "merged.web", "uploaded.web"  # no name of a run has a dot
STATE = "state.safetensors"  # of a checkpoint, next to its LoRA and token rows
FOLDERS = ("[!.]*", "[!.]*/checkpoints/[!.]*", f"{MERGED}/[!.]*")  # given whole, with token rows


def find_loras(runs: Path) -> list[str]:
    """Runs and checkpoints with a LoRA or token rows, merged LoRAs, and uploaded files: their paths
    in the folder `runs`, in order. Names that begin with a dot are left out.
    """
    files = runs.glob(f"{UPLOADED}/[!.]*")
    found = {path for path in files if path.is_file() and is_adapter_file(path)}
    for pattern in FOLDERS:
        for file in runs.glob(f"{pattern}/[!.]*.safetensors"):
            if file.parent.name != UPLOADED and file.name != STATE and is_adapter_file(file):
                found.add(file.parent)
    return sorted(path.relative_to(runs).as_posix() for path in found)


def pick_loras(runs: Path, form: Sequence[Any]) -> list[tuple[str, float]]:
    """(path, number) of the LoRAs in a form: name, number, name, number ..., where empty names
    count for nothing. Raises UserError for names that `find_loras` does not have, and other paths.
    """
    known = find_loras(runs)
    picked = []
    for name, number in zip(form[::2], form[1::2], strict=True):
        if name and name not in known:
            raise UserError(f"{name!r} is no LoRA in {runs}; choose one of the list")
        if name:
            picked.append((str(runs / name), float(number)))
    return picked


def keep_upload(runs: Path, file: Path) -> str:
    """Copies a LoRA file that was uploaded into the folder of the runs; returns its name there.

    Raises UserError for a file that is no LoRA, whose pickles are read without executing them, and
    for a name that is taken.
    """
    kept = runs / UPLOADED / file.name
    if not is_adapter_file(file):
        raise UserError(f"{file.name} is no LoRA file that can be read")
    if kept.exists():
        raise UserError(f"{file.name} is there already; rename the file that you upload")
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, kept)
    return kept.relative_to(runs).as_posix()
