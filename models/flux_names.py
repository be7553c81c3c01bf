"""The names of Flux's layers and norms in the original code, which most adapter files use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from models.original_names import ADDED_QKV, QKV, BlockNames, find_original_names

NAMES = {  # diffusers' path -> the original code's, which kohya's files use
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
# Layers whose output is scale and shift here, shift and scale in the original code.
SWAPPED = frozenset({"norm_out.linear"})
DOUBLE_BLOCK = {  # names inside a double block
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE_BLOCK = {
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
BLOCKS = {
    "transformer_blocks": BlockNames(
        "double_blocks", DOUBLE_BLOCK, {"img_attn.qkv": QKV, "txt_attn.qkv": ADDED_QKV}
    ),
    "single_transformer_blocks": BlockNames(
        "single_blocks", SINGLE_BLOCK, {"linear1": (*QKV, "proj_mlp")}
    ),
}


def original_flux_names(paths: Iterable[str]) -> dict[str, Any]:
    """The fields `names`, `fused` and `swapped` of a `Component`, for the transformer's paths."""
    return find_original_names(paths, NAMES, BLOCKS) | {"swapped": SWAPPED}
