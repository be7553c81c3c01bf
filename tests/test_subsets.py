"""Several folders in one run: their repeats and captions, class images among the others."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import Config, DataConfig, PriorConfig, Stage, ValidationConfig
from lora_core.data.step_visits import StepOrder
from lora_core.errors import UserError
from lora_core.subset_options import Subset
from lora_core.toml import from_table, to_table
from tests.conftest import final, rows, same, save_photos
from tests.image_examples import noise_image
from training import setup
from training.checks.config_checks import check_config
from training.inputs import training_images
from training.inputs.subsets import balance_class_images, list_image_folders


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    save_photos(tmp_path / "two", count=2)
    save_photos(tmp_path / "three", "b, c, TOK", count=3)
    for i in range(7):
        path = tmp_path / "reg" / f"r{i}.png"
        path.parent.mkdir(exist_ok=True)
        noise_image(20, 20, i).save(path)
    return tmp_path


def with_subsets(config: Config, *subsets: Subset, **options: Any) -> Config:
    data = DataConfig(subsets=subsets, resolution=16, **options)
    return replace(config, data=data, validation=ValidationConfig(every=-1))


def test_options_of_a_subset_win_over_those_of_data(config: Config, folders: Path) -> None:
    first = Subset(str(folders / "two"), repeats=3, caption_prefix="", tag_dropout=0.0)
    second = Subset(str(folders / "three"), keep_tokens=0)
    data = DataConfig(
        subsets=(first, second),
        repeats=2,
        caption_prefix="best",
        shuffle_caption=True,
        tag_dropout=0.5,
        keep_tokens=2,
    )
    one, other = list_image_folders(data)
    assert (one.repeats, one.tags.caption_prefix, one.tags.tag_dropout) == (3, "", 0.0)
    assert (one.tags.keep_tokens, one.tags.shuffle_caption) == (2, True)
    assert (other.repeats, other.tags.caption_prefix, other.tags.keep_tokens) == (2, "best", 0)
    assert from_table(to_table(replace(config, data=data))) == replace(config, data=data)


def test_each_epoch_has_each_image_as_often_as_its_subset_says(
    config: Config, folders: Path
) -> None:
    config = with_subsets(
        config, Subset(str(folders / "two"), repeats=3), Subset(str(folders / "three"))
    )
    data = setup.open_data(config)
    order = StepOrder(data.training, None, batch=3, seed=0)
    seen: Counter[str] = Counter()
    for step in range(3):  # 2 x 3 + 3 images
        seen.update(data.training.records[v.record].path.parent.name for v in order.visits(step))
    assert seen == {"two": 6, "three": 3}
    found = training_images.open_training_images(config)
    assert found.listing is not None and found.listing.root == folders
    masks = "masks that are not asked for (--data.masks file)"
    assert found.unused.keys() == {masks} and len(found.unused[masks]) == 5


@pytest.mark.parametrize(
    ("others", "expected"), [(3, [1, 1, 1]), (7, [1] * 7), (16, [3, 3] + [2] * 5)]
)
def test_class_images_are_as_many_as_the_others(
    config: Config, folders: Path, others: int, expected: list[int]
) -> None:
    """kohya: in their order, once each until there are as many; then once more each."""
    config = with_subsets(
        config,
        Subset(str(folders / "three")),
        Subset(str(folders / "reg"), prior=True, captions="one", caption="a thing"),
    )
    records = training_images.open_training_images(config).records
    own = [r for r in records if not r.is_prior][:1] * others
    prior = list({r.path: r for r in _scanned(config, 1)}.values())
    counts = Counter(r.path.name for r in balance_class_images(own + prior) if r.is_prior)
    assert [counts[f"r{i}.png"] for i in range(7) if counts[f"r{i}.png"]] == expected


def _scanned(config: Config, number: int) -> list[Any]:
    from lora_core.data.image_checks import ImageChecks

    return training_images._scan_one(config, list_image_folders(config.data)[number], ImageChecks())


def test_class_images_among_the_others_are_weighted_as_in_kohyas_mean(
    config: Config, folders: Path, quick: None
) -> None:
    """The loss of a step is the mean over its images, class images times the weight: with weight 0
    they train nothing, and a batch of theirs alone leaves the adapters as they were."""
    reg = Subset(str(folders / "reg"), prior=True, captions="one", caption="a thing")
    config = with_subsets(config, Subset(str(folders / "two")), reg)
    config = replace(config, stages=(Stage(steps=4),), batch_size=1)
    runs = []
    for weight in (1.0, 0.5):
        run = train.train(
            replace(config, prior=PriorConfig(weight=weight), out=f"{config.out}{weight}")
        )
        runs.append(final(run))
    assert not same(*runs)
    order = StepOrder(setup.open_data(config).training, None, batch=1, seed=config.seed)
    records = setup.open_data(config).training.records
    kinds = [records[order.visits(step)[0].record].is_prior for step in range(4)]
    assert sorted(kinds) == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.images": "x"}, "is the only source of images"),
        ({"data.dataset": "x"}, "is the only source of images"),
        ({"prior.prompt": "a dog"}, "a subset with prior = true has some already"),
    ],
)
def test_subsets_that_contradict_other_options_are_refused(
    config: Config, folders: Path, options: dict[str, Any], message: str
) -> None:
    from tests.test_configs import put

    config = with_subsets(
        config, Subset(str(folders / "two")), Subset(str(folders / "reg"), prior=True)
    )
    check_config(config)
    with pytest.raises(UserError, match=message):
        check_config(put(config, options))
    with pytest.raises(UserError, match=r"data.subsets.0 has no images"):
        check_config(with_subsets(config, Subset()))
    with pytest.raises(UserError, match=r"all of the .* have class images"):
        check_config(with_subsets(config, Subset(str(folders / "reg"), prior=True)))
    with pytest.raises(UserError, match=r"keep-tokens has no effect without --data.shuf"):
        check_config(with_subsets(config, Subset(str(folders / "two")), keep_tokens=1))


def test_a_subset_that_is_not_read_is_an_error(
    config: Config, folders: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_subsets(config, Subset(str(folders / "two")), Subset(str(folders / "three")))
    whole = training_images.list_image_folders
    monkeypatch.setattr(training_images, "list_image_folders", lambda *a: whole(*a)[:1])
    with pytest.raises(UserError, match=r"^--data.subsets .* had no effect"):
        train.train(config)


def test_a_run_with_shuffled_captions_has_the_bits_of_any_batch_and_cache(
    config: Config, folders: Path, quick: None
) -> None:
    """No text trains, so captions are encoded once each: never those of another visit."""
    subset = Subset(str(folders / "three"))
    config = with_subsets(config, subset, shuffle_caption=True, cache=str(folders / "cache"))
    config = replace(config, stages=(Stage(steps=3),))
    whole = train.train(config)
    again = train.train(replace(config, out=f"{config.out}-again"))  # from the disk
    assert same(final(whole), final(again))
    parts = replace(config, batch_size=1, accumulation=2, out=f"{config.out}-parts")
    losses = [[row["loss"] for row in rows(run)] for run in (whole, train.train(parts))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
