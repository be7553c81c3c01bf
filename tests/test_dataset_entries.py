"""Entries about the images of a run: folders, repeats, tags, buckets, steps of an epoch."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_core.config import Config, DataConfig
from lora_core.data.dataset import ImageDataset, scan_folder
from lora_core.data.step_visits import StepOrder
from lora_core.settings import CaptionSettings
from tests.image_examples import noise_image, save_image
from tests.test_configs import put
from training.headers.dataset_entries import dataset_entries, steps_per_epoch


def save_folder(folder: Path, captions: list[str], size: tuple[int, int] = (16, 16)) -> None:
    for i, caption in enumerate(captions):
        save_image(noise_image(*size, seed=i), folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption)


def open_folder(config: Config, folder: Path, *, is_prior: bool = False) -> ImageDataset:
    return ImageDataset(scan_folder(folder, is_prior=is_prior), config.data)


def entries_of(config: Config, training: ImageDataset, prior: Any = None) -> dict[str, Any]:
    data: Any = SimpleNamespace(training=training, class_images=prior)
    return dataset_entries(config, data, (), "run", "the trigger")


def test_folders_are_counted_as_kohya_counts_them(tmp_path: Path) -> None:
    """set_tag_frequency of sd-scripts: each image once, whatever its repeats; tags between commas,
    stripped, in lower case; an image without a text has the folder's words.
    """
    config = Config(data=DataConfig(resolution=16))
    save_folder(tmp_path / "in" / "3_anna of paris", ["SKS,  red ,", "sks, Blue", ""])
    save_folder(tmp_path / "in" / "1_cat", ["cat", "cat"])
    save_folder(tmp_path / "class", ["a dog"] * 4)
    training = open_folder(config, tmp_path / "in")
    found = entries_of(config, training, open_folder(config, tmp_path / "class", is_prior=True))
    assert json.loads(found["ss_tag_frequency"]) == {
        "images": {"cat": 2},
        "images (2)": {"sks": 2, "red": 1, "blue": 1, "anna of paris": 1},
        "class images": {"a dog": 4},
    }
    assert json.loads(found["ss_dataset_dirs"]) == {
        "images": {"n_repeats": 1, "img_count": 2},
        "images (2)": {"n_repeats": 3, "img_count": 3},
    }
    assert json.loads(found["ss_reg_dataset_dirs"]) == {
        "class images": {"n_repeats": 1, "img_count": 4}
    }
    assert (found["ss_num_train_images"], found["ss_num_reg_images"]) == (11, 4)
    (dataset,) = json.loads(found["ss_datasets"])
    subsets = dataset["subsets"]
    assert [own["class_tokens"] for own in subsets] == ["cat", "the trigger", "a dog"]
    assert [own["is_reg"] for own in subsets] == [False, False, True]
    shown = {**found, "ss_tag_frequency": "", "ss_datasets": ""}
    assert "anna" not in str(shown)  # names of folders are nobody's business
    hidden = entries_of(put(config, {"files.header": "no_captions"}), training)
    assert "sks" not in str(hidden) and "cat" not in str(hidden)


def test_buckets_are_counted_with_repeats(tmp_path: Path) -> None:
    """kohya's reader shows width x height; its error is the mean over images without repeats."""
    data = DataConfig(resolution=16, buckets=True, bucket_step=4, repeats=2)
    config = Config(data=data, batch_size=2)
    save_folder(tmp_path / "in", ["a", "b"], (16, 16))
    for i in range(3):
        save_image(noise_image(12, 24, seed=i), tmp_path / "in" / f"wide{i}.png")
        (tmp_path / "in" / f"wide{i}.txt").write_text("c")
    training = ImageDataset(scan_folder(tmp_path / "in", repeats=2), data)
    found = json.loads(entries_of(config, training)["ss_bucket_info"])
    counts = {tuple(own["resolution"]): own["count"] for own in found["buckets"].values()}
    expected = Counter((w, h) for h, w in training.sizes)
    assert counts == expected and sum(counts.values()) == 10
    ratios = [abs(w / h - r.size[1] / r.size[0]) for (h, w), r in _unique(training)]
    assert math.isclose(found["mean_img_ar_error"], sum(ratios) / 5)
    square = entries_of(replace(config, data=replace(data, buckets=False)), training)
    assert square["ss_bucket_info"] == "null" and square["ss_min_bucket_reso"] is None


def _unique(training: ImageDataset) -> list[tuple[tuple[int, int], Any]]:
    pairs = zip(training.sizes, training.records, strict=True)
    return list({record.path: (size, record) for size, record in pairs}.values())


def test_an_epoch_visits_every_image(tmp_path: Path) -> None:
    """The steps of an epoch are those in which the order of the run has seen all images."""
    save_folder(tmp_path / "in", ["a"] * 5, (16, 16))
    save_image(noise_image(12, 24, seed=9), tmp_path / "in" / "wide.png")
    (tmp_path / "in" / "wide.txt").write_text("c")
    for buckets in (False, True):
        data = DataConfig(resolution=16, buckets=buckets, bucket_step=4)
        config = Config(data=data, batch_size=2)
        training = ImageDataset(scan_folder(tmp_path / "in"), data)
        steps = steps_per_epoch(config, training)
        order = StepOrder(training, None, batch=2, seed=0)
        seen: set[int] = set()
        for step in range(math.ceil(steps)):
            seen |= {visit.record for visit in order.visits(step)}
        assert len(seen) == 6 and steps == (4 if buckets else 3)


def test_folders_of_one_run_have_their_own_captions_and_class_images(tmp_path: Path) -> None:
    """Class images that take turns with the others are counted apart."""
    config = Config(data=DataConfig(resolution=16))
    save_folder(tmp_path / "a", ["sks, b"] * 2)
    save_folder(tmp_path / "b", ["dog"] * 3)
    shuffled = CaptionSettings(shuffle_caption=True, keep_tokens=1, caption_prefix="x")
    records = scan_folder(tmp_path / "a", tags=shuffled, repeats=2)
    records += scan_folder(tmp_path / "b", is_prior=True)
    found = entries_of(config, ImageDataset(records, config.data))
    assert (found["ss_num_train_images"], found["ss_num_reg_images"]) == (4, 3)
    assert (found["ss_shuffle_caption"], found["ss_keep_tokens"]) == (True, 1)
    (dataset,) = json.loads(found["ss_datasets"])
    keys = ("is_reg", "num_repeats", "shuffle_caption", "keep_tokens", "caption_prefix")
    shown = [[own[key] for key in keys] for own in dataset["subsets"]]
    assert shown == [[False, 2, True, 1, "x"], [True, 1, False, 0, None]]


def test_images_that_are_not_enlarged_have_buckets_of_their_own(tmp_path: Path) -> None:
    data = DataConfig(resolution=32, buckets=True, bucket_step=4, bucket_upscale=False)
    for i, size in enumerate([(8, 12), (12, 8), (8, 12), (64, 64)]):
        save_image(noise_image(*size, seed=i), tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text("a")
    training = ImageDataset(scan_folder(tmp_path / "in"), data)
    entries = entries_of(Config(data=data), training)
    found = json.loads(entries["ss_bucket_info"])["buckets"]
    assert len(found) == 3 and sum(own["count"] for own in found.values()) == 4
    assert entries["ss_bucket_no_upscale"] is True
