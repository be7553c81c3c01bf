"""TensorBoard, read back by its own reader, and W&B, a module with the signatures of its documents
(it is not installed here).
"""

from __future__ import annotations

import io
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.runs.trackers import SINKS, WandB, check_login, plain_options
from tests.conftest import rows


def test_tensorboard_has_images_text_and_hyper_parameters(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    monkeypatch.undo()  # real images
    look = replace(config.samples, every=1, seeds=2)
    run = train.train(replace(config, report="tensorboard", samples=look))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    images = [*(f"samples/a TOK, seed {i}" for i in range(2)), "before_after"]
    assert sorted(events.Tags()["images"]) == sorted(images)
    for tag in images[:2]:
        found = events.Images(tag)
        assert [each.step for each in found] == [1, 2, 2]  # at the end once more
        pixels = Image.open(io.BytesIO(found[0].encoded_image_string))
        assert pixels.size == (16, 16)
    sheet = Image.open(io.BytesIO(events.Images("before_after")[0].encoded_image_string))
    assert sheet.tobytes() == Image.open(run / "before_after.png").tobytes()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '    out = "run"' in text and "rank = 4" in text
    assert str(Path(config.data.images)) not in text and str(run) not in text
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    params = HParamsPluginData.FromString(content).session_start_info.hparams
    assert params["adapter.rank"].number_value == 4
    assert params["stages.0.steps"].number_value == 2
    assert params["report"].string_value == "tensorboard"
    (result,) = events.Scalars("val_loss_after")
    assert result.value == pytest.approx(rows(run)[-1]["val_loss"])
    assert [path.name for path in run.iterdir()].count("tensorboard") == 1


class StubImage:
    def __init__(
        self, data_or_path: Any, mode: str | None = None, caption: str | None = None
    ) -> None:
        assert isinstance(data_or_path, Image.Image)
        self.caption = caption


class StubHtml:
    def __init__(self, data: str, inject: bool = True) -> None:
        self.data = data


class StubWandb(types.ModuleType):
    """The calls of wandb 0.12 to 0.22 that are used, which drops steps that go back."""

    Image, Html = StubImage, StubHtml

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.finished = 0

    def init(
        self,
        project: str | None = None,
        name: str | None = None,
        dir: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.started = {"project": project, "name": name, "dir": dir, "config": config}

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        assert step is not None and (not self.logged or step >= self.logged[-1][0])
        self.logged.append((step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished += 1

    def login(self) -> bool:
        return True


def test_wandb_gets_images_text_and_hyper_parameters(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step goes back, and no path of this computer is sent."""
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    look = replace(config.samples, every=1, seeds=2)
    run = train.train(replace(config, report="wandb", samples=look, log_every=5))
    assert stub.started["config"]["adapter"]["rank"] == 4
    assert config.data.images not in repr(stub.started["config"])
    drawn = [(step, data["samples"]) for step, data in stub.logged if "samples" in data]
    assert [step for step, _ in drawn] == [1, 2, 2]
    assert [image.caption for image in drawn[0][1]] == ["a TOK, seed 0", "a TOK, seed 1"]
    (text,) = [data["config"].data for _, data in stub.logged if "config" in data]
    assert "rank = 4" in text and "&quot;run&quot;" in text
    losses = [data["loss"] for _, data in stub.logged if "loss" in data]
    assert losses == [row["loss"] for row in rows(run) if "loss" in row]
    assert any("before_after" in data for _, data in stub.logged)
    assert stub.summary["steps"] == 2 and stub.finished == 1


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WandB(tmp_path, {})
    with pytest.raises(UserError, match="--report wandb"):
        check_login("wandb")
    assert SINKS["none"](tmp_path, {}) is None


def test_hyper_parameters_are_plain() -> None:
    table = {"a": 1, "b": {"c": [1, 2], "d": True}, "stages": [{"steps": 3}]}
    assert plain_options(table) == {"a": 1, "b.c": "[1, 2]", "b.d": True, "stages.0.steps": 3}
