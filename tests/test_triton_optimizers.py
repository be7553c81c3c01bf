"""Prodigy and AdamW in Triton: by the interpreter where there is no GPU."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core import kernels
from lora_core.kernels import COSTS, OPS, steps
from lora_core.optim.adamw import AdamW
from lora_core.prodigy import SCALARS, Prodigy

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("patched_once")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = (7, 3), (5,), (11, 97), (1,)
RECIPES = {
    "plain": {},
    "options": dict(
        bias_correction=True, safeguard=True, slice_p=3, d_coef=2.0, growth_rate=1.5, beta3=0.9
    ),
    "coupled": dict(decouple=False, weight_decay=0.1),
    "no momentum": dict(beta1=0.0, weight_decay=0.0, slice_p=2),
    "coupled without momentum": dict(
        beta1=0.0, decouple=False, weight_decay=0.1, bias_correction=True
    ),
}
VIEWS = {
    "view",
    "detach",
    "slice",
    "select",
    "unbind",
    "split",
    "alias",
    "reshape",
    "_unsafe_view",
    "as_strided",
    "lift_fresh",
}


class Calls(TorchDispatchMode):
    """Counts launches: aten calls but views, custom ops by their declared cost. Raises where a value would travel to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            raise RuntimeError("host sync in the step")
        if name in COSTS:
            self.launches += [name] * COSTS[name](*args).launches
        elif name.startswith("aten::") and name.split("::")[1] not in VIEWS:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


def example(name: str, dtype: torch.dtype, **changes) -> tuple:
    """The op's example, with another recipe; the same numbers in every dtype."""
    if name == "adamw_step":
        args = OPS[name].example(3, dtype, DEVICE)
        return *args[:-1], args[-1]._replace(**changes)
    scalars, found_inf, grad_scale, rows = OPS[name].example(3, dtype, DEVICE)
    return scalars, found_inf, grad_scale, tuple(remade(row, **changes) for row in rows)


def remade(row: steps.MovingGroup, **changes) -> steps.MovingGroup:
    """With another recipe and the state that belongs to it."""
    recipe, flat = row.recipe._replace(**changes), row.flat
    states = []
    for (start, count, _), p in zip(flat.bounds, flat.params):
        state = {
            key: value[start : start + count].view(p.shape)
            for key, value in flat.state.items()
            if key not in ("p0", "s", "exp_avg")
        }
        if recipe.beta1 > 0:
            state["exp_avg"] = flat.state["exp_avg"][start : start + count].view(p.shape)
        before = flat.state["p0"][start : start + count][:: recipe.slice_p].clone()
        states.append(state | {"p0": before, "s": 2**-20 * before})
    return row._replace(
        recipe=recipe, flat=steps.FlatParameters(flat.params, states, recipe.slice_p)
    )


