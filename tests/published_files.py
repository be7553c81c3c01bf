"""The tensors of files that public tools write for today's models: names and shapes, no weights.

Read from the tools' own code, 2026: diffusers' DreamBooth scripts, sd-scripts, musubi-tuner,
ai-toolkit, OneTrainer and SimpleTuner. Sizes are in units of the model's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

Shape = tuple[int, ...]
Sizes = Mapping[str, tuple[int, int]]  # layer -> (outputs, inputs) in units of the width


class Blocks(NamedTuple):
    """The same layers in several blocks."""

    name: str  # the start of their names, {} for the number
    numbers: Iterable[int]
    layers: Sizes


class PublishedFile(NamedTuple):
    """What one tool writes for one model."""

    kind: str  # name in PUBLISHED_MODELS
    format: str  # name in FORMATS
    width: int
    leaves: str  # kind of the tensors of a layer, see `leaf_shapes`
    blocks: tuple[Blocks, ...]
    header: Mapping[str, str] = {}


IMAGE = {"attn.to_q": (1, 1), "attn.to_k": (1, 1), "attn.to_v": (1, 1), "attn.to_out.0": (1, 1)}
TEXT = {"attn.add_q_proj": (1, 1), "attn.add_k_proj": (1, 1), "attn.add_v_proj": (1, 1)}
SECOND = {name.replace("attn", "attn2"): size for name, size in IMAGE.items()}
TEXT_OUT = {"attn.to_add_out": (1, 1)}
# Stable Diffusion 3 in the original code
ATTENTION = {"attn.qkv": (3, 1), "attn.proj": (1, 1)}
JOINT = {**ATTENTION, "mlp.fc1": (4, 1), "mlp.fc2": (1, 4), "adaLN_modulation.1": (6, 1)}
JOINT_2 = {**JOINT, "attn2.qkv": (3, 1), "attn2.proj": (1, 1), "adaLN_modulation.1": (9, 1)}
JOINT_END = {"attn.qkv": (3, 1), "adaLN_modulation.1": (2, 1)}  # of the text in the last block
# FLUX.2 in the original code, and in diffusers'
DOUBLE = {
    "img_attn.qkv": (3, 1),
    "img_attn.proj": (1, 1),
    "img_mlp.0": (6, 1),
    "img_mlp.2": (1, 3),
    "txt_attn.qkv": (3, 1),
    "txt_attn.proj": (1, 1),
    "txt_mlp.0": (6, 1),
    "txt_mlp.2": (1, 3),
}
SINGLE = {"linear1": (9, 1), "linear2": (1, 4)}
SINGLE_2 = {"attn.to_qkv_mlp_proj": (9, 1), "attn.to_out": (1, 4)}


def joint_blocks(head: str, count: int, dual: int = 0) -> tuple[Blocks, ...]:
    """All layers of Stable Diffusion 3's blocks, of which the first `dual` have two attentions."""
    image, text = head + "joint_blocks.{}.x_block.", head + "joint_blocks.{}.context_block."
    return (
        Blocks(image, range(dual), JOINT_2),
        Blocks(image, range(dual, count), JOINT),
        Blocks(text, range(count - 1), JOINT),
        Blocks(text, (count - 1,), JOINT_END),
    )


def flux2_blocks(head: str, double: int, single: int) -> tuple[Blocks, ...]:
    """All layers of FLUX.2's blocks in the original code."""
    return (
        Blocks(head + "double_blocks.{}.", range(double), DOUBLE),
        Blocks(head + "single_blocks.{}.", range(single), SINGLE),
    )


def klein_blocks(head: str, double: int, single: int) -> tuple[Blocks, ...]:
    """What diffusers' script for FLUX.2 adapts: attention of the image, and the single blocks."""
    return (
        Blocks(head + "transformer_blocks.{}.", range(double), IMAGE),
        Blocks(head + "single_transformer_blocks.{}.", range(single), SINGLE_2),
    )


