"""The moving average against its formula in float64, the swap, and resuming."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.errors import UserError
from lora_core.optim.ema import ParameterAverage
from lora_core.runs.run_folder import flatten_state, unflatten_state


def params(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in ((3, 4), (5,), (1,))
    ]


def train_(ps, step):
    """A made-up optimizer step."""
    with torch.no_grad():
        for p in ps:
            p.add_(
                torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64
                ).to(p.dtype),
                alpha=0.1,
            )


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_its_formula(decay):
    ps = params()
    average, expected = ParameterAverage(ps, decay), [p.detach().clone() for p in ps]
    for n in range(1, 31):
        train_(ps, n)
        average.update_()
        d = min(decay, (1 + n) / (10 + n))
        expected = [d * a + (1 - d) * p.detach() for a, p in zip(expected, ps)]
        for a, e in zip(average.averages, expected):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-14)


def test_the_warm_up_forgets_the_start():
    p = torch.nn.Parameter(torch.ones(2))
    average = ParameterAverage([p], 0.999)
    with torch.no_grad():
        p.zero_()
    for _ in range(30):
        average.update_()
    assert (
        float(average.averages[0].max()) < 1e-4 and 0.999**30 > 0.97
    )  # what a constant decay would have kept


def test_a_bf16_parameter_is_averaged_in_fp32_where_bf16_would_stand_still():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = ParameterAverage([p], 0.999)
    average.count = 100_000
    with torch.no_grad():
        p.fill_(1.5)
    for _ in range(100):
        average.update_()
    wrong = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(100):
        wrong.lerp_(p.detach(), 1e-3)
    assert average.averages[0].dtype == torch.float32 and torch.equal(
        wrong, torch.ones(4, dtype=torch.bfloat16)
    )
    torch.testing.assert_close(
        average.averages[0], torch.full((4,), 1.5 - 0.5 * 0.999**100), rtol=1e-5, atol=0
    )
    with average.swapped():
        assert torch.equal(p, average.averages[0].bfloat16())


def test_factors_are_averaged_not_their_product():
    up, down = torch.nn.Parameter(torch.tensor([[0.0]])), torch.nn.Parameter(torch.tensor([[1.0]]))
    average = ParameterAverage([up, down], 0.5)
    with torch.no_grad():
        up.fill_(1.0), down.fill_(2.0)
    average.update_()
    d = 2 / 11
    assert (
        float(average.averages[0] @ average.averages[1])
        == pytest.approx((1 - d) * (2 - d))
        != pytest.approx((1 - d) * 2)
    )


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_puts_the_averages_in_and_the_trained_values_back(fails):
    ps = params(torch.float32)
    average = ParameterAverage(ps, 0.9)
    train_(ps, 1)
    average.update_()
    trained, averages = ([p.detach().clone() for p in values] for values in (ps, average.averages))
    try:
        with average.swapped():
            assert all(torch.equal(p, a) for p, a in zip(ps, averages)) and not torch.equal(
                ps[0], trained[0]
            )
            with average.swapped():
                assert torch.equal(ps[0], averages[0])
            assert torch.equal(ps[0], averages[0])
            with pytest.raises(ValueError, match="leave swapped"):
                average.update_()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(p, t) for p, t in zip(ps, trained)) and all(
        torch.equal(a, b) for a, b in zip(average.averages, averages)
    )
    assert all(p.requires_grad and p.is_leaf for p in ps)
    average.update_()


def test_it_resumes_bit_for_bit():
    whole = params(torch.float32)
    average = ParameterAverage(whole, 0.999)
    for n in range(6):
        train_(whole, n)
        average.update_()
    first = params(torch.float32)
    half = ParameterAverage(first, 0.999)
    for n in range(3):
        train_(first, n)
        half.update_()
    saved = unflatten_state(*flatten_state(half.state_dict()))
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    again = ParameterAverage(second, 0.999)
    again.load_state_dict(saved)
    for n in range(3, 6):
        train_(second, n)
        again.update_()
    assert again.count == 6 and all(
        torch.equal(a, b) for a, b in zip(again.averages, average.averages)
    )
    again.load_state_dict({"averages": saved["averages"], "count": torch.tensor(3)})
    assert again.count == 3
    with pytest.raises(UserError, match="2 tensors that do not fit the 3 that train"):
        again.load_state_dict({"averages": saved["averages"][:2], "count": 3})


def test_an_update_waits_for_nothing():
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                raise RuntimeError("host sync")
            return func(*args, **(kwargs or {}))

    average = ParameterAverage(params(), 0.9)
    with NoSync():
        average.update_()
        with average.swapped():
            pass


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match=r"--ema is .*expected a decay in \[0, 1\)"):
        ParameterAverage(params(), decay)
