"""Captions: from text files, tables and file names that somebody wrote; what is none is refused."""

import hashlib
import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from lora_core.data.captions import looks_like_caption
from lora_core.data.dataset import ImageDataset, ImageSettings
from lora_core.data.records import scan_folder
from lora_core.errors import UserError
from tests.image_examples import noise_image, save_gray_square, save_image

UNWRITTEN = [
    "IMG_4711", "IMG_E4711", "img_4711 (2)", "IMG-20240501-WA0001", "IMG_20240501_123456_HDR",
    "DSC0001", "DSC_0001", "DSCF1234", "_MG_1234",
    "P1010023", "100_0001", "SANY0007", "GOPR0001", "DJI_0001", "PXL_20240501_123456789",
    "MVIMG_20181212", "20240501_123456", "2024-05-01",
    "5 May 2024", "WhatsApp Image 2024-05-01 at 12", "FB_IMG_1589", "signal-2024-05-01-123456_002",
    "received_1234", "Snapchat-123456",
    "Screenshot 2024-05-01", "Screenshot_20240501_Chrome", "Screen Shot 2024-05-01 at 3",
    "Bildschirmfoto 2024-05-01 um 12",
    "Capture d’écran 2024-05-01", "微信图片_20240501", "photo (3)", "image0", "image (1) copy",
    "Photo on 5-6-24 at 3", "download (2)", "unnamed",
    "untitled", "00001-1234567", "ComfyUI_00001_", "tumblr_n4kd92jd1o1",
    "550e8400-e29b-41d4-a716-446655440000",
    "d41d8cd98f00b204e9800998ecf8427e", "a8f3kd92", "000123", "x", "", "写真 3",
]  # fmt: skip
WRITTEN = [
    "a photo of TOK", "TOK", "dog", "dog_01", "dog 001", "sks dog", "a dog (2)",
    "cat-sitting-on-mat", "image of Paris", "photo of a cat",
    "Sam in the garden", "signal tower", "screenshot of a game", "screen door", "R2D2 robot",
    "René", "Rene\u0301", "кошка", "犬", "मेरा कुत्ता",
]  # fmt: skip


@pytest.mark.parametrize("name", UNWRITTEN)
def test_names_of_cameras_and_programs_are_no_captions(name: str) -> None:
    assert not looks_like_caption(name)


@pytest.mark.parametrize("name", WRITTEN)
def test_words_are_captions(name: str) -> None:
    assert looks_like_caption(name)


def test_text_files_may_hold_several_captions(image_folder):
    (image_folder / "1.txt").write_text("a TOK\n\n  the TOK  \n")
    records = scan_folder(image_folder)
    assert [r.path.name for r in records] == [f"{i}.png" for i in range(5)]
    assert records[1].captions == ("a TOK", "the TOK") and records[2].captions == (
        "a photo of TOK 2",
    )
    drawn = [
        ImageDataset(records, ImageSettings(8)).example(1, visit).caption for visit in range(40)
    ]
    assert set(drawn) == {"a TOK", "the TOK"}


