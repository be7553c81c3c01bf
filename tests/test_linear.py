"""The Triton kernels of lora_linear, lora_grouped and lora_conv against the float64 reference.

In the interpreter and, marked gpu, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from lora_core.kernels import linear, reference
from lora_core.kernels.reference import Drop, Member
from tests.linear_cases import CASES, DTYPES, Case, given, one, outcome

pytestmark = pytest.mark.usefixtures("patched_once")


class Convolution(NamedTuple):
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    last: bool = False  # channels_last
    frozen: bool = True
    size: tuple[int, int] = (9, 8)
    images: int = 2


CONVOLUTIONS = {
    "1x1": Convolution((1, 1)),
    "1x1 channels last": Convolution((1, 1), last=True),
    "1x1 alone": Convolution((1, 1), frozen=False),
    "1x1 stride 2": Convolution((1, 1), stride=(2, 2)),
    "1x1 of one image": Convolution((1, 1), images=1),
    "1x1 of one image, channels last": Convolution((1, 1), last=True, images=1),
    "1x1 of one pixel": Convolution((1, 1), size=(1, 1)),
    "3x3 of one pixel": Convolution((3, 3), padding=(1, 1), size=(1, 1)),
    "3x3": Convolution((3, 3), (2, 1), (1, 0), (1, 2)),
    "3x3 of one image": Convolution((3, 3), padding=(1, 1), images=1),
    "3x3 channels last": Convolution((3, 3), padding="same", last=True),
    "3x2 alone": Convolution((3, 2), frozen=False),
}


def hold(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Over the draws, the error to float64 is at most twice the largest of three.

    The reference's in the same dtype, one rounding, a sum in order: adding n fp32 terms of random
    sign in order rounds each partial sum by at most 2^-24 of it, evenly spread: 2^-24 sqrt(n / 6)
    of the result.
    """
    squares: dict[str, Tensor] = {}
    longest = max(
        math.prod(case.shape[:-1]), case.shape[-1], *(max(member) for member in case.members)
    )
    for seed in range(2):
        data = given(case, dtype, seed, device)
        exact = outcome(reference.lora_grouped, case, torch.float64, data)
        plain, ours = (
            outcome(op, case, dtype, data) for op in (reference.lora_grouped, linear.lora_grouped)
        )
        for key, truth in exact.items():
            rounding = truth.norm() * max(
                torch.finfo(ours[key].dtype).eps / 2, 2**-24 * (longest / 6) ** 0.5
            )
            found = torch.stack(
                [(ours[key] - truth).norm(), (plain[key] - truth).norm(), rounding]
            ).square()
            squares[key] = squares.get(key, torch.zeros_like(found)) + found
    for key, found in squares.items():
        mine, eager, rounding = found.sqrt().tolist()
        assert mine <= 2 * max(eager, rounding), (key, mine, eager, rounding)


IN_EVERY_DTYPE = ("one row", "DoRA", "dropout and DoRA", "features in parts")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, dtype in product(CASES, DTYPES)
        if dtype == torch.bfloat16 or name in IN_EVERY_DTYPE
    ],
)
def test_groups_round_no_worse_than_twice_the_reference(name: str, dtype: torch.dtype) -> None:
    hold(CASES[name], dtype)


ON_THE_DEVICE = CASES | {
    "three of SDXL's": Case((2, 2048, 640), ((640, 16),) * 3),
    "Flux, DoRA and dropout": Case((4608, 3072), ((3072, 64),), "full", drop=0.1),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ON_THE_DEVICE)
