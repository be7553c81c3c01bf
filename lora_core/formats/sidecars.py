"""Files beside a LoRA file that managers read: NAME.preview.png, and A1111's NAME.json.

A1111 and its followers show the image NAME.preview.png of NAME.safetensors, as ComfyUI-Lora-Manager
does, and read NAME.json: its "activation text" is put into the prompt with the LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.atomic_files import atomic_write
from lora_core.formats.model_spec import PREFIX


def preview_path(file: Path) -> Path:
    """The image of a LoRA file."""
    return file.with_name(f"{file.stem}.preview.png")


def user_metadata_path(file: Path) -> Path:
    """A1111's table of what a user says about a LoRA file."""
    return file.with_suffix(".json")


def user_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """A1111's table for a file with this header. It has no version of the model, which A1111 finds
    in the header itself, and no weight but 0, the user's own default.
    """
    notes = [header.get(f"{PREFIX}{name}", "") for name in ("usage_hint", "license")]
    return {
        "description": header.get(f"{PREFIX}description", ""),
        "activation text": header.get(f"{PREFIX}trigger_phrase", ""),
        "preferred weight": 0.0,
        "negative text": "",
        "notes": "\n".join(filter(None, notes)),
    }


def write_user_metadata(file: Path, header: Mapping[str, str]) -> Path:
    """Writes NAME.json beside NAME.safetensors with this header, and returns its path."""
    path = user_metadata_path(file)
    with atomic_write(path) as temporary:
        temporary.write_bytes(encode_user_metadata(header))
    return path


def encode_user_metadata(header: Mapping[str, str]) -> bytes:
    """The content of NAME.json for a file with this header."""
    return json.dumps(user_metadata(header), indent=4, ensure_ascii=False).encode()
