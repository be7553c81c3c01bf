"""The options of infer.py: images from a base model and any number of LoRA files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lora_core.model_settings import ModelConfig
from lora_core.settings import AtLeast, SamplerSettings, Share


@dataclass(frozen=True)
class ImageRequest:
    """The images that are asked for; these options are the first of the help."""

    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA file or run folder and its strength: PATH (strength 1), PATH:0.8, or
    PATH:unet=0.6,text=0.9; PATH:0.8@0.2-1 acts at noise levels of 0.2 to 1 only. Repeat the flag
    for several; learned tokens next to a LoRA file are loaded with it. Empty: the base model
    alone."""
    prompt: str = ""
    """Text to draw; it may hold the placeholder words of the LoRAs, and A1111's tags for further
    ones: <lora:NAME:0.7> is NAME or NAME.safetensors in the current folder, or a run folder. Empty:
    with --prompts."""
    prompts: str = ""
    """Text file with one prompt a line, instead of --prompt; with --grid a sheet has a row for each
    prompt. Empty: --prompt."""
    out: str = "out.png"
    """PNG to write; several images get _000, _001 ... before the ending. OUT.gif or OUT.webp is an
    animation over one --grid axis."""
    overwrite: bool = False
    """Replace images and animations that exist."""
    seed: int = 0
    """Seed of the first image; each further one adds 1. The noise at the start is that of diffusers
    with torch.Generator("cpu").manual_seed(seed)."""
    count: Annotated[int, AtLeast(1)] = 1
    """Images for each prompt."""


@dataclass(frozen=True)
class Infer(SamplerSettings, ModelConfig, ImageRequest):
    """Draw images with a text-to-image model and LoRA files."""

    steps: Annotated[int, AtLeast(0)] = 0
    """Sampling steps; 0: the model's own number where it was distilled to few steps (4), else
    25."""
    clip_skip: Annotated[int, AtLeast(0)] = 0
    """Last layers of the CLIP text encoders that are left out; 0: as many as the run of the LoRA
    left out, else none."""
    max_token_length: Literal[0, 75, 150, 225] = 0
    """Tokens of a prompt that CLIP text encoders read, 75 at a time; 0: as in the run of the LoRA,
    else 75."""
    max_sequence_length: Annotated[int, AtLeast(0)] = 0
    """Tokens of a T5 prompt; 0: as in the run of the LoRA, else 512, or 256 for a model without
    guidance embedding."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks."""
    batch: Annotated[int, AtLeast(1)] = 4
    """Images sampled together; fewer need less memory."""
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One sheet of images over SETTING=START:STOP:STEP (stop included) or SETTING=A,B,C; repeat the
    flag for a second axis. Settings: seed (stop excluded), guidance, adapter_guidance, steps,
    strength, unet or text of all LoRAs, lora0.strength, lora1.unet ...; checkpoint=RUN is all
    checkpoints of a run in their order and its end, in the place of --lora RUN. Empty: single
    images."""
    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    """PNG made by this program, whose image is repeated: its prompt, models on this disk, seed,
    sampler and size, which are printed. Flags win, and only they name files to write, start images,
    and models to fetch. Empty: none."""
    init_image: str = ""
    """Image to start from (with --strength), or to paint in (with --mask). Empty: noise alone."""
    mask: str = ""
    """Inpainting: image that is white where --init-image is to be painted. An inpainting model sees
    the rest of the image; of other models the latents of the rest are put back before each step.
    Empty: the whole image."""
    region: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A box of the image with a prompt of its own, "x0,y0,x1,y1: PROMPT" or "x0,y0,x1,y1: PROMPT;
    negative: TEXT", in pixels (left, top, right, bottom). Repeat the flag for several; where boxes
    overlap, they are averaged (Mix-of-Show). Without a negative prompt it has --negative. Empty:
    none."""
    skip_layers: tuple[int, ...] = ()
    """Skip-layer guidance, for transformers of joint blocks: numbers of blocks without which the
    prompts are asked for once more, and guidance moves away from that. Empty: none."""
    skip_layer_scale: float = 2.8
    """Strength of --skip-layers: that many times the difference is added."""
    skip_layer_start: Annotated[float, Share()] = 0.01
    """Share of the steps after which --skip-layers acts."""
    skip_layer_stop: Annotated[float, Share(zero=False, one=True)] = 0.2
    """Share of the steps before which --skip-layers ends."""
    refiner: str = ""
    """Folder or hub id of a refiner model, which runs the last steps as image to image. Empty:
    none."""
    adapter_kind: str = ""
    """Class of the adapters of a --lora that a run with --adapter.kind FILE.py:Class wrote
    (NAME_adapter.safetensors). The code in FILE.py is run. Empty: the kinds that are built in."""
