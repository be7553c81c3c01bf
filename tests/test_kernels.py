"""The references against the formulas in float64, and the dispatcher.

The dropout hash is held to a scalar uint32 implementation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_core import kernels
from lora_core.errors import UserError
from lora_core.kernels import OPS, call, choice, reference, use_kernels


def dense(down, up, scale, groups=1):
    """The update that folding would add to the weight, one matrix per group, with loops."""
    out, r = up.shape[0], down.shape[0]
    blocks = []
    for g in range(groups):
        rows, ranks = (
            slice(g * out // groups, (g + 1) * out // groups),
            slice(g * r // groups, (g + 1) * r // groups),
        )
        blocks.append(torch.einsum("oi,i...->o...", up[rows].flatten(1), down[ranks]))
    return scale * torch.cat(blocks)


@pytest.mark.parametrize("name", OPS)
def test_reference_runs_its_example_and_keeps_the_dtype(name):
    for dtype in (torch.float64, torch.bfloat16):
        args = OPS[name].example(0, dtype, "cpu")
        out = call(name, *args)
        for y in out if isinstance(out, tuple) else (out,):
            assert torch.isfinite(y).all()
            assert y.dtype == (
                reference.wide_dtype(dtype)
                if name in ("dora_norm", "dora_norms", "snr_weighted_mse")
                else dtype
            )


def test_lora_linear_is_the_dense_layer():
    x, weight, bias, down, up, scale = OPS["lora_linear"].example(1, torch.float64, "cpu")
    expected = x @ (weight + dense(down, up, scale)).T + bias
    torch.testing.assert_close(
        call("lora_linear", x, weight, bias, down, up, scale), expected, rtol=0, atol=1e-12
    )
    alone = call("lora_linear", x, None, None, down, up, scale)
    torch.testing.assert_close(alone, x @ dense(down, up, scale).T, rtol=0, atol=1e-12)


def test_lora_conv_is_the_dense_convolution_with_stride_padding_dilation_groups():
    x, weight, bias, down, up, scale, stride, padding, dilation, groups = OPS["lora_conv"].example(
        2, torch.float64, "cpu"
    )
    expected = torch.nn.functional.conv2d(
        x, weight + dense(down, up, scale, groups), bias, stride, padding, dilation, groups
    )
    got = call("lora_conv", x, weight, bias, down, up, scale, stride, padding, dilation, groups)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    alone = call("lora_conv", x, None, None, down, up, scale, stride, padding, dilation, groups)
    torch.testing.assert_close(
        alone,
        expected - torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups),
        rtol=0,
        atol=1e-12,
    )


def test_dora_norm_is_per_output_row_on_a_square_weight():
    generator = torch.Generator().manual_seed(3)
    weight, down, up = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 6), (2, 6), (6, 2))
    )
    rows = torch.stack([(weight + 0.5 * up @ down)[i].square().sum().sqrt() for i in range(6)])
    torch.testing.assert_close(call("dora_norm", weight, down, up, 0.5), rows, rtol=1e-14, atol=0)


def test_dora_norm_of_a_grouped_convolution():
    _, weight, _, down, up, scale, *_, groups = OPS["lora_conv"].example(4, torch.float64, "cpu")
    expected = (weight + dense(down, up, scale, groups)).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(
        call("dora_norm", weight, down, up, scale), expected, rtol=1e-14, atol=0
    )


def test_dora_norm_is_fp32_for_bf16_weights_and_under_autocast():
    weight, down, up, scale = OPS["dora_norm"].example(5, torch.float32, "cpu")
    low = weight.bfloat16()
    exact = (low.double() + scale * up.double() @ down.double()).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = call("dora_norm", low, down, up, scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_dora_compose_is_the_formula_and_rounds_once():
    y0, bias, lora, gain = OPS["dora_compose"].example(6, torch.float64, "cpu")
    expected = y0 + 0.3 * ((gain.double() - 1) * (y0 - bias) + gain.double() * lora)
    torch.testing.assert_close(
        call("dora_compose", y0, bias, lora, gain, 0.3), expected, rtol=0, atol=1e-12
    )
    low = [t.bfloat16() for t in (y0, bias, lora)]
    exact = (
        low[0].double()
        + (gain.double() - 1) * (low[0].double() - low[1].double())
        + gain.double() * low[2].double()
    )
    got = call("dora_compose", *low, gain)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("name", ["lora_linear", "lora_conv", "dora_compose"])
def test_gradients_pass_gradcheck(name):
    args = [
        a.double().requires_grad_() if isinstance(a, torch.Tensor) else a
        for a in OPS[name].example(7, torch.float64, "cpu")
    ]
    assert torch.autograd.gradcheck(OPS[name].reference, args)


# --- fused implementations ---


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


# --- dispatcher ---


def test_a_mode_without_an_implementation_takes_the_next_plainer_one_and_warns(monkeypatch):
    monkeypatch.setitem(OPS, "dora_norm", replace(OPS["dora_norm"], fused=None, triton=None))
    monkeypatch.setattr(choice, "_warned", set())
    args = OPS["dora_norm"].example()
    expected = OPS["dora_norm"].reference(*args)
    with use_kernels("fused"):
        assert torch.equal(call("dora_norm", *args), expected)
    with (
        use_kernels("triton"),
        pytest.warns(UserWarning, match="dora_norm runs without its triton kernel: there is none"),
    ):
        assert torch.equal(call("dora_norm", *args), expected)
    assert kernels.current_mode() == "auto"


def test_modes_nest_and_read_the_environment(monkeypatch):
    with use_kernels("reference"):
        with use_kernels("fused"):
            assert kernels.current_mode() == "fused"
        assert kernels.current_mode() == "reference"
    monkeypatch.setattr(kernels.dispatch, "mode", None)  # as in a process that has not read it
    monkeypatch.setenv("LORA_KERNELS", "reference")
    assert kernels.current_mode() == "reference"
    monkeypatch.setenv("LORA_KERNELS", "fused")
    assert kernels.current_mode() == "reference"  # read once
    kernels.set_mode(None)
    assert kernels.current_mode() == "fused"
    monkeypatch.setenv("LORA_KERNELS", "fast")
    kernels.set_mode(None)
    with pytest.raises(UserError, match=r"'fast'.*auto, reference, fused, triton"):
        kernels.current_mode()
    with pytest.raises(UserError, match="'quick'"), use_kernels("quick"):
        pass


def test_a_resolved_function_is_the_implementation_until_the_generation_changes(monkeypatch):
    args = OPS["lora_linear"].example()
    for mode in ("reference", "fused"):
        with use_kernels(mode):
            assert kernels.resolve("lora_linear", *args) is getattr(OPS["lora_linear"], mode)
    found = [kernels.dispatch.generation]
    with use_kernels("fused"):
        found.append(kernels.dispatch.generation)
    found.append(kernels.dispatch.generation)
    monkeypatch.setitem(OPS, "lora_linear", replace(OPS["lora_linear"], triton=None))
    found.append(kernels.dispatch.generation)
    with choice.replayed():
        found.append(kernels.dispatch.generation)
    choice.reload_winners()
    found.append(kernels.dispatch.generation)
    kernels.resolve("lora_linear", *args)
    assert kernels.dispatch.generation == found[-1] and found == sorted(set(found))


def test_auto_takes_fused_and_triton_only_for_cuda(monkeypatch):
    def fused(*args):
        return torch.tensor(1.0)

    def triton(*args):
        return torch.tensor(2.0)

    op = replace(OPS["lora_linear"], fused=fused, triton=triton, supports=lambda *a: "in is odd")
    monkeypatch.setitem(OPS, "lora_linear", op)
    args = op.example()
    assert call("lora_linear", *args) == 1
    monkeypatch.setattr(choice, "_warned", set())
    with (
        use_kernels("triton"),
        pytest.warns(UserWarning, match="lora_linear runs without its triton kernel: in is odd"),
    ):
        assert call("lora_linear", *args) == 1
    with use_kernels("reference"):
        assert call("lora_linear", *args).shape == (2, 5, 11)
    monkeypatch.setitem(OPS, "lora_linear", replace(op, supports=lambda *a: None))
    with use_kernels("triton"):
        assert call("lora_linear", *args) == 2


# --- dropout ---


def uint32_mask(shape, p, seed, layer, step, rows):
    """The same hash in numpy's uint32, where products wrap by themselves, one element at a time."""
    np.seterr(over="ignore")
    u = np.uint32

    def mix(h):
        h ^= h >> u(16)
        h *= u(0x7FEB352D)
        h ^= h >> u(15)
        h *= u(0x846CA68B)
        return h ^ (h >> u(16))

    def absorb(state, word):
        return mix((state ^ u(word & 0xFFFFFFFF)) + u(0x9E3779B9))

    out = np.zeros((shape[0], int(np.prod(shape[1:]))), bool)
    for i, row in enumerate(rows):
        key = u(0)
        for word in (seed, seed >> 32, layer, step, row, row >> 32):
            key = absorb(key, word)
        second = absorb(key, 1)
        for e in range(out.shape[1]):
            out[i, e] = int(mix(mix(u(e) ^ key) ^ second)) >= int(p * 2**32)
    return torch.from_numpy(out).reshape(shape)


