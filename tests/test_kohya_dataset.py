"""kohya's dataset files: the values that subsets inherit, and the batches of an epoch."""

from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import UserError
from lora_core.settings import ImageSettings
from tests.conftest import save_photos
from tests.image_examples import noise_image
from training.translation.kohya_data import translate_data
from training.translation.kohya_dataset import ForeignData, read_datasets
from training.translation.kohya_options import KOHYA_DEFAULTS
from training.translation.kohya_steps import count_batches, translate_length
from training.translation.translated_options import TranslatedOptions


def kohya_options(**given: Any) -> TranslatedOptions:
    return TranslatedOptions("kohya", KOHYA_DEFAULTS, given)


def read(path: Path, text: str, **given: Any) -> tuple[TranslatedOptions, ForeignData]:
    path.write_text(text)
    options = kohya_options(dataset_config=str(path), **given)
    return options, read_datasets(options, path)


# The example of docs/config_README-en.md, without its data set of another resolution.
EXAMPLE = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'
  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3
  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  keep_tokens = 1
"""


def test_the_guides_example_is_inherited_as_the_guide_says(tmp_path: Path) -> None:
    options, data = read(tmp_path / "d.toml", EXAMPLE)
    assert [subset["keep_tokens"] for subset in data.subsets] == [2, 3, 1]
    assert [subset.values["keep_tokens"].place for subset in data.subsets] == [
        "datasets.0.",
        "datasets.0.subsets.1.",
        "datasets.0.subsets.2.",
    ]
    assert all(subset["batch_size"] == 4 and subset["num_repeats"] == 1 for subset in data.subsets)
    translate_data(options, data)
    assert data.record is not None
    data.record.check_complete()
    ours = data.record.options
    assert ours["data.subsets.0.keep_tokens"] == 2 and ours["data.subsets.2.prior"] is True
    assert ours["data.shuffle_caption"] is True and ours["data.resolution"] == 512
    assert ours["data.subsets.1.caption"] == "fuga boy"
    entry = next(e for e in data.record.entries if e.name == "general.keep_tokens")
    assert entry.outcome == "ignored" and "every subset" in entry.remark
    assert options.options["data.caption_lines"] == "first"


def test_options_of_the_command_line_hold_where_the_file_has_none(tmp_path: Path) -> None:
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nflip_aug = false\n"
    given = {"resolution": "64,64", "train_batch_size": 3, "dataset_repeats": 5, "flip_aug": True}
    options, data = read(tmp_path / "d.toml", text, **given)
    (subset,) = data.subsets
    assert (subset["resolution"], subset["batch_size"], subset["num_repeats"]) == ("64,64", 3, 5)
    assert subset["flip_aug"] is False and subset["caption_extension"] == ".caption"
    translate_data(options, data)
    assert data.record is not None
    ours = options.options | data.record.options
    assert ours["batch_size"] == 3 and ours["data.repeats"] == 5 and ours["data.resolution"] == 64
    assert ours["data.caption_extension"] == ".caption" and ours["data.images"] == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[general]\nkeep_token = 1\n[[datasets]]\n",
            r"general\.keep_token .*general\.keep_tokens",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nbatch_size = 1\n", "no option there"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1\n", "image_dir is missing"),
        ("[general]\n", "has no .*subsets"),
        ("[model]\nx = 1\n", "has model; expected"),
        (
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\n"
            "[[datasets]]\nresolution = 96\n[[datasets.subsets]]\nimage_dir = 'b'\n",
            "resolution differs between the data sets",
        ),
        (
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\n"
            "[[datasets.subsets]]\nimage_dir = 'b'\nflip_aug = true\n",
            "flip_aug differs between the subsets",
        ),
        (
            "[[datasets]]\nresolution = [64, 96]\n[[datasets.subsets]]\nimage_dir = 'a'\n",
            "64 x 96, and images are cut to squares",
        ),
        (
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\n"
            "metadata_file = 'm.json'\n",
            "metadata_file of kohya is not read",
        ),
    ],
)
def test_what_one_run_cannot_have_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        translate_data(*read(tmp_path / "d.toml", text))


@pytest.mark.parametrize(
    ("caption", "taken"),
    [
        ("a photo of garp", set()),
        ("garp, in town", {"shuffle_caption", "tag_dropout"}),
        ("garp, in town, {red|blue}", {"tag_dropout", "keep_tokens", "wildcards"}),
        ("x ||| a, b", {"shuffle_caption", "tag_dropout", "keep_tokens_separator"}),
    ],
)
def test_options_that_change_no_caption_are_left_out(
    tmp_path: Path, caption: str, taken: set[str]
) -> None:
    """A run of ours refuses what does nothing; kohya's files often shuffle whole sentences."""
    save_photos(tmp_path / "a", caption, count=2)
    text = f"[[datasets]]\nresolution = 16\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
    given: dict[str, Any] = {
        "shuffle_caption": True,
        "keep_tokens": 2,
        "caption_tag_dropout_rate": 1e-4,
    }
    given |= {"enable_wildcard": True, "caption_extension": ".txt", "keep_tokens_separator": "|||"}
    if "," in caption and "{" not in caption:
        given["keep_tokens"] = 0
    options, data = read(tmp_path / "d.toml", text, **given)
    translate_data(options, data)
    names = {"shuffle_caption", "tag_dropout", "keep_tokens", "wildcards", "keep_tokens_separator"}
    found = {name.removeprefix("data.") for name in options.options}
    assert found & names == taken
    if not taken:
        idle = [entry for entry in options.entries if entry.outcome == "ignored"]
        assert (
            "no caption changes by it"
            in {entry.name: entry.remark for entry in idle}["shuffle_caption"]
        )


