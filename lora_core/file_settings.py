"""Settings of the files that a run leaves: precision, header entries, files for managers, the hub.

A dataclass that needs no torch; a config's section `files`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lora_core.settings import AtLeast

HeaderEntries = Literal["full", "no_captions", "short"]


@dataclass(frozen=True)
class FileSettings:
    """What the files of a run hold beside the trained numbers, and who sees them."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the LoRA files, also of those in checkpoints; fp16 and bf16 halve their size.
    Token rows, DoRA's magnitudes and the state for --resume stay fp32."""
    header: HeaderEntries = "full"
    """Entries of the files' headers, under kohya's names: full; no_captions leaves out how often
    each tag is in the captions, and names of folders; short: only what programs need to read the
    file."""
    title: str = ""
    """Title of the model; empty: the name of its file."""
    author: str = ""
    """Name of the author. Empty: none is written."""
    description: str = ""
    """The model in a few sentences. Empty: none is written."""
    license: str = ""
    """License, for headers and README.md: an id of the hub such as mit, cc-by-4.0 or
    creativeml-openrail-m, another name, or an address. Empty: none is written."""
    tags: str = ""
    """Words to find the model by, separated by commas. Empty: none."""
    trigger: str = ""
    """Words that a prompt has to have, as managers of LoRA files show them; empty: with learned
    tokens the name of their file, else the placeholder word, or what all captions begin with."""
    thumbnail: Annotated[int, AtLeast(0)] = 256
    """Longest side in pixels of a sample image in the header of the file for A1111 and ComfyUI; 0:
    none. Never a training image."""
    sidecars: bool = False
    """Also write NAME.preview.png, a sample image, and NAME.json, the trigger words and the
    description as A1111 reads them, next to the file for A1111 and ComfyUI."""
    public: bool = False
    """With --push-to-hub: a repository that everyone sees; otherwise it is private."""

    def __post_init__(self) -> None:
        """Nothing here: config_checks looks at all sections once the flags have been read."""
