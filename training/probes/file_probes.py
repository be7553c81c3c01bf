"""Probes of the header entries of a finished run's files, and of the files beside them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from lora_core.formats import run_file_names
from lora_core.formats.model_spec import PREFIX
from lora_core.formats.sidecars import preview_path, user_metadata_path
from models import DTYPES
from training.probes.outcome_probes import FinishedRun, Outcome


def has_words(option: str) -> Outcome:
    """Whether the header has the text of an option of --files."""

    def probe(run: FinishedRun) -> bool:
        entry = {"trigger": "trigger_phrase"}.get(option, option)
        given = getattr(run.config.files, option)
        return all(_header(file).get(f"{PREFIX}{entry}") == given for file in _files(run)[:1])

    return probe


def has_entries(run: FinishedRun) -> bool:
    """--files.header: whether what it leaves out is not there."""
    left_out = {"no_captions": "ss_tag_frequency", "short": "ss_steps"}
    gone = left_out.get(run.config.files.header, "")
    return not any(gone in _header(file) for file in _files(run))


def files_have_precision(run: FinishedRun) -> bool:
    """--files.precision: whether a LoRA file has factors of it, or says that they overflow it."""
    wanted = DTYPES[run.config.files.precision]
    for file in _lora_files(run):
        with safe_open(file, "pt") as opened:
            found = {opened.get_tensor(key).dtype for key in opened.keys()}  # noqa: SIM118
        if wanted not in found:
            return not fits_half(run, wanted)
    return True


def fits_half(run: FinishedRun, dtype: torch.dtype) -> bool:
    """Whether all trained parameters are in the range of a dtype."""
    limit = torch.finfo(dtype).max
    for params in run.log.model.groups.values():
        if any(p.detach().abs().max() > limit for p in params):
            return False
    return True


def has_thumbnail(run: FinishedRun) -> bool:
    """--files.thumbnail: whether the header has an image of at most that size, or none with 0."""
    largest = run.config.files.thumbnail
    if run.log.model.family.inpainting:
        return True
    for file in _lora_files(run):
        text = _header(file).get(f"{PREFIX}thumbnail", "")
        if not text:
            return not largest
        data = base64.b64decode(text.partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            return max(image.size) <= largest
    return True


def has_sidecars(run: FinishedRun) -> bool:
    """--files.sidecars: whether they are there."""
    files = _lora_files(run)
    made = [user_metadata_path(file) for file in files]
    if not run.log.model.family.inpainting:
        made += [preview_path(file) for file in files]
    return all(file.is_file() for file in made)


def _files(run: FinishedRun) -> list[Path]:
    """The files under kohya's names, and of token rows, that are there."""
    names = run_file_names(run.folder.name)[1:]
    return [run.folder / name for name in names if (run.folder / name).is_file()]


def _lora_files(run: FinishedRun) -> list[Path]:
    """The file under kohya's names, if any."""
    name = run_file_names(run.folder.name)[1]
    return [file for file in _files(run) if file.name == name]


def _header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})
