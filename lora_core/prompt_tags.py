"""LoRA tags in prompts, <lora:NAME:0.7>, as A1111 reads them (extra_networks_lora.py).

<lora:NAME>                    strength 1 everywhere
<lora:NAME:0.7>                strength of the text encoders and of the denoiser
<lora:NAME:0.5:0.7>            that of the text encoders, then that of the denoiser
<lora:NAME:te=0.5:unet=0.7>    the same by name; te alone is for both, unet alone for the denoiser
<lora:NAME:0.7:lbw=OUTD>       block weights (sd-webui-lora-block-weight): a list, or its name

"lyco" means the same as "lora". What changes during sampling (start, stop, step) or cuts ranks
(dyn) has no counterpart here and is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from lora_core.errors import UserError
from lora_core.text import is_number

TAG = re.compile(r"<(?:lora|lyco):([^>]+)>")
BLOCK_ARGUMENTS = ("lbw", "w")
ENDINGS = (".safetensors", ".pt", ".ckpt")  # that a name in a tag may lack, the first found wins


@dataclass(frozen=True)
class LoraTag:
    """One tag: the name of a LoRA, its strengths, and its block weights as they are written."""

    name: str
    unet: float = 1.0  # strength of the denoiser, whatever its class
    text: float = 1.0  # strength of every text encoder
    blocks: str = ""


def parse_lora_tags(text: str) -> tuple[str, list[LoraTag]]:
    """(the text without its tags, the tags in order).

    Nothing else is taken from the text, spaces included. Raises UserError for a strength that is
    not a number, and for arguments with another meaning than the five above.
    """
    tags = [parse_lora_tag(found[0]) for found in TAG.finditer(text)]
    return TAG.sub("", text), tags


def parse_lora_tag(text: str) -> LoraTag:
    """The tag that is the whole text. Raises UserError as `parse_lora_tags`."""
    found = TAG.fullmatch(text)
    if not found:
        raise UserError(f"{text!r} is not a LoRA tag; write <lora:NAME:0.7>")
    name, *arguments = found[1].split(":")
    name = name.strip().strip("\"'")
    if not name:
        raise UserError(f"{text} names no LoRA; write <lora:NAME:0.7>")
    named, positional = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            named[key.strip()] = value.strip()
        else:
            positional.append(argument.strip())
    blocks = _take_blocks(named, positional, text)
    _refuse_unknown(named, positional, text)
    both = _read_strength(positional[0], text) if positional else 1.0
    encoders = _read_strength(named["te"], text) if "te" in named else both
    denoiser = _read_strength(positional[1], text) if len(positional) > 1 else encoders
    if "unet" in named:
        denoiser = _read_strength(named["unet"], text)
    return LoraTag(name, denoiser, encoders, blocks)


def find_tagged_file(name: str, folder: str | Path = "") -> str:
    """The path of the LoRA with a name: a file, with or without its ending, or a run folder.

    A relative name is looked up in the folder. Raises UserError where there is none.
    """
    path = Path(folder) / Path(name).expanduser()
    candidates = [path, *(path.with_name(path.name + ending) for ending in ENDINGS)]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    if path.is_dir():
        return str(path)
    raise UserError(
        f"<lora:{name}> names no file: there is neither {path} nor {candidates[1]}; write the "
        "path of the file without its ending"
    )


def _take_blocks(named: dict[str, str], positional: list[str], tag: str) -> str:
    """The block weights, taken out: lbw= or w=, or the second number's place (older notation)."""
    given = [named.pop(key) for key in BLOCK_ARGUMENTS if key in named]
    if len(positional) > 1 and not is_number(positional[1]):
        given.append(positional.pop(1))
    if len(given) > 1:
        raise UserError(f"{tag} has several block weights, {' and '.join(given)}; keep one")
    return given[0] if given else ""


def _refuse_unknown(named: dict[str, str], positional: list[str], tag: str) -> None:
    """Raises UserError for an argument without a counterpart."""
    unknown = [f"{key}={value}" for key, value in named.items() if key not in ("te", "unet")]
    unknown += positional[2:]
    if unknown:
        raise UserError(
            f"{tag} has {unknown[0]!r}, which means nothing here; a tag takes strengths (0.5:0.7, "
            "te=0.5, unet=0.7) and block weights (lbw=)"
        )


def _read_strength(text: str, tag: str) -> float:
    if "@" in text:
        raise UserError(
            f"{tag} has a range of noise levels, which only --lora takes; write --lora PATH:{text}"
        )
    if not is_number(text) or not math.isfinite(float(text)):
        raise UserError(f"{tag} has the strength {text!r}, expected a number such as 0.7")
    return float(text)
