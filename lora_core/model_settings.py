"""The base model and its device, as training and infer.py take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lora_core.settings import AtLeast


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the device that it runs on."""

    model: str = ""
    """The base model: a folder or hub id in the diffusers layout, or a single file (.safetensors,
    .ckpt) of SD 1.x, 2.x or SDXL. It has no default."""
    model_config: str = ""
    """Folder or hub id with the configs and tokenizers of a single-file model; empty: those it was
    published with."""
    family: str = ""
    """my_family.py:FAMILY, the functions of a model family of your own, for models that no built-in
    one reads. Empty: the built-in one."""
    vae: str = ""
    """Folder or hub id of another VAE. Empty: the model's own."""
    clip_skip: Annotated[int, AtLeast(0)] = 0
    """Last layers of the CLIP text encoders that are left out. 0: none."""
    max_token_length: Literal[0, 75, 150, 225] = 0
    """Tokens of a prompt that CLIP text encoders read, 75 at a time (SD and SDXL; as kohya); 0:
    75."""
    max_sequence_length: Annotated[int, AtLeast(0)] = 0
    """Tokens of a T5 prompt; 0: 512, or 256 for a model without guidance embedding."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""
    offload: bool = True
    """Keep a network on the GPU only while it works, else in host memory, which costs the time of a
    copy when it comes back."""
    quantize: Literal["none", "fp8", "int8", "int4"] = "none"
    """Form in which frozen linear layers of the denoiser and of T5 are stored: fp8 and int8 take
    half the memory of bf16, int4 (NF4, as in QLoRA) about a quarter (extra: torchao)."""
    stream: bool = False
    """Keep the denoiser's blocks in host memory and copy each to the GPU for its turn, at most two
    at once: slower; training needs --gradient-checkpointing."""
    threads: Annotated[int, AtLeast(0)] = 0
    """CPU threads; 0: torch's choice."""
