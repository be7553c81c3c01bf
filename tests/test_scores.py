"""Validation in a run: the same images and noise whatever the seed and the batch, and what it
costs.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from lora_core.config import Config, ValidationConfig
from tests.conftest import merged, rows, save_photos
from tests.opened_run import open_parts
from training import setup


def test_validation_gives_the_same_numbers_whatever_the_training_seed(
    config: Config, quick: None
) -> None:
    config = replace(config, validation=ValidationConfig(bins=3, draws=2), batch_size=3)
    other = merged(
        config,
        {
            "out": config.out + "1",
            "seed": 7,
            "data": {"flip": True, "crop": "random", "repeats": 2},
            "noise": {"offset": 0.1},
        },
    )
    a, b = (rows(train.train(c), "val") for c in (config, other))
    count = 5 * 3 * 2
    assert a[:count] == b[:count] and a[count:] != b[count:] and len(a) == 2 * count
    seeded = train.train(
        replace(config, out=config.out + "2", validation=ValidationConfig(bins=3, draws=2, seed=1))
    )
    assert rows(seeded, "val")[:count] != a[:count]


def test_the_held_out_images_are_the_ones_scored(
    config: Config, quick: None, tmp_path: Path
) -> None:
    held_out = save_photos(tmp_path / "held", side=40, count=2)
    run = train.train(replace(config, validation=ValidationConfig(str(held_out), bins=2)))
    trained = setup.open_data(replace(config, out=config.out + "2")).training
    assert len(rows(run, "val")) == 2 * 2 * 2 and not {r["key"] for r in rows(run, "val")} & {
        r.key for r in trained.records
    }


@pytest.mark.parametrize(("batch", "count"), [(1, 0), (2, 0), (3, 4), (5, 0), (7, 0)])
def test_it_costs_a_batch_at_a_time_and_reads_each_image_once(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, batch: int, count: int
) -> None:
    s = open_parts(
        replace(config, batch_size=batch, validation=ValidationConfig(bins=2, draws=2, count=count))
    )
    sizes: list[int] = []
    read: list[int] = []
    prompts: list[int] = []
    family, images = s.model.family, s.data.validation
    denoise, example, encode = family.denoise, images.example, family.encode_prompts
    monkeypatch.setattr(family, "denoise", lambda x, *a: (sizes.append(len(x)), denoise(x, *a))[1])
    monkeypatch.setattr(family, "encode_prompts", lambda p: (prompts.append(len(p)), encode(p))[1])
    monkeypatch.setattr(images, "example", lambda i, visit: (read.append(i), example(i, visit))[1])
    for done in (0, 1):
        s.log.validate(done, s.scorer)
    number = count or 5
    assert set(sizes) == {min(batch, number)} == set(prompts) and sorted(read) == list(
        range(number)
    )
    assert s.log.scores[0] == s.log.scores[1] and [x.key for x in s.log.scores[0][:number]] == [
        r.key for r in images.records
    ]
    expected = []
    for place in itertools.product(range(2), range(2)):
        expected += [place] * number
    assert [(x.draw, x.bin) for x in s.log.scores[0]] == expected
    assert images._recent.bytes == 0 and all(
        e.pixels.shape == (4, 8, 8) for e in s.scorer.latents.values()
    )


def test_scores_of_other_batches_differ_by_rounding_only(config: Config, quick: None) -> None:
    found = []
    for batch in (1, 2, 5):
        s = open_parts(replace(config, batch_size=batch, validation=ValidationConfig(bins=3)))
        s.log.validate(0, s.scorer)
        found.append(torch.tensor([score.loss for score in s.log.scores[0]]))
        Path(config.out).mkdir(exist_ok=True)
        config = replace(config, out=config.out + "x")
    assert all(torch.allclose(found[0], other, rtol=1e-5, atol=0) for other in found[1:])
