"""Optimizers by name, their arguments and groups, and LoRA+."""

import math

import pytest
import torch

from lora_core.config import OptimizerConfig
from lora_core.errors import UserError
from lora_core.optim.adamw import AdamW
from lora_core.optim.building import OPTIMIZERS, build_optimizer, resolve_optimizer, split_by_ratio
from lora_core.prodigy import Prodigy
from lora_core.runs.run_folder import flatten_state, unflatten_state
from lora_core.settings import check_options


def with_grads(*shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=dtype)
    return params


def test_optimizers_by_name_and_by_path():
    assert resolve_optimizer("adamw") is AdamW is OPTIMIZERS["adamw"]
    assert resolve_optimizer("torch.optim.AdamW") is torch.optim.AdamW
    assert resolve_optimizer("prodigy") is Prodigy
    assert resolve_optimizer("torch.optim.Adagrad") is torch.optim.Adagrad


@pytest.mark.parametrize(
    "name, words",
    [
        ("adamv", "nearest is 'adamw'"),
        ("torch.optim.Adagrda", "nearest: Adagrad"),
        ("no_such_module.Adam", "no_such_module"),
        ("torch.nn.Linear", "not a torch.optim.Optimizer"),
        ("torch.optim.lr_scheduler", "not a torch.optim.Optimizer"),
        (".AdamW", "choose adamw, prodigy or path/to/file.py:Class, or a dotted"),
        ("torch..AdamW", "torch."),
    ],
)
def test_wrong_optimizers_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        resolve_optimizer(name)


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
    with pytest.raises(
        UserError, match="optimizer adamw takes no argument 'amsgrad'; it takes eps"
    ):
        build_optimizer("adamw", [named(params)], {"amsgrad": True})
    with pytest.raises(UserError, match=r"adamw refuses its settings.*|floating point"):
        build_optimizer(
            "adamw", [named([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])], {}
        )


def test_an_adamw_resumes_bit_for_bit():
    """N steps = k steps, a checkpoint through plain files, N - k steps.

    A group pauses on the way, with lr 0 and without gradients.
    """
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
    """One step, and three: ups at 16 times the learning rate.

    Other groups, and parameters that are not ups, have the plain one.
    """
    found = []
    for by_hand in (False, True):
        params = [
            p.detach().requires_grad_() for p in with_grads((4, 3), (3, 4), (4, 2), (2, 4), (5, 2))
        ]
        ups, rest, tokens = params[1:4:2], params[0:3:2], params[4:]
        if by_hand:
            groups = [named(rest), named(ups, lr=16e-2), named(tokens, "tokens", lr=0.5)]
        else:
            whole = [named(params[:4]), named(tokens, "tokens", lr=0.5)]
            groups = split_by_ratio(whole, {"denoiser": dict.fromkeys(ups, 16)})
        optimizer = build_optimizer(name, groups, {})
        found.append(stepped(optimizer, params, range(1)) + stepped(optimizer, params, range(1, 3)))
        if not by_hand:
            seen = []
            for g in optimizer.param_groups:
                seen.append((g["name"], g["ratio"], g["lr"], len(g["params"])))
            assert seen == [
                ("denoiser", 1.0, 1e-2, 2),
                ("denoiser", 16.0, 16e-2, 2),
                ("tokens", 1.0, 0.5, 1),
            ]
            saved = unflatten_state(*flatten_state(optimizer.state_dict()))
            assert [g["ratio"] for g in saved["param_groups"]] == [1.0, 16.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_ratio_of_one_splits_nothing_and_bad_ones_are_refused():
    params = with_grads((4, 3), (3, 4))
    (group,) = split_by_ratio([named(params)], {"denoiser": {params[1]: 1.0}})
    assert group["params"] == params and group["ratio"] == 1.0 and group["lr"] == 1e-2
    every = dict.fromkeys(params, 2.0)
    (group,) = split_by_ratio([named(params)], {"denoiser": every})  # no empty group
    assert group["ratio"] == 2.0
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"--optimizer\.lora-plus is"):
            check_options(OptimizerConfig(lora_plus=ratio), "--optimizer.")
    with pytest.raises(ValueError, match="denoiser lacks 1 of its"):
        split_by_ratio([named(params[:1])], {"denoiser": {params[1]: 2.0}})
