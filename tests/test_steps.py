"""A step's implementations (torch operations on flat tensors, compiled loops, Triton) against its
definition.
"""

import math

import pytest
import torch

from lora_core import kernels
from lora_core.kernels import OPS
from tests.step_examples import DEVICE, error, example, outcome, run, use_mode

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("patched_once")


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
