"""Reference implementations of the adapter operations, in plain differentiable torch.

Every other implementation is tested against these functions. Dtypes: adapter factors are fp32 (fp64
on an fp64 base). They are cast to x's dtype for the matrix products, so a bf16 base gives a bf16
result, and autograd casts their gradients back to fp32. Under torch.autocast the products run in
autocast's dtype, like the base layer's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASK = 0xFFFFFFFF  # the hash works on uint32 values, held in int64 here
# 2^32 / golden ratio: keeps the all-zero key away from the mixer's fixed point 0.
GOLDEN = 0x9E3779B9


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of adapters, norms and sums on a base of some dtype (bf16, fp16, fp8, int8): fp64
    for fp64, else fp32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast is off on x's device.

    The meta device has no autocast, and torch 2.13 raises for it.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Drop(NamedTuple):
    """Dropout of an adapter's input, by the hash of `keyed_dropout`. The base layer has none."""

    p: float
    seed: int
    layer: int  # uint32
    step: Tensor  # [] int64
    rows: Tensor  # [b] int64, one key for each x[i]


class Member(NamedTuple):
    """A frozen linear layer and its LoRA, or with `magnitude` and `norm` [out] its DoRA."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    scale: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None  # dora_norm of these factors; may require a gradient
    drop: Drop | None = None


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """x W^T + bias + scale x' down^T up^T  [..., out] in x's dtype (arXiv 2106.09685).

    x' is x after `drop`; with weight None the last term alone. With magnitude and norm the sum
    without the bias is multiplied by magnitude / norm in fp32 or better and rounded once (arXiv
    2402.09353). x [..., in], weight [out, in], down [r, in], up [out, r], magnitude and norm [out].
    """
    dropped = x if drop is None else keyed_dropout(x, *drop)
    update = scale * F.linear(F.linear(dropped, down.to(x.dtype)), up.to(x.dtype))
    if weight is None:
        return update
    y = F.linear(x, weight, bias)
    if magnitude is None or norm is None:
        return y + update
    return dora_compose(y, bias, update, magnitude / norm)


def lora_grouped(x: Tensor, members: tuple[Member, ...]) -> tuple[Tensor, ...]:
    """lora_linear of every member on the same x."""
    return tuple(lora_linear(x, *member) for member in members)


def lora_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """conv(x, W) + bias + scale * conv1x1(conv(x, down), up)  [b, out, h', w'] in x's dtype.

    With weight None the last term alone. x [b, in, h, w], weight [out, in / groups, kh, kw],
    down [r, in / groups, kh, kw] (the base's stride, padding, dilation and groups),
    up [out, r / groups, 1, 1] (the base's groups): group by group the product has the base weight's
    shape, so folding is exact.
    """
    hidden = F.conv2d(x, down.to(x.dtype), None, stride, padding, dilation, groups)
    update = scale * F.conv2d(hidden, up.to(x.dtype), groups=groups)
    if weight is None:
        return update
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups) + update


def dora_norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """L2 norm of every output row of W + scale * up @ down  [out], in fp32 or better.

    arXiv 2402.09353; rows as in peft; without autocast. Forms the dense update: one weight-sized
    matrix in fp32. Shapes as in lora_linear or lora_conv (groups follow from up's shape).
    """
    dtype = wide_dtype(weight.dtype)
    with without_autocast(weight):
        out, per_group = up.shape[:2]
        groups = down.shape[0] // per_group
        b = up.to(dtype).reshape(groups, out // groups, per_group)
        a = down.to(dtype).reshape(groups, per_group, -1)
        adapted = weight.to(dtype).flatten(1) + scale * (b @ a).reshape(out, -1)
        return torch.linalg.vector_norm(adapted, dim=1)


def dora_norms(layers: tuple[tuple[Tensor, Tensor, Tensor, float], ...]) -> tuple[Tensor, ...]:
    """dora_norm of every layer (weight, down, up, scale)."""
    return tuple(dora_norm(*layer) for layer in layers)


def dora_compose(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float = 1.0
) -> Tensor:
    """y0 + strength * ((gain - 1) (y0 - bias) + gain * lora)  in y0's dtype.

    Computed in fp32 or better and rounded once. y0 = base(x) with its bias,
    lora = scale * up(down(x)), gain = magnitude / norm; bias and gain are shaped to broadcast over
    y0 ([out] or [out, 1, 1]). The bias is outside the norm. gain == 1 and lora == 0 return y0
    exactly, in every dtype.
    """
    dtype = wide_dtype(y0.dtype)
    product = y0.to(dtype) if bias is None else y0.to(dtype) - bias.to(dtype)
    gain = gain.to(dtype)
    change = (gain - 1) * product + gain * lora.to(dtype)
    return (y0.to(dtype) + strength * change).to(y0.dtype)


def snr_weighted_mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> Tensor:
    """weight times the masked mean of (out - target)^2  [b], in fp32 or better.

    out and target [b, c, h, w], mask as in masked_mean, weight [b].
    """
    dtype = wide_dtype(out.dtype)
    losses = masked_mean((out.to(dtype) - target.to(dtype)) ** 2, mask)
    return losses if weight is None else losses * weight


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over c, h, w of the error e [b, c, h, w]  [b]; with a mask m, sum(m e) / (c sum(m)).

    m [b, 1, h, w]. An example with a small mask counts as much as one with a large mask (kohya
    divides by the whole area; cloneofsimo weights with m^2). An empty mask gives 0.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    area = masked_area(error, mask)
    return (mask * error).sum((1, 2, 3)) / area


def masked_area(error: Tensor, mask: Tensor) -> Tensor:
    """c sum(m)  [b], at least the smallest normal number.

    Raises ValueError for a mask of another shape than [b, 1, h, w].
    """
    if mask.shape != (len(error), 1, *error.shape[2:]):
        expected = [len(error), 1, *error.shape[2:]]
        raise ValueError(
            f"the mask is {list(mask.shape)}, expected {expected}; resize it to the latents"
        )
    area = mask.to(error.dtype).sum((1, 2, 3)) * error.shape[1]
    return area.clamp(min=torch.finfo(error.dtype).tiny)


def keyed_dropout(x: Tensor, p: float, seed: int, layer: int, step: Tensor, rows: Tensor) -> Tensor:
    """x with each element zeroed with probability p and the rest divided by 1 - p.

    The choice is a hash, not a stream of random numbers: element e (row-major inside its row) of
    row i is decided by (seed, layer, step, rows[i], e) alone, so the mask does not depend on batch
    size, accumulation or recomputation. x [b, ...], layer a uint32, step [] int64, rows [b] int64
    (both on x's device: nothing syncs).
    """
    state = hash_word(hash_word(hash_word(0, seed), seed >> 32), layer)
    key = hash_word(hash_word(hash_word(state, step), rows), rows >> 32)
    element = torch.arange(x.shape[1:].numel(), device=x.device)
    bits = _mix(_mix(element ^ key[:, None]) ^ hash_word(key, 1)[:, None])
    keep = (bits >= int(p * 2**32)).reshape(x.shape)
    return torch.where(keep, x / (1 - p), 0)


def hash_word(state: Any, word: Any) -> Any:
    """The hash's state after one more word; uint32 values in ints or int64 tensors."""
    return _mix(((state ^ (word & MASK)) + GOLDEN) & MASK)


def _mix(h: Any) -> Any:
    """A bijection of uint32 with good avalanche: `lowbias32` of C. Wellons' hash-prospector.

    Written so that no int64 product overflows.
    """
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & MASK
    h = h ^ (h >> 15)
    h = (h * (0x846CA68B - 2**32)) & MASK
    return h ^ (h >> 16)