def test_a_metadata_table_pairs_files_with_their_own_text_whatever_its_order(image_folder):
    save_image(noise_image(8, 8, 9), image_folder / "more" / "x.png")
    rows = [{"file_name": f"{i}.png", "text": f"row {i}"} for i in (3, 0, 4, 2, 1)]
    rows += [{"file_name": "more/x.png", "text": ["one", "two"]}]
    (image_folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    found = {
        r.path.relative_to(image_folder).as_posix(): r.captions for r in scan_folder(image_folder)
    }
    assert found == {**{f"{i}.png": (f"row {i}",) for i in range(5)}, "more/x.png": ("one", "two")}


def test_captions_in_file_names_one_for_all_and_templates(tmp_path):
    save_image(noise_image(8, 8), tmp_path / "a photo of TOK.src.jpg")
    assert (
        scan_folder(tmp_path)[0].captions
        == scan_folder(tmp_path, captions="filename")[0].captions
        == ("a photo of TOK",)
    )
    assert (
        scan_folder(tmp_path, caption="the TOK")[0].captions
        == scan_folder(tmp_path, captions="one", caption="the TOK")[0].captions
        == ("the TOK",)
    )
    for kind in ("object", "style"):
        captions = scan_folder(tmp_path, captions=kind, caption="TOK")[0].captions
        assert all(c.split().count("TOK") == 1 and "{" not in c for c in captions)
        assert all(c.endswith(" in the style of TOK") for c in captions) == (kind == "style")


@pytest.mark.parametrize(
    ("kind", "count", "different", "digest"),
    [("object", 27, 27, "5995bccf7defdb77"), ("style", 19, 17, "1bd6a744a586167e")],
)
def test_templates_are_those_of_lora_pti(tmp_path, kind, count, different, digest):
    """The digest is that of the sorted list in lora_diffusion/dataset.py of cloneofsimo/lora."""
    save_image(noise_image(8, 8), tmp_path / "1.png")
    captions = scan_folder(tmp_path, captions=kind, caption="{}")[0].captions
    assert (len(captions), len(set(captions))) == (count, different)
    assert hashlib.sha256("\n".join(sorted(captions)).encode()).hexdigest()[:16] == digest


def test_a_named_column_and_a_csv_table(image_folder):
    rows = [
        {"file_name": f"{i}.png", "text": f"row {i}", "tags": [f"tag {i}", "zwei\u2028drei"]}
        for i in range(5)
    ]
    (image_folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert [r.captions for r in scan_folder(image_folder, caption_column="tags")] == [
        (f"tag {i}", "zwei\u2028drei") for i in range(5)
    ]
    with pytest.raises(
        UserError,
        match="line 1 has the columns file_name, text, tags; expected the caption under 'label'",
    ):
        scan_folder(image_folder, caption_column="label")
    (image_folder / "metadata.csv").write_text(
        '\ufefffile_name,text,note\r\n4.png,"a, ""quoted""\r\ntext",x\r\n', encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"both metadata\.jsonl and metadata\.csv; keep one"):
        scan_folder(image_folder)
    (image_folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"4 of 5 images lack a row in metadata\.csv"):
        scan_folder(image_folder)
    with open(image_folder / "metadata.csv", "a") as table:
        table.write("".join(f"{i}.png,row {i},note {i}\n" for i in range(4)))
    assert [r.captions for r in scan_folder(image_folder)] == [
        *((f"row {i}",) for i in range(4)),
        ('a, "quoted"\ntext',),
    ]
    assert scan_folder(image_folder, caption_column="note")[4].captions == ("x",)
    for bad, match in (
        ("0.png\n", "line 2 has the text None"),
        ('0.png,"a', r"metadata\.csv is not CSV \(unexpected end"),
        (",a", "names , which is not"),
        ("9.png,a", "names 9"),
    ):
        (image_folder / "metadata.csv").write_text("file_name,text\n" + bad)
        with pytest.raises(UserError, match=match):
            scan_folder(image_folder)
    (image_folder / "metadata.csv").unlink()
    with pytest.raises(
        UserError, match=r"images has \.txt captions, so --data\.caption-column is not used"
    ):
        scan_folder(image_folder, caption_column="note")


@pytest.mark.parametrize(
    "table, match",
    [
        ("{not json}", "line 1 is not JSON"),
        ('{"text": "a"}', 'no "file_name"'),
        ('{"file_name": "0.png", "label": "a"}', "columns file_name, label"),
        ('{"file_name": "0.png", "text": ""}', "the text ''"),
        ('{"file_name": "gone.png", "text": "a"}', "names gone.png"),
        ('{"file_name": "0.png", "text": "a"}', "4 of 5 images lack a row"),
    ],
)
def test_a_bad_metadata_table_is_refused(image_folder, table, match):
    (image_folder / "metadata.jsonl").write_text(table)
    with pytest.raises(UserError, match=match):
        scan_folder(image_folder)


def test_missing_or_useless_captions_are_refused(image_folder):
    with pytest.raises(UserError, match=r"has \.txt captions, so --data\.caption is not used"):
        scan_folder(image_folder, caption="a TOK")
    for mode in ("one", "object", "style"):
        with pytest.raises(UserError, match="need the caption"):
            scan_folder(image_folder, captions=mode)
    with pytest.raises(UserError, match=r"metadata\.jsonl, which is missing"):
        scan_folder(image_folder, captions="metadata")
    with pytest.raises(UserError, match="unknown caption mode 'tags'"):
        scan_folder(image_folder, captions="tags")
    (image_folder / "3.txt").write_text("  \n")
    (image_folder / "4.txt").unlink()
    with pytest.raises(UserError, match=r"2 of 5 images lack a \.txt .*3\.png"):
        scan_folder(image_folder)
    (image_folder / "4.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        scan_folder(image_folder)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"file_name": "' + "a" * 5000 + '.png", "text": "x"}', "which is not an image"),
        ("[" * 100_000, "line 1 is JSON in too many brackets"),
        ('{"image": "a.png", "text": "x"}', 'no "file_name", but image, text'),
        ('{"file_name": "a.png", "text": "x \\ud83d TOK"}', r"half a character: 'x \\ud83d TOK'"),
        ('{"file_name": "a.png", "text": ["x", "TOK\\u0000"]}', r"zero byte .*'TOK\\x00'"),
    ],
    ids=["long name", "brackets", "columns", "half a character", "zero byte"],
)
def test_what_no_table_can_hold_is_named(tmp_path: Path, row: str, sentence: str) -> None:
    save_gray_square(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(row)
    with pytest.raises(UserError, match=sentence):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "{outside}/private.png",
        "../outside/private.png",
        "sub/../../outside/private.png",
        "./../outside/private.png",
        "linked/private.png",
        "sub/linked/private.png",
        "..",
        "../photos/../outside/private.png",
        unicodedata.normalize("NFD", "lié/private.png"),
        unicodedata.normalize("NFD", "lié/../é.png"),
    ],
)
@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_a_table_names_files_in_its_folder_only(tmp_path: Path, name: str, table: str) -> None:
    outside, photos = tmp_path / "outside", tmp_path / "photos"
    save_gray_square(outside / "private.png")
    save_gray_square(photos / "sub" / "own.png")
    for link in ("linked", unicodedata.normalize("NFC", "lié")):
        (photos / link).symlink_to(outside)
    save_gray_square(tmp_path / unicodedata.normalize("NFC", "é.png"))
    (photos / "sub" / "linked").symlink_to(outside)
    name = name.format(outside=outside)
    text = f"file_name,text\n{name},a face\n"
    if table.endswith("jsonl"):
        text = json.dumps({"file_name": name, "text": "a face"}) + "\n"
    (photos / table).write_text(text)
    with pytest.raises(UserError, match="which is not an image in"):
        scan_folder(photos)


@pytest.mark.parametrize(
    "name", ["own.png", "./own.png", "sub/../own.png", "sub/own2.png", "{photos}/own.png", "li.png"]
)
def test_a_table_names_files_of_its_folder_in_any_way(tmp_path: Path, name: str) -> None:
    """A link to one file is the user's own, or that of the hub's cache."""
    photos = tmp_path / "photos"
    save_gray_square(photos / "own.png")
    save_gray_square(photos / "sub" / "own2.png", 3)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "blob.png")
    (photos / "li.png").symlink_to(tmp_path / "blob.png")
    row = {"file_name": name.format(photos=photos), "text": "a face"}
    (photos / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    captions = {r.path.name: r.captions for r in scan_folder(photos, caption="others")}
    assert captions[Path(name).name] == ("a face",)


def test_images_without_captions_are_told_what_to_give(image_folder: Path) -> None:
    for path in image_folder.glob("*.txt"):
        path.unlink()
    said = (
        r"5 of 5 images in .*images have no caption, first 0\.png; "
        r'give --data\.caption "a photo of TOK", or write 0\.txt$'
    )
    with pytest.raises(UserError, match=said):
        scan_folder(image_folder)
