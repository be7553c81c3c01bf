"""Records of a folder: tables, captions without the word, folders without images, useless masks."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_core.data.dataset import ImageDataset, ImageSettings
from lora_core.data.records import describe_unread_folder_names, images_missing_word, scan_folder
from lora_core.errors import UserError
from tests.image_examples import noise_image, save_gray_square, save_image, save_kohya_folders


def test_captions_without_the_word_are_listed_once_each(image_folder):
    (image_folder / "2.txt").write_text("a photo of TOK2")
    (image_folder / "4.txt").write_text("TOK\nsomething else")
    assert images_missing_word(scan_folder(image_folder, repeats=3), "TOK") == [
        image_folder / "2.png",
        image_folder / "4.png",
    ]
    assert images_missing_word(scan_folder(image_folder), "TOK2") == [
        image_folder / f"{i}.png" for i in (0, 1, 3, 4)
    ]


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone does not exist"):
        scan_folder(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="no images in"):
        scan_folder(tmp_path)
    with pytest.raises(UserError, match="no images"):
        ImageDataset([], ImageSettings(8))


def test_masks_that_cannot_work_are_refused(tmp_path):
    save_image(noise_image(8, 10), tmp_path / "x.png")
    for mask, match in (
        (noise_image(10, 8, 1, "L"), r"x\.mask\.png is 10x8, its image 8x10"),
        (Image.new("L", (8, 10), 255), r"x\.mask\.png is only ones"),
        (Image.new("1", (8, 10), 0), r"x\.mask\.png is only zeros"),
        (Image.new("L", (8, 10), 128), r"one grey, 128"),
    ):
        save_image(mask, tmp_path / "x.mask.png")
        with pytest.raises(UserError, match=match):
            scan_folder(tmp_path, caption="TOK")
    save_image(noise_image(8, 10, 1, "L"), tmp_path / "x.mask.png")
    save_image(noise_image(8, 10, 1, "L"), tmp_path / "other.mask.png")
    with pytest.raises(UserError, match=r"other\.mask\.png belongs to no image"):
        scan_folder(tmp_path, caption="TOK")
    opaque = noise_image(8, 10).convert("RGBA")
    save_image(opaque, tmp_path / "x.png")
    with pytest.raises(UserError, match=r"alpha channel of .*x\.png is only ones"):
        scan_folder(tmp_path, caption="TOK", masks="alpha")


def test_names_of_kohyas_folders_that_no_image_takes_are_said(tmp_path: Path) -> None:
    save_kohya_folders(tmp_path)
    root = tmp_path
    assert describe_unread_folder_names(root, scan_folder(root)) == ""
    said = describe_unread_folder_names(root, scan_folder(root, captions="one", caption="x"))
    assert said.startswith("folder names are no captions here") and " of " in said


@pytest.mark.parametrize(
    "name", ["a.mask.png", "a.mask.PNG", "a-masklabel.jpg", "below/b_mask.png", "a.Mask.webp"]
)
def test_a_table_that_names_a_mask_as_an_image_is_refused(tmp_path: Path, name: str) -> None:
    for image in ("a.png", "below/b.png", name):
        save_gray_square(tmp_path / image)
    rows = [{"file_name": image, "text": "x"} for image in ("a.png", "below/b.png", name)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="is a mask and not an image; take its row out"):
        scan_folder(tmp_path)


@pytest.mark.parametrize("written", ["a.png", "./a.png", "below/../a.png", "ROOT/a.png"])
def test_a_table_may_write_a_path_in_several_ways(
    tmp_path: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gray_square(tmp_path / "photos" / "a.png")
    save_gray_square(tmp_path / "photos" / "below" / "b.png")
    row = {"file_name": written.replace("ROOT", str(tmp_path / "photos")), "text": "x"}
    (tmp_path / "photos" / "metadata.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    assert [r.path for r in scan_folder("photos")] == [Path("photos/a.png")]
