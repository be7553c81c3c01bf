"""Networks as a run sets them up: gradient checkpointing, an adapter of one's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import Config, OptimizerConfig, Stage
from tests.conftest import learned, rows, same


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
