"""DoRA's norms and gain against the references in float64.

In Triton (interpreted where there is no GPU) and by blocks on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_core.errors import UserError
from lora_core.kernels import COSTS, OPS, call, device, reference, use_kernels

triton = pytest.importorskip("triton")
from lora_core.kernels import compose, dora, norms  # noqa: E402

pytestmark = pytest.mark.usefixtures("patched_once")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
Layer = tuple[Tensor, Tensor, Tensor, float]


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def layer(
    rows: int,
    columns: tuple[int, ...],
    rank: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    ones = [1] * (len(columns) - 1)
    weight, down, up = draw(seed, (rows, *columns), (rank, *columns), (rows, rank, *ones))
    return weight.to(dtype), down, up, 0.5


def error(got: Tensor, exact: Tensor) -> float:
    """The largest error, as a part of the largest value."""
    return float(
        (got.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-300)
    )


def close(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of the reference in the same dtype, or one rounding."""
    assert got.shape == exact.shape and got.dtype == eager.dtype
    assert error(got, exact) <= 2 * error(eager, exact) + torch.finfo(got.dtype).eps, (
        error(got, exact),
        error(eager, exact),
    )


@contextmanager
def launches() -> Iterator[list[str]]:
    """The kernels that are launched inside, by name; interpreter only."""
    from triton.runtime.interpreter import GridExecutor

    seen: list[str] = []
    run = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", counted):
        yield seen


