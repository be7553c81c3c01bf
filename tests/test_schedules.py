"""Schedules against diffusers' formulas, optimiser names, clipping and loss scaling against torch's own."""

import math

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.errors import UserError
from lora_core.optim.adamw import AdamW
from lora_core.optim.schedules import (
    OPTIMIZERS,
    SCHEDULES,
    LossScaler,
    build_optimizer,
    check_arguments,
    clip_gradients_,
    resolve_optimizer,
    resolve_schedule,
    split_lora_plus,
)
from lora_core.prodigy import Prodigy
from lora_core.runs.run_folder import flatten_state, unflatten_state


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("host sync")
        return func(*args, **(kwargs or {}))


ROWS = [
    ("constant", "constant_with_warmup", {}, {}),
    ("linear", "linear", {}, {}),
    ("cosine", "cosine", {}, {}),
    ("cosine_restarts", "cosine_with_restarts", {}, {}),
    ("cosine_restarts", "cosine_with_restarts", dict(cycles=3), dict(num_cycles=3)),
    ("polynomial", "polynomial", dict(end=1e-3), {}),
    ("polynomial", "polynomial", dict(end=1e-3, power=2.5), dict(power=2.5)),
]


@pytest.mark.parametrize("ours, theirs, args, their_args", ROWS)
@pytest.mark.parametrize("total, warmup", [(37, 0), (37, 5), (10, 10), (1, 0), (4, 1)])
def test_schedules_are_diffusers(ours, theirs, args, their_args, total, warmup):
    lr = 1e-4  # diffusers' lr_end of 1e-7 is the fraction 1e-3 of it
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total, **their_args
    )
    multiplier = resolve_schedule(ours, **args)
    last = (
        total - 1 if total == warmup else total + 4
    )  # diffusers' polynomial divides by zero at the end of a run that is all warm-up
    for step in range(last):
        assert multiplier(step, total, warmup) == pytest.approx(
            scheduler.get_last_lr()[0] / lr, rel=1e-12, abs=1e-15
        ), step
        optimizer.step()
        if step + 1 < last:
            scheduler.step()


def test_a_cosine_of_other_cycles_is_diffusers():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 3, 20, num_cycles=1.5)
    for step in range(20):
        assert SCHEDULES["cosine"](step, 20, 3, cycles=1.5) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-15
        )
        optimizer.step(), scheduler.step()


def test_wrong_schedules_name_the_nearest():
    with pytest.raises(UserError, match="nearest: cosine"):
        resolve_schedule("cosin")
    with pytest.raises(UserError, match=r"power.*nearest: power"):
        resolve_schedule("polynomial", powr=2)
    with pytest.raises(UserError, match="no argument 'total'"):
        resolve_schedule("constant", total=2)


def test_optimizers_by_name_and_by_path():
    assert resolve_optimizer("adamw") is AdamW is OPTIMIZERS["adamw"]
    assert resolve_optimizer("torch.optim.AdamW") is torch.optim.AdamW
    assert resolve_optimizer("prodigy") is Prodigy
    assert resolve_optimizer("torch.optim.Adagrad") is torch.optim.Adagrad


@pytest.mark.parametrize(
    "name, words",
    [
        ("adamv", "nearest: adamw"),
        ("torch.optim.Adagrda", "nearest: Adagrad"),
        ("no_such_module.Adam", "no_such_module"),
        ("torch.nn.Linear", "not a torch.optim.Optimizer"),
        ("torch.optim.lr_scheduler", "not a torch.optim.Optimizer"),
        (".AdamW", "expected one of"),
        ("torch..AdamW", "torch."),
    ],
)
def test_wrong_optimizers_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        resolve_optimizer(name)


def test_arguments_are_checked_against_the_signature():
    check_arguments(Prodigy, {"d_coef": 2.0}, "optimizer prodigy", given=("params", "lr"))
    with pytest.raises(
        UserError, match=r"optimizer prodigy has no argument 'dcoef'.*nearest: d_coef"
    ):
        check_arguments(Prodigy, {"dcoef": 2.0}, "optimizer prodigy", given=("params", "lr"))


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


# ---------------------------------------------------------------- building: AdamW, LoRA+


def named(params, name="denoiser", lr=1e-2, **extra):
    return {"params": params, "name": name, "lr": lr, "weight_decay": 0.1, **extra}


