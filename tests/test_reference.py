"""The references against the formulas in float64, and the dropout hash against a scalar uint32
implementation.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_core.kernels import OPS, call


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