def with_gradients(
    norm: Callable[..., Tensor], args: Layer, slope: Tensor, dtype: torch.dtype | None = None
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
    args = layer(*shape, dtype)
    (slope,) = draw(7, (shape[0],))
    exact = with_gradients(reference.dora_norm, args, slope, torch.float64)
    for got, eager, want in zip(
        with_gradients(fast, args, slope),
        with_gradients(reference.dora_norm, args, slope),
        exact,
        strict=True,
    ):
        close(got, eager, want)


@pytest.mark.parametrize("formats", [(LAST, LAST), (LAST, None), (None, LAST)], ids=str)
def test_norms_of_channels_last_convolutions(formats: Any) -> None:
    weight, down, up, scale = layer(5, (6, 3, 2), 3)
    exact = reference.dora_norm(weight.double(), down.double(), up.double(), scale)
    weight, down = (
        x if f is None else x.to(memory_format=f)
        for x, f in zip((weight, down), formats, strict=True)
    )
    assert dora.norm_refusal(weight, down, up, scale) is None
    assert error(dora.dora_norm(weight, down, up, scale), exact) < 2e-7
    assert error(dora.dora_norms(((weight, down, up, scale),))[0], exact) < 2e-7


def mixed() -> tuple[Layer, ...]:
    """Layers of two dtypes, one not aligned to 16 columns; ranks on both sides of one block."""
    shapes = [(20, (32,), 4), (3, (48,), 2), (17, (7,), 5), (6, (16,), 40)]
    layers = [layer(*shape, seed=i) for i, shape in enumerate(shapes)] + [
        layer(9, (32,), 3, torch.bfloat16, seed=9)
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
    layers = tuple(layer(4 + i, (32,), 3, seed=i) for i in range(5))
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


def cancelling(
    residual: float, rows: int = 64, columns: int = 1280, rank: int = 16
) -> tuple[Layer, Tensor]:
    """W = -s B A + a rest of `residual` ||W||, and the exact norms."""
    rest, down, up = draw(11, (rows, columns), (rank, columns), (rows, rank))
    base = -0.5 * up @ down
    weight = (
        base + residual * rest * base.norm(dim=1, keepdim=True) / rest.norm(dim=1, keepdim=True)
        if residual < 1
        else rest * base.norm() / rest.norm()
    )
    return (weight, down, up, 0.5), reference.dora_norm(
        weight.double(), down.double(), up.double(), 0.5
    )


def factored(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    products = 2 * scale * (weight @ down.t()) + scale**2 * up @ (down @ down.t())
    return (weight.square().sum(1) + (products * up).sum(1)).clamp(min=0).sqrt()


@pytest.mark.parametrize("residual", [1.0, 0.1, 0.01, 0.001])
def test_rows_that_nearly_cancel_are_as_good_as_the_dense_form(residual: float) -> None:
    args, exact = cancelling(residual, 16, 320)
    eager = ((reference.dora_norm(*args) - exact) / exact).abs().max()
    for fast in (dora.dora_norm, norms.dora_norm):
        assert ((fast(*args) - exact) / exact).abs().max() <= 2 * eager + 1e-7
    if residual < 0.1:
        assert (
            (factored(*args) - exact) / exact
        ).abs().max() > 20 * eager  # why that form is not taken


def test_the_norm_of_a_bf16_weight_is_good_to_1e6_under_autocast_too() -> None:
    weight, down, up, _ = layer(40, (1280,), 16, torch.bfloat16)
    exact = reference.dora_norm(weight.double(), down.double(), 0.01 * up.double(), 1.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert error(norms.dora_norm(weight, down, 0.01 * up, 1.0), exact) < 1e-6


def test_blocks_of_rows_do_not_change_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    args = layer(23, (50,), 3, torch.bfloat16)
    whole = norms.dora_norm(*args)
    for size in (1, 100, 400):
        monkeypatch.setattr(norms, "BLOCK", size)
        torch.testing.assert_close(norms.dora_norm(*args), whole, rtol=3e-7, atol=0)


def test_a_row_of_zeros_has_norm_0_and_no_gradient() -> None:
    weight, down, up, scale = layer(4, (8,), 2)
    weight[1], up[1] = 0, 0
    for fast in (dora.dora_norm, norms.dora_norm):
        n, d_down, d_up = with_gradients(
            fast, (weight, down, up, scale), torch.ones(4, device=DEVICE)
        )
        assert n[1] == 0 and (d_up[1] == 0).all() and torch.isfinite(d_down).all()


def test_what_the_kernels_do_not_take_is_said() -> None:
    weight, down, up, scale = layer(4, (8,), 2)
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


# ---------------------------------------------------------------- composition


def layouts(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y0, bias, lora and gain: rows, planes, channels_last, or planes with channels_last."""
    if kind == "rows":
        y0, bias, lora, gain = draw(1, (2, 5, 131), (131,), (2, 5, 131), (131,))
        return y0.to(dtype), bias.to(dtype), lora.to(dtype), gain
    y0, bias, lora, gain = draw(2, (2, 19, 3, 45), (19, 1, 1), (2, 19, 3, 45), (19, 1, 1))
    y0, lora = (x.to(dtype, memory_format=torch.contiguous_format) for x in (y0, lora))
    y0 = y0 if kind == "planes" else y0.to(memory_format=LAST)
    return y0, bias.to(dtype), lora.to(memory_format=LAST) if kind == "last" else lora, gain


def composed(
    op: Callable[..., Tensor],
    args: tuple[Any, ...],
    slope: Tensor,
    bias: bool,
    strength: float,
    base: bool = True,
) -> list[Tensor]:
    y0, b, lora, gain = args
    y0, lora, gain = (
        y0.detach().clone().requires_grad_(base),
        lora.detach().clone().requires_grad_(),
        gain.detach().clone().requires_grad_(),
    )
    y = op(y0, b if bias else None, lora, gain, strength)
    (y * slope.to(y.dtype)).sum().backward()
    return [x for x in (y.detach(), y0.grad, lora.grad, gain.grad) if x is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rows", "planes", "last", "both"])
def test_composition_and_its_gradients_are_the_references(kind: str, dtype: torch.dtype) -> None:
    args = layouts(kind, dtype)
    slope = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    wide = tuple(x.double() for x in args)
    for bias, strength in ((True, 1.0), (False, 0.3)):
        assert (
            compose.compose_refusal(args[0], args[1] if bias else None, *args[2:], strength) is None
        )
        exact = composed(reference.dora_compose, wide, slope, bias, strength)
        eager = composed(reference.dora_compose, args, slope, bias, strength)
        for got, plain, want in zip(
            composed(compose.dora_compose, args, slope, bias, strength), eager, exact, strict=True
        ):
            close(got, plain, want)
    assert len(composed(compose.dora_compose, args, slope, True, 1.0, base=False)) == 3


def test_gain_1_and_no_update_leave_the_output_to_the_bit() -> None:
    y0, bias, lora, gain = layouts("rows", torch.bfloat16)
    assert torch.equal(
        compose.dora_compose(y0, bias, torch.zeros_like(lora), torch.ones_like(gain)), y0
    )


def test_what_the_composition_does_not_take_is_said() -> None:
    y0, bias, lora, gain = layouts("rows", torch.float32)
    for args, word in [
        ((y0.double(), None, lora, gain), "float64"),
        ((y0, bias.clone().requires_grad_(), lora, gain), "gradient"),
        ((y0, bias, lora[:, :1], gain), "shapes"),
        ((y0, bias, lora, gain[:5]), "shapes"),
        ((y0.transpose(0, 1), bias, lora.transpose(0, 1), gain), "contiguous"),
    ]:
        assert word in str(compose.compose_refusal(*args))


# ---------------------------------------------------------------- how they run


def cases() -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    y0, bias, lora, gain = layouts("rows", torch.float32)
    weight, down, up, scale = layer(9, (32,), 3)
    return [
        (dora.dora_norm, (weight, down.requires_grad_(), up.requires_grad_(), scale)),
        (norms.dora_norm, (weight, down, up, scale)),
        (
            lambda w, d, u, s: torch.cat(dora.dora_norms(((w, d, u, s), (w, d, u, 2 * s)))),
            (weight, down, up, scale),
        ),
        (
            compose.dora_compose,
            (y0.requires_grad_(), bias, lora.requires_grad_(), gain.requires_grad_(), 0.5),
        ),
    ]


@pytest.mark.parametrize("i", range(4))
def test_compiled_whole_checkpointed_and_on_meta(i: int) -> None:
    op, args = cases()[i]
    wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    plain = op(*args)
    expected = torch.autograd.grad(plain.square().sum(), wanted)
    again = op(*args)
    assert torch.equal(again, plain)
    repeated = torch.autograd.grad(again.square().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(expected, repeated, strict=True))
    for run in (
        torch.compile(op, backend="aot_eager", fullgraph=True),
        lambda *a: checkpoint(op, *a, use_reentrant=False),
    ):
        y = run(*args)
        torch.testing.assert_close(y, plain)
        for got, want in zip(torch.autograd.grad(y.square().sum(), wanted), expected, strict=True):
            torch.testing.assert_close(got, want)
    empty = [
        x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in args
    ]
    y = op(*empty)
    assert y.is_meta and y.shape == plain.shape
    for got, want in zip(
        torch.autograd.grad(
            y.sum(), [x for x in empty if isinstance(x, Tensor) and x.requires_grad]
        ),
        expected,
        strict=True,
    ):
        assert got.shape == want.shape and got.dtype == want.dtype


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter runs")
def test_launches_are_those_declared() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Declared(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "lora_core":
                cost = COSTS[func._schema.name](*args)
                assert cost.bytes > 0
                self.total += cost.launches
            return func(*args, **(kwargs or {}))

    for i in (0, 2, 3):
        op, args = cases()[i]
        with launches() as seen, Declared() as declared:
            op(*args).sum().backward()
        assert len(seen) == declared.total == (2 if i == 3 else 1)


def test_rows_of_the_table_of_ops() -> None:
    for name in ("dora_norm", "dora_norms", "dora_compose"):
        args = OPS[name].example(0, torch.float32, DEVICE)
        exact = OPS[name].reference(*args)
        for mode in ("fused", "triton"):
            with use_kernels(mode):
                got = call(name, *args)
            torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    assert device.device_refusal(torch.zeros(1, device=DEVICE)) is None
