"""Cross-attention of a UNet by layer: a text for each layer, texts of regions, attention maps.

Each cross-attention module gets a `LayerAttention` as its processor. It computes what diffusers'
default processor computes and has three additions, all of which read one `CrossAttention`:

- where prompt embeds have a layer axis [b, layers, s, d], layer l reads slice l (P+, arXiv
  2303.09522; the layers are in the order that the family gives). Pipelines that take three axes
  only get them as [b, s, layers * d], see `pack_layers`;
- inside the boxes of regions, a layer's output comes from the regions' own texts (Mix-of-Show,
  arXiv 2305.18292 section 3.4);
- while maps are asked for, queries and keys are kept, from which `maps` computes the attention
  probabilities. No second forward pass is needed, and gradients reach the queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.errors import UserError
from lora_core.kernels.reference import without_autocast

UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
CROSS_KEYS = ".attn2.to_k"


class AttentionMap(NamedTuple):
    """Attention of one layer's image positions on the prompt tokens.

    In a UNet the probabilities of a position sum to 1 over the tokens; where text and image attend
    to each other, the rest of 1 is attention on the image.
    """

    name: str  # path of the attention module in the denoiser
    probabilities: Tensor  # [b, heads, h * w, tokens], fp32
    h: int  # rows of positions; coarser layers have fewer than the latents
    w: int  # positions in a row


class Box(NamedTuple):
    """A rectangle of the image, its sides as fractions of the image's width and height."""

    left: float
    top: float
    right: float
    bottom: float

    def cells(self, height: int, width: int) -> tuple[slice, slice]:
        """The (rows, columns) of a grid whose cells lie wholly inside the box."""
        # 1e-9: a side on a cell's edge, such as 1/3 of 12 cells, is not moved by rounding
        rows = slice(math.ceil(self.top * height - 1e-9), math.floor(self.bottom * height + 1e-9))
        columns = slice(math.ceil(self.left * width - 1e-9), math.floor(self.right * width + 1e-9))
        return rows, columns


class Region(NamedTuple):
    """A box and the prompt embeds that are used inside it."""

    box: Box
    prompt_embeds: Tensor  # [b, s, d], or [b, layers, s, d]


class CrossAttention:
    """The cross-attention layers of one denoiser, and what a forward pass asks of them."""

    def __init__(self, denoiser: nn.Module, paths: Sequence[str]) -> None:
        self.layers: dict[str, LayerAttention] = {}
        self.count = len(paths)
        self.regions: Sequence[Region] = ()
        self.latent_size = (0, 0)  # (h, w) of the latents in this forward pass
        self.keeps_queries = False  # whether layers keep their queries and keys
        self.unused: set[int] = set()  # regions that no layer has used in this forward pass
        for index, path in enumerate(paths):
            module: Any = denoiser.get_submodule(path)
            layer = LayerAttention(self, index).to(module.to_q.weight.device)
            module.set_processor(layer)
            self.layers[path] = layer

    @contextmanager
    def forward_pass(
        self,
        latent_size: tuple[int, int],
        regions: Sequence[Region],
        maps: list[AttentionMap] | None,
    ) -> Iterator[None]:
        """A context for one forward pass with regions, or with maps, which are appended to `maps`.

        A forward pass with neither needs no context.
        """
        self.regions, self.latent_size = regions, latent_size
        self.keeps_queries = maps is not None
        self.unused = set(range(len(regions)))
        try:
            yield
            if maps is not None:
                maps += self._maps()
            if self.unused:
                raise _unused_region(self.regions[min(self.unused)].box)
        finally:
            self.regions, self.keeps_queries = (), False
            for layer in self.layers.values():
                layer.queries = layer.keys = None

    def _maps(self) -> Iterator[AttentionMap]:
        """softmax(q k^T / sqrt(d)) of every layer, in fp32."""
        for path, layer in self.layers.items():
            assert layer.queries is not None and layer.keys is not None
            probabilities = attention_probabilities(layer.queries, layer.keys)
            size = grid_size(self.latent_size, probabilities.shape[2])
            yield AttentionMap(path, probabilities, *size)


