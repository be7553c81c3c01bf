"""AdamW against torch.optim.AdamW."""

import copy
import math

import pytest
import torch

from lora_core import kernels
from lora_core.errors import UserError
from lora_core.optim.adamw import AdamW
from lora_core.runs.run_folder import flatten_state, unflatten_state
from tests.adamw_runs import error, parameters, train

OPTIONS = [
    {},
    dict(lr=0.1, weight_decay=0.5),
    dict(betas=(0.0, 0.9)),
    dict(betas=(0.5, 0.0), eps=1e-3),
    dict(weight_decay=0.0),
]


@pytest.mark.parametrize("mode", ["reference", "fused"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "default")
def test_twenty_steps_are_torchs(options: dict, mode: str) -> None:
    """In fp64 to 1e-12; in fp32 no further from fp64 than twice torch's own fp32.

    A parameter pauses: each has its own count.
    """
    found = {}
    for dtype in (torch.float64, torch.float32):
        for cls in (AdamW, torch.optim.AdamW):
            params = parameters(dtype)
            with kernels.use_kernels(mode):
                found[cls, dtype] = train(cls(params, **options), params, range(20), skip=1)
    exact = found[torch.optim.AdamW, torch.float64]
    assert error(found[AdamW, torch.float64], exact) < 1e-12
    assert (
        error(found[AdamW, torch.float32], exact)
        <= 2 * error(found[torch.optim.AdamW, torch.float32], exact) + 2**-24
    )


@pytest.mark.parametrize("torch_first", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_either_class_takes_over_the_state_of_the_other(torch_first: bool, fused: bool) -> None:
    whole = parameters()
    expected = train(torch.optim.AdamW(whole, lr=1e-2), whole, range(9), skip=0)
    params = parameters()
    theirs = torch.optim.AdamW(params, lr=1e-2, fused=fused)
    first, second = (
        (theirs, AdamW(params, lr=1e-2)) if torch_first else (AdamW(params, lr=1e-2), theirs)
    )
    train(first, params, range(5), skip=0)
    second.load_state_dict(unflatten_state(*flatten_state(first.state_dict())))
    assert error(train(second, params, range(5, 9), skip=0), expected) < 1e-12
    for p in params:
        assert {name: value.shape for name, value in first.state[p].items()} == {
            name: value.shape for name, value in second.state[p].items()
        }


def test_it_resumes_bit_for_bit_and_does_not_alias() -> None:
    whole = parameters(torch.float32)
    expected = train(AdamW(whole), whole, range(10))
    params = parameters(torch.float32)
    optimizer = AdamW(params)
    train(optimizer, params, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = [t.clone() for t in flatten_state(saved)[0].values()]
    fresh = [p.detach().clone().requires_grad_() for p in params]
    again = AdamW(fresh)
    again.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(train(again, fresh, range(4, 10)), expected))
    assert all(torch.equal(a, b) for a, b in zip(kept, flatten_state(saved)[0].values()))


def test_groups_have_their_own_settings() -> None:
    found = []
    for cls in (AdamW, torch.optim.AdamW):
        params = parameters()
        groups = [
            {"params": params[:2], "lr": 0.1},
            {"params": params[2:4], "weight_decay": 0.3},
            {"params": params[4:], "betas": (0.5, 0.9)},
        ]
        found.append(train(cls(groups, lr=1e-2), params, range(6)))
    assert error(*found) < 1e-12


def test_half_precision_parameters_have_fp32_state() -> None:
    """Each step is that of fp64 on the rounded parameter, rounded once.

    torch keeps bf16 moments there.
    """
    params = parameters(torch.bfloat16)
    copies = [p.detach().double().requires_grad_() for p in params]
    optimizer, exact = AdamW(params, lr=1e-2), torch.optim.AdamW(copies, lr=1e-2)
    for step in range(5):
        train(optimizer, params, range(step, step + 1))
        for p, copied in zip(params, copies):
            copied.grad = p.grad.double()
        exact.step()
        for p, copied in zip(params, copies):
            assert ((p.double() - copied).abs() <= copied.abs() * 2**-8).all()
            copied.data.copy_(p.detach().double())
    for p in params:
        assert {value.dtype for value in optimizer.state[p].values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["reference", "fused"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_tensor_lr_a_scale_and_an_overflow(
    mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels.loops, "load_library", lambda: None)
    plain, params = parameters(), parameters()
    expected = train(AdamW(plain, lr=0.1), plain, range(3))
    optimizer = AdamW(params, lr=torch.tensor(0.1, dtype=torch.float64))
    with kernels.use_kernels(mode):
        for step in range(3):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            generator = torch.Generator().manual_seed(1000 + step)
            for p in params:
                p.grad = 4 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
            kept = [
                t.clone() for t in [*params, *flatten_state(optimizer.state_dict())[0].values()]
            ]
            for p in params:
                p.grad = torch.full_like(p, math.inf)
            optimizer.found_inf = torch.tensor([1.0])
            optimizer.step()
            assert all(
                torch.equal(a, b)
                for a, b in zip(kept, [*params, *flatten_state(optimizer.state_dict())[0].values()])
            )
    assert error([p.detach() for p in params], expected) < 1e-12


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(lr=-1.0), "lr"),
        (dict(betas=(1.0, 0.9)), "betas"),
        (dict(eps=-1.0), "eps"),
        (dict(weight_decay=-1.0), "weight_decay"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, word: str) -> None:
    with pytest.raises(UserError, match=f"AdamW got {word}"):
        AdamW(parameters(), **options)


def test_a_state_made_with_amsgrad_is_refused() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params, amsgrad=True)
    train(theirs, params, range(1))
    with pytest.raises(UserError, match="amsgrad=True"):
        AdamW(params).load_state_dict(theirs.state_dict())


def test_the_closure_is_evaluated_with_gradients() -> None:
    params = parameters()

    def closure() -> float:
        assert torch.is_grad_enabled()
        for p in params:
            p.grad = torch.ones_like(p)
        return 7.0

    assert AdamW(params).step(closure) == 7.0
