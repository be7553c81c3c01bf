"""Prodigy: golden values of the algorithm, prodigyopt as the oracle, and laws of our own.

prodigyopt does not hold the latter: freezing, groups, no host sync.
"""

import contextlib
import copy
import io
import itertools
import math

import pytest
import torch
from prodigyopt import Prodigy as Oracle
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.errors import UserError
from lora_core.prodigy import Prodigy
from lora_core.runs.run_folder import flatten_state, unflatten_state

GOLDEN = [
    (
        {},
        {
            1: 1.000000e-6,
            2: 1.581532e-6,
            3: 4.822397e-6,
            5: 3.450963e-5,
            10: 3.873623e-3,
            20: 9.375613e-1,
        },
    ),
    (
        dict(safeguard_warmup=True, use_bias_correction=True, betas=(0.9, 0.99), weight_decay=0.01),
        {
            1: 1e-6,
            2: 1e-6,
            3: 1e-6,
            5: 1.193586e-6,
            10: 4.168239e-6,
            20: 5.063784e-5,
            30: 8.121805e-4,
            60: 6.364898e-1,
        },
    ),
    (
        dict(d_coef=2.0, growth_rate=1.02),
        {1: 1e-6, 2: 3.163064e-6, 3: 3.226326e-6, 5: 3.356669e-6, 10: 3.706034e-6, 20: 4.517635e-6},
    ),
]
OPTIONS = [
    {},
    dict(lr=0.5),
    dict(betas=(0.9, 0.99)),
    dict(betas=(0.0, 0.99)),
    dict(beta3=0.9),
    dict(eps=1e-4),
    dict(weight_decay=0.05),
    dict(weight_decay=0.05, decouple=False),
    dict(use_bias_correction=True),
    dict(safeguard_warmup=True),
    dict(d0=1e-4),
    dict(d_coef=2.0),
    dict(growth_rate=1.05),
    dict(slice_p=3),
    dict(
        safeguard_warmup=True,
        use_bias_correction=True,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        lr=0.7,
    ),
    dict(
        betas=(0.0, 0.95),
        slice_p=2,
        decouple=False,
        weight_decay=0.1,
        growth_rate=1.5,
        d_coef=0.5,
        use_bias_correction=True,
    ),
]


