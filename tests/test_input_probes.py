"""Probes of the inputs: what they say where an option acts, where it does not, and where nothing
can show it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lora_core.config import Config, DataConfig
from lora_core.data.dataset import ImageDataset, scan_folder
from training.probes import input_probes as probes


def looked_at(config: Config | None = None, **parts: Any) -> Any:
    """A step of which only some parts are there."""
    return SimpleNamespace(config=config or Config(), **parts)


def test_draws_are_enough_for_chance_to_explain_nothing() -> None:
    for p in (0.01, 0.1, 0.5, 0.99):
        draws = probes.enough_draws(p)
        assert draws is not None and (1 - p) ** draws <= probes.RARE
        assert draws == 1 or (1 - p) ** (draws - 1) > probes.RARE
    assert probes.enough_draws(0.001) is None


@pytest.fixture
def square(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a")
    return tmp_path / "images"


@pytest.mark.parametrize(
    "option, changes, found",
    [
        ("crop", {"crop": "random"}, None),  # no margin
        ("crop", {"crop": "random", "zoom": 1.5}, True),
        ("zoom", {"zoom": 1.5}, True),
        ("flip", {"flip": True}, True),
        ("flip", {"flip": True, "variants": 1}, "not False"),  # one draw
        ("jitter", {"jitter": True}, True),
        ("interpolation", {"interpolation": "lanczos"}, None),  # has its size already
        ("interpolation", {"interpolation": "lanczos", "resolution": 8}, True),
    ],
)
def test_pixels(square: Path, option: str, changes: dict[str, Any], found: Any) -> None:
    settings = replace(DataConfig(resolution=16), **changes)
    training = ImageDataset(scan_folder(square), settings)
    step = looked_at(data=SimpleNamespace(training=training))
    seen = probes.changes_pixels(option)(step)
    assert seen is not False if found == "not False" else seen is found


def test_pixels_come_again_after_the_variants(square: Path) -> None:
    settings = DataConfig(resolution=16, flip=True, zoom=1.5, crop="random", variants=2)
    training = ImageDataset(scan_folder(square), settings)
    step = looked_at(data=SimpleNamespace(training=training))
    assert probes.repeats_pixels(step)


def test_buckets_of_square_images_cannot_show_themselves(square: Path) -> None:
    settings = DataConfig(resolution=16, buckets=True, bucket_step=4)
    training = ImageDataset(scan_folder(square), settings)
    step = looked_at(Config(data=settings), data=SimpleNamespace(training=training))
    assert probes.has_buckets(step) is None and probes.has_bucket_step(step)


@pytest.mark.parametrize("zeroes", [True, False])
@pytest.mark.parametrize("how", ["zeros", "empty"])
def test_captions_are_dropped_in_the_way_that_was_asked_for(zeroes: bool, how: Any) -> None:
    config = Config(data=DataConfig(dropped=how))
    source = SimpleNamespace(captions=SimpleNamespace(zeroes_dropped=zeroes))
    step = looked_at(config, source=source)
    assert probes.drops_as_asked(step) == (zeroes == (how == "zeros"))


def test_pairs_have_as_many_losers() -> None:
    for losers, found in ((None, False), (torch.tensor([False, True]), True)):
        step = looked_at(batch=SimpleNamespace(is_loser=losers))
        assert probes.has_losers(step) is found
    step = looked_at(batch=SimpleNamespace(is_loser=torch.tensor([False, False])))
    assert probes.has_losers(step) is False


def test_arguments_at_their_defaults_change_nothing() -> None:
    def function(x: float, gamma: float = 5.0, k: int = 1) -> float:
        return x * gamma * k

    assert probes.differing_arguments(function, {"gamma": 5.0, "k": 2}) == {"k": 2}