def outcome(name: str, args: tuple) -> list[torch.Tensor]:
    """Everything that a step may write, in fp64."""
    if name == "adamw_step":
        flats, scalars = [args[3]], []
    else:
        flats, scalars = [row.flat for row in args[3]], list(args[0].unbind())
    found = [x.double().clone() for x in scalars]
    for flat in flats:
        for name, whole in {"param": flat.param, **flat.state}.items():
            picked = name in ("p0", "s")
            sizes = [-(-count // _slice(flat)) if picked else count for _, count, _ in flat.bounds]
            places = (
                range(len(sizes))
                if name == "step"
                else [bound[2 if picked else 0] for bound in flat.bounds]
            )
            found.append(
                torch.cat(
                    [
                        whole[at : at + (1 if name == "step" else size)]
                        for at, size in zip(places, sizes)
                    ]
                ).double()
            )
    return found


def _slice(flat: steps.FlatParameters) -> int:
    """slice_p: where the second parameter's s begins after the first's 21 elements, and not at the next aligned place."""
    return {7: 3, 11: 2}.get(flat.bounds[1][2], 1)


def run(name: str, mode: str, dtype: torch.dtype, **changes) -> list[torch.Tensor]:
    args = example(name, dtype, **changes)
    with kernels.use_kernels(mode):
        for _ in range(2):
            kernels.call(name, *args)
    return outcome(name, args)


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item() for a, b in zip(found, exact)
    )


MODES = ("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)
CASES = [("prodigy_step", recipe) for recipe in RECIPES.values()] + [
    ("adamw_step", {}),
    ("adamw_step", dict(lr=0.1, beta1=0.5, weight_decay=0.3)),
]


@pytest.mark.parametrize("mode", ["fused", "triton"])
@pytest.mark.parametrize("name, changes", CASES, ids=[*RECIPES, "adamw", "adamw, options"])
def test_a_twin_equals_the_definition_in_fp64(name: str, changes: dict, mode: str) -> None:
    exact = run(name, "reference", torch.float64, **changes)
    assert error(run(name, mode, torch.float64, **changes), exact) < 1e-12


@pytest.mark.parametrize("name, changes", CASES, ids=[*RECIPES, "adamw", "adamw, options"])
def test_in_fp32_and_bf16_it_is_no_further_from_fp64_than_torch(name: str, changes: dict) -> None:
    """At most twice the definition's own error in fp32; in bf16 one unit in the last place (at most 2^-7) of it in each of the two steps."""
    exact, torchs, ours = (run(name, mode, dtype, **changes) for mode, dtype in MODES)
    assert error(ours, exact) <= 2 * error(torchs, exact) + 2**-23
    if not changes:
        assert (
            error(*(run(name, mode, torch.bfloat16) for mode in ("triton", "reference")))
            <= 2 * 2**-7
        )


def network(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(SHAPES[i % len(SHAPES)], generator=generator).to(DEVICE).requires_grad_()
        for i in range(count)
    ]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
    return params


@pytest.mark.parametrize(
    "make, groups, launches", [(Prodigy, 1, 2), (Prodigy, 2, 4), (AdamW, 1, 1), (AdamW, 2, 2)]
)
def test_launches_are_those_declared_however_many_parameters(
    make: type, groups: int, launches: int
) -> None:
    params = network()
    optimizer = make([{"params": params[i::groups]} for i in range(groups)])
    with kernels.use_kernels("triton"):
        optimizer.step()
        with Calls() as calls:
            optimizer.step()
        assert len(calls.launches) == launches, calls.launches
        for p in params:
            p.grad = p.grad.clone()
        with Calls() as calls:
            optimizer.step()
        assert (
            len(calls.launches) == launches + groups
            and calls.launches.count("aten::copy_") == groups
        )  # the new addresses
    with (
        kernels.use_kernels("fused"),
        pytest.raises(RuntimeError, match="host sync"),
        Calls(),
    ):  # the test can fail
        float(optimizer.param_groups[0].get("d", params[0].detach().sum()))


@pytest.mark.parametrize("make", [Prodigy, AdamW])
def test_a_step_on_the_meta_device_is_counted(make: type) -> None:
    params = [torch.zeros(3, 5, device="meta", requires_grad=True) for _ in range(4)]
    for p in params:
        p.grad = torch.zeros_like(p)
    with kernels.use_kernels("triton"):
        optimizer = make(params)
        optimizer.step()
        with Calls() as calls:
            optimizer.step()
    assert calls.launches == (
        ["lora_core::prodigy_reduce", "lora_core::prodigy_update"]
        if make is Prodigy
        else ["lora_core::adamw"]
    )


@pytest.mark.parametrize("name", ["prodigy_step", "adamw_step"])
def test_the_bits_are_the_same_in_every_run(name: str) -> None:
    a, b = (run(name, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("mode", ["reference", "fused", "triton"])
@pytest.mark.parametrize("name", ["prodigy_step", "adamw_step"])
def test_an_overflow_leaves_every_bit(name: str, mode: str) -> None:
    args = list(example(name, torch.float32))
    args[1] = torch.tensor(1.0, device=DEVICE)
    for g in args[4] if name == "adamw_step" else args[3][0].grads:
        if g is not None:
            g.view(-1)[0] = math.inf
    before = outcome(name, args)
    with kernels.use_kernels(mode):
        kernels.call(name, *args)
    assert all(torch.equal(a, b) for a, b in zip(before, outcome(name, args)))


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("name", ["prodigy_step", "adamw_step"])
def test_an_lr_on_the_device_and_a_scale(name: str, mode: str) -> None:
    """lr as a tensor is lr as a number; gradients four times as large with a scale of four are the plain ones."""
    plain = run(name, "reference", torch.float64, lr=0.5)
    args = list(example(name, torch.float64, lr=torch.tensor(0.5, device=DEVICE)))
    args[1:3] = torch.tensor([0.0], device=DEVICE), torch.tensor(4.0, device=DEVICE)
    for grads in [args[4]] if name == "adamw_step" else [row.grads for row in args[3]]:
        for g in grads:
            if g is not None:
                g.mul_(4)
    with kernels.use_kernels(mode):
        for _ in range(2):
            kernels.call(name, *args)
    assert error(outcome(name, args), plain) < 1e-12


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("first", [True, False])
def test_an_lr_of_zero_on_the_device_freezes_the_group(mode: str, first: bool) -> None:
    """The other group walks as if it were alone, and the frozen one learns of d and nothing else; with both frozen nothing moves."""
    for both in (False, True):
        scalars, _, _, rows = example("prodigy_step", torch.float64)
        frozen = 0 if first else 1
        zero = torch.tensor(0.0, device=DEVICE)
        rows = tuple(
            r._replace(recipe=r.recipe._replace(lr=zero)) if both or i == frozen else r
            for i, r in enumerate(rows)
        )
        before = [
            x.clone()
            for x in (
                rows[frozen].flat.param,
                *rows[frozen].flat.state.values(),
                scalars[frozen, 2],
                scalars[frozen, 5],
            )
        ]
        start, all_scalars = rows[1 - frozen].flat.param.clone(), scalars.clone()
        with kernels.use_kernels(mode):
            kernels.call("prodigy_step", scalars, None, None, rows)
        after = [
            rows[frozen].flat.param,
            *rows[frozen].flat.state.values(),
            scalars[frozen, 2],
            scalars[frozen, 5],
        ]
        assert all(torch.equal(a, b) for a, b in zip(before, after))
        assert torch.equal(scalars[0, :2], scalars[1, :2])
        assert (
            torch.equal(start, rows[1 - frozen].flat.param)
            == both
            == torch.equal(scalars, all_scalars)
        )
        if not both:
            alone, _, _, lone = example("prodigy_step", torch.float64)
            kernels.OPS["prodigy_step"].reference(alone, None, None, lone[1 - frozen : 2 - frozen])
            assert (
                error(
                    [rows[1 - frozen].flat.param, scalars[1 - frozen]],
                    [lone[1 - frozen].flat.param, alone[1 - frozen]],
                )
                < 1e-12
            )


@pytest.mark.parametrize("distance", ["shared", "group"])
def test_whole_runs_are_those_of_the_definition(distance: str) -> None:
    """Twelve steps with a pausing group, and the addresses that a CUDA graph would hold."""
    found = []
    for mode in ("reference", "triton"):
        params = [p.detach().double().requires_grad_() for p in network(5)]
        optimizer = Prodigy(
            [{"params": params[:3]}, {"params": params[3:], "lr": 0.5}],
            distance=distance,
            d0=1e-3,
            use_bias_correction=True,
        )
        places = None
        with kernels.use_kernels(mode):
            for step in range(12):
                for i, p in enumerate(params):
                    p.grad = (p.detach() + math.sin(step + i)) if i < 3 or step % 4 else None
                optimizer.step()
                now = [g[name].data_ptr() for g in optimizer.param_groups for name in SCALARS] + [
                    p.data_ptr() for p in params
                ]
                assert step < 4 or now == places
                places = now
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert places[: 2 * len(SCALARS)] == [
                g[name].data_ptr() for g in optimizer.param_groups for name in SCALARS
            ]
        found.append(
            [
                *(p.detach() for p in params),
                *(g[name].double() for g in optimizer.param_groups for name in SCALARS),
            ]
        )
    assert error(found[1], found[0]) < 1e-11
    assert torch.equal(found[1][5], found[1][5 + len(SCALARS)]) == (distance == "shared")


def test_a_sum_over_many_programs_has_fp64_accuracy() -> None:
    """More partial sums than the last program reads at once would take long here; its loop over them is run with a smaller reach."""
    from lora_core.kernels import optimizers

    before, optimizers.ADDED, optimizers.BLOCK = (optimizers.ADDED, optimizers.BLOCK), 2, 256
    try:
        exact = run("prodigy_step", "reference", torch.float64)
        assert error(run("prodigy_step", "triton", torch.float64), exact) < 1e-12
        assert abs(run("prodigy_step", "triton", torch.float32)[0][0] / exact[0][0] - 1) < 1e-6
    finally:
        optimizers.ADDED, optimizers.BLOCK = before


def test_every_configuration_is_listed_for_the_compiler() -> None:
    from lora_core.kernels import optimizers

    few, all_of_them = optimizers.list_builds(False), optimizers.list_builds(True)
    for build in all_of_them:
        assert list(build.signature) == list(build.kernel.arg_names)
        assert set(build.constants) == {
            name for name, kind in build.signature.items() if kind == "constexpr"
        }
    assert {b.name for b in few} < {b.name for b in all_of_them} and len(
        {b.name for b in all_of_them}
    ) == len(all_of_them)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [Prodigy, AdamW])
def test_a_captured_step_replays_with_a_new_lr(make: type) -> None:
    """Captured and replayed steps, with an lr that changes between two, are the eager ones bit for bit."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = []
    for captured in (False, True):
        params, lr = network(), torch.tensor(1e-2, device="cuda")
        optimizer = make(params, lr=lr)
        for _ in range(2):
            optimizer.step()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(4):
            lr.fill_(1e-2 * step)
            graph.replay() if captured else optimizer.step()
        found.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found))
