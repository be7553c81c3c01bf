"""Tensor names in single-file checkpoints of CompVis' latent-diffusion code and its descendants.

Each `name_*` function maps the shapes of a network in the diffusers layout to a table: key in the
single file -> `StoredTensor`. A table is made from the blocks that the network has, so that any
depth and width works; reading uses the same table in reverse. Its keys lack the network's prefix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError

Shape = tuple[int, ...]
# How a tensor is stored in the single file: unchanged, [o, i] as a 1x1 convolution [o, i, 1, 1], or
# transposed [i, o].
Form = Literal["same", "conv", "transposed"]
TEXT_MODEL_LEVEL = "text_model."  # of published names; transformers 5 dropped it (CLIPTextModel)
UNET_EDGES = {  # modules outside of the UNet's blocks
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
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
VAE_RESNET["conv_shortcut"] = "nin_shortcut"
VAE_ATTENTION = {  # diffusers' names, and its older ones
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a single file."""

    keys: tuple[str, ...]  # in the diffusers layout; several are stacked by rows
    shape: Shape  # in the single file
    form: Form = "same"
    also: tuple[str, ...] = ()  # other names under which files have it; read, never written
    spare: bool = False  # a copy for readers that expect it and never use it; not read

    def join_parts(self, parts: list[Tensor]) -> Tensor:
        """The tensor of the single file from those of `keys`."""
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.form == "transposed":
            tensor = tensor.T
        return tensor.reshape(self.shape)

    def split_parts(self, tensor: Tensor, shapes: Mapping[str, Shape]) -> list[Tensor]:
        """The tensors of `keys` from that of the single file, the exact inverse of `join_parts`."""
        if self.form == "transposed":
            tensor = tensor.T
        rows = [shapes[key][0] if shapes[key] else 1 for key in self.keys]
        pieces = tensor.split(rows) if len(rows) > 1 else [tensor]
        return [piece.reshape(shapes[key]) for piece, key in zip(pieces, self.keys)]


class NetworkNames(NamedTuple):
    """How single files name the tensors of one kind of network."""

    name_tensors: Callable[[Mapping[str, Shape]], dict[str, StoredTensor]]
    weights: str  # the stem of the weights' file in the diffusers layout


# ---------------------------------------------------------------- the UNet