def test_a_folder_that_stands_twice_is_read_once(tmp_path: Path) -> None:
    text = "[[datasets]]\nresolution = 64\n" + "[[datasets.subsets]]\nimage_dir = 'a'\n" * 2
    options, data = read(tmp_path / "d.toml", text)
    assert len(data.subsets) == 1
    translate_data(options, data)
    assert data.record is not None and "already" in data.record.entries[-1].remark


def test_folders_with_numbers_are_subsets(tmp_path: Path) -> None:
    for name in ("data/3_TOK cat", "data/1_dog", "data/notes", "reg/2_animal"):
        (tmp_path / name).mkdir(parents=True)
    given = {"train_data_dir": str(tmp_path / "data"), "reg_data_dir": str(tmp_path / "reg")}
    options = kohya_options(**given, resolution=64)
    data = read_datasets(options, None)
    found = [(s["num_repeats"], s["class_tokens"], s["is_reg"]) for s in data.subsets]
    assert found == [(1, "dog", False), (3, "TOK cat", False), (2, "animal", True)]
    translate_data(options, data)
    ours = options.options
    assert ours["data.subsets.1.repeats"] == 3 and ours["data.subsets.2.prior"] is True
    with pytest.raises(UserError, match="has no folders N_name"):
        read_datasets(kohya_options(train_data_dir=str(tmp_path / "reg" / "2_animal")), None)


def test_an_epoch_has_the_batches_that_kohya_counts(tmp_path: Path) -> None:
    """Each bucket's images by themselves, its last batch with fewer; class images as many."""
    (tmp_path / "a").mkdir()
    for i in range(5):
        side = 24 if i < 3 else 48
        noise_image(24, side, i).save(tmp_path / "a" / f"{i}.png")
    save_photos(tmp_path / "r", count=1)
    text = (
        f"[[datasets]]\nresolution = 24\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
        "num_repeats = 3\n"
    )
    square = ImageSettings(24)
    _, data = read(tmp_path / "d.toml", text)
    assert count_batches(data.subsets, square, 4) == 4  # ceil(15 / 4)
    buckets = ImageSettings(24, buckets=True, bucket_step=8)
    assert count_batches(data.subsets, buckets, 4) == 5  # ceil(9 / 4) + ceil(6 / 4)
    reg = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'r'}'\nis_reg = true\n"
    _, data = read(tmp_path / "d.toml", text + reg)
    assert count_batches(data.subsets, square, 4) == 8  # ceil(30 / 4)
    (tmp_path / "empty").mkdir()
    _, data = read(tmp_path / "d.toml", text.replace("/a'", "/empty'"))
    with pytest.raises(UserError, match="no images in"):
        count_batches(data.subsets, square, 4)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 1600),
        ({"max_train_steps": 7}, 7),
        ({"max_train_epochs": 3}, 30),
        ({"max_train_epochs": 3, "max_train_steps": 7}, 30),
        ({"max_train_epochs": 3, "gradient_accumulation_steps": 4}, 9),  # 3 x ceil(10 / 4)
    ],
)
def test_epochs_are_steps_as_kohya_rounds_them(given: dict[str, int], steps: int) -> None:
    options = kohya_options(**given)
    assert translate_length(options, 10)[0] == steps
    assert translate_length(kohya_options(max_train_epochs=3), 10, processes=4) == (9, 3)
    assert options.options["stages.0.steps"] == steps
    options.check_complete()
