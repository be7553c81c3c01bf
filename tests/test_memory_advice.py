"""Out of memory is one sentence with the numbers and options that would fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.toml import to_toml
from tests.test_memory_errors import CUDA
from training import nonfinite, processes
from training.memory import memory_advice
from training.memory.memory_advice import fitting_options


def run_main(config: Config, tmp_path: Path) -> int:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    return train.main([str(file)])


def raise_cuda(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("place", "when", "advice"),
    [
        ("training.nonfinite.check_loss_values", "in a training step", "by the plan (--plan) th"),
        ("training.setup.load_family", "while the model was loaded", "lower it with --gradient"),
        ("training.results.before_after_grid", "while the results were written", "by the plan"),
    ],
)
def test_one_sentence_in_every_phase(
    place: str,
    when: str,
    advice: str,
    config: Config,
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, raise_cuda)
    assert run_main(replace(config, batch_size=2), tmp_path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert line.startswith(
        f"error: out of memory {when}: 2.15 GB more were asked for, this process"
    )
    assert f"the GPU has 25.4 GB; {advice}" in line


def test_a_real_refusal_of_the_cpus_allocator(
    config: Config,
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(nonfinite, "check_loss_values", lambda *_: torch.empty(1 << 55))
    assert run_main(replace(config, precision="fp32", batch_size=2), tmp_path) == 2
    said = capsys.readouterr().err
    assert "out of memory in a training step: 144,115,188 GB more were asked for" in said
    assert "Traceback" not in said and "would fit: --" in said


def test_three_sets_of_options_of_which_none_has_the_last_of_another(
    config: Config, quick: None
) -> None:
    resolved, functions = train.resolve_functions(
        replace(config, device="cpu", batch_size=4), None, train.training_step
    )
    fits = fitting_options(resolved, functions, 0)
    assert 1 <= len(fits) <= 3 and len({fit.words for fit in fits}) == len(fits)
    assert all(fit.words for fit in fits)


def test_without_a_plan_the_advice_is_general() -> None:
    expected = pytest.raises(UserError, match=r"--gradient-checkpointing blocks.*--plan")
    with expected, memory_advice.explained(Config(), raise_cuda):  # type: ignore[arg-type]
        raise_cuda()


def test_other_errors_stay_what_they_are() -> None:
    expected = pytest.raises(RuntimeError, match="a shape")
    with expected, memory_advice.explained(Config(), raise_cuda):  # type: ignore[arg-type]
        raise RuntimeError("a shape")


def test_the_sentence_of_another_process_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.distributed, "process_rank", lambda: 1)
    monkeypatch.setattr(processes.distributed, "process_count", lambda: 2)
    expected = pytest.raises(UserError, match=r"^process 1: out of memory in this run: 2\.15 GB")
    block = memory_advice.explained(Config(), raise_cuda)  # type: ignore[arg-type]
    with expected, block, processes._one_voice():
        raise_cuda()
