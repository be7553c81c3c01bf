"""The names of Stable Diffusion 3's layers and norms in the original code, also of 3.5."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from models.original_names import ADDED_QKV, QKV, BlockNames, find_original_names

NAMES = {  # diffusers' path -> the original code's
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
JOINT_BLOCK = {  # names inside a block; attn2 is the second attention of 3.5 medium
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
JOINED = {
    "x_block.attn.qkv": QKV,
    "context_block.attn.qkv": ADDED_QKV,
    "x_block.attn2.qkv": tuple(path.replace("attn", "attn2") for path in QKV),
}
BLOCKS = {"transformer_blocks": BlockNames("joint_blocks", JOINT_BLOCK, JOINED)}


def original_sd3_names(paths: Collection[str]) -> dict[str, Any]:
    """The fields `names`, `fused` and `swapped` of a `Component`, for the transformer's paths.

    The text's last modulation is a scale and a shift without a gate, as the image's in norm_out;
    both have the other order in the original code.
    """
    numbers = [int(path.split(".")[1]) for path in paths if path.startswith("transformer_blocks.")]
    last = f"transformer_blocks.{max(numbers, default=0)}.norm1_context.linear"
    swapped = frozenset({"norm_out.linear", last}.intersection(paths))
    return find_original_names(paths, NAMES, BLOCKS) | {"swapped": swapped}