def diffusers_blocks(head: str, count: int, dual: int = 0) -> tuple[Blocks, ...]:
    """The attention of Stable Diffusion 3's blocks in diffusers' names."""
    name = head + "transformer_blocks.{}."
    return (
        Blocks(name, range(count), {**IMAGE, **TEXT}),
        Blocks(name, range(count - 1), TEXT_OUT),
        Blocks(name, range(dual), SECOND),
    )


def simpletuner_blocks(head: str, count: int, dual: int = 0) -> tuple[Blocks, ...]:
    """What SimpleTuner adapts of Stable Diffusion 3: every attention's image."""
    name = head + "transformer_blocks.{}."
    return (Blocks(name, range(count), IMAGE), Blocks(name, range(dual), SECOND))


KLEIN_4B, KLEIN_9B, DEV = (5, 20), (8, 24), (8, 48)  # double and single blocks
SD3_HEADER = {"ss_network_module": "networks.lora_sd3"}
MUSUBI = {"ss_network_module": "networks.lora_flux_2"}
UNET, PEFT, COMFY, ONE = "lora_unet.", "transformer.", "diffusion_model.", "lora_transformer."
PUBLISHED_FILES: dict[str, PublishedFile] = {
    "diffusers, SD 3.5 large": PublishedFile(
        "sd3.5-large", "diffusers", 2432, "peft", diffusers_blocks(PEFT, 38)
    ),
    "sd-scripts, SD 3 medium": PublishedFile(
        "sd3", "kohya", 1536, "kohya", joint_blocks(UNET, 24), SD3_HEADER
    ),
    "sd-scripts, SD 3.5 medium": PublishedFile(
        "sd3.5-medium", "kohya", 1536, "kohya", joint_blocks(UNET, 24, 13), SD3_HEADER
    ),
    "sd-scripts, SD 3.5 large": PublishedFile(
        "sd3.5-large", "kohya", 2432, "kohya", joint_blocks(UNET, 38), SD3_HEADER
    ),
    "sd-scripts, attention of SD 3 medium": PublishedFile(
        "sd3",
        "kohya",
        1536,
        "kohya",
        (Blocks(UNET + "joint_blocks.{}.x_block.", range(24), ATTENTION),),
        SD3_HEADER | {"ss_base_model_version": "medium"},
    ),
    "SimpleTuner, SD 3.5 medium": PublishedFile(
        "sd3.5-medium", "diffusers", 1536, "peft", simpletuner_blocks(PEFT, 24, 13)
    ),
    "SimpleTuner LoKr, SD 3.5 medium": PublishedFile(
        "sd3.5-medium", "kohya", 1536, "lokr", simpletuner_blocks("lycoris.", 24, 13)
    ),
    "OneTrainer, SD 3.5 medium": PublishedFile(
        "sd3.5-medium", "kohya", 1536, "kohya", diffusers_blocks(ONE, 24, 13)
    ),
    "OneTrainer for ComfyUI, SD 3.5 large": PublishedFile(
        "sd3.5-large", "comfyui", 2432, "comfy", joint_blocks(COMFY, 38)
    ),
    "diffusers, klein 4B": PublishedFile(
        "flux2-klein-base-4b", "diffusers", 3072, "peft", klein_blocks(PEFT, *KLEIN_4B)
    ),
    "diffusers, double blocks of klein 4B": PublishedFile(
        "flux2-klein-base-4b", "diffusers", 3072, "peft", klein_blocks(PEFT, 5, 0)
    ),
    "diffusers, klein 9B": PublishedFile(
        "flux2-klein-base-9b", "diffusers", 4096, "peft", klein_blocks(PEFT, *KLEIN_9B)
    ),
    "diffusers, dev": PublishedFile(
        "flux2-dev", "diffusers", 6144, "peft", klein_blocks(PEFT, *DEV)
    ),
    "musubi-tuner, klein 4B": PublishedFile(
        "flux2-klein-base-4b",
        "kohya",
        3072,
        "kohya",
        flux2_blocks(UNET, *KLEIN_4B),
        MUSUBI | {"ss_base_model_version": "flux_2_klein_4b"},
    ),
    "musubi-tuner, klein 9B": PublishedFile(
        "flux2-klein-base-9b",
        "kohya",
        4096,
        "kohya",
        flux2_blocks(UNET, *KLEIN_9B),
        MUSUBI | {"modelspec.architecture": "Flux.2-klein-9b/lora"},
    ),
    "musubi-tuner, dev": PublishedFile(
        "flux2-dev",
        "kohya",
        6144,
        "kohya",
        flux2_blocks(UNET, *DEV),
        MUSUBI | {"ss_base_model_version": "flux_2_dev"},
    ),
    "ai-toolkit, klein 4B": PublishedFile(
        "flux2-klein-base-4b",
        "comfyui",
        3072,
        "peft",
        flux2_blocks(COMFY, *KLEIN_4B),
        {"ss_base_model_version": "flux2_klein_4b"},
    ),
    "ai-toolkit LoKr, klein 9B": PublishedFile(
        "flux2-klein-base-9b",
        "comfyui",
        4096,
        "lokr",
        flux2_blocks(COMFY, *KLEIN_9B),
        {"ss_base_model_version": "flux2_klein_9b"},
    ),
    "ai-toolkit, dev": PublishedFile(
        "flux2-dev",
        "comfyui",
        6144,
        "peft",
        flux2_blocks(COMFY, *DEV),
        {"ss_base_model_version": "flux2"},
    ),
    "OneTrainer, klein 4B": PublishedFile(
        "flux2-klein-base-4b",
        "diffusers",
        3072,
        "dotted",
        klein_blocks(PEFT, *KLEIN_4B),
        {"modelspec.architecture": "Flux.2/lora"},
    ),
    "SimpleTuner for ComfyUI, klein 9B": PublishedFile(
        "flux2-klein-base-9b", "comfyui", 4096, "comfy", flux2_blocks(COMFY, *KLEIN_9B)
    ),
    "SimpleTuner LoKr, klein 9B": PublishedFile(
        "flux2-klein-base-9b", "kohya", 4096, "lokr", klein_blocks("lycoris.", *KLEIN_9B)
    ),
    "DiffSynth, klein 4B": PublishedFile(
        "flux2-klein-base-4b", "peft", 3072, "default", klein_blocks("", *KLEIN_4B)
    ),
    "peft on the original code, klein 9B": PublishedFile(
        "flux2-klein-base-9b", "peft", 4096, "peft", flux2_blocks("base_model.model.", *KLEIN_9B)
    ),
}