def name_unet(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """The table of a UNet2DConditionModel. Raises UserError for a tensor without a name here."""
    return _name_tensors(shapes, name_unet_blocks(shapes))


def unet_module_names(paths: Iterable[str]) -> dict[str, str]:
    """Path of a layer in a UNet2DConditionModel -> its dotted name in CompVis' code.

    Layers that the original code does not have are left out.
    """
    paths = list(paths)
    names = _rename_all(paths, name_unet_blocks(paths))
    return {path: name for path, name in names.items() if name}


def name_unet_blocks(keys: Iterable[str]) -> dict[str, str]:
    """Block, or module outside of the blocks, -> its CompVis name, for the keys of one UNet.

    Resnets and samplers are numbered through: input_blocks from 1 (0 is conv_in), output_blocks
    from 0. An upsampler is the last member of its block's last entry.
    """
    counts = count_numbered(keys)
    modules = dict(UNET_EDGES)
    number = 1
    for i in range(counts["down_blocks"]):
        block = f"down_blocks.{i}"
        for j in range(counts[f"{block}.resnets"]):
            modules |= _inner(f"{block}.resnets.{j}", f"input_blocks.{number}.0", UNET_RESNET)
            modules[f"{block}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if counts[f"{block}.downsamplers"]:
            modules[f"{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    modules |= _inner("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    number = 1
    if counts["mid_block.attentions"]:
        modules["mid_block.attentions.0"] = "middle_block.1"
        number = 2
    modules |= _inner("mid_block.resnets.1", f"middle_block.{number}", UNET_RESNET)
    number = 0
    for i in range(counts["up_blocks"]):
        block = f"up_blocks.{i}"
        for j in range(counts[f"{block}.resnets"]):
            modules |= _inner(f"{block}.resnets.{j}", f"output_blocks.{number}.0", UNET_RESNET)
            modules[f"{block}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        member = 2 if counts[f"{block}.attentions"] else 1
        modules[f"{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{member}.conv"
    return modules


# ---------------------------------------------------------------- the other networks


def name_vae(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """The table of an AutoencoderKL. Attention's linear layers are 1x1 convolutions in the file.

    Blocks of the decoder are numbered from the finest. diffusers' older names of attention layers
    (query, key, value, proj_attn) are known. Raises UserError for a tensor without a name here.
    """
    counts = count_numbered(shapes)
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    modules |= _name_vae_half("encoder", "down_blocks", "downsample", counts)
    modules |= _name_vae_half("decoder", "up_blocks", "upsample", counts)
    entries = _name_tensors(shapes, modules)
    for key, entry in entries.items():
        if ".attentions." in entry.keys[0] and len(entry.shape) == 2:
            entries[key] = replace(entry, form="conv", shape=(*entry.shape, 1, 1))
    return entries


def _name_vae_half(
    part: str, blocks: str, sampler: str, counts: Mapping[str, int]
) -> dict[str, str]:
    """Modules of the encoder or the decoder -> their names in single files."""
    modules = {f"{part}.{name}": f"{part}.{name}" for name in ("conv_in", "conv_out")}
    modules[f"{part}.conv_norm_out"] = f"{part}.norm_out"
    depth = counts[f"{part}.{blocks}"]
    for i in range(depth):
        block = f"{part}.{blocks}.{i}"
        number = i if part == "encoder" else depth - 1 - i
        there = f"{part}.{blocks.removesuffix('_blocks')}.{number}"
        for j in range(counts[f"{block}.resnets"]):
            modules |= _inner(f"{block}.resnets.{j}", f"{there}.block.{j}", VAE_RESNET)
            modules |= _inner(f"{block}.attentions.{j}", f"{there}.attn.{j}", VAE_ATTENTION)
        modules[f"{block}.{sampler}rs.0.conv"] = f"{there}.{sampler}.conv"
    for j in range(2):
        modules |= _inner(f"{part}.mid_block.resnets.{j}", f"{part}.mid.block_{j + 1}", VAE_RESNET)
    return modules | _inner(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1", VAE_ATTENTION)


def name_clip(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """The table of a CLIPTextModel as transformers 4 published it, with the level text_model.

    Files without that level are also read.
    """
    entries = {}
    for key, shape in shapes.items():
        if key.startswith("text_projection"):
            entries[key] = StoredTensor((key,), shape)
        else:
            short = key.removeprefix(TEXT_MODEL_LEVEL)
            entries[TEXT_MODEL_LEVEL + short] = StoredTensor((key,), shape, also=(short,))
    return entries


def name_open_clip(shapes: Mapping[str, Shape]) -> dict[str, StoredTensor]:
    """The table of OpenCLIP's text tower: q, k, v are one in_proj, the projection is transposed.

    Raises UserError for a tensor without a name here.
    """
    level = TEXT_MODEL_LEVEL if any(key.startswith(TEXT_MODEL_LEVEL) for key in shapes) else ""
    modules = {f"{level}final_layer_norm": "ln_final"}
    modules[f"{level}embeddings.token_embedding"] = "token_embedding"
    entries: dict[str, StoredTensor] = {}
    for i in range(count_text_layers(shapes)):
        layer = f"{level}encoder.layers.{i}"
        block = f"transformer.resblocks.{i}"
        modules |= _inner(layer, block, OPEN_CLIP_LAYER)
        for leaf in ("weight", "bias"):
            parts = tuple(f"{layer}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            if all(part in shapes for part in parts):
                rows = sum(shapes[part][0] for part in parts)
                shape = (rows, *shapes[parts[0]][1:])
                entries[f"{block}.attn.in_proj_{leaf}"] = StoredTensor(parts, shape)
    if (key := f"{level}embeddings.position_embedding.weight") in shapes:
        entries["positional_embedding"] = StoredTensor((key,), shapes[key])
    if (key := "text_projection.weight") in shapes:
        entries["text_projection"] = StoredTensor((key,), shapes[key][::-1], "transposed")
    done = {f"{level}embeddings.position_ids"}  # a buffer that OpenCLIP does not have
    for entry in entries.values():
        done.update(entry.keys)
    rest = {key: shape for key, shape in shapes.items() if key not in done}
    return entries | _name_tensors(rest, modules)


NETWORK_NAMES = {
    "unet": NetworkNames(name_unet, "diffusion_pytorch_model"),
    "vae": NetworkNames(name_vae, "diffusion_pytorch_model"),
    "clip": NetworkNames(name_clip, "model"),
    "open_clip": NetworkNames(name_open_clip, "model"),
}


def spare_layers(entries: Mapping[str, StoredTensor], count: int) -> dict[str, StoredTensor]:
    """Entries for `count` further layers of an OpenCLIP text tower, copies of its last one.

    Stable Diffusion 2 reads the state before the last of 24 layers, so diffusers keeps 23; readers
    of single files build 24 and never run the last. kohya's scripts write the same copy.
    """
    layers = "transformer.resblocks"
    last = count_numbered(entries)[layers] - 1
    head = f"{layers}.{last}."
    copies = {}
    for key, entry in entries.items():
        if key.startswith(head):
            for n in range(1, count + 1):
                name = f"{layers}.{last + n}.{key.removeprefix(head)}"
                copies[name] = replace(entry, spare=True)
    return copies


def count_text_layers(keys: Iterable[str]) -> int:
    """The number of layers of a CLIP text encoder in the diffusers layout."""
    counts = count_numbered(keys)
    return max(counts["encoder.layers"], counts[f"{TEXT_MODEL_LEVEL}encoder.layers"])


def count_numbered(keys: Iterable[str]) -> Mapping[str, int]:
    """Path of a module list, such as `down_blocks.0.resnets` -> its length (highest index + 1).

    0 for a list that no key has.
    """
    counts: dict[str, int] = defaultdict(int)
    for key in keys:
        words = key.split(".")
        for i, word in enumerate(words[:-1]):
            if word.isdecimal():
                group = ".".join(words[:i])
                counts[group] = max(counts[group], int(word) + 1)
    return counts


# ---------------------------------------------------------------- helpers


def _name_tensors(
    shapes: Mapping[str, Shape], modules: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """The table of a network: each tensor is named after the innermost known module around it."""
    entries: dict[str, StoredTensor] = {}
    for key, name in _rename_all(shapes, modules).items():
        if not name:
            raise UserError(
                f"{key} has no name in a single file of this kind; "
                "only networks of the original architectures can be written as one"
            )
        if name in entries:
            raise UserError(
                f"{key} and {entries[name].keys[0]} would both be {name} in a single file; "
                "the network names one layer twice"
            )
        entries[name] = StoredTensor((key,), shapes[key])
    return entries


def _rename_all(keys: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Key -> the key with the innermost known module around it renamed; "" where none is known."""
    names = {}
    for key in keys:
        module = key
        while module and module not in modules:
            module = module.rpartition(".")[0]
        names[key] = modules[module] + key[len(module) :] if module else ""
    return names


def _inner(here: str, there: str, names: Mapping[str, str]) -> dict[str, str]:
    """Paths of the modules inside a module: diffusers' -> CompVis', each with its parent's path."""
    return {f"{here}.{name}": f"{there}.{other}" for name, other in names.items()}
