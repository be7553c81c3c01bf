"""Prodigy and AdamW in Triton: by the interpreter where there is no GPU."""

import contextlib
import copy
import math
from collections.abc import Iterator

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
OPTIONS = {
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
    """Counts launches: aten calls but views, custom ops by their declared cost.

    Raises where a value would travel to the host.
    """

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
    """The op's example with other settings; the same numbers in every dtype."""
    if name == "adamw_step":
        args = OPS[name].example(3, dtype, DEVICE)
        return *args[:-1], args[-1]._replace(**changes)
    scalars, found_inf, grad_scale, groups = OPS[name].example(3, dtype, DEVICE)
    changed = tuple(change_settings(group, **changes) for group in groups)
    return scalars, found_inf, grad_scale, changed


def change_settings(group: steps.MovingGroup, **changes) -> steps.MovingGroup:
    """The group with other settings and the state that belongs to them."""
    settings, flat = group.settings._replace(**changes), group.flat
    states = []
    for p, (_, _, old) in zip(flat.params, flat.iterate_tensors(flat.params)):
        p0 = old["p0"][:: settings.slice_p].clone()
        state = {"p0": p0, "s": 2**-20 * p0, "exp_avg_sq": old["exp_avg_sq"].view(p.shape)}
        if settings.beta1 > 0:
            state["exp_avg"] = old["exp_avg"].view(p.shape)
        states.append(state)
    flat = steps.FlatParameters(flat.params, states, settings.slice_p)
    return group._replace(settings=settings, flat=flat)


def outcome(name: str, args: tuple) -> list[torch.Tensor]:
    """Everything that a step may write, in fp64: scalars, then each parameter and its state."""
    if name == "adamw_step":
        flats, found = [args[3]], []
    else:
        flats, found = [group.flat for group in args[3]], list(args[0].double().clone().unbind())
    for flat in flats:
        parts: dict[str, list[torch.Tensor]] = {"param": []}
        for x, _, state in flat.iterate_tensors(flat.params):
            parts["param"].append(x)
            for key, value in state.items():
                parts.setdefault(key, []).append(value)
        found += [torch.cat(tensors).double() for tensors in parts.values()]
    return found


@contextlib.contextmanager
def use_mode(mode: str) -> Iterator[None]:
    """A mode of the kernels; "flat": the fused one without a compiler, in torch operations."""
    with pytest.MonkeyPatch.context() as patch, kernels.use_kernels(mode.replace("flat", "fused")):
        if mode == "flat":
            patch.setattr(kernels.loops, "load_library", lambda: None)
        yield


def run(name: str, mode: str, dtype: torch.dtype, **changes) -> list[torch.Tensor]:
    args = example(name, dtype, **changes)
    with use_mode(mode):
        for _ in range(2):
            kernels.call(name, *args)
    return outcome(name, args)


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    largest = 0.0
    for a, b in zip(found, exact, strict=True):
        largest = max(largest, ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item())
    return largest


CASES = [
    *(("prodigy_step", changes) for changes in OPTIONS.values()),
    ("adamw_step", {}),
    ("adamw_step", dict(lr=0.1, beta1=0.5, weight_decay=0.3)),
]
NAMES = [*OPTIONS, "adamw", "adamw, options"]


@pytest.mark.parametrize("mode", ["flat", "fused", "triton"])
@pytest.mark.parametrize("name, changes", CASES, ids=NAMES)
def test_an_implementation_equals_the_definition_in_fp64(
    name: str, changes: dict, mode: str
) -> None:
    exact = run(name, "reference", torch.float64, **changes)
    assert error(run(name, mode, torch.float64, **changes), exact) < 1e-12


@pytest.mark.parametrize("mode", ["flat", "fused", "triton"])
@pytest.mark.parametrize("name, changes", CASES, ids=NAMES)
def test_in_fp32_and_bf16_it_is_no_further_from_fp64_than_torch(
    name: str, changes: dict, mode: str
) -> None:
    """At most twice the definition's own error in fp32.

    In bf16 one unit in the last place (at most 2^-7) of it in each of the two steps.
    """
    exact, definition = (
        run(name, "reference", dtype, **changes) for dtype in (torch.float64, torch.float32)
    )
    found = run(name, mode, torch.float32, **changes)
    assert error(found, exact) <= 2 * error(definition, exact) + 2**-23
    if not changes:
        found, definition = (run(name, m, torch.bfloat16) for m in (mode, "reference"))
        assert error(found, definition) <= 2 * 2**-7


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


@pytest.mark.parametrize("mode", ["reference", "flat", "fused", "triton"])
@pytest.mark.parametrize("name", ["prodigy_step", "adamw_step"])
def test_an_overflow_leaves_every_bit(name: str, mode: str) -> None:
    args = list(example(name, torch.float32))
    args[1] = torch.tensor(1.0, device=DEVICE)
    for g in args[4] if name == "adamw_step" else args[3][0].grads:
        if g is not None:
            g.view(-1)[0] = math.inf
    before = outcome(name, args)
    with use_mode(mode):
        kernels.call(name, *args)
    assert all(torch.equal(a, b) for a, b in zip(before, outcome(name, args)))


@pytest.mark.parametrize(
    "name, mode",
    [
        ("prodigy_step", "reference"),
        ("prodigy_step", "flat"),
        ("prodigy_step", "triton"),
        ("adamw_step", "reference"),
        ("adamw_step", "triton"),  # torch's fused kernel would unscale the same gradients twice
    ],
)
def test_an_lr_on_the_device_and_a_scale(name: str, mode: str) -> None:
    """lr as a tensor is lr as a number; a scale of four undoes gradients four times as large."""
    plain = run(name, "reference", torch.float64, lr=0.5)
    args = list(example(name, torch.float64, lr=torch.tensor(0.5, device=DEVICE)))
    args[1:3] = torch.tensor([0.0], device=DEVICE), torch.tensor(4.0, device=DEVICE)
    gradients = [args[4]] if name == "adamw_step" else [group.grads for group in args[3]]
    for grads in gradients:
        for g in grads:
            if g is not None:
                g.mul_(4)
    with use_mode(mode):
        for _ in range(2):
            kernels.call(name, *args)
    assert error(outcome(name, args), plain) < 1e-12


@pytest.mark.parametrize("mode", ["reference", "flat", "triton"])
@pytest.mark.parametrize("first", [True, False])
def test_an_lr_of_zero_on_the_device_freezes_the_group(mode: str, first: bool) -> None:
    """The other group walks as if it were alone; the frozen one takes the new d and nothing else.

    With both frozen nothing moves.
    """
    frozen, moving = (0, 1) if first else (1, 0)
    for both in (False, True):
        scalars, _, _, groups = example("prodigy_step", torch.float64)
        stopped = [
            group._replace(settings=group.settings._replace(lr=torch.tensor(0.0, device=DEVICE)))
            for group in groups
        ]
        groups = tuple(stopped[i] if both or i == frozen else groups[i] for i in range(2))
        before = frozen_values(scalars, groups, frozen)
        start, all_scalars = groups[moving].flat.param.clone(), scalars.clone()
        with use_mode(mode):
            kernels.call("prodigy_step", scalars, None, None, groups)
        for a, b in zip(before, frozen_values(scalars, groups, frozen), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(scalars[0, :2], scalars[1, :2])
        assert torch.equal(start, groups[moving].flat.param) == both
        assert torch.equal(scalars, all_scalars) == both
        if not both:
            alone, _, _, lone = example("prodigy_step", torch.float64)
            OPS["prodigy_step"].reference(alone, None, None, lone[moving : moving + 1])
            found = [groups[moving].flat.param, scalars[moving]]
            assert error(found, [lone[moving].flat.param, alone[moving]]) < 1e-12


def frozen_values(scalars: torch.Tensor, groups: tuple, index: int) -> list[torch.Tensor]:
    """Copies of what a frozen group keeps: parameters, state, numerator and count."""
    flat = groups[index].flat
    values = flat.param, *flat.state.values(), scalars[index, 2], scalars[index, 5]
    return [value.clone() for value in values]


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
                    moves = i < 3 or step % 4
                    p.grad = p.detach() + math.sin(step + i) if moves else None
                optimizer.step()
                now = [value.data_ptr() for value in [*scalars_of(optimizer), *params]]
                assert step < 4 or now == places
                places = now
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            loaded = [value.data_ptr() for value in scalars_of(optimizer)]
            assert places[: len(loaded)] == loaded
        values = [*params, *scalars_of(optimizer)]
        found.append([value.detach().double().clone() for value in values])
    assert error(found[1], found[0]) < 1e-11
    assert torch.equal(found[1][5], found[1][5 + len(SCALARS)]) == (distance == "shared")


def scalars_of(optimizer: Prodigy) -> list[torch.Tensor]:
    found = []
    for group in optimizer.param_groups:
        found += [group[name] for name in SCALARS]
    return found


def test_a_sum_over_many_programs_has_fp64_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program's loop over partial sums runs with a smaller reach.

    More partial sums than it reads at once would take long here.
    """
    from lora_core.kernels import optimizers

    monkeypatch.setattr(optimizers, "ADDED", 2)
    monkeypatch.setattr(optimizers, "BLOCK", 256)
    exact = run("prodigy_step", "reference", torch.float64)
    assert error(run("prodigy_step", "triton", torch.float64), exact) < 1e-12
    assert abs(run("prodigy_step", "triton", torch.float32)[0][0] / exact[0][0] - 1) < 1e-6


def test_every_configuration_is_listed_for_the_compiler() -> None:
    from lora_core.kernels import optimizers

    few = optimizers.list_optimizer_builds(False)
    every = optimizers.list_optimizer_builds(True)
    for build in every:
        names = list(build.kernel.arg_names)
        assert list(build.signature) == names
        assert len(names) <= 24
        constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
        assert set(build.constants) == constants
    names = {build.name for build in every}
    assert {build.name for build in few} < names
    assert len(names) == len(every)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [Prodigy, AdamW])
def test_a_captured_step_replays_with_a_new_lr(make: type) -> None:
    """Captured and replayed steps are the eager ones bit for bit, with an lr that changes."""
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