def stepped(optimizer, params, steps=range(6)):
    """Steps with gradients that depend on the step alone."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_arguments_go_to_the_class():
    params = with_grads((3,))
    assert build_optimizer("adamw", [named(params)], {"eps": 1e-6}).defaults["eps"] == 1e-6
    assert build_optimizer("torch.optim.AdamW", [named(params)], {"amsgrad": True}).defaults[
        "amsgrad"
    ]
    with pytest.raises(UserError, match="optimizer adamw has no argument 'amsgrad'; expected eps"):
        build_optimizer("adamw", [named(params)], {"amsgrad": True})
    with pytest.raises(UserError, match=r"adamw refuses its settings.*|floating point"):
        build_optimizer(
            "adamw", [named([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])], {}
        )


def test_an_adamw_resumes_bit_for_bit():
    """N steps = k steps, a checkpoint through plain files, N - k steps; a group pauses on the way, lr 0 and without gradients."""
    whole = [p.detach().requires_grad_() for p in with_grads((7, 3), (130,))]
    expected = stepped(
        build_optimizer("adamw", [named(whole[:1]), named(whole[1:], "tokens")], {}), whole
    )
    first = [p.detach().requires_grad_() for p in with_grads((7, 3), (130,))]
    optimizer = build_optimizer("adamw", [named(first[:1]), named(first[1:], "tokens")], {})
    stepped(optimizer, first, range(2))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in first:
        p.grad = None
    before = [p.detach().clone() for p in first]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first, before))
    saved = unflatten_state(*flatten_state(optimizer.state_dict()))
    second = [p.detach().clone().requires_grad_() for p in first]
    again = build_optimizer("adamw", [named(second[:1]), named(second[1:], "tokens")], {})
    again.load_state_dict(saved)
    for group in again.param_groups:
        group["lr"] = 1e-2
    assert all(torch.equal(p, q) for p, q in zip(stepped(again, second, range(2, 6)), expected))


@pytest.mark.parametrize("name", ["adamw", "prodigy", "torch.optim.SGD"])
def test_lora_plus_is_two_groups_by_hand(name):
    """One step, and three: ups at 16 times the learning rate; other names, and what is no up, at the plain one."""
    found = []
    for by_hand in (False, True):
        params = [
            p.detach().requires_grad_() for p in with_grads((4, 3), (3, 4), (4, 2), (2, 4), (5, 2))
        ]
        ups, rest, tokens = params[1:4:2], params[0:3:2], params[4:]
        if by_hand:
            groups = [named(rest), named(ups, lr=16e-2), named(tokens, "tokens", lr=0.5)]
        else:
            groups = split_lora_plus(
                [named(params[:4]), named(tokens, "tokens", lr=0.5)], {"denoiser": ups}, 16
            )
        optimizer = build_optimizer(name, groups, {})
        found.append(stepped(optimizer, params, range(1)) + stepped(optimizer, params, range(1, 3)))
        if not by_hand:
            assert [(g["name"], g["ratio"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
                ("denoiser", 1.0, 1e-2, 2), ("denoiser", 16.0, 16e-2, 2), ("tokens", 1.0, 0.5, 1),
            ]  # fmt: skip
            saved = unflatten_state(*flatten_state(optimizer.state_dict()))
            assert [g["ratio"] for g in saved["param_groups"]] == [1.0, 16.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_ratio_of_one_splits_nothing_and_bad_ones_are_refused():
    params = with_grads((4, 3), (3, 4))
    (group,) = split_lora_plus([named(params)], {"denoiser": params[1:]}, 1.0)
    assert group["params"] == params and group["ratio"] == 1.0 and group["lr"] == 1e-2
    (group,) = split_lora_plus(
        [named(params)], {"denoiser": params}, 2.0
    )  # all ups: no empty group
    assert group["ratio"] == 2.0
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"--optimizer\.lora-plus is"):
            split_lora_plus([named(params)], {}, ratio)
    with pytest.raises(ValueError, match="1 of the ups of denoiser"):
        split_lora_plus([named(params[:1])], {"denoiser": params[1:]}, 2.0)


FACTORIES = {
    "built adamw": lambda params: build_optimizer("adamw", [named(params)], {}),
    "prodigy": lambda params: Prodigy(params, d0=1e-2, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
}
OVERFLOWS = {0: "inf", 1: "nan", 5: "inf", 11: "nan"}


def fp16_run(make, scaler, steps=20, skip=False):
    """Steps on a toy loss; those in OVERFLOWS get an inf or NaN gradient, or do not exist with `skip`. Returns params, optimiser, scales."""
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
    """Bit for bit the run in which those steps do not exist: scales are powers of two, so unscaling is exact."""
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
