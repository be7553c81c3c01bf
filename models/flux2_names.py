"""The names of FLUX.2's layers and norms in the original code: Flux's, and shared modulation.

One layer computes q, k, v and the MLP's input of a single block in both codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from models import flux_names
from models.original_names import ADDED_QKV, QKV, BlockNames, find_original_names

ENDS = ("x_embedder", "context_embedder", "norm_out.linear", "proj_out")  # as Flux's
NAMES = {path: flux_names.NAMES[path] for path in ENDS} | {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
DOUBLE_BLOCK = flux_names.DOUBLE_BLOCK | {  # whose attention has Flux's names
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE_BLOCK = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
BLOCKS = {
    "transformer_blocks": BlockNames(
        "double_blocks", DOUBLE_BLOCK, {"img_attn.qkv": QKV, "txt_attn.qkv": ADDED_QKV}
    ),
    "single_transformer_blocks": BlockNames("single_blocks", SINGLE_BLOCK, {}),
}


def original_flux2_names(paths: Iterable[str]) -> dict[str, Any]:
    """The fields `names`, `fused` and `swapped` of a `Component`, for the transformer's paths."""
    return find_original_names(paths, NAMES, BLOCKS) | {"swapped": flux_names.SWAPPED}
