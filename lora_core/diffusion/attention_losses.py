"""Attention regularization: learned tokens should act inside the mask of their subject.

Mix-of-Show (arXiv 2305.18292, its trainer's `cal_attn_reg`) reads the first learned token of a
prompt as an adjective, which must not act outside the mask, and the second as the subject. Here are
its formula and one that depends neither on the rest of the batch nor on the resolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.cross_attention import AttentionMap


class TokenMaps(NamedTuple):
    """Attention of one resolution on two tokens, averaged over layers and heads."""

    adjective: Tensor  # [b, h, w]
    subject: Tensor  # [b, h, w]


def token_maps(maps: Sequence[AttentionMap], positions: Tensor) -> Iterator[TokenMaps]:
    """The maps of each resolution, the finest first, on the tokens at `positions` [b, n].

    The first position of a prompt is that of the adjective, the second that of the subject. The
    only learned token of a prompt is both. Without any the maps are those of the last token.
    """
    first, second = positions[:, 0], positions[:, min(1, positions.shape[1] - 1)]
    second = torch.where(second < 0, first, second)
    grids = sorted({(m.h, m.w) for m in maps}, reverse=True)
    rows = torch.arange(len(positions), device=positions.device)
    for grid in grids:
        same = [m.probabilities for m in maps if (m.h, m.w) == grid]
        mean = torch.cat(same, dim=1).mean(1).mT.unflatten(2, grid)  # [b, s, h, w]
        yield TokenMaps(mean[rows, first], mean[rows, second])


def mixofshow_regularization(
    maps: Sequence[AttentionMap],
    positions: Tensor,  # [b, n] of the learned tokens of each prompt
    mask: Tensor,  # [b, 1, H, W]
    *,
    full_identity: bool,
) -> Tensor:
    """0-dim: Mix-of-Show's regularization, before its weight `attn_reg_weight`.

    At each resolution both maps are divided by their maximum over the batch; the adjective's mean
    where the (nearest) mask is 0 is added to the subject's squared distance to the mask
    (`reg_full_identity`), or to the subject's mean where the mask is 0. Resolutions are summed.
    Examples without learned tokens do not count (in the source every prompt has both). Where the
    mask is nowhere 0, the source gets NaN and leaves the whole term out; here it is 0.
    """
    has_tokens = (positions[:, 0] >= 0)[:, None, None]
    total = torch.zeros((), device=mask.device)
    is_defined = torch.ones((), dtype=torch.bool, device=mask.device)
    for adjective, subject in token_maps(maps, positions):
        target = F.interpolate(mask, adjective.shape[1:], mode="nearest")[:, 0]
        counted = has_tokens.expand_as(target)
        outside = counted & (target == 0)
        is_defined = is_defined & outside.any()
        adjective = _divide_by_maximum(adjective, counted)
        subject = _divide_by_maximum(subject, counted)
        total = total + mean_where(adjective, outside)
        if full_identity:
            total = total + mean_where((subject - target) ** 2, counted)
        else:
            total = total + mean_where(subject, outside)
    return torch.where(is_defined, total, 0)


def attention_outside(
    maps: Sequence[AttentionMap],
    positions: Tensor,  # [b, n] of the learned tokens of each prompt
    mask: Tensor,  # [b, 1, H, W] in [0, 1]
    *,
    full_identity: bool,
) -> Tensor:
    """[b] in [0, 2]: the normalized regularization of each example.

    A map divided by its sum is a distribution over positions. The adjective adds the share of it
    that lies outside the mask, the subject the same; with `full_identity` the subject adds its
    total variation distance to the mask's own distribution. Resolutions are averaged, masks of
    coarse ones are area means. 0 for examples without learned tokens or with an empty mask.
    """
    has_tokens = positions[:, 0] >= 0
    resolutions = []
    for adjective, subject in token_maps(maps, positions):
        target = F.interpolate(mask.float(), adjective.shape[1:], mode="area")[:, 0]
        loss = _share_outside(adjective, target)
        if full_identity:
            wanted = target / target.sum((1, 2), keepdim=True).clamp(min=1e-12)
            own = subject / subject.sum((1, 2), keepdim=True)
            loss = loss + 0.5 * (own - wanted).abs().sum((1, 2))
        else:
            loss = loss + _share_outside(subject, target)
        resolutions.append(loss)
    is_used = has_tokens & (mask.flatten(1).amax(1) > 0)
    return torch.where(is_used, torch.stack(resolutions).mean(0), 0)


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """0-dim mean of the values where `counted` is true; 0 where it is nowhere true."""
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


def _divide_by_maximum(attention: Tensor, counted: Tensor) -> Tensor:
    """The attention [b, h, w] divided by its maximum where `counted` is true.

    Divided by 1 where it is nowhere true: 0 / 0 would make every gradient NaN.
    """
    maximum = torch.where(counted, attention, 0).amax()
    return attention / torch.where(counted.any(), maximum, 1)


def _share_outside(attention: Tensor, target: Tensor) -> Tensor:
    """[b] the share of the attention [b, h, w] outside the mask `target` [b, h, w]."""
    return (attention * (1 - target)).sum((1, 2)) / attention.sum((1, 2))
