"""Adapter files: `load` reads every known format, `save` writes one, `save_run` a run's files.

`FORMATS` lists the formats, a `Layout` the names of a family, and `AdapterState` holds the content
of a file. Everything is imported at its first use, so that a command line that only lists formats
starts without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_core import load_names_lazily

if TYPE_CHECKING:
    from lora_core.formats.adapter_files import (
        detect_format,
        load,
        older_file_names,
        run_file_paths,
        save,
        save_run,
        settle_scales,
    )
    from lora_core.formats.embeddings import placeholder_header
    from lora_core.formats.known_formats import (
        CUSTOM,
        EMBEDDINGS,
        FORMATS,
        NATIVE,
        Format,
        run_file_names,
    )
    from lora_core.formats.layout import Component, Layout, layout_of
    from lora_core.formats.recognition import read_key_shapes

__all__ = [
    "CUSTOM",
    "EMBEDDINGS",
    "FORMATS",
    "NATIVE",
    "Component",
    "Format",
    "Layout",
    "detect_format",
    "layout_of",
    "load",
    "older_file_names",
    "placeholder_header",
    "read_key_shapes",
    "run_file_names",
    "run_file_paths",
    "save",
    "save_run",
    "settle_scales",
]

KNOWN = ("CUSTOM", "EMBEDDINGS", "FORMATS", "NATIVE", "Format", "run_file_names")
MODULES = {  # public name -> its module
    **dict.fromkeys(__all__, "lora_core.formats.adapter_files"),
    **dict.fromkeys(KNOWN, "lora_core.formats.known_formats"),
    **dict.fromkeys(("Component", "Layout", "layout_of"), "lora_core.formats.layout"),
    "placeholder_header": "lora_core.formats.embeddings",
    "read_key_shapes": "lora_core.formats.recognition",
}

__getattr__ = load_names_lazily(__name__, MODULES)
