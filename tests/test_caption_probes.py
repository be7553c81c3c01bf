"""Probes of captions: None where nothing can show an option, False where it had no effect."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_core.config import Config, DataConfig
from lora_core.data.dataset import ImageDataset, scan_folder
from lora_core.settings import CaptionSettings, ImageSettings
from lora_core.subset_options import Subset
from tests.image_examples import noise_image
from training.probes import caption_probes as probes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise_image(16, 16).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("TOK, b, c\nTOK")
    return tmp_path


def looked_at(folder: Path, **options: Any) -> Any:
    records = scan_folder(folder, tags=CaptionSettings(**options))
    training = ImageDataset(records, ImageSettings(16))
    config = Config(data=DataConfig(subsets=(Subset(str(folder)),)))
    return SimpleNamespace(data=SimpleNamespace(training=training), config=config)


def test_tags_are_seen_to_change_or_not(folder: Path) -> None:
    shuffles = probes.changes_tags("shuffle_caption")
    assert shuffles(looked_at(folder, shuffle_caption=True))
    assert shuffles(looked_at(folder, shuffle_caption=True, keep_tokens=3)) is False
    assert shuffles(looked_at(folder)) is None
    drops = probes.changes_tags("tag_dropout")
    assert drops(looked_at(folder, tag_dropout=0.3))
    assert drops(looked_at(folder, tag_dropout=1e-6)) is None
    keeps = probes.changes_tags("keep_tokens")
    assert keeps(looked_at(folder, keep_tokens=1, shuffle_caption=True))
    assert keeps(looked_at(folder, keep_tokens=1)) is False


def test_fixed_texts_and_lines_are_seen(folder: Path) -> None:
    first = looked_at(folder, caption_prefix="x", caption_suffix="y", caption_lines="first")
    assert probes.has_prefix(first) and probes.has_suffix(first)
    assert probes.reads_first_lines(first)
    tags = CaptionSettings(caption_prefix="x", caption_suffix="y", caption_lines="first")
    first.data.training.records = [
        replace(r, tags=tags) for r in looked_at(folder).data.training.records
    ]
    assert not probes.has_prefix(first) and not probes.has_suffix(first)
    assert not probes.reads_first_lines(first)


def test_a_folder_without_an_image_in_the_run_is_seen(folder: Path) -> None:
    first = looked_at(folder)
    assert probes.reads_subsets(first)
    first.config = Config(data=DataConfig(subsets=(Subset(str(folder)), Subset("elsewhere"))))
    assert not probes.reads_subsets(first)
