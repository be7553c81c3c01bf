"""Probes of the optimizer's options: rates as tensors, warm-up, groups without a gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_core.config import Config, OptimizerConfig, Stage
from lora_core.optim import schedules
from training.probes import optimizer_probes as probes


@pytest.mark.parametrize("lr", [1e-4, torch.tensor(1e-4), torch.tensor(1e-4, dtype=torch.float64)])
@pytest.mark.parametrize("wanted, found", [(1e-4, True), (1.0001e-4, False)])
def test_a_rate_may_be_a_tensor(lr: Any, wanted: float, found: bool) -> None:
    """torchao's optimizers keep it in fp32, in which 1e-4 is another number."""
    group = {"name": "denoiser", "rate": wanted, "ratio": 1.0, "lr": lr}
    config = Config(optimizer=OptimizerConfig(lr={"denoiser": wanted}))
    step: Any = SimpleNamespace(
        config=config,
        stage=Stage(),
        groups=[group],
        inputs=[SimpleNamespace(number=0)],
        optimization=SimpleNamespace(rate_schedules={"constant": lambda *_: 1.0}),
    )
    assert probes.has_rates(step) is found


@pytest.mark.parametrize("rise, found", [(lambda i: 1.0, True), (lambda i: 0.0, None)])
def test_a_warm_up_to_nothing_cannot_be_seen(rise: Any, found: Any) -> None:
    def multiplier(step: int, total: int, warmup: int) -> float:
        return rise(step) * min(1.0, step / warmup)

    step: Any = SimpleNamespace(
        config=Config(optimizer=OptimizerConfig(warmup=2)),
        stage=Stage(5),
        optimization=SimpleNamespace(rate_schedules={"constant": multiplier}),
    )
    assert probes.warms_up(step) is found


@pytest.mark.parametrize(
    "captions, dropped, found",
    [(("a TOK",), (False,), False), (("a cat",), (False,), None), (("",), (True,), None)],
)
def test_tokens_without_a_gradient(captions: Any, dropped: Any, found: Any) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    word = SimpleNamespace(word="TOK", names=("<s0>",))
    step: Any = SimpleNamespace(
        config=Config(),
        stage=Stage(1, ("tokens",)),
        batch=SimpleNamespace(captions=captions, dropped=dropped),
        model=SimpleNamespace(groups={"tokens": [p]}, gradient_hooks={}, placeholders=[word]),
    )
    assert probes.reaches_parameters(step) is found


@pytest.mark.parametrize(
    "steps, warmup, schedule, arguments, found",
    [
        (1000, 0, "wsd", {"decay": 0.01, "end": 0.1}, True),  # the last ten steps show it
        (1000, 0, "wsd", {"decay": 0.005, "power": 2.0}, True),
        (1000, 0, "polynomial", {"power": 1.0}, None),  # its default
        (1000, 1000, "polynomial", {"power": 2.0}, None),  # warms up to its end
        (2, 0, "wsd", {"decay": 0.2}, None),  # too short
        (1000, 0, "cosine", {"cycles": 0.5, "of": 1}, False),
    ],
)
def test_arguments_of_schedules(
    steps: int, warmup: int, schedule: Any, arguments: dict[str, Any], found: Any, monkeypatch: Any
) -> None:
    whole = schedules.SCHEDULES["cosine"]
    monkeypatch.setitem(  # a schedule that ignores an argument
        schedules.SCHEDULES, "cosine", lambda step, steps, cycles=0.5, of=0: whole(step, steps)
    )
    optimizer = OptimizerConfig(schedule=schedule, schedule_args=arguments, warmup=warmup)
    own = schedules.resolve_schedule(schedule, **arguments)
    step: Any = SimpleNamespace(
        config=Config(optimizer=optimizer),
        stage=Stage(steps),
        optimization=SimpleNamespace(rate_schedules={schedule: own}),
    )
    assert probes.shapes_schedule(step) is found
