"""Sums and inner products of adapters of one layer, in factor space.

sum_i w_i delta W_i = [w_1 s_1 up_1, w_2 s_2 up_2, ...] [down_1; down_2; ...]

It is exact for any ranks, scales and signs. A DoRA cannot be summed like this, because its update
is neither low rank nor known without the base weight: `adapter_sums.mix_layers` and
`rounding.add_updates` take it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank, factor_blocks, from_blocks, refuse_dora
from lora_core.errors import UserError

WeightedAdapters = Sequence[tuple[float, LowRank]]  # (weight, adapter), all of one layer
LPL_WARNING = (
    "lpl adds factors, not updates: (a1 up1 + a2 up2)(a1 down1 + a2 down2) squares the strengths "
    "and mixes unrelated bases in its cross terms; mix computes the exact sum"
)


def concat_factors(terms: WeightedAdapters) -> LowRank:
    """The exact weighted sum by concatenation, with the sum of ranks and scale 1, fp32 or better.

    Weight times scale is multiplied into `up`. Then powers of two, which do not round, balance the
    largest entries of both factors of a term, so that neither overflows or underflows in fp16 where
    the other would not. Raises UserError for a DoRA, and for adapters of different shapes.
    """
    ups, downs, shapes = [], [], set()
    for weight, lr in terms:
        refuse_dora(lr)
        up, down = factor_blocks(lr)
        up, down = balance_factors(up * (weight * lr.scale), down)
        ups.append(up)
        downs.append(down)
        shapes.add((up.shape[:2], lr.down.shape[1:]))
    if len(shapes) > 1:
        described = ", ".join(describe_shapes(lr) for _, lr in terms)
        raise UserError(
            f"adapters of different layers cannot be added: {described}; merge files of one model"
        )
    kernel = tuple(terms[0][1].down.shape[2:])
    return from_blocks(torch.cat(ups, 2), torch.cat(downs, 1), kernel)


def balance_factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """up * t and down / t with the power of two t that balances their largest entries.

    Factors of which one is zero are unchanged.
    """
    largest_up, largest_down = float(up.abs().max()), float(down.abs().max())
    if not (0 < largest_up < math.inf and 0 < largest_down < math.inf):
        return up, down
    t = 2.0 ** round((math.log2(largest_down) - math.log2(largest_up)) / 2)
    return up * t, down / t


def lpl(first: LowRank, second: LowRank, alpha_1: float = 0.5, alpha_2: float = 0.5) -> LowRank:
    """cloneofsimo's lossy sum, (a1 up1 + a2 up2)(a1 down1 + a2 down2) with each scale in its `up`.

    LPL_WARNING describes its error: a file with itself gives 4 delta W at (1, 1) and delta W at
    (0.5, 0.5). Raises UserError for a DoRA and for different shapes or ranks.
    """
    refuse_dora(first)
    refuse_dora(second)
    if first.down.shape != second.down.shape or first.up.shape != second.up.shape:
        raise UserError(
            f"lpl adds factors of equal rank and shape, got {describe_shapes(first)} and "
            f"{describe_shapes(second)}; mix takes any ranks"
        )
    (up_1, down_1), (up_2, down_2) = factor_blocks(first), factor_blocks(second)
    up = alpha_1 * first.scale * up_1 + alpha_2 * second.scale * up_2
    down = alpha_1 * down_1 + alpha_2 * down_2
    return from_blocks(up, down, tuple(first.down.shape[2:]))


def slerp(first: LowRank, second: LowRank, t: float) -> LowRank:
    """The point at t in [0, 1] of the great circle from one update to the other (Shoemake 1985).

    Exact, of rank the sum of ranks; see `slerp_weights`. Raises UserError for a DoRA.
    """
    return concat_factors(list(zip(slerp_weights(first, second, t), (first, second))))


def slerp_weights(first: LowRank, second: LowRank, t: float) -> tuple[float, float]:
    """The weights of both updates at the point t of the great circle between them.

    sin((1 - t) w) / sin w and sin(t w) / sin w, w the angle between the updates as vectors; linear
    where w is 0 or pi or one of them is zero. Raises UserError for a DoRA.
    """
    refuse_dora(first)
    refuse_dora(second)
    angle = 0.0
    if frobenius_norm(first) and frobenius_norm(second):
        angle = math.acos(max(-1.0, min(1.0, cosine_similarity(first, second))))
    if math.sin(angle) <= 1e-4:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def inner_product(first: LowRank, second: LowRank) -> float:
    """The inner product of two updates of one layer. Raises UserError for a DoRA."""
    (up_1, down_1), (up_2, down_2) = double_blocks(first), double_blocks(second)
    return first.scale * second.scale * float(((up_1.mT @ up_2) * (down_1 @ down_2.mT)).sum())


def frobenius_norm(lr: LowRank) -> float:
    """The Frobenius norm of the update. Raises UserError for a DoRA."""
    square = lr.scale * lr.scale * square_of_product(*double_blocks(lr))
    return math.sqrt(max(0.0, square))


def square_of_product(up: Tensor, down: Tensor) -> float:
    """The squared norm of up @ down, of blocks up [g, out, r] and down [g, r, in].

    By the Gram matrices of the factors; by the product where it is smaller than they are, so that
    the work is at most linear in r.
    """
    rank, out, fan_in = up.shape[2], up.shape[1], down.shape[2]
    if rank * (out + fan_in) <= out * fan_in:
        return float(((up.mT @ up) * (down @ down.mT)).sum())
    return float((up @ down).square().sum())


def cosine_similarity(first: LowRank, second: LowRank) -> float:
    """The cosine of the angle between two updates as vectors; 0 when one of them is zero.

    Raises UserError for a DoRA.
    """
    norms = frobenius_norm(first) * frobenius_norm(second)
    return inner_product(first, second) / norms if norms else 0.0


def describe_shapes(lr: LowRank) -> str:
    """An adapter's shapes, for an error message."""
    return f"up {list(lr.up.shape)} x down {list(lr.down.shape)}"


def double_blocks(lr: LowRank) -> tuple[Tensor, Tensor]:
    """`factor_blocks` in fp64. Raises UserError for a DoRA."""
    refuse_dora(lr)
    up, down = factor_blocks(lr)
    return up.double(), down.double()


class one_thread:
    """A context whose block runs on one CPU thread of this process.

    Thin factorizations are thousands of tiny parallel regions. On 2 cores a second thread gains
    nothing even at best (1280 x 1280, 64 columns: 2.5 ms with one thread, 2.7 with two), and where
    other processes want the cores the threads wait for each other: a whole file took 7 s with one
    thread against 234 s with two.
    """

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)
