"""cloneofsimo's lora_distill: the difference of two models as a file in its format.

    lora_distill TARGET_MODEL BASE_MODEL --rank 4 --save_path svd_distill.safetensors

There the factors are clipped at a quantile of their entries (`clamp_quantile`), which makes the
error larger than the rank does, and the layers of residual blocks are computed and not saved. Here
no entry is clipped, and those layers are in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_core.errors import UserError
from lora_core.flags.fire_words import REQUIRED, parse_fire_words
from merging.commands import Distill, DistillFileOptions, KeepShare

ARGUMENTS: dict[str, Any] = {
    "target_model": REQUIRED,
    "base_model": REQUIRED,
    "rank": 4,
    "clamp_quantile": 0.99,
    "device": "cuda:0",
    "save_path": "svd_distill.safetensors",
    "overwrite": False,  # ours
}
# the classes CrossAttention, Attention, GEGLU, ResnetBlock2D and CLIPAttention
LAYERS = "attn,*.ff.net.0.proj,*.resnets.*"
HELP = """lora_distill TARGET_MODEL BASE_MODEL <flags>: a LoRA of the difference of two models

  TARGET_MODEL            the fine-tuned model: folder, single file or hub id
  BASE_MODEL              the model that it was made of
  --rank N                rank of each layer (4)
  --save_path FILE        the file to write, in cloneofsimo's format (svd_distill.safetensors)
  --clamp_quantile Q      taken and not used: no entry is clipped, the error is smaller (0.99)
  --device NAME           taken and not used: the SVD runs on the CPU, a layer at a time (cuda:0)
  --overwrite             of this project: replace a file that is there

example: lora_distill tuned toy/model --rank 4 --save_path lora.safetensors
more choices (other formats, ranks by error): merge.py distill --help"""


def run_lora_distill(words: Sequence[str]) -> None:
    """Write the file of one command line. Raises UserError before anything is written."""
    from merging.distill import run_distill  # imports torch

    run_distill(translate_words(words))
    print("clamp_quantile: no entry was clipped")


def translate_words(words: Sequence[str]) -> Distill:
    """The options of merge.py distill that a command line means. Raises UserError."""
    values = ARGUMENTS | parse_fire_words(words, ARGUMENTS, "lora_distill")
    if not 0 < values["clamp_quantile"] <= 1:
        raise UserError(
            f"--clamp_quantile is {values['clamp_quantile']:g}; expected a number in (0, 1]"
        )
    path = str(values["save_path"])
    if not path.endswith(".safetensors"):
        raise UserError(f"--save_path is {path}; expected a name that ends in .safetensors")
    files = replace(DistillFileOptions(), format="cloneofsimo", overwrite=values["overwrite"])
    return Distill(
        base=str(values["base_model"]),
        tuned=str(values["target_model"]),
        out=path,
        layers=LAYERS,
        keep=KeepShare(rank=values["rank"]),
        files=files,
    )
