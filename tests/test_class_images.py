"""Class images: drawn once, own ones kept, and none that is not finite."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from lora_core.config import Config, PriorConfig
from lora_core.errors import UserError
from tests.conftest import save_photos
from tests.opened_run import open_parts
from training import setup


def test_class_images_are_drawn_once_and_own_ones_are_kept(
    config: Config, quick: None, tmp_path: Path
) -> None:
    own = save_photos(tmp_path / "class", count=1)
    (own / "0.mask.png").unlink()
    (own / "0.png").rename(own / "00001.png")
    before = (own / "00001.png").read_bytes()
    prior = PriorConfig("a cat", str(own), count=3)
    train.train(replace(config, prior=prior))
    names = sorted(p.name for p in own.glob("*.png"))
    assert (
        names == ["00000.png", "00001.png", "00002.png"]
        and (own / "00001.png").read_bytes() == before
    )
    drawn = (own / "00000.png").read_bytes()
    train.train(replace(config, out=config.out + "2", prior=prior))
    assert (own / "00000.png").read_bytes() == drawn and sorted(
        p.name for p in own.glob("*.png")
    ) == names


def test_more_class_images_than_asked_for_are_said(
    config: Config, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = save_photos(tmp_path / "class", count=3)
    for mask in own.glob("*.mask.png"):
        mask.unlink()
    found = open_parts(
        replace(config, prior=PriorConfig("a cat", images=str(own), count=2))
    ).data.class_images
    assert found is not None and len(found) == 3
    assert f"class images: all 3 of {own}; --prior.count 2" in capsys.readouterr().out


def test_class_images_of_nan_are_not_written(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = setup.load_family

    def damaged(*args: Any, **settings: Any) -> Any:
        family = load(*args, **settings)
        with torch.no_grad():
            family.modules["vae"].decoder.conv_out.bias.fill_(float("nan"))
        return family

    monkeypatch.setattr(setup, "load_family", damaged)
    with pytest.raises(UserError, match="decoder gave NaN"):
        train.train(replace(config, prior=PriorConfig("a cat", count=2)))
    assert not list(Path(config.out).rglob("*.png"))
