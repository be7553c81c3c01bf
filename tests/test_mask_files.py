"""--data.masks clipseg:WORDS: masks are written beside the images, once, and read as files."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import train
from lora_core.config import Config, SegmenterWords
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line
from lora_core.runs.shared_options import shorten_mask_source
from tests.conftest import merged, save_photos
from tests.tiny_clipseg import save_clipseg
from training import setup
from training.inputs import mask_files
from training.inputs.mask_files import PUBLISHED_WEIGHTS, parse_segmenter
from training.shared_config import shared_config


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clipseg(tmp_path_factory.mktemp("masks") / "clipseg")


@pytest.fixture
def masked(config: Config, clipseg: Path, tmp_path: Path) -> Config:
    """Three photos, of which one has a mask, and a segmenter for the others."""
    folder = save_photos(tmp_path / "masked", count=3)
    for i in (0, 2):
        (folder / f"{i}.mask.png").unlink()
    source = SegmenterWords(f"clipseg@{clipseg}:a face")
    return merged(config, {"data": {"images": str(folder), "masks": source}})


def test_a_run_writes_missing_masks_and_reads_them_as_files(
    masked: Config, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(masked.data.images)
    painted = (folder / "1.mask.png").read_bytes()
    train.train(masked)
    said = capsys.readouterr().out
    assert f"masks: 2 written for 'a face', first {folder / '0.mask.png'}; look at them" in said
    assert (folder / "1.mask.png").read_bytes() == painted
    for i in (0, 2):
        mask, image = Image.open(folder / f"{i}.mask.png"), Image.open(folder / f"{i}.png")
        assert mask.mode == "L" and mask.size == image.size and mask.getextrema()[1] > 200
    monkeypatch.setattr(mask_files, "_open_segmenter", None)  # not needed a second time
    again = setup.open_data(masked)
    assert all(record.mask_path is not None for record in again.training.records)
    assert "written" not in capsys.readouterr().out
    files = setup.open_data(merged(masked, {"data": {"masks": "file"}}))
    assert files.training.records == again.training.records


def test_a_corrected_mask_is_another_image_for_resume(masked: Config, quick: None) -> None:
    train.train(masked)
    mask = Image.open(Path(masked.data.images) / "0.mask.png")
    mask.paste(255, (0, 0, 4, 4))
    mask.save(Path(masked.data.images) / "0.mask.png")
    longer = replace(masked, resume=True, stages=(replace(masked.stages[0], steps=3),))
    with pytest.raises(UserError, match=r"the content or the mask of 1 image changed: 0\.png"):
        train.train(longer)


def test_images_without_a_find_are_named_after_the_others_are_written(
    masked: Config, tmp_path: Path
) -> None:
    flat = save_clipseg(tmp_path / "flat", contrast=0.01)
    masked = merged(masked, {"data": {"masks": f"clipseg@{flat}:a cat"}})
    with pytest.raises(
        UserError,
        match=r"nothing like 'a cat' in 2 of 2 images, first .*0\.png; paint 0\.mask\.png",
    ):
        setup.open_data(masked)
    assert not (Path(masked.data.images) / "0.mask.png").exists()


def test_two_images_of_one_name_share_a_mask(masked: Config) -> None:
    folder = Path(masked.data.images)
    Image.open(folder / "0.png").save(folder / "0.jpg")
    data = setup.open_data(masked)
    paths = {record.path.name: record.mask_path for record in data.training.records}
    assert paths["0.png"] == paths["0.jpg"] == folder / "0.mask.png"


def test_a_concept_with_some_masks_gets_the_others_beside_its_images(
    masked: Config, tmp_path: Path
) -> None:
    """In Mix-of-Show's layout, with masks in a folder of their own."""
    folder, given = tmp_path / "concept", Path(masked.data.images)
    for name in ("image", "mask"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        (given / f"{i}.png").rename(folder / "image" / f"{i}.png")
    (given / "1.mask.png").rename(folder / "mask" / "1.png")
    data = {"images": str(folder), "captions": "one", "caption": "a TOK"}
    records = setup.open_data(merged(masked, {"data": data})).training.records
    masks = [
        record.mask_path.relative_to(folder).as_posix() for record in records if record.mask_path
    ]
    assert masks == ["image/0.mask.png", "mask/1.png", "image/2.mask.png"]


def test_missing_weights_are_one_sentence(masked: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: str) -> str:
        raise OSError("offline")

    monkeypatch.setattr("models.components.hf_hub_download", refuse)
    for source, name in (("clipseg:a cat", PUBLISHED_WEIGHTS), ("clipseg@a/b:a cat", "a/b")):
        with pytest.raises(
            UserError,
            match=f"--data.masks: clipseg has no weights: {name} is not a local folder; the hub "
            "gave no config.json for it: offline; or paint",
        ):
            setup.open_data(merged(masked, {"data": {"masks": source}}))


def test_a_source_is_parsed_at_its_first_colon() -> None:
    assert parse_segmenter("file") is None
    assert parse_segmenter("clipseg:a face: happy") == (PUBLISHED_WEIGHTS, "a face: happy")
    assert parse_segmenter("clipseg@models/x: a cat ") == ("models/x", "a cat")
    for wrong in ("files", "clipseg", "clipseg:", "clipseg@:a", "clipsegs:a", "sam:a face", ""):
        with pytest.raises(UserError, match=r'expected none, file, .* "clipseg:a face"'):
            parse_segmenter(wrong)


def test_both_spellings_of_the_flag_are_one_option(config: Config) -> None:
    for flag in ("--data.masks", "--data.mask"):
        words = [flag, "clipseg:a face"]
        found = parse_command_line(Config, words, prog="train.py", example="")
        assert found.data.masks == "clipseg:a face"
    with pytest.raises(UserError, match=r"--data\.masks is 'fill', expected none"):
        train.train(merged(config, {"data": {"masks": "fill"}}))


def test_shared_files_do_not_name_the_folder_of_the_weights(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = SegmenterWords(f"clipseg@{tmp_path / 'clipseg'}:a face")
    shared = shared_config(merged(config, {"data": {"masks": source}}), config.out)
    assert shared.data.masks == "clipseg@~/clipseg:a face"
    for other in ("clipseg:a face", "file", "none"):
        assert shorten_mask_source(other, tmp_path) == other
