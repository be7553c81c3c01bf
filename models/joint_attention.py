"""Attention where text and image attend to each other, and its maps: Flux, Stable Diffusion 3.

In a double (or joint) block text and image have their own projections; in a single block the
sequence of text and image is projected as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.cross_attention import AttentionMap, attention_probabilities


class JointAttention:
    """The processor of one attention module, which can keep queries and keys.

    It computes what diffusers' own processor computes; that of Stable Diffusion 3 has the image
    before the text, which changes the order of sums only.
    """

    def __init__(self) -> None:
        self.keeps_queries = False
        self.queries: Tensor | None = None  # [b, heads, s + h w, d] of text and image, rotated
        self.keys: Tensor | None = None  # the same of the keys

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any, mask: Tensor | None) -> Tensor:
        """[b, s + h w, heads * d] from queries, keys and values [b, s + h w, heads, d]."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if self.keeps_queries:
            self.queries, self.keys = q, k
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


class DoubleAttention(JointAttention):
    """The processor of a double block's attention module."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [b, h w, c] of the image
        encoder_hidden_states: Tensor,  # [b, s, c] of the text
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states
        heads = attn.heads
        q = _join(attn.norm_added_q, attn.add_q_proj(text), attn.norm_q, attn.to_q(image), heads)
        k = _join(attn.norm_added_k, attn.add_k_proj(text), attn.norm_k, attn.to_k(image), heads)
        v = torch.cat([attn.add_v_proj(text), attn.to_v(image)], dim=1).unflatten(-1, (heads, -1))
        y = self.attend(q, k, v, image_rotary_emb, attention_mask)
        s = text.shape[1]
        of_image = attn.to_out[1](attn.to_out[0](y[:, s:].contiguous()))
        of_text = y[:, :s].contiguous()
        if (
            attn.context_pre_only
        ):  # the last block of Stable Diffusion 3, after which no text is read
            return of_image, of_text
        return of_image, attn.to_add_out(of_text)


class SingleAttention(JointAttention):
    """The processor of a single block's attention module, which has no projection at its end."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [b, s + h w, c] of text and image
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        split = (attn.heads, -1)
        q = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, split))
        k = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, split))
        v = attn.to_v(hidden_states).unflatten(-1, split)
        return self.attend(q, k, v, image_rotary_emb, attention_mask)


def install_joint_attention(transformer: nn.Module) -> dict[str, JointAttention]:
    """Path -> the new processor of every block's attention module."""
    found: dict[str, JointAttention] = {}
    for path, module in transformer.named_modules():
        if not hasattr(module, "set_processor") or path.endswith(".attn2"):
            continue  # attn2, in Stable Diffusion 3.5 medium, is the image's alone
        is_double = getattr(module, "add_q_proj", None) is not None
        found[path] = DoubleAttention() if is_double else SingleAttention()
        module.set_processor(found[path])
    return found


@contextmanager
def keep_maps(
    layers: Mapping[str, JointAttention], grid: tuple[int, int], maps: list[AttentionMap] | None
) -> Iterator[None]:
    """A context for one forward pass; appends the layers' maps to `maps`, if any, at its end.

    softmax(q k^T / sqrt(d)) over text and image keys, the text's columns of it: rows sum to less
    than 1. `grid` is the number of patches (rows, columns) of the image.
    """
    for layer in layers.values():
        layer.keeps_queries = maps is not None
    try:
        yield
        if maps is not None:
            for path, layer in layers.items():
                maps.append(AttentionMap(path, _text_columns(layer, grid[0] * grid[1]), *grid))
    finally:
        for layer in layers.values():
            layer.keeps_queries, layer.queries, layer.keys = False, None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, heads, s, d] (arXiv 2104.09864 eq. 34), in fp32.

    Each pair of adjacent channels is rotated by its angle, given as cos and sin [s, d].
    """
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _text_columns(layer: JointAttention, positions: int) -> Tensor:
    """[b, heads, h w, s] attention of the image's h w positions on the text."""
    assert layer.queries is not None and layer.keys is not None
    s = layer.keys.shape[2] - positions
    return attention_probabilities(layer.queries[:, :, s:], layer.keys)[..., :s]


def _join(text_norm: Any, text: Tensor, image_norm: Any, image: Tensor, heads: int) -> Tensor:
    """[b, s + h w, heads, d] of text and image, each through its own norm, if it has one."""
    parts = []
    for norm, x in ((text_norm, text), (image_norm, image)):
        split = x.unflatten(-1, (heads, -1))
        parts.append(split if norm is None else norm(split))
    return torch.cat(parts, dim=1)
