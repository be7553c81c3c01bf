"""Adapted linear layers for the tests of linear.py and its parts: shapes, arguments, outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels import reference
from lora_core.kernels.reference import Drop, Member

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


class Case(NamedTuple):
    shape: tuple[int, ...]  # of x
    members: tuple[tuple[int, int], ...]  # (out, rank)
    gain: str = ""  # or "detached", "full"
    bias: bool = True
    drop: float = 0.0


CASES = {
    "one row": Case((1, 33), ((11, 1),)),
    "a prime of rows": Case((13, 70), ((65, 3), (33, 20)), bias=False),
    "rows in parts": Case((3, 50, 33), ((17, 16), (40, 3), (9, 20), (33, 1))),
    "features in parts": Case((5, 600), ((600, 3), (40, 16)), bias=False),
    "ranks in blocks": Case((20, 40), ((40, 70), (24, 40))),
    "many rows": Case((1061, 20), ((24, 3),)),
    "DoRA": Case((2, 65, 33), ((32, 16), (48, 3), (32, 20)), "detached"),
    "DoRA, norm in the graph": Case((40, 33), ((270, 40), (32, 4)), "full", bias=False),
    "DoRA, features in parts": Case((9, 40), ((600, 5),), "full"),
    "dropout": Case((3, 43, 32), ((32, 16), (20, 40)), drop=0.3),
    "dropout and DoRA": Case((2, 7, 33), ((64, 5),), "full", drop=0.5),
}


def given(
    case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, list[Member], list[Tensor]]:
    """x, members and output gradients in float64.

    dtype holds them exactly, the adapters fp32.
    """
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = dtype, size: float = 1.0) -> Tensor:
        return (
            (torch.randn(shape, generator=make, dtype=torch.float64) * size).to(device, of).double()
        )

    x, width = draw(*case.shape), case.shape[-1]
    step, rows = torch.tensor(3, device=device), torch.arange(len(x), device=device) * 2**33 - 5
    members = []
    for i, (out, rank) in enumerate(case.members):
        weight, wide = draw(out, width, size=width**-0.5), torch.float32
        norm = weight.norm(dim=1).float().double() if case.gain else None
        magnitude = None if norm is None else (norm * (1 + 0.2 * draw(out))).float().double()
        drop = Drop(case.drop, 2**40 + 77, 2**32 - 1 - i, step, rows) if case.drop else None
        down, up = (
            draw(rank, width, of=wide, size=width**-0.5),
            draw(out, rank, of=wide, size=rank**-0.5),
        )
        members.append(
            Member(
                weight, draw(out) if case.bias else None, down, up, 0.7 + i, magnitude, norm, drop
            )
        )
    return x, members, [draw(*case.shape[:-1], out) for out, _ in case.members]


def outcome(
    op: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    data: tuple[Tensor, list[Member], list[Tensor]],
) -> dict[str, Tensor]:
    """Outputs and gradients, computed in dtype."""
    wide, (x, members, dys) = reference.wide_dtype(dtype), data
    x, leaves, cast = x.to(dtype, copy=True).requires_grad_(), {}, []
    for i, m in enumerate(members):
        mine = {"down": m.down, "up": m.up} | (
            {"magnitude": m.magnitude, "norm": m.norm} if case.gain else {}
        )
        mine = {
            k: v.to(wide, copy=True).requires_grad_(k != "norm" or case.gain == "full")
            for k, v in mine.items()
            if v is not None
        }
        cast.append(
            m._replace(
                weight=m.weight.to(dtype), bias=None if m.bias is None else m.bias.to(dtype), **mine
            )
        )
        leaves |= {f"{k} {i}": v for k, v in mine.items() if v.requires_grad}
    ys = op(x, tuple(cast))
    torch.autograd.backward(ys, [dy.to(dtype) for dy in dys])
    assert all(
        leaf.grad.dtype == leaf.dtype
        and leaf.grad.is_contiguous()
        and leaf.grad.shape == leaf.shape
        for leaf in leaves.values()
    )
    return (
        {f"y {i}": y.detach() for i, y in enumerate(ys)}
        | {"dx": x.grad}
        | {f"d_{k}": leaf.grad for k, leaf in leaves.items()}
    )


def one(dtype: torch.dtype = torch.float32, rows: int = 12) -> tuple[Tensor, Member]:
    x, members, _ = given(Case((rows, 33), ((20, 5),)), dtype)
    m = members[0]
    factors = {"down": m.down.float().requires_grad_(), "up": m.up.float().requires_grad_()}
    return x.to(dtype), m._replace(
        weight=m.weight.to(dtype), bias=None if m.bias is None else m.bias.to(dtype), **factors
    )