def test_groups_on_the_device(name: str, dtype: torch.dtype) -> None:
    hold(ON_THE_DEVICE[name], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions_on_the_device(name: str, dtype: torch.dtype) -> None:
    hold_conv(name, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_gives_the_same_bits_again() -> None:
    data = given(CASES["DoRA"], torch.bfloat16, device="cuda")
    first, again = (
        outcome(linear.lora_grouped, CASES["DoRA"], torch.bfloat16, data) for _ in range(2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_mask_is_the_references_to_the_bit() -> None:
    """With weight 0 and factors 1 the layer is the dropout itself, and so is its gradient."""
    size, eye = 40, torch.eye(40)
    x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    drops = [
        Drop(p, -3, layer, torch.tensor(2**33 + 1), torch.tensor([0, -(2**40), 9]))
        for p, layer in ((0.25, 1), (0.0, 2), (0.9, 2**32 - 1))
    ]
    ys = linear.lora_grouped(
        x,
        tuple(
            Member(torch.zeros(size, size), None, eye, eye, 1.0, None, None, drop) for drop in drops
        ),
    )
    for y, drop in zip(ys, drops):
        expected = reference.keyed_dropout(x, *drop)
        assert torch.equal(y, expected)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        assert torch.equal(dx != 0, expected != 0) and torch.allclose(
            dx[dx != 0], torch.tensor(1 / (1 - drop.p))
        )


def test_any_strides_of_x_and_of_its_outputs_gradient() -> None:
    x, m = one()
    for view in (
        x.view(3, 4, 33).transpose(0, 1),
        torch.stack([x, x], -1)[..., 1],
        x[::2],
        x.expand(2, 12, 33),
        x.t().contiguous().t(),
    ):
        results = []
        wide = m._replace(
            **{
                name: t.detach().double()
                for name, t in m._asdict().items()
                if isinstance(t, Tensor)
            }
        )
        wide = wide._replace(down=wide.down.requires_grad_(), up=wide.up.requires_grad_())
        for op, x_, m_ in (
            (linear.lora_linear, view, m),
            (reference.lora_linear, view, m),
            (reference.lora_linear, view.double(), wide),
        ):
            leaf = x_.detach().requires_grad_()
            y = op(leaf, *m_)
            results.append(
                [
                    y,
                    *torch.autograd.grad(
                        y.sum() + y.transpose(0, 1).square().sum(), [leaf, m_.down, m_.up]
                    ),
                ]
            )
        for found, eager, exact in zip(*results):
            assert (found - exact).norm() <= 2 * (eager - exact).norm() + torch.finfo(
                torch.float32
            ).eps * exact.norm()


def test_a_member_of_one_feature_whose_gradient_has_odd_strides() -> None:
    x, m = one()
    members = (m._replace(weight=m.weight[:1], bias=None, up=m.up[:1].detach().requires_grad_()), m)
    results = []
    for op in (reference.lora_grouped, linear.lora_grouped):
        narrow, broad = op(leaf := x.detach().requires_grad_(), members)
        dys = (
            torch.linspace(-1, 1, narrow.numel()).view(1, -1).t(),
            broad.detach().cos(),
        )  # strides 1 and the number of rows
        results.append(
            torch.autograd.grad(
                (narrow, broad), [leaf, m.down, *(member.up for member in members)], dys
            )
        )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gain", ["", "full"])
def test_empty_batch_gives_zeros(gain: str) -> None:
    case = Case((0, 4, 33), ((20, 5), (7, 3)), gain)
    found = outcome(linear.lora_grouped, case, torch.float32, given(case, torch.float32))
    assert found["y 0"].shape == (0, 4, 20) and found["dx"].shape == (0, 4, 33)
    assert not any(gradient.any() for gradient in found.values())


def test_the_update_alone_reads_no_frozen_layer() -> None:
    x, m = one()
    x = x.requires_grad_()
    drop = Drop(0.5, 1, 2, torch.tensor(3), torch.arange(len(x)))
    for dropped in (None, drop):
        a, b = (
            op(x, None, None, m.down, m.up, 0.3, None, None, dropped)
            for op in (reference.lora_linear, linear.lora_linear)
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for p, q in zip(
            *(torch.autograd.grad(y.square().sum(), [x, m.down, m.up]) for y in (a, b))
        ):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [(0,), (2,), (1, 3)])
@pytest.mark.parametrize("gain", ["", "full"])
def test_outputs_that_nobody_uses_cost_nothing(used: tuple[int, ...], gain: str) -> None:
    case = Case((70, 33), ((17, 16), (40, 3), (9, 20), (33, 1)), gain, drop=0.2)
    x, members, dys = given(case, torch.float32)
    members = [
        Member(*(t.float().requires_grad_() if isinstance(t, Tensor) else t for t in m))
        for m in members
    ]
    x = x.float().requires_grad_()
    factors = chain.from_iterable((m.down, m.up, m.magnitude, m.norm) for m in members)
    leaves = [x, *(t for t in factors if t is not None)]
    found = []
    for op in (reference.lora_grouped, linear.lora_grouped):
        ys = op(x, tuple(members))
        found.append(
            torch.autograd.grad(
                [ys[i] for i in used], leaves, [dys[i].float() for i in used], allow_unused=True
            )
        )
    for a, b in zip(*found):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_unlike_members_and_more_than_four_are_split_over_launches() -> None:
    case = Case((6, 33), ((8, 2),) * 6)
    x, members, _ = given(case, torch.float32)
    members = [Member(*(t.float() if isinstance(t, Tensor) else t for t in m)) for m in members]
    members[1] = members[1]._replace(drop=Drop(0.5, 1, 2, torch.tensor(3), torch.arange(6)))
    members[5] = members[5]._replace(
        magnitude=members[5].weight.norm(dim=1) * 1.5, norm=members[5].weight.norm(dim=1)
    )
    for a, b in zip(
        linear.lora_grouped(x.float(), tuple(members)),
        reference.lora_grouped(x.float(), tuple(members)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert linear.lora_grouped(x.float(), ()) == ()


def test_a_gain_that_hides_the_product_gives_its_row_no_gradient() -> None:
    case = Case((8, 33), ((20, 5),), "full")
    x, (m,), (dy,) = given(case, torch.float32)
    assert m.magnitude is not None
    for gain, gets in ((0.0, False), (2.0**-25, False), (2.0**-20, True)):
        magnitude = m.magnitude.clone()
        magnitude[7] = gain * m.norm[7]  # type: ignore[index]
        found = outcome(
            linear.lora_grouped, case, torch.float32, (x, [m._replace(magnitude=magnitude)], [dy])
        )
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert bool(found["d_magnitude 0"][7] != 0) == gets and found["d_magnitude 0"][6] != 0


def test_what_is_saved_is_x_and_t() -> None:
    x, m = one(torch.bfloat16)
    y = linear.lora_linear(x, *m)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    own = {t.untyped_storage().data_ptr() for t in (x, m.weight, m.down, m.up)}
    assert [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own] == [(12, 5)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend: str) -> None:
    case = Case((2, 9, 33), ((21, 3), (8, 2)), "full", drop=0.4)
    x, members, _ = given(case, torch.float32)
    members = [Member(*(t.float() if isinstance(t, Tensor) else t for t in m)) for m in members]

    def loss(x: Tensor, *factors: Tensor) -> Tensor:
        own = [
            m._replace(down=factors[2 * i], up=factors[2 * i + 1]) for i, m in enumerate(members)
        ]
        losses = [y.square().sum() for y in linear.lora_grouped(x, tuple(own))]
        return sum(losses)  # type: ignore[return-value]

    factors = chain.from_iterable((m.down, m.up) for m in members)
    leaves = [t.float().requires_grad_() for t in (x, *factors)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(
        torch.compile(loss, backend=backend, fullgraph=True)(*leaves), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_checkpointing_recomputes_the_same_bits() -> None:
    x, m = one()
    x = x.requires_grad_()
    drop = Drop(0.5, 1, 2, torch.tensor(3), torch.arange(len(x)))
    run = lambda x: linear.lora_linear(x, *m[:-1], drop)  # noqa: E731
    found = [
        torch.autograd.grad(y.square().sum(), [x, m.down, m.up])
        for y in (run(x), checkpoint(run, x, use_reentrant=False))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def hold_conv(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """As `hold`, of a convolution of images of 7 channels with rank 5."""
    c, make = CONVOLUTIONS[name], torch.Generator().manual_seed(3)
    shapes = (c.images, 7, *c.size), (12, 7, *c.kernel), (12,), (5, 7, *c.kernel), (12, 5, 1, 1)
    x, weight, bias, down, up = (
        torch.randn(s, generator=make, dtype=torch.float64).to(device) * (0.3 if i else 1)
        for i, s in enumerate(shapes)
    )
    x, weight, bias, down, up = (
        x.to(dtype).double(),
        weight.to(dtype).double(),
        bias.to(dtype).double(),
        down.float().double(),
        up.float().double(),
    )

    def run(op: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        layout = torch.channels_last if c.last else torch.contiguous_format
        leaves = [
            x.to(dtype, memory_format=layout, copy=True),
            *(t.to(reference.wide_dtype(dtype), copy=True) for t in (down, up)),
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        base = (weight.to(dtype), bias.to(dtype)) if c.frozen else (None, None)
        y = op(leaves[0], *base, *leaves[1:], 0.7, c.stride, c.padding, c.dilation, 1)
        pattern = (
            torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=device)
            .reshape(y.shape)
            .cos()
            .to(torch.bfloat16)
        )
        y.backward(pattern.to(dtype))
        assert (
            all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
            and leaves[1].grad.is_contiguous()
            and leaves[2].grad.is_contiguous()
        )
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    for exact, eager, ours in zip(
        run(reference.lora_conv, torch.float64),
        run(reference.lora_conv, dtype),
        run(linear.lora_conv, dtype),
    ):
        assert (ours - exact).norm() <= 2 * max(
            (eager - exact).norm(), exact.norm() * torch.finfo(ours.dtype).eps / 2
        )


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_round_no_worse_than_twice_the_reference(
    name: str, dtype: torch.dtype
) -> None:
    hold_conv(name, dtype)
