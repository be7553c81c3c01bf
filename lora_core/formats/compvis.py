"""How CompVis' latent-diffusion code and its descendants name the tensors of a diffusion UNet, a VAE and CLIP text encoders.

Each grammar is a function from the shapes of a network in the diffusers layout to a table: key in the single file -> `Entry`. Tables are made from
the network's own blocks, so any depth and width will do, and reading is the same table the other way round. Keys are relative to a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError

Shape = tuple[int, ...]
Form = Literal[
    "same", "conv", "transposed"
]  # how a tensor lies in the single file: as it is; [o, i] as a 1x1 convolution [o, i, 1, 1]; [i, o]
TEXT_MODEL_LEVEL = (
    "text_model."  # a level of published names that transformers 5 dropped from CLIPTextModel
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a single file."""

    keys: tuple[str, ...]  # in the diffusers layout; several are stacked by rows
    shape: Shape  # in the single file
    form: Form = "same"
    also: tuple[str, ...] = ()  # other names under which files have it; only read
    spare: bool = False  # a copy for readers that expect it and never use it; not read

    def encode(self, parts: list[Tensor]) -> Tensor:
        """The tensor of the single file from those of `keys`."""
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.form == "transposed":
            tensor = tensor.T
        return tensor.reshape(self.shape)

    def decode(self, tensor: Tensor, shapes: Mapping[str, Shape]) -> list[Tensor]:
        """The tensors of `keys` from that of the single file, the exact inverse of `encode`."""
        if self.form == "transposed":
            tensor = tensor.T
        rows = [shapes[key][0] if shapes[key] else 1 for key in self.keys]
        pieces = tensor.split(rows) if len(rows) > 1 else [tensor]
        return [piece.reshape(shapes[key]) for piece, key in zip(pieces, self.keys)]


class NetworkNames(NamedTuple):
    entries: Callable[[Mapping[str, Shape]], dict[str, StoredTensor]]
    weights: str  # the stem of the weights' file in the diffusers layout