class LayerAttention(nn.Module):
    """The processor of one cross-attention module, which diffusers calls in its forward."""

    index: Tensor  # [1] of the layer's slice in prompt embeds with a layer axis

    def __init__(self, shared: CrossAttention, index: int) -> None:
        super().__init__()
        self.shared = shared
        # a tensor, so that torch.compile makes one code for all layers
        self.register_buffer("index", torch.tensor([index]), persistent=False)
        self.queries: Tensor | None = None  # [b, heads, h w, d] of the last forward pass
        self.keys: Tensor | None = None  # [b, heads, s, d]

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,  # [b, h w, c]
        # [b, s, d], [b, layers, s, d] or [b, s, layers * d]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        text, split = encoder_hidden_states, (attn.heads, -1)
        assert text is not None
        if text.ndim != 3 or text.shape[-1] != attn.cross_attention_dim:
            text = self._own_text(attn, text)
        q = attn.to_q(hidden_states).unflatten(-1, split).transpose(1, 2)
        k = attn.to_k(text).unflatten(-1, split).transpose(1, 2)
        v = attn.to_v(text).unflatten(-1, split).transpose(1, 2)
        if attention_mask is not None:
            attention_mask = _mask_for_heads(attn, attention_mask, text)
        if self.shared.keeps_queries:
            self.queries, self.keys = q, k
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        if self.shared.regions:
            y = self._replace_regions(attn, q, y)
        y = y.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](y))

    def _own_text(self, attn: Any, text: Tensor) -> Tensor:
        """[b, s, d] the text of this layer."""
        count, width = self.shared.count, attn.cross_attention_dim
        if text.ndim == 3 and count > 1 and text.shape[-1] == count * width:
            text = text.unflatten(-1, (count, width)).transpose(1, 2)
        return text.index_select(1, self.index).squeeze(1) if text.ndim == 4 else text

    def _replace_regions(self, attn: Any, q: Tensor, context: Tensor) -> Tensor:
        """[b, heads, h w, d] the output with the regions' own attention inside their boxes.

        Where boxes overlap, their outputs are averaged.
        """
        size = grid_size(self.shared.latent_size, q.shape[2])
        queries, y = q.unflatten(2, size), context.unflatten(2, size)
        total = torch.zeros_like(y)
        count = torch.zeros(size, dtype=y.dtype, device=y.device)
        for number, region in enumerate(self.shared.regions):
            rows, columns = region.box.cells(*size)
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            self.shared.unused.discard(number)
            text = self._own_text(attn, region.prompt_embeds.to(q.dtype))
            k = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            v = attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            cropped = queries[:, :, rows, columns]
            inside = F.scaled_dot_product_attention(cropped.flatten(2, 3), k, v)
            total[:, :, rows, columns] += inside.unflatten(2, cropped.shape[2:4])
            count[rows, columns] += 1
        count = count[..., None]
        return torch.where(count > 0, total / count.clamp(min=1), y).flatten(2, 3)


def cross_attention_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """A UNet's cross-attention modules, those of the down blocks first, then middle, then up.

    Mix-of-Show, kohya's XTI and P+ (arXiv 2303.09522) count them in this order; the UNet itself
    lists the middle block last. None for a network with other blocks.
    """
    found = dict.fromkeys(path.removesuffix(".to_k") for path in paths if path.endswith(CROSS_KEYS))
    blocks = {path: path.split(".")[0] for path in found}
    if not set(UNET_BLOCKS).issuperset(blocks.values()):
        return ()
    return tuple(sorted(found, key=lambda path: UNET_BLOCKS.index(blocks[path])))


def pack_layers(prompt_embeds: Tensor) -> Tensor:
    """[b, layers, s, d] prompt embeds as [b, s, layers * d].

    diffusers' pipelines take three axes; `LayerAttention` knows the packed ones by their width.
    """
    return prompt_embeds.transpose(1, 2).flatten(2)


def grid_size(latent_size: tuple[int, int], positions: int) -> tuple[int, int]:
    """(h, w) of a layer with that many positions: the latents' size halved often enough.

    Halves are rounded up, as a convolution of stride 2 does.

    Raises UserError where no number of halvings gives as many positions.
    """
    height, width = latent_size
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != positions:
        raise UserError(
            f"an attention layer has {positions} positions, no halving of the latents' "
            f"{latent_size[0]} x {latent_size[1]}; the shape of this network's maps is not known"
        )
    return height, width


def attention_probabilities(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) [b, heads, q, k] of [b, heads, q, d] and [b, heads, k, d], in fp32,
    also under autocast.
    """
    with without_autocast(queries):
        q, k = queries.float(), keys.float()
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def attention_on_tokens(
    maps: Sequence[AttentionMap], positions: Tensor, size: tuple[int, int]
) -> Tensor:
    """[b, *size] attention on the tokens at `positions` [b, n], where -1 stands for none.

    The sum over the tokens, averaged over heads and layers; each layer's map is first resized to
    `size` bilinearly. An example without tokens has zeros.
    """
    is_token = (positions >= 0).to(torch.float32)
    total = torch.zeros((), device=positions.device)
    for m in maps:
        mean = m.probabilities.mean(1)  # [b, h w, tokens]
        columns = positions.clamp(min=0)[:, None].expand(-1, mean.shape[1], -1)
        on_tokens = (mean.gather(2, columns) * is_token[:, None]).sum(2)
        grid = on_tokens.unflatten(1, (1, m.h, m.w))
        total = total + F.interpolate(grid, size, mode="bilinear")[:, 0]
    return total / len(maps)


def _unused_region(box: Box) -> UserError:
    """The error for a region that is smaller than every layer's cells."""
    sides = ", ".join(f"{side:g}" for side in box)
    return UserError(
        f"the region {sides} (left, top, right, bottom as fractions of the image) holds no whole "
        "cell of any attention layer, so its prompt would have no effect; enlarge it"
    )


def _mask_for_heads(attn: Any, mask: Tensor, text: Tensor) -> Tensor:
    """diffusers' attention mask as [b, heads, 1, s]."""
    b, s = text.shape[:2]
    prepared = attn.prepare_attention_mask(mask, s, b)
    return prepared.view(b, attn.heads, -1, prepared.shape[-1])
