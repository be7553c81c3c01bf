"""Packed weights: exact sizes, the formulas of fp8, int8 and NF4 in float64, gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_core.memory.live_tensors import LiveTensors
from lora_core.memory.quantized_weights import (
    NF4_BLOCK,
    QuantizedLinear,
    is_quantizable,
    pack_weight,
    packing_bytes,
    stored_bytes,
    unpacking_bytes,
)

FORMS = ("fp8", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((320, 320), (1280, 640), (7, 64), (32, 48), (3, 5), (2, 2))


def linear(shape, dtype=torch.float32, seed=0):
    """A frozen Linear of a random weight [out, in]."""
    torch.manual_seed(seed)
    return nn.Linear(shape[1], shape[0]).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_bytes_are_those_of_the_packed_tensors(form, dtype):
    for shape in SHAPES:
        if is_quantizable(shape, form):
            _, tensors = pack_weight(linear(shape, dtype).weight, form)
            assert sum(t.nbytes for t in tensors) == stored_bytes(shape, form, dtype), shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_and_unpacking_take_the_bytes_that_are_planned(form, dtype):
    """Within 2 %, for weights below and above the numbers that torchao takes at once."""
    for shape in ((320, 320), (1536, 1024)):
        weight = linear(shape, dtype).weight
        with LiveTensors() as live:
            packing, tensors = pack_weight(weight, form)
        planned = packing_bytes(weight.numel(), form, dtype)
        assert planned == pytest.approx(live.peak + weight.nbytes, rel=0.02)
        with LiveTensors() as live:
            packing.unpack(tensors)
        assert unpacking_bytes(weight.numel(), form, dtype) == pytest.approx(live.peak, rel=0.02)


def test_stored_bytes_of_what_is_not_quantizable_are_the_plain_size():
    for form, shape in (
        ("none", (4, 4)),
        ("int4", (3, 5)),
        ("int8", (8, 4, 3, 3)),
        ("fp8", (1, 9)),
    ):
        assert not is_quantizable(shape, form)
        assert stored_bytes(shape, form, torch.bfloat16) == 2 * torch.Size(shape).numel()


def int8_formula(weight):
    """Symmetric by rows: scale max |w| / 127.5, rounded to even, in float64 (torchao's range is
    -128 ... 127).
    """
    w = weight.double()
    scale = (w.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    scale = scale.float().double()
    return (w / scale).round().clamp(-128, 127) * scale


def fp8_formula(weight):
    """float8_e4m3 of w / scale, scale max |w| / 448, in float64 but for the rounding itself."""
    w = weight.double()
    scale = (w.abs().amax(1, keepdim=True) / 448).float()
    return (weight.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def nf4_levels():
    """The levels of NF4 by appendix E of arXiv 2305.14314: quantiles of the normal distribution."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([upper, lower, torch.zeros(1, dtype=torch.float64)]).sort().values
    return levels / levels.max()


def nf4_formula(weight):
    """The nearest level of w / max |w| of each block of 64, with scales that are not rounded."""
    w = weight.double().view(-1, NF4_BLOCK)
    scale = w.abs().amax(1, keepdim=True)
    levels = nf4_levels()
    nearest = (w / scale)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).view(weight.shape)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_weight_is_that_of_the_formulas_in_float64():
    weight = linear((48, 128)).weight
    packing, tensors = pack_weight(weight, "fp8")
    assert relative(packing.unpack(tensors), fp8_formula(weight)) < 1e-6
    packing, tensors = pack_weight(weight, "int8")
    steps = weight.double() / (weight.double().abs().amax(1, keepdim=True) / 127.5)
    is_tie = ((steps.abs() % 1) - 0.5).abs() < 1e-4  # as every row's largest number
    assert is_tie.sum() < 2 * len(weight)
    difference = packing.unpack(tensors).double() - int8_formula(weight)
    assert difference[~is_tie].abs().max() < 1e-6 * weight.abs().max()
    packing, tensors = pack_weight(weight, "int4")
    # int8 scales of scales: each off by at most half a step of 1/127 of the largest distance
    assert relative(packing.unpack(tensors), nf4_formula(weight)) < 1 / 127


@pytest.mark.parametrize("form", FORMS)
def test_layer_is_its_unpacked_weight_in_forward_and_backward(form):
    plain = linear((48, 128), torch.bfloat16)
    layer = QuantizedLinear(plain, form)
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), F.linear(twin, layer.weight, plain.bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert torch.equal(y, expected) and torch.equal(x.grad, twin.grad)
    assert layer.weight.dtype == torch.bfloat16 and layer.bias is plain.bias


def test_only_packed_tensors_are_kept_for_the_backward():
    layer = QuantizedLinear(linear((48, 128)), "int8")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 128, requires_grad=True))
    own = {t.data_ptr() for t in layer.packed}
    assert {t.data_ptr() for t in kept} == own


def test_casting_the_model_leaves_the_packed_numbers():
    layer = QuantizedLinear(linear((48, 128)), "fp8")
    again = copy.deepcopy(layer).to(torch.float16)
    assert torch.equal(again.weight, layer.weight)
    assert [t.dtype for t in again.packed] == [t.dtype for t in layer.packed]
