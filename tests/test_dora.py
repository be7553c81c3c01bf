"""DoRA's row norms in Triton (interpreted where there is no GPU) against the float64 reference, and
those by blocks on the CPU at the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.kernels import call, reference, use_kernels
from tests.kernel_checks import (
    DEVICE,
    NormArguments,
    check_error,
    check_launches,
    check_row_of_ops,
    check_ways_to_run,
    draw,
    error,
    launches,
    norm_arguments,
)

pytest.importorskip("triton")
from lora_core.kernels import dora, norms

pytestmark = pytest.mark.usefixtures("patched_once")
LAST = torch.channels_last


def with_gradients(
    norm: Callable[..., Tensor],
    args: NormArguments,
    slope: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    weight, down, up, scale = args
    if dtype is not None:
        weight, down, up = weight.to(dtype), down.to(dtype), up.to(dtype)
    down, up = down.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    n = norm(weight, down, up, scale)
    (n * slope.to(n.dtype)).sum().backward()
    assert down.grad is not None and up.grad is not None
    return [n.detach(), down.grad, up.grad]


SHAPES = [(1, (1,), 1), (17, (131,), 3), (33, (64,), 16), (5, (3, 3, 3), 2), (4, (6, 1, 1), 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fast", [dora.dora_norm, norms.dora_norm])
def test_norms_and_their_gradients_are_the_references(
    fast: Callable[..., Tensor], shape: Any, dtype: torch.dtype
) -> None:
    args = norm_arguments(*shape, dtype)
    (slope,) = draw(7, (shape[0],))
    exact = with_gradients(reference.dora_norm, args, slope, torch.float64)
    for got, eager, want in zip(
        with_gradients(fast, args, slope),
        with_gradients(reference.dora_norm, args, slope),
        exact,
        strict=True,
    ):
        check_error(got, eager, want)


@pytest.mark.parametrize("formats", [(LAST, LAST), (LAST, None), (None, LAST)], ids=str)
def test_norms_of_channels_last_convolutions(formats: Any) -> None:
    weight, down, up, scale = norm_arguments(5, (6, 3, 2), 3)
    exact = reference.dora_norm(weight.double(), down.double(), up.double(), scale)
    weight, down = (
        x if f is None else x.to(memory_format=f)
        for x, f in zip((weight, down), formats, strict=True)
    )
    assert dora.norm_refusal(weight, down, up, scale) is None
    assert error(dora.dora_norm(weight, down, up, scale), exact) < 2e-7
    assert error(dora.dora_norms(((weight, down, up, scale),))[0], exact) < 2e-7


def mixed() -> tuple[NormArguments, ...]:
    """Layers of two dtypes, one not aligned to 16 columns; ranks on both sides of one block."""
    shapes = [(20, (32,), 4), (3, (48,), 2), (17, (7,), 5), (6, (16,), 40)]
    layers = [norm_arguments(*shape, seed=i) for i, shape in enumerate(shapes)] + [
        norm_arguments(9, (32,), 3, torch.bfloat16, seed=9)
    ]
    return tuple((w, d, u, 0.25 * (i + 1)) for i, (w, d, u, _) in enumerate(layers))


def test_norms_of_all_layers_are_those_of_each() -> None:
    layers = mixed()
    for got, args in zip(dora.dora_norms(layers), layers, strict=True):
        torch.testing.assert_close(got, reference.dora_norm(*args), rtol=5e-7, atol=0)
    slopes = draw(3, *[(len(args[0]),) for args in layers])
    grown = [
        (w, d.clone().requires_grad_(), u.clone().requires_grad_(), s) for w, d, u, s in layers
    ]
    sum(
        ((n * g).sum() for n, g in zip(dora.dora_norms(tuple(grown)), slopes, strict=True)),
        torch.zeros((), device=DEVICE),
    ).backward()
    for (_, down, up, _), args, slope in zip(grown, layers, slopes, strict=True):
        exact = with_gradients(reference.dora_norm, args, slope, torch.float64)
        for found, wanted in ((down.grad, exact[1]), (up.grad, exact[2])):
            assert found is not None and wanted is not None and error(found, wanted) < 1e-6


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter runs")
def test_layers_of_a_kind_are_one_launch_and_the_table_is_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = tuple(norm_arguments(4 + i, (32,), 3, seed=i) for i in range(5))
    with launches() as seen:
        first = dora.dora_norms(layers)
    assert seen == ["norms_kernel"]
    tables = dict(dora._tables)
    with torch.no_grad():
        layers[2][2].mul_(3)  # an optimiser step in place: the addresses stay
    second = dora.dora_norms(layers)
    assert dora._tables.keys() == tables.keys()
    assert not torch.equal(first[2], second[2]) and torch.equal(first[1], second[1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dora, "_tables", {})
    assert dora._find_table(list(layers))[0].shape == (5, dora.FIELDS)  # the CPU captures nothing
    with launches() as seen:
        dora.dora_norms(mixed())
    assert len(seen) == 4


def test_a_new_table_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        type = "cuda"

    class Weight:
        device, shape, ndim = Fake(), (2, 3), 2

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.zeros(2, 3), name)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: Any) -> Tensor:
            return torch.zeros(2, 3)[i]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UserError, match="run one step before the capture"):
        layer = Weight(), torch.zeros(1, 3), torch.zeros(2, 1), 1.0
        dora._find_table([layer])  # type: ignore[list-item]


def test_a_row_of_zeros_has_norm_0_and_no_gradient() -> None:
    weight, down, up, scale = norm_arguments(4, (8,), 2)
    weight[1], up[1] = 0, 0
    for fast in (dora.dora_norm, norms.dora_norm):
        n, d_down, d_up = with_gradients(
            fast, (weight, down, up, scale), torch.ones(4, device=DEVICE)
        )
        assert n[1] == 0 and (d_up[1] == 0).all() and torch.isfinite(d_down).all()


def test_what_the_kernels_do_not_take_is_said() -> None:
    weight, down, up, scale = norm_arguments(4, (8,), 2)
    for args, word in [
        ((weight.double(), down.double(), up.double(), scale), "float64"),
        ((weight.to(torch.int8), down, up, scale), "int8"),
        ((weight.to(torch.float8_e4m3fn), down, up, scale), "float8"),
        ((weight[:, ::2], down[:, ::2], up, scale), "contiguous"),
        ((weight.clone().requires_grad_(), down, up, scale), "gradient"),
        ((weight, torch.cat([down, down]), up, scale), "groups"),
    ]:
        assert word in str(dora.norm_refusal(*args))
        assert word in str(dora.norms_refusal(((weight, down, up, scale), args)))
    assert dora.norm_refusal(weight, down, up, scale) is None
    eight = weight.to(torch.float8_e4m3fn)
    with (
        use_kernels("triton"),
        pytest.warns(UserWarning, match="dora_norm runs without its triton kernel"),
    ):
        got = call("dora_norm", eight, down, up, scale)
    torch.testing.assert_close(
        got, reference.dora_norm(eight.float(), down, up, scale), rtol=5e-7, atol=0
    )


def norms_of_two(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return torch.cat(dora.dora_norms(((weight, down, up, scale), (weight, down, up, 2 * scale))))


def trained_arguments() -> NormArguments:
    weight, down, up, scale = norm_arguments(9, (32,), 3)
    return weight, down.requires_grad_(), up.requires_grad_(), scale


@pytest.mark.parametrize("op", [dora.dora_norm, norms_of_two], ids=["one layer", "two layers"])
def test_compiled_whole_checkpointed_and_on_meta(op: Callable[..., Tensor]) -> None:
    check_ways_to_run(op, trained_arguments())


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter runs")
def test_launches_are_those_declared() -> None:
    for op in (dora.dora_norm, norms_of_two):
        check_launches(op, trained_arguments(), 1)


def test_rows_of_the_table_of_ops() -> None:
    for name in ("dora_norm", "dora_norms"):
        check_row_of_ops(name, rtol=1e-6, atol=1e-6)
