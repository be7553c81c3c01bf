"""Adapter files: `load` reads every known format, `save` writes one, `save_run` a run's files.

`FORMATS` lists the formats, a `Layout` the names of a family, and `AdapterState` holds the content
of a file. Everything is imported at its first use, so that a command line that only lists formats
starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_core.formats.adapter_files import (
        detect_format,
        load,
        read_key_shapes,
        run_file_paths,
        save,
        save_run,
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
    "placeholder_header",
    "read_key_shapes",
    "run_file_names",
    "run_file_paths",
    "save",
    "save_run",
]

MODULES = {  # public name -> its module
    **dict.fromkeys(("CUSTOM", "EMBEDDINGS", "FORMATS", "NATIVE", "Format"), "known_formats"),
    "placeholder_header": "embeddings",
    "run_file_names": "known_formats",
    **dict.fromkeys(("Component", "Layout", "layout_of"), "layout"),
    **dict.fromkeys(("load", "save", "save_run", "run_file_paths"), "adapter_files"),
    **dict.fromkeys(("detect_format", "read_key_shapes"), "adapter_files"),
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value
