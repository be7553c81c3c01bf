"""kohya's optimizers, rates and schedules. Learning rates of each step are compared with the
schedulers of transformers, which kohya's script calls.
"""

from typing import Any

import pytest
import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

from lora_core.errors import UserError
from lora_core.optim.schedules import resolve_schedule
from training.translation import kohya_optimizer
from training.translation.kohya_options import KOHYA_DEFAULTS
from training.translation.translated_options import TranslatedOptions, nest_options


def record(**given: Any) -> TranslatedOptions:
    return TranslatedOptions("kohya", KOHYA_DEFAULTS, given)


def kohya_rates(name: str, steps: int, rate: float, **options: Any) -> list[float]:
    """The learning rate of each step by transformers' scheduler, as kohya calls it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)](optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SCHEDULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("constant", {}, {}),
    ("constant_with_warmup", {"lr_warmup_steps": 5}, {"num_warmup_steps": 5}),
    ("linear", {}, {"num_warmup_steps": 0, "num_training_steps": 40}),
    ("cosine", {"lr_warmup_steps": 0.1}, {"num_warmup_steps": 4, "num_training_steps": 40}),
    (
        "cosine_with_restarts",
        {"lr_scheduler_num_cycles": 3, "lr_warmup_steps": 4},
        {"num_warmup_steps": 4, "num_training_steps": 40, "num_cycles": 3},
    ),
    (
        "polynomial",
        {"lr_scheduler_power": 2},
        {"num_warmup_steps": 0, "num_training_steps": 40, "power": 2},
    ),
    (
        "inverse_sqrt",
        {"lr_warmup_steps": 6, "lr_scheduler_timescale": 9},
        {"num_warmup_steps": 6, "timescale": 9},
    ),
]


@pytest.mark.parametrize(("name", "given", "theirs"), SCHEDULES)
def test_the_rate_of_each_step_is_that_of_kohyas_scheduler(
    name: str, given: dict[str, Any], theirs: dict[str, Any]
) -> None:
    rate, steps = 1e-3, 40
    options = record(lr_scheduler=name, **given)
    kohya_optimizer.translate_schedule(options, steps, rate)
    options.check_complete()
    table = nest_options(options.options)["optimizer"]
    multiplier = resolve_schedule(table["schedule"], **table.get("schedule_args", {}))
    own = [rate * multiplier(step, steps, table.get("warmup", 0)) for step in range(steps)]
    assert own == pytest.approx(kohya_rates(name, steps, rate, **theirs), rel=1e-9, abs=1e-12)


def test_schedules_that_are_not_here_are_refused() -> None:
    for given, message in (
        ({"lr_scheduler": "piecewise_constant"}, "choose constant, "),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "classes are not read"),
        ({"lr_warmup_steps": 10}, "its script refuses a warm-up"),
    ):
        with pytest.raises(UserError, match=message):
            kohya_optimizer.translate_schedule(record(**given), 40, 1e-3)


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({}, {"denoiser": 2e-6, "text_encoder": 2e-6}),
        ({"learning_rate": 1e-4, "unet_lr": 2e-4}, {"denoiser": 2e-4, "text_encoder": 1e-4}),
        ({"learning_rate": 1e-4, "text_encoder_lr": [3e-5, 3e-5]},
         {"denoiser": 1e-4, "text_encoder": 3e-5}),
        ({"unet_lr": 1e-4, "text_encoder_lr": 0.0}, {"denoiser": 1e-4}),
        ({"learning_rate": 1e-4, "network_train_unet_only": True}, {"denoiser": 1e-4}),
        ({"text_encoder_lr": 1e-5, "network_train_text_encoder_only": True},
         {"text_encoder": 1e-5}),
    ],
)  # fmt: skip
def test_rates_and_the_groups_that_train(given: dict[str, Any], rates: dict[str, float]) -> None:
    options = record(**given)
    groups = kohya_optimizer.translate_groups(options)
    table = nest_options(options.options)
    assert groups == tuple(rates) and table["optimizer"]["lr"] == rates
    assert table["stages"][0]["groups"] == list(rates)
    options.check_complete()


def test_optimizers_keep_the_defaults_of_their_classes() -> None:
    def translate(**given: Any) -> dict[str, Any]:
        options = record(**given)
        kohya_optimizer.translate_optimizer(options, ("denoiser",))
        options.check_complete()
        return options.options

    plain = translate()
    assert plain["optimizer.name"] == "adamw" and plain["optimizer.clip"] == 1.0
    assert plain["optimizer.weight_decay.denoiser"] == 0.01
    arguments = ["decouple=True", "weight_decay=0.02", "d_coef=2", "betas=(0.9, 0.99)"]
    prodigy = translate(optimizer_type="Prodigy", optimizer_args=arguments)
    assert prodigy["optimizer.name"] == "prodigy" and prodigy["optimizer.args.d_coef"] == 2
    assert prodigy["optimizer.weight_decay.denoiser"] == 0.02
    assert prodigy["optimizer.betas.denoiser"] == [0.9, 0.99]
    assert translate(optimizer_type="prodigy")["optimizer.weight_decay.denoiser"] == 0
    nesterov = translate(optimizer_type="SGDNesterov")
    assert nesterov["optimizer.args.momentum"] == 0.9 and nesterov["optimizer.args.nesterov"]
    with pytest.raises(UserError, match="relative_step=False"):
        translate(optimizer_type="AdaFactor")


def test_eight_bits_are_taken_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, name in ((True, "bitsandbytes.optim.AdamW8bit"), (False, "adamw")):
        monkeypatch.setattr(kohya_optimizer, "_has_bitsandbytes", lambda has=has: has)
        for given in ({"optimizer_type": "AdamW8bit"}, {"use_8bit_adam": True}):
            options = record(**given)
            kohya_optimizer.translate_optimizer(options, ("denoiser",))
            assert options.options["optimizer.name"] == name
            assert options.entries[0].outcome == ("taken" if has else "changed")
