"""Gradient clipping and loss scaling against torch's own."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.errors import UserError
from lora_core.optim.building import build_optimizer
from lora_core.optim.gradients import LossScaler, clip_gradients_
from lora_core.prodigy import Prodigy
from lora_core.runs.run_folder import flatten_state, unflatten_state


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("host sync")
        return func(*args, **(kwargs or {}))


def with_grads(*shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=dtype)
    return params


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6, math.inf])
def test_clipping_is_torchs(max_norm):
    ours, theirs = (with_grads((5, 3), (7,), (1,), dtype=torch.float64) for _ in range(2))
    ours[2].grad = theirs[2].grad = None
    with NoSync():
        norm = clip_gradients_(ours, max_norm)
    expected = torch.nn.utils.get_total_norm([p.grad for p in theirs[:2]])
    if max_norm < math.inf:
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    for p, q in zip(ours[:2], theirs):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)


def test_the_norm_of_a_long_half_precision_gradient_is_exact():
    p = torch.zeros(300_001, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = math.sqrt(sum(v * v for v in p.grad.double().tolist()))
    assert float(clip_gradients_([p], math.inf)) == pytest.approx(exact, rel=1e-12)


def test_nothing_to_clip_or_unscale_is_an_error():
    with pytest.raises(UserError, match="no gradient"):
        clip_gradients_([torch.zeros(2, requires_grad=True)], 1.0)
    with pytest.raises(UserError, match="no gradient"):
        LossScaler().unscale_([torch.zeros(2, requires_grad=True)])
    with pytest.raises(UserError, match="positive"):
        clip_gradients_(with_grads((2,)), 0.0)


def named(params, name="denoiser", lr=1e-2, **extra):
    return {"params": params, "name": name, "lr": lr, "weight_decay": 0.1, **extra}


FACTORIES = {
    "built adamw": lambda params: build_optimizer("adamw", [named(params)], {}),
    "prodigy": lambda params: Prodigy(params, d0=1e-2, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
}
OVERFLOWS = {0: "inf", 1: "nan", 5: "inf", 11: "nan"}


def fp16_run(make, scaler, steps=20, skip=False):
    """(parameters, optimizer, scales) after steps on a toy loss.

    The steps in OVERFLOWS get an inf or NaN gradient, or are left out with `skip`.
    """
    params = with_grads((4, 3), (5,), seed=1)
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    optimizer, scales = make(params), []
    for step in range(steps):
        if skip and step in OVERFLOWS:
            continue
        optimizer.zero_grad()
        loss = sum(((p - 0.1 * step) ** 2).sum() for p in params)
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler and step in OVERFLOWS:
            params[step % 2].grad.view(-1)[2] = float(OVERFLOWS[step])
        if scaler:
            scaler.unscale_(params) if isinstance(scaler, LossScaler) else scaler.unscale_(
                optimizer
            )
            scaler.step(optimizer)
            scaler.update()
            scales.append(
                float(scaler.current if isinstance(scaler, LossScaler) else scaler.get_scale())
            )
        else:
            optimizer.step()
    return params, optimizer, scales


@pytest.mark.parametrize("name", FACTORIES)
def test_an_overflown_step_is_no_step(name):
    """Bit for bit the run without those steps: scales are powers of two, so unscaling is exact."""
    scaled, optimizer, _ = fp16_run(FACTORIES[name], LossScaler(init=1024.0, interval=4))
    plain, expected, _ = fp16_run(FACTORIES[name], None, skip=True)
    assert all(torch.equal(p, q) for p, q in zip(scaled, plain))
    ours, theirs = (flatten_state(o.state_dict()) for o in (optimizer, expected))
    assert ours[1] == theirs[1] and all(
        torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0]
    )


@pytest.mark.parametrize("name", FACTORIES)
def test_the_scale_moves_as_torchs(name):
    settings = dict(init_scale=1024.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=4)
    ours = fp16_run(FACTORIES[name], LossScaler(init=1024.0, interval=4))
    theirs = fp16_run(FACTORIES[name], torch.amp.GradScaler("cpu", **settings))
    assert ours[2] == theirs[2] and any(b > a for a, b in zip(ours[2], ours[2][1:]))
    assert all(torch.equal(p, q) for p, q in zip(ours[0], theirs[0]))


def test_prodigy_unscales_for_torchs_scaler():
    """GradScaler without unscale_ hands grad_scale to an optimiser of this protocol."""

    def run(scaler):
        params = with_grads((4,))
        optimizer = Prodigy(params, d0=1e-2)
        for _ in range(3):
            for p in params:
                p.grad = torch.full_like(p, 3.0) * (64.0 if scaler else 1.0)
            if scaler:
                scaler.scale(torch.zeros(()))
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        return params[0]

    assert torch.equal(run(torch.amp.GradScaler("cpu", init_scale=64.0)), run(None))


def test_the_scale_never_grows_to_infinity():
    scaler = LossScaler(init=2.0**127, interval=1)
    for _ in range(3):
        scaler.update()
    assert float(scaler.current) == 2.0**127


def test_the_scaler_stays_where_it_is_in_memory():
    """A CUDA graph replays addresses."""
    scaler, (p,) = LossScaler(init=1024.0, interval=1), with_grads((4,))
    places = [t.data_ptr() for t in (scaler.current, scaler.clean, scaler.found_inf)]
    for grad in (1.0, math.inf):
        p.grad = torch.full_like(p, grad)
        scaler.unscale_([p]), scaler.update()
    scaler.load_state_dict(scaler.state_dict())
    assert (
        places == [t.data_ptr() for t in (scaler.current, scaler.clean, scaler.found_inf)]
        and float(scaler.current) == 1024.0
    )


@pytest.mark.parametrize("make", [FACTORIES["prodigy"]])
def test_no_host_sync_around_prodigy(make):
    params, scaler = with_grads((4, 3), (5,)), LossScaler()
    optimizer = make(params)
    params[0].grad[0, 0] = math.inf
    with NoSync():
        scaler.unscale_(params)
        clip_gradients_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert float(scaler.current) == 32768.0 and not params[0].any()


def test_overflow_is_seen_in_half_precision_gradients():
    (p,) = with_grads((6,), dtype=torch.float16)
    p.grad[3] = math.inf
    assert float(LossScaler().unscale_([p])) == 1.0


def test_the_scaler_resumes_bit_for_bit():
    a, b = LossScaler(init=1024.0, interval=4), LossScaler()
    fp16_run(FACTORIES["prodigy"], a, steps=7)
    b.load_state_dict(unflatten_state(*flatten_state(a.state_dict())))
    for _ in range(6):
        a.update(), b.update()
        assert torch.equal(a.current, b.current) and torch.equal(a.clean, b.clean)


@pytest.mark.parametrize(
    "options", [dict(init=0.0), dict(growth=1.0), dict(backoff=1.0), dict(interval=0)]
)
def test_scaler_settings_out_of_range_are_refused(options):
    with pytest.raises(UserError, match="expected init"):
        LossScaler(**options)
