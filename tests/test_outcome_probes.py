"""Probes of what a run has written: options that act are seen, and what a run cannot show is no
error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import Config
from lora_core.runs.pictures import CELLS
from tests.conftest import learned, same
from tests.test_configs import put
from training import results
from training.probes import effects
from training.probes import outcome_probes as probes

ACTING: list[dict[str, Any]] = [
    {
        "samples.prompts": ("a TOK", "TOK TOK", "a TOK"),
        "samples.every": 1,
        "samples.strengths": (0.0, 0.5, 1.0),
        "samples.seeds": 2,
        "samples.new_prompts": ("a", "{} on mars"),
        "samples.show_data": True,
        "samples.base_word": "a  thing",
        "stages.0.groups": ("denoiser", "tokens"),
        "save_every": 1,
        "keep": 1,
        "ema": 0.9,
    },
    {
        "validation.seed": 5,
        "validation.bins": 2,
        "validation.draws": 2,
        "validation.count": 2,
        "validation.every": 1,
        "data.skip_bad": True,
    },
]


@pytest.mark.parametrize("values", ACTING, ids=["images", "scores"])
def test_options_that_act_are_seen_and_looking_changes_nothing(
    values: dict[str, Any], config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    whole = effects.check_outputs

    def look(log: Any, samples: Any) -> None:
        run = probes.FinishedRun(log, samples)
        for name in values:
            effect = effects.OPTION_EFFECTS[name.replace("stages.0.", "stages.")]
            if isinstance(effect, effects.Written) and effect.is_there is not None:
                assert effect.is_there(run) is True, name
                asked.append(name)
        whole(log, samples)

    monkeypatch.setattr(effects, "check_outputs", look)
    run = train.train(put(config, values))
    left = {"stages.0.groups", "ema"}
    assert set(asked) == values.keys() - left
    monkeypatch.setattr(effects, "check_outputs", lambda *_: None)
    blind = train.train(put(config, values | {"out": f"{config.out}_blind"}))
    assert same(learned(run), learned(blind))
    for file in ("val.jsonl", "metrics.jsonl"):
        assert (run / file).read_bytes() == (blind / file).read_bytes()


def test_prompts_without_the_word_have_no_base_word(config: Config, quick: None) -> None:
    values = {"samples.prompts": ("a",), "samples.base_word": "a  thing"}
    run = train.train(put(config, values | {"stages.0.groups": ("denoiser", "tokens")}))
    with results.pictures.Image.open(run / "before_after.png") as sheet:
        assert "thing" not in sheet.text[CELLS]


def test_sheets_say_what_they_show(config: Config, tmp_path: Path) -> None:
    """The probes read the text of the PNG, as the report does."""
    values = {"samples.new_prompts": ("TOK",), "stages.0.steps": 1}
    run = train.train(put(config, values))
    with results.pictures.Image.open(run / "before_after.png") as sheet:
        sheet.load()
        cells = json.loads(sheet.info[CELLS])["cells"]
    assert [cell["caption"] for cell in cells if cell["role"] == "new"] == ["TOK"]
