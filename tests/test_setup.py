"""Networks as a run sets them up: gradient checkpointing, an adapter of one's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import Config, OptimizerConfig, Stage
from lora_core.errors import UserError
from lora_core.toml import read_toml
from tests.conftest import learned, rows, same
from training import setup


@pytest.mark.parametrize("groups", [("denoiser",), ("text_encoder",), ("denoiser", "tokens")])
def test_gradient_checkpointing_gives_the_same_numbers(
    config: Config, quick: None, groups: Any
) -> None:
    config = replace(
        config,
        stages=(Stage(2, groups),),
        optimizer=OptimizerConfig(),
        adapter=replace(config.adapter, dropout=0.2),
    )
    plain = train.train(config)
    saving = train.train(replace(config, out=config.out + "2", gradient_checkpointing="all"))
    for a, b in zip(rows(plain), rows(saving), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("mode", ["blocks", "all"])
def test_gradient_checkpointing_changes_no_bit(config: Config, quick: None, mode: Any) -> None:
    config = replace(config, stages=(Stage(1, ("denoiser", "text_encoder", "tokens")),))
    config = replace(config, optimizer=OptimizerConfig())
    plain = train.train(config)
    saving = train.train(replace(config, out=config.out + "2", gradient_checkpointing=mode))
    assert same(learned(plain), learned(saving))


def test_true_is_answered_with_the_words_of_today(tmp_path: Path) -> None:
    for written, word in (("true", '"all", which is what true was'), ("false", '"none"')):
        (tmp_path / "old.toml").write_text(f"gradient_checkpointing = {written}\n")
        with pytest.raises(UserError, match=f"none, blocks, all; write {word}"):
            read_toml(tmp_path / "old.toml")


def test_an_adapter_of_ones_own(config: Config, quick: None, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from lora_core.adapters.kinds import LoRA\nclass Half(LoRA):\n    def __init__(self, "
        "base, layer):\n"
        "        super().__init__(base, layer)\n        self.scale /= 2\n"
    )
    own = train.train(replace(config, adapter=replace(config.adapter, kind=f"{file}:Half")))
    half = train.train(
        replace(config, out=config.out + "2", adapter=replace(config.adapter, alpha=2.0))
    )
    assert same(learned(own), learned(half))


def test_a_model_of_another_size_is_a_warning(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    side = setup.open_model(config).family.resolution
    far = replace(config, data=replace(config.data, resolution=side * 4))
    capsys.readouterr()
    setup.open_model(far)
    said = f"warning: --data.resolution {side * 4}, and {config.model} was made for {side} pixels"
    assert said in capsys.readouterr().err.splitlines()
