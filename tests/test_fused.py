"""Laws of the fused implementations.

The reference in float64, at most twice its rounding, the base layer's bits at init, and no gradient
of a weight's shape.
"""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_core.kernels import OPS, call, fused, reference, use_kernels
from lora_core.kernels.reference import Drop, Member, wide_dtype

HALF = [torch.bfloat16, torch.float16]


def draw(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def linear(b=2, s=5, i=24, o=20, r=4, *, bias=True, dora=False, p=0.0, seed=0, dtype=torch.float64):
    """lora_linear's arguments, factors in fp32 or better and with a dimension's spread."""
    x, weight, offset, down, up = draw(seed, (b, s, i), (o, i), (o,), (r, i), (o, r))
    down, up = (t.to(wide_dtype(dtype)) for t in (down / i**0.5, up / r**0.5))
    magnitude, norm = (t.abs().to(wide_dtype(dtype)) + 0.5 for t in draw(seed + 1, (o,), (o,)))
    drop = Drop(p, 7, zlib.crc32(b"path"), torch.tensor(3), torch.arange(b) * 2**40) if p else None
    weight = weight / i**0.5
    args = (
        x.to(dtype),
        weight.to(dtype),
        offset.to(dtype) if bias else None,
        down,
        up,
        0.7,
        *((magnitude, norm) if dora else (None, None)),
        drop,
    )
    return args


def run(f, args, wanted=None, dy=None):
    """f's output and the gradients of the tensors at `wanted`, for the gradient dy.

    wanted: all of floating point where it is None; dy: drawn where it is None.
    """
    wanted = (
        [n for n, a in enumerate(args) if torch.is_tensor(a) and a.is_floating_point()]
        if wanted is None
        else wanted
    )
    leaves = [a.detach().requires_grad_() if n in wanted else a for n, a in enumerate(args)]
    y = f(*leaves)
    dy = draw(9, y.shape)[0].to(y.device, y.dtype) if dy is None else dy
    return [y.detach(), *torch.autograd.grad(y, [leaves[n] for n in wanted], dy)]


@pytest.fixture
def split(monkeypatch):
    """No weight is small enough to be merged."""
    monkeypatch.setattr(fused, "MERGE_LIMIT", 0)


def close(ours, theirs, tolerance=1e-12):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm().clamp(min=1), (a - b).norm() / b.norm()


# --- the reference's function and gradients ---


@pytest.mark.parametrize(("dora", "p"), itertools.product([False, True], [0.0, 0.3]))
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 24, 20, 4),
        (1, 1, 7, 11, 1),
        (3, 2, 300, 260, 256),
        (2, 0, 24, 20, 4),
        (0, 3, 24, 20, 4),
    ],
)
def test_linear_is_the_reference(split, shape, dora, p):
    if shape[0] == 0 and p:
        pytest.skip("there are no rows to name")
    for bias in (True, False):
        args = linear(*shape, bias=bias, dora=dora, p=p)
        close(run(fused.lora_linear, args), run(reference.lora_linear, args))


@pytest.mark.parametrize("dora", [False, True])
def test_a_small_weight_is_merged_and_is_the_reference(dora):
    args = linear(dora=dora)
    close(run(fused.lora_linear, args), run(reference.lora_linear, args))
    assert (
        passes(lambda: fused.lora_linear(*args)).count("addmm") == 2
    )  # W + s B A, and with it the layer


def test_the_update_alone_one_row_and_odd_strides(split):
    x, _, _, down, up, *rest = linear(p=0.3)
    alone = x, None, None, down, up, *rest
    close(run(fused.lora_linear, alone), run(reference.lora_linear, alone))
    for dora in (False, True):
        x, *rest = linear(b=5, s=5, dora=dora)
        for other in (
            x[0, 0],
            x[0],
            x.transpose(0, 1),
            x[:1].expand(4, -1, -1),
            x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        ):
            close(
                run(fused.lora_linear, (other, *rest)), run(reference.lora_linear, (other, *rest))
            )
        expanded = torch.ones(1, dtype=torch.float64).expand(5, 5, 20)
        close(
            run(fused.lora_linear, (x, *rest), dy=expanded),
            run(reference.lora_linear, (x, *rest), dy=expanded),
        )