class NoSync(TorchDispatchMode):
    """Raises where a tensor's value would travel to the host.

    .item(), float(), `if tensor` and .any() in a branch all end in this operator.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("host sync in the step")
        return func(*args, **(kwargs or {}))


def toy():
    return [
        torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
    ]


def toy_grads(params):
    """Gradients of 1/2 |p - (3, 1, -1)|^2 + 1/2 |q - (.3, -.2)|^2."""
    for p, goal in zip(params, ([3.0, 1.0, -1.0], [0.3, -0.2])):
        p.grad = p.detach() - torch.tensor(goal, dtype=p.dtype)


def problem(seed=0, dtype=torch.float64):
    """(parameters, function that sets their gradients) of a small least-squares net.

    Two layers and a bias, one all zero, one non-contiguous.
    """
    g = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(16, 5, generator=g, dtype=dtype),
        torch.randn(16, 3, generator=g, dtype=dtype),
    )
    params = [
        torch.randn(5, 7, generator=g, dtype=dtype).t().contiguous().t(),
        torch.zeros(7, 3, dtype=dtype),
        torch.randn(3, generator=g, dtype=dtype),
    ]
    params = [p.requires_grad_() for p in params]

    def gradients(at=0):
        w = 1 + 0.3 * math.sin(at)  # the gradients differ from step to step
        loss = (w * (torch.tanh(x @ params[0]) @ params[1] + params[2] - y) ** 2).mean()
        for p, grad in zip(params, torch.autograd.grad(loss, params)):
            p.grad = grad

    return params, gradients


def quadratic():
    """Separate parabolas pulled by a varying force.

    Here 1 ulp at the start stays below 1e-11 in 150 steps of prodigyopt itself, for every entry of
    OPTIONS; on `problem` it grows to 1e-4 in one of them, so no two implementations could agree to
    1e-8 there.
    """
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (7, 3), (3,)]
    goals = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    params = [
        torch.randn(5, 7, generator=g, dtype=torch.float64).t().contiguous().t(),
        torch.zeros(7, 3, dtype=torch.float64),
        torch.randn(3, generator=g, dtype=torch.float64),
    ]
    bends = [0.5 + torch.rand(shape, generator=g, dtype=torch.float64) for shape in shapes]
    params = [p.requires_grad_() for p in params]

    def gradients(at):
        for i, (p, goal, bend) in enumerate(zip(params, goals, bends)):
            p.grad = bend * (p.detach() - goal) + 0.1 * math.sin(at + i)

    return params, gradients


def bits(tensors):
    return [t.detach().clone() for t in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def oracle(params, **options):
    with contextlib.redirect_stdout(io.StringIO()):  # it prints when decay is on
        return Oracle(params, **options)


@pytest.mark.parametrize("options, golden", GOLDEN)
def test_golden_values(options, golden):
    params = toy()
    optimizer = Prodigy(params, **options)
    for step in range(1, max(golden) + 1):
        toy_grads(params)
        optimizer.step()
        if step in golden:
            assert float(optimizer.param_groups[0]["d"]) == pytest.approx(golden[step], rel=5e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "default")
def test_150_steps_are_prodigyopts(options):
    (ours, our_grads), (theirs, their_grads) = quadratic(), quadratic()
    a, b = Prodigy(ours, **options), oracle(theirs, **options)
    for step in range(150):
        our_grads(step), their_grads(step)
        if step % 40 == 39:  # a parameter of the group without a gradient for a step
            ours[2].grad = theirs[2].grad = None
        a.step(), b.step()
        for name in ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k"):
            got, expected = float(a.param_groups[0][name]), float(b.param_groups[0][name])
            assert abs(got - expected) <= 1e-8 * abs(expected), (step, name)
        for p, q in zip(ours, theirs):
            assert (p - q).norm() <= 1e-8 * q.norm(), step
    assert b.param_groups[0]["d"] > 100 * b.param_groups[0]["d0"]


def test_one_shared_distance_over_two_groups_is_prodigyopts():
    (ours, our_grads), (theirs, their_grads) = problem(1), problem(1)
    a = Prodigy(
        [{"params": ours[:1], "weight_decay": 0.1}, {"params": ours[1:]}], use_bias_correction=True
    )
    b = oracle(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}],
        use_bias_correction=True,
    )
    for step in range(100):
        our_grads(step), their_grads(step)
        a.step(), b.step()
    assert float(a.param_groups[1]["d"]) == pytest.approx(b.param_groups[1]["d"], rel=1e-8)
    assert all((p - q).norm() <= 1e-8 * q.norm() for p, q in zip(ours, theirs))


@pytest.mark.parametrize("slice_p", [1, 2])
def test_a_step_without_gradient_signal_is_prodigyopts_early_return(slice_p):
    """D = 0: no count, no movement, no decay of N.

    With slices the moments see a gradient that the estimate does not.
    """
    ours, theirs = toy()[:1], toy()[:1]
    a, b = (
        Prodigy(ours, slice_p=slice_p, use_bias_correction=True),
        oracle(theirs, slice_p=slice_p, use_bias_correction=True),
    )
    blind = [[0.0, 1.0 * (slice_p > 1), 0.0], [0.0, 2.0 * (slice_p > 1), 0.0]]
    for grad in (*blind, [1.0, 2.0, -3.0], [0.5, 0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]):
        ours[0].grad, theirs[0].grad = (torch.tensor(grad, dtype=torch.float64) for _ in range(2))
        a.step(), b.step()
        assert float(a.param_groups[0]["k"]) == b.param_groups[0]["k"]
        assert float(a.param_groups[0]["d_numerator"]) == pytest.approx(
            b.param_groups[0]["d_numerator"], rel=1e-12
        )
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(
            a.state[ours[0]]["exp_avg_sq"], b.state[theirs[0]]["exp_avg_sq"], rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("how", ["lr", "grad"])
@pytest.mark.parametrize("distance", ["shared", "group"])
@pytest.mark.parametrize("weight_decay, decouple", [(0.0, True), (0.1, True), (0.1, False)])
def test_a_paused_group_is_bit_identical(how, distance, weight_decay, decouple):
    params, gradients = problem(2)
    optimizer = Prodigy(
        [{"params": params[:2]}, {"params": params[2:]}],
        weight_decay=weight_decay,
        decouple=decouple,
        distance=distance,
    )
    group, paused = optimizer.param_groups[1], params[2]

    def step(at, pause):
        gradients(at)
        group["lr"] = 0.0 if pause and how == "lr" else 1.0
        if pause and how == "grad":
            paused.grad = None
        optimizer.step()

    for at in range(30):
        step(at, pause=False)
    before = bits([paused, *optimizer.state[paused].values(), group["d_numerator"], group["k"]])
    moving, d = bits(params[:2]), group["d"].clone()
    for at in range(30, 60):
        step(at, pause=True)
        assert same(
            before, [paused, *optimizer.state[paused].values(), group["d_numerator"], group["k"]]
        )
    assert not any(torch.equal(p, q) for p, q in zip(params[:2], moving))
    assert distance == "shared" or torch.equal(group["d"], d)
    assert distance == "group" or torch.equal(group["d"], optimizer.param_groups[0]["d"])
    step(60, pause=False)
    assert not torch.equal(before[0], paused)


def test_the_distance_is_measured_on_the_groups_that_move():
    """With one group paused from the start, the other walks as if it were alone.

    prodigyopt counts the numerator of all and the s of some.
    """
    (both, both_grads), (alone, alone_grads) = problem(3), problem(3)
    a = Prodigy([{"params": both[:2]}, {"params": both[2:], "lr": 0.0}])
    b = Prodigy(alone[:2])
    for step in range(50):
        both_grads(step), alone_grads(step)
        a.step(), b.step()
    assert same(both, alone) and torch.equal(a.param_groups[0]["d"], b.param_groups[0]["d"])


def test_a_distance_per_group_is_one_optimizer_per_group():
    (together, grads), (apart, apart_grads) = problem(4), problem(4)
    one = Prodigy(
        [{"params": together[:1]}, {"params": together[1:], "d0": 1e-4, "d_coef": 0.5}],
        distance="group",
    )
    two = [Prodigy(apart[:1]), Prodigy(apart[1:], d0=1e-4, d_coef=0.5)]
    for step in range(60):
        grads(step), apart_grads(step)
        one.step(), two[0].step(), two[1].step()
    assert same(together, apart)
    assert float(one.param_groups[0]["d"]) != float(one.param_groups[1]["d"])


def test_a_group_lr_scales_its_own_step():
    """Second step of the toy, by hand.

    Both groups have m / sqrt(v) from one constant gradient, so their steps are in the ratio of
    their lr.
    """
    params = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = Prodigy([{"params": params[:1], "lr": 1.0}, {"params": params[1:], "lr": 0.25}])
    for _ in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert float(params[1].detach() / params[0].detach()) == pytest.approx(0.25, rel=1e-12)
    # N and D by hand for the first two steps: N = d0 (1 d0 x0 + .25 d0 x1) / d0 ...,
    # x = lr d0 m / sqrt(v) of step one
    params = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = Prodigy(
        [{"params": params[:1], "lr": 1.0}, {"params": params[1:], "lr": 0.25}], eps=1e-300
    )
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    d0, b3, x = 1e-6, math.sqrt(0.999), 1e-6 * 0.1 / math.sqrt(0.001)
    assert float(optimizer.param_groups[0]["d_hat"]) == pytest.approx(
        (d0 * x + 0.25 * d0 * 0.25 * x) / ((1 + b3) * d0 * 1.25), rel=1e-12
    )


@pytest.mark.parametrize(
    "options", [{}, OPTIONS[-2], OPTIONS[-1]], ids=["default", "advice", "many"]
)
@pytest.mark.parametrize("distance", ["shared", "group"])
def test_no_host_sync_in_a_step(options, distance):
    params, gradients = problem(5)
    optimizer = Prodigy(
        [{"params": params[:1]}, {"params": params[1:]}], distance=distance, **options
    )
    for step in range(3):
        gradients(step)
        with NoSync():
            optimizer.step()
    with pytest.raises(RuntimeError, match="host sync"), NoSync():  # the test can fail
        peer = oracle(params)
        peer.step()


@pytest.mark.parametrize("resume_at", [1, 7, 20])
@pytest.mark.parametrize(
    "options", [{}, dict(OPTIONS[-1], distance="group")], ids=["default", "many"]
)
def test_state_round_trips_bit_for_bit(options, resume_at):
    """Through state_dict, the flat tensors and JSON of a checkpoint, and into a new optimizer.

    In the middle of a pause.
    """

    def run(stop, resume=None):
        params, gradients = problem(6, torch.float32)
        optimizer = Prodigy([{"params": params[:2]}, {"params": params[2:]}], **options)
        start = 0
        if resume:
            start, weights, flat = resume
            for p, w in zip(params, weights):
                p.data.copy_(w)
            optimizer.load_state_dict(unflatten_state(*flat))
        for step in range(start, stop):
            gradients(step)
            if 5 <= step < 12:
                params[2].grad = None
            optimizer.step()
        return stop, bits(params), flatten_state(optimizer.state_dict())

    whole, resumed = run(40), run(40, run(resume_at))
    assert same(whole[1], resumed[1])
    assert whole[2][1] == resumed[2][1] and whole[2][0].keys() == resumed[2][0].keys()
    assert same(list(whole[2][0].values()), list(resumed[2][0].values()))


def test_loading_does_not_alias_and_refuses_another_distance():
    params, gradients = problem(7)
    optimizer = Prodigy(params)
    gradients(), optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = Prodigy(problem(7)[0])
    other.load_state_dict(saved)
    kept = bits(flatten_state(saved)[0].values())
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert same(kept, list(flatten_state(saved)[0].values()))
    with pytest.raises(UserError, match="distance"):
        Prodigy(problem(7)[0], distance="group").load_state_dict(saved)


def test_half_precision_parameters_keep_fp32_state_over_a_load():
    p = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    optimizer = Prodigy([p], d0=1e-2)
    for _ in range(3):
        p.grad = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
        optimizer.step()
    other = Prodigy([p.detach().clone().requires_grad_()], d0=1e-2)
    other.load_state_dict(optimizer.state_dict())
    (restored,) = other.state.values()
    assert all(
        value.dtype == torch.float32 and torch.equal(value, restored[name])
        for name, value in optimizer.state[p].items()
    )


@pytest.mark.parametrize(
    "weight_decay, decouple, use_bias_correction",
    list(itertools.product([0.0, 0.1], [True, False], [True, False])),
)
def test_an_overflown_step_changes_nothing(weight_decay, decouple, use_bias_correction):
    """found_inf = 1 on the first step, and later: no weight, moment, count or distance moves.

    The run goes on as if the step had not been.
    """
    runs = []
    for overflow in (True, False):
        params, gradients = problem(8)
        optimizer = Prodigy(
            params,
            weight_decay=weight_decay,
            decouple=decouple,
            use_bias_correction=use_bias_correction,
        )
        for step in range(12):
            if overflow and step in (0, 6):
                gradients(step)
                params[0].grad[0, 0], params[1].grad[0, 0] = math.inf, math.nan
                optimizer.found_inf = torch.tensor(1.0)
                with NoSync():
                    optimizer.step()
            gradients(step)
            optimizer.found_inf = torch.tensor([0.0])
            optimizer.step()
        runs.append([*params, *flatten_state(optimizer.state_dict())[0].values()])
    assert same(*runs)


def test_a_nan_gradient_shows():
    params, gradients = problem(9)
    optimizer = Prodigy(params)
    gradients()
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    assert params[0].isnan().any()


def test_coupled_decay_leaves_the_gradient_alone():
    params, gradients = problem(10)
    optimizer = Prodigy(params, weight_decay=0.5, decouple=False)
    gradients()
    before = bits(p.grad for p in params)
    optimizer.step()
    assert same(before, [p.grad for p in params])


def test_a_new_group_joins_the_distance_reached():
    params, gradients = problem(11)
    optimizer = Prodigy(params[:2])
    for step in range(30):
        gradients(step)
        optimizer.step()
    optimizer.add_param_group({"params": params[2:]})
    first, second = optimizer.param_groups
    assert (
        torch.equal(first["d"], second["d"])
        and float(second["d"]) > 1e-6
        and float(second["k"]) == 0
    )


def test_closure_is_evaluated_once_with_gradients():
    params, gradients = problem(12)
    optimizer = Prodigy(params)

    def closure():
        assert torch.is_grad_enabled()
        gradients()
        return 7.0

    assert optimizer.step(closure) == 7.0


def _shard(rank, store, queue):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    full, gradients = problem(13)
    shards = [p.detach().reshape(-1).chunk(2)[rank].clone().requires_grad_() for p in full]
    optimizer = Prodigy(shards, fsdp_in_use=True)
    for step in range(20):
        for p, shard in zip(full, shards):
            halves = [torch.empty_like(h) for h in p.detach().reshape(-1).chunk(2)]
            for owner, half in enumerate(halves):
                half.copy_(shard.detach()) if owner == rank else None
                dist.broadcast(half, owner)
            p.data.copy_(torch.cat(halves).reshape(p.shape))
        gradients(step)
        for p, shard in zip(full, shards):
            shard.grad = p.grad.reshape(-1).chunk(2)[rank].clone()
        optimizer.step()
    queue.put((rank, [s.detach().tolist() for s in shards], float(optimizer.param_groups[0]["d"])))
    dist.destroy_process_group()


def test_two_shards_reproduce_the_whole(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=_shard, args=(rank, tmp_path / "store", queue)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    (_, first, d0), (_, second, d1) = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    params, gradients = problem(13)
    optimizer = Prodigy(params)
    for step in range(20):
        gradients(step)
        optimizer.step()
    assert d0 == d1 == pytest.approx(float(optimizer.param_groups[0]["d"]), rel=1e-12)
    for p, a, b in zip(params, first, second):
        torch.testing.assert_close(
            torch.tensor(a + b, dtype=p.dtype), p.detach().reshape(-1), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(lr=0.0), "lr"),
        (dict(betas=(1.0, 0.9)), "betas"),
        (dict(eps=0.0), "eps"),
        (dict(d0=0.0), "d0"),
        (dict(d_coef=0.0), "d_coef"),
        (dict(growth_rate=0.0), "growth_rate"),
        (dict(slice_p=0), "slice_p"),
        (dict(weight_decay=-1.0), "weight_decay"),
        (dict(beta3=1.5), "beta3"),
        (dict(distance="both"), "distance"),
    ],
)
def test_values_out_of_range_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        Prodigy(toy(), **options)


@pytest.mark.parametrize(
    "name, value", [("d0", 1e-4), ("d_coef", 2.0), ("growth_rate", 1.02), ("betas", (0.9, 0.99))]
)
def test_groups_that_share_a_distance_must_agree_on_it(name, value):
    groups = [{"params": [toy()[0]]}, {"params": [toy()[1]], name: value}]
    with pytest.raises(UserError, match="beta3" if name == "betas" else name):
        Prodigy(groups)
    Prodigy([dict(group) for group in groups], distance="group")


def test_names_order_and_defaults_are_prodigyopts():
    import inspect

    ours, theirs = (inspect.signature(cls).parameters for cls in (Prodigy, Oracle))
    assert list(ours)[:-1] == list(theirs) and list(ours)[-1] == "distance"
    assert all(ours[name].default == theirs[name].default for name in theirs)
