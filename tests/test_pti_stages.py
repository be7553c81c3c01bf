"""Steps, rates and schedules of lora_pti's command line, which counts forward passes."""

from pathlib import Path

import pytest

from lora_core.config import Config
from training.translation.lora_pti import translate_lora_pti

TOKENS = "--placeholder_tokens=<a>|<b>"


def config_of(folder: Path, *words: str) -> Config:
    return translate_lora_pti([str(folder), "model", "out", *words]).config


def updates_of_train_inversion(steps: int, accumulation: int) -> int:
    """How often the loop of train_inversion calls the optimizer, written out."""
    updates = 0
    for global_step in range(steps):
        if global_step % accumulation == 0:
            updates += 1
    return updates


@pytest.mark.parametrize("steps, passes", [(1000, 4), (1000, 3), (7, 8), (5, 1)])
def test_the_inversion_has_as_many_updates_as_there(photos: Path, steps: int, passes: int) -> None:
    words = (f"--max_train_steps_ti={steps}", f"--gradient_accumulation_steps={passes}")
    stages = config_of(photos, TOKENS, *words).stages
    assert [stage.steps for stage in stages] == [updates_of_train_inversion(steps, passes), 1000]


def test_scale_lr_multiplies_all_rates_but_that_of_the_continuation(photos: Path) -> None:
    words = (TOKENS, "--scale_lr", "--train_batch_size=2", "--gradient_accumulation_steps=3")
    config = config_of(photos, *words, "--continue_inversion", "--continue_inversion_lr=1e-4")
    rates = {"denoiser": 6e-4, "text_encoder": 6e-5, "tokens": 3e-3}
    assert config.optimizer.lr == pytest.approx(rates)
    assert config.stages[1].lr == {"tokens": 1e-4}
    same = config_of(photos, *words, "--continue_inversion")
    assert same.stages[1].lr == pytest.approx({"tokens": 3e-3})
    plain = config_of(photos, TOKENS)
    assert plain.optimizer.lr == {"denoiser": 1e-4, "text_encoder": 1e-5, "tokens": 5e-4}


def test_the_tuning_leaves_out_the_noisiest_fifth_and_the_norm_prior(photos: Path) -> None:
    first, second = config_of(photos, TOKENS, "--continue_inversion").stages
    assert (first.high, second.high) == (None, 0.8)
    assert (first.norm, second.norm) == (None, "none")
    assert first.groups == ("tokens",)
    assert second.groups == ("denoiser", "text_encoder", "tokens")


def test_warm_ups_are_counted_in_updates_and_constant_has_none(photos: Path) -> None:
    words = (TOKENS, "--lr_warmup_steps=10", "--lr_warmup_steps_lora=10")
    assert [stage.warmup for stage in config_of(photos, *words).stages] == [3, 10]
    constant = config_of(photos, *words, "--lr_scheduler_lora=constant").stages[1]
    assert (constant.schedule, constant.warmup) == ("constant", None)
    warm = config_of(photos, *words, "--lr_scheduler_lora=constant_with_warmup").stages[1]
    assert (warm.schedule, warm.warmup) == ("constant", 10)


def test_without_an_inversion_there_is_one_stage(photos: Path) -> None:
    for words in (("--perform_inversion=False",), ("--max_train_steps_ti=0",)):
        stages = config_of(photos, TOKENS, "--continue_inversion", *words).stages
        assert [stage.groups for stage in stages] == [("denoiser", "text_encoder", "tokens")]