def leaf_shapes(leaves: str, out: int, inner: int, rank: int = 2) -> dict[str, Shape]:
    """End of a tensor's name -> its shape, for one layer."""
    if leaves == "lokr":
        return {".lokr_w1": (4, 4), ".lokr_w2": (out // 4, inner // 4), ".alpha": ()}
    down, up = {
        "peft": (".lora_A.weight", ".lora_B.weight"),
        "comfy": (".lora_A.weight", ".lora_B.weight"),
        "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    }.get(leaves, (".lora_down.weight", ".lora_up.weight"))
    shapes: dict[str, Shape] = {down: (rank, inner), up: (out, rank)}
    if leaves in ("kohya", "comfy", "dotted"):
        shapes[".alpha"] = ()
    return shapes


def list_tensors(file: PublishedFile) -> dict[str, Shape]:
    """Name -> shape of every tensor; in kohya's names all but the last dots are underscores."""
    shapes: dict[str, Shape] = {}
    for blocks in file.blocks:
        for number in blocks.numbers:
            for layer, (out, inner) in blocks.layers.items():
                name = blocks.name.format(number) + layer
                if file.format == "kohya":
                    name = name.replace(".", "_")
                own = leaf_shapes(file.leaves, out * file.width, inner * file.width)
                shapes |= {name + leaf: shape for leaf, shape in own.items()}
    return shapes
