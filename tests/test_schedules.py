"""Schedules against those of diffusers and transformers, and papers' formulas."""

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler
from transformers.optimization import get_inverse_sqrt_schedule, get_wsd_schedule

from examples.my_schedule import cooldown
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


@pytest.mark.parametrize("total, warmup", [(37, 0), (37, 5), (40, 10), (1, 0)])
def test_wsd_and_inverse_sqrt_are_those_of_transformers(total, warmup):
    tail = max(1, round(0.2 * (total - warmup)))
    for make, ours in (
        (
            lambda o: get_wsd_schedule(
                o, warmup, tail, total, min_lr_ratio=0.0 if warmup else 0.1, decay_type="linear"
            ),
            resolve_schedule("wsd", decay=0.2, end=0.0 if warmup else 0.1),
        ),
        (lambda o: get_inverse_sqrt_schedule(o, warmup), resolve_schedule("inverse_sqrt")),
        (
            lambda o: get_inverse_sqrt_schedule(o, warmup, timescale=7),
            resolve_schedule("inverse_sqrt", timescale=7),
        ),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = make(optimizer)
        for step in range(total):
            theirs = scheduler.get_last_lr()[0]
            assert ours(step, total, warmup) == pytest.approx(theirs, rel=1e-12, abs=1e-15)
            optimizer.step(), scheduler.step()
    with pytest.raises(
        UserError, match=r"a share of 2 of the steps; expected a number in \(0, 1\]"
    ):
        resolve_schedule("wsd", decay=2.0)(0, 10, 0)


def test_inverse_sqrt_is_the_transformers_own_and_rex_is_the_papers():
    """arXiv 1706.03762 eq. 3, over its largest value; arXiv 2107.04197, f(x) = x / (1/2 + x/2)."""
    ours, rex = resolve_schedule("inverse_sqrt"), resolve_schedule("rex")
    for step in range(1, 40):
        paper = min(step**-0.5, step * 8**-1.5) / 8**-0.5
        assert ours(step, 40, 8) == pytest.approx(paper, rel=1e-12)
        left = 1 - step / 40
        assert rex(step, 40, 0) == pytest.approx(left / (1 / 2 + left / 2), rel=1e-12)
    assert rex(0, 40, 0) == 1


OWN = """
def two(step, steps, *, low=0.5):
    return 1 - (1 - low) * step / steps

def three(step, total, warmup, *, low=0.5):
    return low

def defaulted(step, total, warmup=0):
    return warmup / total

def fails(step, steps):
    if step:
        return 1 / (step - step)
    return 1.0
"""


def test_a_schedule_from_a_file_counts_after_the_warm_up_unless_it_takes_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    two = resolve_schedule(f"{file}:two")
    assert [two(step, 8, 4) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625]
    assert resolve_schedule(f"{file}:two", low=0.0)(7, 8, 4) == 0.25
    assert resolve_schedule(f"{file}:three", low=0.3)(0, 8, 4) == 0.3
    assert resolve_schedule(f"{file}:defaulted")(0, 8, 4) == 0.5
    with pytest.raises(UserError, match=r"'steps' to set here: the program gives it.*takes low"):
        resolve_schedule(f"{file}:two", steps=3)
    said = r"fn\(step, steps\) and returns a number: ZeroDivisionError: .*mine.py, line 13\)"
    with pytest.raises(UserError, match=said):
        resolve_schedule(f"{file}:fails")(1, 8, 0)
    with pytest.raises(UserError, match=r"has no function 'twoo' \(nearest: two\)"):
        resolve_schedule(f"{file}:twoo")


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


def test_the_example_is_the_papers_cooldown():
    """arXiv 2405.18392: 1, and 1 - sqrt((n - (N - n_d)) / n_d) in the last n_d steps."""
    ours = resolve_schedule("examples/my_schedule.py:cooldown", share=0.4)
    for step in range(50):
        x = (step - 30) / 20
        assert ours(step, 50, 0) == pytest.approx(1 - x**0.5 if x > 0 else 1, rel=1e-12)
    assert ours(5, 60, 10) == pytest.approx(0.5) and cooldown(10, 10) == pytest.approx(0, abs=1e-12)