def test_only_the_gradients_that_are_asked_for(split):
    for dora in (False, True):
        args = linear(dora=dora, p=0.3)
        every = dict(enumerate(run(reference.lora_linear, args)[1:]))
        wanted = [n for n, a in enumerate(args) if torch.is_tensor(a)]
        places = range(len(wanted))
        pairs = itertools.combinations(places, 2)
        for chosen in itertools.chain(itertools.combinations(places, 1), pairs):
            close(
                run(fused.lora_linear, args, [wanted[c] for c in chosen])[1:],
                [every[c] for c in chosen],
            )


def test_undefined_and_second_gradients(split):
    x, weight, bias, down, up, scale, *_ = linear()
    down.requires_grad_()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.set_materialize_grads(False)
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    for y in (
        fused.lora_linear(x, weight, bias, down, up, scale),
        fused.lora_conv(*conv(needs=3)),
        compose(down),
    ):
        (Nothing.apply(y).sum() + down.sum()).backward()
        assert torch.equal(down.grad, torch.ones_like(down))
        down.grad = None
    first = torch.autograd.grad(
        fused.lora_linear(x, weight, bias, down, up, scale).square().sum(), down, create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def compose(down):
    y0, bias, lora, gain = OPS["dora_compose"].example(0, torch.float64, "cpu")
    return fused.dora_compose(y0 + 0 * down.sum(), bias, lora, gain)


def conv(
    channels=6,
    out=8,
    b=2,
    size=(7, 9),
    *,
    kernel=(3, 2),
    window=((2, 1), (1, 0), (1, 2)),
    bias=True,
    needs=None,
    dtype=torch.float64,
):
    x, weight, offset, down, up = draw(
        3,
        (b, channels, *size),
        (out, channels, *kernel),
        (out,),
        (4, channels, *kernel),
        (out, 4, 1, 1),
    )
    args = [
        x.to(dtype),
        weight.to(dtype) / 6,
        offset.to(dtype) if bias else None,
        down.to(wide_dtype(dtype)) / 6,
        up.to(wide_dtype(dtype)) / 2,
    ]
    if needs is not None:
        args[needs].requires_grad_()
    return *args, 0.7, *window, 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("merged", [0, fused.MERGE_LIMIT])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv_is_the_reference(monkeypatch, layout, merged, bias):
    monkeypatch.setattr(fused, "MERGE_LIMIT", merged)
    for kernel, window in (((3, 2), ((2, 1), (1, 0), (1, 2))), ((1, 1), ((1, 1), (0, 0), (1, 1)))):
        for b in (2, 0):
            x, *rest = conv(b=b, kernel=kernel, window=window, bias=bias)
            args = x.contiguous(memory_format=layout), *rest
            close(run(fused.lora_conv, args), run(reference.lora_conv, args))
    alone = args[0], None, None, *args[3:]
    close(run(fused.lora_conv, alone), run(reference.lora_conv, alone))


def test_odd_convolutions_are_the_reference(split):
    x, weight, bias, down, up, scale, *window, _ = conv()
    grouped = OPS["lora_conv"].example(1, torch.float64, "cpu")
    same = x, weight, bias, down, up, scale, (1, 1), "same", (1, 1), 1
    single = x[0], weight, bias, down, up, scale, *window, 1
    flat = x, weight.transpose(2, 3).contiguous().transpose(2, 3), bias, down, up, scale, *window, 1
    for args in (grouped, same, single, flat):
        close(run(fused.lora_conv, args), run(reference.lora_conv, args))


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("shape", ["rows", "picture", "channels_last", "no bias", "empty"])
def test_compose_is_the_reference(shape, strength):
    y0, bias, lora, gain = (
        t.double() for t in OPS["dora_compose"].example(2, torch.float64, "cpu")
    )
    if shape in ("picture", "channels_last"):
        y0, lora = draw(4, (2, 11, 3, 5), (2, 11, 3, 5))
        y0 = y0.contiguous(
            memory_format=torch.channels_last
            if shape == "channels_last"
            else torch.contiguous_format
        )
        bias, gain = bias.view(11, 1, 1), gain.view(11, 1, 1)
    elif shape == "empty":
        y0, lora = y0[:0], lora[:0]
    args = y0, None if shape == "no bias" else bias, lora, gain, strength
    close(run(fused.dora_compose, args), run(reference.dora_compose, args))


def test_grouped_is_lora_linear_of_every_member(split):
    x, *one = linear()
    _, *two = linear(o=8, r=3, dora=True, seed=5)
    members = Member(*one), Member(*two)
    for ours, theirs in zip(
        call("lora_grouped", x, members), reference.lora_grouped(x, members), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with use_kernels("fused"):
        assert torch.equal(call("lora_grouped", x, members)[1], fused.lora_linear(x, *two))


# --- rounding ---


def errors(name, make, dtype, fast, draws=12):
    """Mean over draws of the relative errors to float64 of the output and each gradient.

    The reference's and those of `fast`.
    """
    totals = []
    for seed in range(draws):
        args = make(seed, dtype)
        exact = run(
            getattr(reference, name),
            [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args],
        )
        for f in (getattr(reference, name), fast):
            got = run(f, args)
            totals.append(
                [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
            )
    return torch.tensor(totals).view(draws, 2, -1).mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "case", ["lora", "dora", "dropout", "conv", "channels_last", "compose", "merged", "merged dora"]
)
def test_rounding_is_at_most_twice_the_references(monkeypatch, dtype, case):
    if not case.startswith("merged"):
        monkeypatch.setattr(fused, "MERGE_LIMIT", 0)

    def make(seed, dtype):
        if case == "compose":
            y0, bias, lora, gain = OPS["dora_compose"].example(seed, dtype, "cpu")
            return y0, bias, lora, gain, 0.6
        if case in ("conv", "channels_last"):
            x, *rest = conv(b=2 + seed % 2, dtype=dtype)
            return x.contiguous(
                memory_format=torch.channels_last
            ) if case == "channels_last" else x, *rest
        return linear(
            2, 30, 48, 40, dora="dora" in case, p=0.3 * (case == "dropout"), seed=seed, dtype=dtype
        )

    name = {"conv": "lora_conv", "channels_last": "lora_conv", "compose": "dora_compose"}.get(
        case, "lora_linear"
    )
    theirs, ours = errors(name, make, dtype, getattr(fused, name))
    assert (ours <= 2 * theirs + 1e-9).all(), (ours / theirs).tolist()
    assert theirs.max() < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize(
    ("bias", "merged", "dora"),
    itertools.product([True, False], [0, fused.MERGE_LIMIT], [True, False]),
)
def test_at_init_the_layer_is_the_base_layer_to_the_bit(monkeypatch, dtype, bias, merged, dora):
    """Also for x in odd strides, where torch adds the bias after rounding the product."""
    monkeypatch.setattr(fused, "MERGE_LIMIT", merged)
    x, weight, offset, down, up, *_ = linear(3, 9, 40, 33, bias=bias, dtype=dtype)
    norm = reference.dora_norm(weight, down, 0 * up, 0.7)
    for other in (x, x.transpose(0, 1), x[0]):
        y = fused.lora_linear(
            other, weight, offset, down, 0 * up, 0.7, *((norm.clone(), norm) if dora else ())
        )
        assert torch.equal(y, F.linear(other, weight, offset)) and y.dtype == dtype
        y0 = F.linear(other, weight, offset)
        assert torch.equal(
            fused.dora_compose(y0, offset, torch.zeros_like(y0), norm / norm, 0.3), y0
        )


def test_autocast_runs_as_the_base_layer_under_it(split):
    """An fp32 base: products, output and rounding of autocast's dtype; fp64 stays fp64.

    A backward outside or inside of it is the same.
    """
    for dora, p in itertools.product([False, True], [0.0, 0.3]):
        args = linear(2, 30, 48, 40, dora=dora, p=p, dtype=torch.float32)
        exact = run(
            reference.lora_linear,
            [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args],
        )
        found = []
        for f in (reference.lora_linear, fused.lora_linear):
            with torch.autocast("cpu", torch.bfloat16):
                inside = run(f, args)
                leaves = [
                    a.detach().requires_grad_()
                    if torch.is_tensor(a) and a.is_floating_point()
                    else a
                    for a in args
                ]
                y = f(*leaves)
            assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(
                y,
                [a for a in leaves if torch.is_tensor(a) and a.requires_grad],
                draw(9, y.shape)[0].bfloat16(),
            )
            assert all(g.dtype == torch.float32 for g in grads)
            if f is fused.lora_linear:
                assert all(torch.equal(a, b) for a, b in zip(inside, [y, *grads], strict=True))
            found.append(
                torch.tensor(
                    [
                        float((a.double() - b).norm() / b.norm())
                        for a, b in zip([y, *grads], exact, strict=True)
                    ]
                )
            )
        assert (found[1] <= 2 * found[0]).all() and found[0].max() < 0.1
    args = linear(dora=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused.lora_linear(*args)
    assert y.dtype == torch.float64 and torch.equal(y, fused.lora_linear(*args))
    small = linear(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            fused.lora_linear(*small).dtype
            == fused.lora_conv(*conv(dtype=torch.float32)).dtype
            == torch.bfloat16
        )


def test_an_fp32_leaf_outside_autocast_has_its_backward_in_fp32_inside(split):
    args = linear(dtype=torch.float32, dora=True)
    leaves = [a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args]
    y = fused.lora_linear(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(
            y, [a for a in leaves if torch.is_tensor(a)], draw(9, y.shape)[0].float()
        )
    assert all(
        torch.equal(a, b) for a, b in zip([y, *grads], run(fused.lora_linear, args), strict=True)
    )


# --- what it costs ---


class Passes(TorchDispatchMode):
    """The aten calls that are no views, and the shapes that each makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view and op.overloadpacket.__name__ not in (
            "empty",
            "new_empty",
            "detach",
            "_unsafe_view",
        ):
            outs = out if isinstance(out, tuple | list) else (out,)
            self.seen.append(
                (op.overloadpacket.__name__, [tuple(o.shape) for o in outs if torch.is_tensor(o)])
            )
        return out


def passes(f):
    with Passes() as seen:
        f()
    return [name for name, _ in seen.seen]


@pytest.mark.parametrize(("dora", "p"), itertools.product([False, True], [0.0, 0.3]))
def test_nothing_of_a_weights_shape_is_made_and_little_is_saved(split, dora, p):
    """For a frozen base.

    Saved: x, x down^T, the cast factors, a DoRA's output before the gain; with dropout no mask.
    """
    args = linear(4, 9, 24, 20, dora=dora, p=p, dtype=torch.bfloat16)
    leaves = [
        a.detach().requires_grad_(n in (0, 3, 4, 6)) if torch.is_tensor(a) else a
        for n, a in enumerate(args)
    ]
    saved = []
    with Passes() as seen, saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.lora_linear(*leaves).float().square().sum().backward()
    assert seen.seen and not [
        op for op, shapes in seen.seen if (20, 24) in shapes or (24, 20) in shapes
    ]
    own = [t for t in saved if t.numel() in (4 * 9 * 24, 4 * 9 * 20) and t.dtype == torch.bfloat16]
    assert sorted({t.data_ptr(): t.numel() for t in own}.values()) == [720] * dora + [864]
    assert not [t for t in saved if t.dtype == torch.bool]


def count(args, wanted):
    with Passes() as seen:
        run(fused.lora_linear, args, wanted)
    return len(seen.seen)


def frozen(args):
    with Passes() as seen:
        run(lambda x: F.linear(x, args[1], args[2]), args[:1], [0])
    return len(seen.seen)


def test_how_many_passes_a_layer_takes_over_the_frozen_one(split):
    """In bf16, forward and backward, scale 1.

    LoRA: six products, two casts of factors and two of their gradients.
    """
    for dora, limit in ((False, 10), (True, 24)):
        args = list(linear(dora=dora, dtype=torch.bfloat16))
        args[5] = 1.0
        assert count(args, [0, 3, 4, 6] if dora else [0, 3, 4]) - frozen(args) <= limit


# --- where it runs ---


@pytest.mark.parametrize(("dora", "p"), itertools.product([False, True], [0.0, 0.3]))
def test_checkpointing_and_compiling_change_no_bit(split, dora, p):
    args = linear(dora=dora, p=p, dtype=torch.bfloat16)
    expected = run(fused.lora_linear, args)
    again = run(lambda *a: checkpoint(fused.lora_linear, *a, use_reentrant=False), args)
    torch._dynamo.reset()
    compiled = run(torch.compile(fused.lora_linear, fullgraph=True, backend="aot_eager"), args)
    for got in (again, compiled):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("f", ["lora_conv", "dora_compose"])
def test_the_others_compile_too(split, f):
    args = conv() if f == "lora_conv" else (*OPS[f].example(1, torch.bfloat16, "cpu"), 0.3)
    torch._dynamo.reset()
    compiled = run(torch.compile(getattr(fused, f), fullgraph=True, backend="aot_eager"), args)
    assert all(
        torch.equal(a, b) for a, b in zip(compiled, run(getattr(fused, f), args), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_meta_device_runs_a_step(dtype):
    drop = Drop(0.5, 7, 1, torch.tensor(3), torch.arange(200))
    lora = linear(200, 3, 140, 130, dora=True, dtype=dtype)
    cases = {
        "lora_linear": (*lora[:-1], drop),
        "lora_conv": conv(48, 48, dtype=dtype),
        "dora_compose": OPS["dora_compose"].example(0, dtype, "cpu"),
    }
    for name, args in cases.items():
        away = [
            a._replace(step=a.step.to("meta"), rows=a.rows.to("meta"))
            if isinstance(a, Drop)
            else a.to("meta")
            if torch.is_tensor(a)
            else a
            for a in args
        ]
        for got, like in zip(
            run(getattr(fused, name), away), run(getattr(reference, name), args), strict=True
        ):
            assert got.is_meta and got.shape == like.shape and got.dtype == like.dtype


@pytest.mark.parametrize("name", ["lora_linear", "lora_conv", "dora_compose"])
def test_gradients_pass_gradcheck(split, name):
    args = (
        conv(size=(4, 5))
        if name == "lora_conv"
        else linear(2, 3, 5, 4, 2, dora=True)
        if name == "lora_linear"
        else OPS[name].example(1, torch.float64)
    )
    args = [a.double().requires_grad_() if torch.is_tensor(a) else a for a in args]
    assert torch.autograd.gradcheck(getattr(fused, name), args)


# --- through the table of ops ---


@pytest.mark.parametrize(
    "shape",
    [(2, 5, 7, 11), (3, 1, 128, 128), (1, 9, 130, 127)],
    ids=["odd", "largest merged", "split"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_lora_linear_is_the_reference(shape, bias):
    b, s, i, o = shape
    make = torch.Generator().manual_seed(5)
    shapes = (b, s, i), (o, i), (o,), (3, i), (o, 3), (b, s, o)
    x, weight, offset, down, up, dy = (
        torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes
    )
    results = []
    for mode in ("reference", "fused"):
        leaves = [
            t.clone().requires_grad_()
            for t in (x.transpose(0, 1).contiguous().transpose(0, 1), down, up)
        ]
        with use_kernels(mode):
            y = call("lora_linear", leaves[0], weight, offset if bias else None, *leaves[1:], 0.7)
        y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [4, 48])  # 9 * 48^2 is above the limit
def test_fused_lora_conv_is_the_reference(channels):
    make = torch.Generator().manual_seed(6)
    shapes = (
        (2, channels, 7, 9),
        (channels, channels, 3, 3),
        (3, channels, 3, 3),
        (channels, 3, 1, 1),
    )
    x, weight, down, up = (
        torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes
    )
    results = []
    for mode in ("reference", "fused"):
        leaves = [t.clone().requires_grad_() for t in (x, down, up)]
        with use_kernels(mode):
            y = call(
                "lora_conv", leaves[0], weight, None, *leaves[1:], 0.7, (2, 1), (1, 0), (1, 2), 1
            )
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [16, 128, 200])
def test_fused_lora_linear_rounds_no_worse_than_the_reference(width):
    """fp32 forward and gradients: at most twice the reference's error to float64.

    In the mean of twenty draws.
    """
    errors = {"reference": torch.zeros(4), "fused": torch.zeros(4)}
    for seed in range(20):
        make = torch.Generator().manual_seed(seed)
        shapes = (2, 40, width), (width, width), (width,), (4, width), (width, 4), (2, 40, width)
        given = [
            torch.randn(shape, generator=make, dtype=torch.float64) * (0.05 if i in (3, 4) else 1)
            for i, shape in enumerate(shapes)
        ]

        def run(dtype, mode, given=given):
            x, weight, bias, down, up, dy = (t.to(dtype, copy=True) for t in given)
            leaves = [t.requires_grad_() for t in (x, down, up)]
            with use_kernels(mode):
                y = call("lora_linear", x, weight, bias, down, up, 0.7)
            y.backward(dy)
            return [y.detach().double(), *(leaf.grad.double() for leaf in leaves)]

        exact = run(torch.float64, "reference")
        for mode, total in errors.items():
            total += torch.tensor(
                [(a - b).norm() / b.norm() for a, b in zip(run(torch.float32, mode), exact)]
            )
    assert (errors["fused"] <= 2 * errors["reference"]).all(), errors


def test_fused_keeps_small_updates_of_a_half_precision_weight():
    x, weight, down, up = (
        torch.ones(1, 8).bfloat16(),
        torch.ones(8, 8).bfloat16(),
        torch.full((1, 8), 1e-3),
        torch.full((8, 1), 1e-3),
    )
    with use_kernels("fused"):
        y = call("lora_linear", x, weight, None, down, up, 1.0)
    with use_kernels("reference"):
        assert torch.equal(y, call("lora_linear", x, weight, None, down, up, 1.0))
