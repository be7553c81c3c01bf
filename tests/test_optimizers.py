"""Prodigy and AdamW in Triton: by the interpreter where there is no GPU."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core import kernels
from lora_core.kernels import COSTS
from lora_core.optim.adamw import AdamW
from lora_core.prodigy import SCALARS, Prodigy
from tests.step_examples import DEVICE, error, run

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("patched_once")
SHAPES = (7, 3), (5,), (11, 97), (1,)
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