def name_unet(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """UNet2DConditionModel. Resnets and samplers are numbered through: input_blocks from 1 (0 is conv_in), output_blocks from 0.

    Raises UserError for a tensor that this grammar has no name for.
    """
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    number = 1
    for i in range(_count_blocks(shapes, r"down_blocks\.(\d+)\..*")):
        block = f"down_blocks.{i}"
        for j in range(_count_blocks(shapes, rf"{block}\.resnets\.(\d+)\..*")):
            modules |= _resnet_names(f"{block}.resnets.{j}", f"input_blocks.{number}.0")
            modules[f"{block}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if _count_blocks(shapes, rf"{block}\.downsamplers\.(\d+)\..*"):
            modules[f"{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    attends = _count_blocks(shapes, r"mid_block\.attentions\.(\d+)\..*")
    middle = ["mid_block.resnets.0", *["mid_block.attentions.0"][:attends], "mid_block.resnets.1"]
    for n, name in enumerate(middle):
        modules |= (
            {name: f"middle_block.{n}"}
            if "attentions" in name
            else _resnet_names(name, f"middle_block.{n}")
        )
    number = 0
    for i in range(_count_blocks(shapes, r"up_blocks\.(\d+)\..*")):
        block = f"up_blocks.{i}"
        attends = _count_blocks(shapes, rf"{block}\.attentions\.(\d+)\..*")
        for j in range(_count_blocks(shapes, rf"{block}\.resnets\.(\d+)\..*")):
            modules |= _resnet_names(f"{block}.resnets.{j}", f"output_blocks.{number}.0")
            modules[f"{block}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        modules[f"{block}.upsamplers.0.conv"] = (
            f"output_blocks.{number - 1}.{2 if attends else 1}.conv"
        )
    return _name_tensors(shapes, modules)


def name_vae(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """AutoencoderKL. Linear layers of attention are 1x1 convolutions here; blocks of the decoder are numbered from the finest.

    diffusers' older names of these layers (query, key, value, proj_attn) are known. Raises UserError for a tensor without a name here.
    """
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for part, blocks, sampler in (
        ("encoder", "down_blocks", "downsample"),
        ("decoder", "up_blocks", "upsample"),
    ):
        short = blocks.removesuffix("_blocks")
        modules |= {f"{part}.{name}": f"{part}.{name}" for name in ("conv_in", "conv_out")} | {
            f"{part}.conv_norm_out": f"{part}.norm_out"
        }
        depth = _count_blocks(shapes, rf"{part}\.{blocks}\.(\d+)\..*")
        for i in range(depth):
            block, there = (
                f"{part}.{blocks}.{i}",
                f"{part}.{short}.{i if part == 'encoder' else depth - 1 - i}",
            )
            for j in range(_count_blocks(shapes, rf"{block}\.resnets\.(\d+)\..*")):
                modules |= _vae_resnet_names(
                    f"{block}.resnets.{j}", f"{there}.block.{j}"
                ) | _vae_attention_names(f"{block}.attentions.{j}", f"{there}.attn.{j}")
            modules[f"{block}.{sampler}rs.0.conv"] = f"{there}.{sampler}.conv"
        for j in range(2):
            modules |= _vae_resnet_names(
                f"{part}.mid_block.resnets.{j}", f"{part}.mid.block_{j + 1}"
            )
        modules |= _vae_attention_names(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1")
    entries = _name_tensors(shapes, modules)
    linear = [
        key
        for key, entry in entries.items()
        if ".attentions." in entry.keys[0] and len(entry.shape) == 2
    ]
    return entries | {
        key: replace(entries[key], form="conv", shape=(*entries[key].shape, 1, 1)) for key in linear
    }


def name_clip(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """CLIPTextModel as transformers 4 published it, with the level text_model; files without that level are read, too."""
    names = {
        key: key
        if key.startswith((TEXT_MODEL_LEVEL, "text_projection"))
        else TEXT_MODEL_LEVEL + key
        for key in shapes
    }
    return {
        name: StoredTensor(
            (key,),
            shapes[key],
            also=(name.removeprefix(TEXT_MODEL_LEVEL),)
            if name.startswith(TEXT_MODEL_LEVEL)
            else (),
        )
        for key, name in names.items()
    }


def name_open_clip(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """OpenCLIP's text tower: q, k and v are one in_proj, the projection is transposed. Raises UserError for a tensor without a name here."""
    level = TEXT_MODEL_LEVEL if any(key.startswith(TEXT_MODEL_LEVEL) for key in shapes) else ""
    modules = {
        f"{level}final_layer_norm": "ln_final",
        f"{level}embeddings.token_embedding": "token_embedding",
    }
    layer_names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    entries: dict[str, StoredTensor] = {}
    for i in range(count_text_layers(shapes)):
        layer, block = f"{level}encoder.layers.{i}", f"transformer.resblocks.{i}"
        modules |= {f"{layer}.{name}": f"{block}.{there}" for name, there in layer_names.items()}
        for leaf in ("weight", "bias"):
            parts = tuple(f"{layer}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            if all(part in shapes for part in parts):
                rows = sum(shapes[part][0] for part in parts)
                entries[f"{block}.attn.in_proj_{leaf}"] = StoredTensor(
                    parts, (rows, *shapes[parts[0]][1:])
                )
    if (key := f"{level}embeddings.position_embedding.weight") in shapes:
        entries["positional_embedding"] = StoredTensor((key,), shapes[key])
    if (key := "text_projection.weight") in shapes:
        entries["text_projection"] = StoredTensor((key,), shapes[key][::-1], "transposed")
    done = {key for entry in entries.values() for key in entry.keys} | {
        f"{level}embeddings.position_ids"
    }  # a buffer that OpenCLIP does not have
    return entries | _name_tensors(
        {key: shape for key, shape in shapes.items() if key not in done}, modules
    )


NETWORK_NAMES = {
    "unet": NetworkNames(name_unet, "diffusion_pytorch_model"),
    "vae": NetworkNames(name_vae, "diffusion_pytorch_model"),
    "clip": NetworkNames(name_clip, "model"),
    "open_clip": NetworkNames(name_open_clip, "model"),
}


def spare_layers(entries: Mapping[str, StoredTensor], count: int) -> dict[str, StoredTensor]:
    """Entries for `count` further layers of an OpenCLIP text tower, copies of its last one.

    Stable Diffusion 2 reads the state before the last of 24 layers, so diffusers keeps 23; readers of single files build 24 and never run the last.
    kohya's scripts write the same copy.
    """
    last = max(
        (
            int(match[1])
            for key in entries
            if (match := re.match(r"transformer\.resblocks\.(\d+)\.", key))
        ),
        default=-1,
    )
    head = f"transformer.resblocks.{last}."
    own = {key: entry for key, entry in entries.items() if key.startswith(head)}
    return {
        f"transformer.resblocks.{last + n}.{key.removeprefix(head)}": replace(entry, spare=True)
        for n in range(1, count + 1)
        for key, entry in own.items()
    }


def count_text_layers(shapes: Iterable[str]) -> int:
    """The number of layers of a CLIP text encoder in the diffusers layout."""
    return _count_blocks(shapes, r"(?:text_model\.)?encoder\.layers\.(\d+)\..*")


def _name_tensors(
    shapes: Mapping[str, Shape], modules: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """One entry a tensor, named by the innermost known module around it."""
    entries: dict[str, StoredTensor] = {}
    for key, shape in shapes.items():
        module, tail = key, ""
        while module and module not in modules:
            module, dot, word = module.rpartition(".")
            tail = dot + word + tail
        if not module:
            raise UserError(
                f"{key} has no name in a single file of this kind; only networks of the original architectures can be written as one"
            )
        name = modules[module] + tail
        if name in entries:
            raise UserError(
                f"{key} and {entries[name].keys[0]} would both be {name} in a single file; the network names one layer twice"
            )
        entries[name] = StoredTensor((key,), shape)
    return entries


def _count_blocks(keys: Iterable[str], pattern: str) -> int:
    """One more than the highest number in that place of a key; 0 where no key has it."""
    compiled = re.compile(pattern)
    return max((int(match[1]) + 1 for key in keys if (match := compiled.fullmatch(key))), default=0)


def _resnet_names(here: str, there: str) -> dict[str, str]:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
    }
    return {
        f"{here}.{name}": f"{there}.{other}"
        for name, other in (names | {"conv_shortcut": "skip_connection"}).items()
    }


def _vae_resnet_names(here: str, there: str) -> dict[str, str]:
    return {
        f"{here}.{name}": f"{there}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")
    } | {f"{here}.conv_shortcut": f"{there}.nin_shortcut"}


def _vae_attention_names(here: str, there: str) -> dict[str, str]:
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    older = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
    return {f"{here}.{name}": f"{there}.{other}" for name, other in (names | older).items()}