def test_dropout_hash_equals_uint32_arithmetic():
    rows = [7, -(2**62) + 11, 2**40]
    args = 0.25, 2**35 + 5, 0xDEADBEEF, 17, rows
    got = call(
        "keyed_dropout", torch.ones(3, 4, 5), *args[:3], torch.tensor(17), torch.tensor(rows)
    )
    assert torch.equal(got != 0, uint32_mask((3, 4, 5), *args))
    assert torch.equal(got.unique(), torch.tensor([0, 1 / 0.75]))


def test_dropout_keep_rate_and_independence():
    rows = torch.arange(4) * 2**33
    draw = [
        call("keyed_dropout", torch.ones(4, 50_000), 0.3, 0, 9, torch.tensor(step), rows) != 0
        for step in (0, 1)
    ]
    n = draw[0].numel()
    assert abs(draw[0].float().mean() - 0.7) < 5 * (0.21 / n) ** 0.5
    for one, other in (
        (draw[0], draw[1]),
        (draw[0][0], draw[0][1]),
        (draw[0][:, 1:], draw[0][:, :-1]),
    ):
        agree = (one == other).float().mean()
        assert abs(agree - (0.49 + 0.09)) < 5 * (0.25 / one.numel()) ** 0.5


def test_dropout_gradient_is_the_mask_and_memory_format_does_not_matter():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rest = 0.5, 1, 2, torch.tensor(3), torch.tensor([4, 5])
    y = call("keyed_dropout", x, *rest)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * 2.0)
    assert torch.equal(call("keyed_dropout", x.to(memory_format=torch.channels_last), *rest), y)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [name for name, op in OPS.items() if op.triton and name not in ("prodigy_step", "adamw_step")],
)
def test_triton_kernels_are_the_reference_on_a_gpu(name, dtype):
    """The example of each row: at most twice the reference's error to float64, in one dtype."""
    op, results = OPS[name], {}
    if reason := op.supports and op.supports(*op.example(0, dtype, "cuda")):
        pytest.skip(f"the kernel refuses this example: {reason}")
    for mode, kind in (("exact", torch.float64), ("reference", dtype), ("triton", dtype)):
        args = OPS[name].example(0, dtype, "cuda")
        args = torch.utils._pytree.tree_map(
            lambda a, kind=kind: (
                a.to(kind) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            ),
            args,
        )
        with use_kernels("triton" if mode == "triton" else "reference"):
            results[mode] = torch.cat(
                [y.double().flatten() for y in torch.utils._pytree.tree_leaves(call(name, *args))]
            )
    error, eager = ((results[mode] - results["exact"]).norm() for mode in ("triton", "reference"))
    assert error <= 2 * eager + 1e-6 * results["exact"].norm()
