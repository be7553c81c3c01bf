"""Model families, one file each; `families` finds and opens the family of a checkpoint.

The public names are loaded when they are first used: `import models.known` imports no family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_core import load_names_lazily
from lora_core.escaped_output import silence_libraries

if TYPE_CHECKING:
    from lora_core.family import Conditioning, Family, LoadOptions, Sizes
    from lora_core.formats.layout import Layout
    from models.families import (
        DTYPES,
        FAMILIES,
        choose_device,
        load_family,
        read_layout,
        read_schedule,
        save_family,
        use_device,
    )

__all__ = [
    "DTYPES",
    "FAMILIES",
    "Conditioning",
    "Family",
    "Layout",
    "LoadOptions",
    "Sizes",
    "choose_device",
    "load_family",
    "read_layout",
    "read_schedule",
    "save_family",
    "use_device",
]

TYPES = ("Conditioning", "Family", "LoadOptions", "Sizes")
MODULES = {  # public name -> its module
    **dict.fromkeys(__all__, "models.families"),
    **dict.fromkeys(TYPES, "lora_core.family"),
    "Layout": "lora_core.formats.layout",
}

silence_libraries()  # before they are imported

__getattr__ = load_names_lazily(__name__, MODULES)
