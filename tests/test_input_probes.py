"""Probes of the inputs: what they say where an option acts, where it does not, and where nothing
can show it.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lora_core.config import Config, DataConfig, Stage
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


def test_images_that_cannot_show_an_option_do_not_hide_one_that_does(square: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(square / "0.png")  # its own mirror image
    (square / "0.txt").write_text("a")
    for changes in ({"flip": True}, {"flip": True, "variants": 40}):
        training = ImageDataset(scan_folder(square), replace(DataConfig(resolution=16), **changes))
        step = looked_at(data=SimpleNamespace(training=training))
        assert training.records[0].path.name == "0.png"
        assert probes.changes_pixels("flip")(step) is True
    training = ImageDataset(scan_folder(square)[:1], DataConfig(resolution=16, flip=True))
    assert probes.changes_pixels("flip")(looked_at(data=SimpleNamespace(training=training))) is None


def test_an_image_of_one_color_shows_no_interpolation(square: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(square / "a.png")
    training = ImageDataset(scan_folder(square), DataConfig(resolution=16, interpolation="lanczos"))
    step = looked_at(data=SimpleNamespace(training=training))
    assert probes.changes_pixels("interpolation")(step) is None


def test_a_zoom_of_less_than_a_pixel_may_do_nothing(square: Path) -> None:
    for zoom, found in ((1.01, None), (1.2, True)):
        training = ImageDataset(scan_folder(square), DataConfig(resolution=16, zoom=zoom))
        step = looked_at(data=SimpleNamespace(training=training))
        assert probes.changes_pixels("zoom")(step) is found


@pytest.mark.parametrize("value, found", [(1.0, None), (0.5, True)])
def test_a_black_and_white_mask_has_no_temperature(value: float, found: Any) -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = value
    stage = Stage(mask_temperature=2.0)
    x = SimpleNamespace(mask=mask**2, unweighted_mask=mask)
    assert probes.sharpens_mask(looked_at(inputs=[x], stage=stage)) is found


def test_a_caption_is_found_in_its_other_unicode_form() -> None:
    """Captions are in form C; what is typed on a Mac may be in form D."""
    caption = unicodedata.normalize("NFD", "a café")
    record = SimpleNamespace(captions=("a photo of a caf\u00e9",))
    data = SimpleNamespace(training=SimpleNamespace(records=[record]))
    found = looked_at(Config(data=DataConfig(caption=caption)), data=data)
    assert probes.uses_caption(found)
    assert not probes.uses_caption(looked_at(Config(data=DataConfig(caption="b")), data=data))
