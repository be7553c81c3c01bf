"""What managers of LoRA files show of a finished run: a thumbnail in the header of the file under
kohya's names, NAME.preview.png and NAME.json beside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_core.atomic_files import atomic_write
from lora_core.config import Config
from lora_core.formats import run_file_names
from lora_core.formats.container import add_header_entries, read_header
from lora_core.formats.model_spec import PREFIX
from lora_core.formats.sidecars import preview_path, write_user_metadata

QUALITY = 85  # of the JPEG; 256 x 256 pixels are about 10 KB
THUMBNAIL = f"{PREFIX}thumbnail"


def add_manager_files(
    config: Config, folder: Path, drawn: Sequence[Image.Image], *, shows_training: bool
) -> list[Path]:
    """Put a thumbnail of the first drawn image into the LoRA file, and write the files of
    --files.sidecars; returns these. Without images where they show training images.
    """
    file = folder / run_file_names(folder.name)[1]
    if not file.is_file():
        return []
    images = () if shows_training else drawn[:1]
    for image in images:
        if config.files.thumbnail:
            add_header_entries(file, {THUMBNAIL: encode_thumbnail(image, config.files.thumbnail)})
    if not config.files.sidecars:
        return []
    written = [write_user_metadata(file, read_header(file))]
    for image in images:
        with atomic_write(preview_path(file)) as temporary:
            image.convert("RGB").save(temporary, "PNG")
        written.append(preview_path(file))
    return written


def encode_thumbnail(image: Image.Image, side: int) -> str:
    """The image as a data URL of a JPEG, scaled down to at most `side` pixels; nothing but pixels
    is in it.
    """
    small = Image.new("RGB", image.size)
    small.paste(image.convert("RGB"))
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
