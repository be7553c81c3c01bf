"""Schedules against diffusers' formulas."""

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler

from lora_core.errors import UserError
from lora_core.optim.schedules import resolve_schedule
from lora_core.plugins import check_arguments
from lora_core.prodigy import Prodigy

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
        assert resolve_schedule("cosine", cycles=1.5)(step, 20, 3) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-15
        )
        optimizer.step(), scheduler.step()


def test_wrong_schedules_name_the_nearest():
    with pytest.raises(UserError, match="unknown schedule 'cosin', the nearest is 'cosine'"):
        resolve_schedule("cosin")
    with pytest.raises(UserError, match=r"power.*nearest: power"):
        resolve_schedule("polynomial", powr=2)
    with pytest.raises(UserError, match="no argument 'total'"):
        resolve_schedule("constant", total=2)


def test_arguments_are_checked_against_the_signature():
    check_arguments(Prodigy, {"d_coef": 2.0}, "optimizer prodigy", given=("params", "lr"))
    with pytest.raises(
        UserError, match=r"optimizer prodigy takes no argument 'dcoef'.*nearest: d_coef"
    ):
        check_arguments(Prodigy, {"dcoef": 2.0}, "optimizer prodigy", given=("params", "lr"))
