"""Latents encoded before a stage: all that its steps read, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core.config import Config, PriorConfig
from tests.conftest import merged, save_pipeline
from tests.opened_run import OpenedRun, latent_files, open_parts
from training.inputs.latent_cache import pixels_repeat_after, vae_fingerprint
from training.inputs.step_inputs import list_captions, list_visits, make_step_inputs


def read_steps(s: OpenedRun, count: int) -> list[torch.Tensor]:
    """The latents, and an inpainting model's inputs, of the first steps."""
    found = []
    for step, batch in enumerate(s.data.batches(s.config, 0, count)):
        for x in make_step_inputs(s.source, batch, s.config.stages[0], step, check=True):
            found += [x.x0] if x.inpaint is None else [x.x0, x.inpaint]
    return found


@pytest.mark.parametrize("case", ["plain", "variants", "buckets", "prior", "holes", "disk"])
def test_steps_find_all_that_they_read(
    config: Config, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    changes = {
        "plain": {},
        "variants": {"data": {"crop": "random", "flip": True, "variants": 3, "workers": 2}},
        "buckets": {"data": {"buckets": True, "bucket_step": 4}},
        "prior": {"prior": PriorConfig("a cat", count=2)},
        "holes": {"data": {"masks": "file", "mask_use": "hole"}},
        "disk": {"data": {"cache": str(tmp_path / "cache")}},
    }
    own = merged(config, changes[case])
    if case == "holes":
        own = replace(own, model=str(save_pipeline(tmp_path / "painter", channels=9)))
    lazily = read_steps(open_parts(own), 3)
    s = open_parts(replace(own, out=own.out + "2"))
    visits = list_visits(s.config, s.data, range(3))
    assert not s.source.latents.steps_encode(visits)
    done = s.source.latents.encode_ahead(visits)
    assert done == (0 if case == "disk" else len(visits)) and len(visits) >= 5
    assert s.source.latents.encode_ahead(visits) == 0
    if case == "disk":
        assert len(latent_files(tmp_path / "cache")) == len(visits)
    monkeypatch.setattr(s.model.family, "encode_images", None)
    for a, b in zip(lazily, read_steps(s, 3), strict=True):
        assert torch.equal(a, b)


def test_only_what_the_steps_read_is_encoded(config: Config, quick: None, tmp_path: Path) -> None:
    """Two steps of two images are four of the five; their captions, and the empty one."""
    s = open_parts(config)
    visits = list_visits(s.config, s.data, range(2))
    assert len(visits) == 4 and s.source.latents.encode_ahead(visits) == 4
    assert len(list_visits(s.config, s.data, range(1000))) == 5
    dropping = merged(config, {"data": {"caption_dropout": 0.5}})
    assert list_captions(dropping, s.data, visits) == ["", "a photo of TOK"]


def test_what_never_repeats_is_left_to_the_steps(
    config: Config, quick: None, tmp_path: Path
) -> None:
    s = open_parts(merged(config, {"data": {"crop": "random"}}))
    visits = list_visits(s.config, s.data, range(50))
    assert pixels_repeat_after(s.data) == 0 and len(visits) == 5
    assert s.source.latents.encode_ahead(visits) == 0 and s.source.latents.steps_encode(visits)
    painter = str(save_pipeline(tmp_path / "painter", channels=9))
    s = open_parts(replace(config, model=painter, out=config.out + "2"))
    visits = list_visits(s.config, s.data, range(2))
    assert s.source.latents.encode_ahead(visits) == 4  # the images repeat, random holes do not
    assert s.source.latents.steps_encode(visits)


def test_a_vae_with_a_batch_norm_has_a_fingerprint() -> None:
    """FLUX.2's: its counter of batches has no axis, and its statistics are part of the encoding."""
    norm = nn.BatchNorm2d(2)
    before = vae_fingerprint(norm)
    norm.running_mean.add_(1)  # type: ignore[union-attr]
    assert vae_fingerprint(norm) != before
