"""Probes of a finished run's files: what is there is seen, what cannot be there is no error."""

from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import AdapterConfig, Config, OptimizerConfig, Stage
from tests.conftest import save_pipeline
from tests.test_configs import put
from training.probes import effects, file_probes, outcome_probes

ALL = {
    "files.precision": "bf16",
    "files.header": "no_captions",
    "files.title": "A",
    "files.author": "B",
    "files.description": "C",
    "files.license": "mit",
    "files.tags": "d, e",
    "files.trigger": "zib",
    "files.thumbnail": 8,
    "files.sidecars": True,
}


def run_and_look(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    seen: dict[str, bool] = {}
    check = effects.check_outputs

    def look(log: Any, samples: Any) -> None:
        run = outcome_probes.FinishedRun(log, samples)
        for name in ALL:
            effect = effects.OPTION_EFFECTS[name]
            assert isinstance(effect, effects.Written) and effect.is_there
            seen[name] = effect.is_there(run)
        check(log, samples)

    monkeypatch.setattr(effects, "check_outputs", look)
    train.train(config)
    return seen


def test_options_that_act_are_seen(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run_and_look(put(config, ALL), monkeypatch)
    assert seen == dict.fromkeys(ALL, True)


@pytest.mark.parametrize("kind", ["inpainting", "tokens", "full"])
def test_what_a_run_cannot_have_is_no_error(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    values: dict[str, Any] = dict(ALL)
    if kind == "inpainting":
        values["model"] = str(save_pipeline(tmp_path / "inpaint", channels=9))
    else:
        for name in ("precision", "thumbnail", "sidecars"):
            del values[f"files.{name}"]
    if kind == "tokens":
        values |= {"stages": (Stage(1, groups=("tokens",)),), "optimizer": OptimizerConfig()}
        values |= {"adapter": AdapterConfig()}
    if kind == "full":
        values["adapter"] = AdapterConfig(kind="full", targets=("all",))
    assert all(run_and_look(put(config, values), monkeypatch).values())


def test_missing_files_are_seen(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("preview_path", "user_metadata_path"):
        place = getattr(file_probes, name)
        monkeypatch.setattr(file_probes, name, lambda file, _=place: file.with_name("other"))
    with pytest.raises(Exception, match=r"--files.sidecars True had no effect"):
        train.train(put(config, {"files.sidecars": True}))
