"""What each file of a folder is to a training, in the layouts that people and other tools leave."""

import itertools
import json
import os
import unicodedata
from pathlib import Path

import pytest

from lora_core.data import dataset, images
from lora_core.data.dataset import scan_folder
from lora_core.data.listing import folder_for_new_images
from lora_core.errors import UserError
from tests.image_examples import save_gray_square, save_kohya_folders
from training.inputs import class_images

NFC, NFD = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))


def names(folder: Path, **how: object) -> list[str]:
    return [
        r.path.relative_to(folder).as_posix()
        for r in scan_folder(folder, **{"captions": "one", "caption": "x", "masks": "none"} | how)
    ]  # type: ignore[arg-type]


# ---------------------------------------------------------------- masks


MASKS = [
    "a.mask.png", "a.mask.PNG", "a.MASK.jpg", "a.mask.webp", "a-masklabel.png", "a_mask.png",
    "a-mask.jpg", "mask_a.png", "a.png.mask.png",
    "masks/a.png", "mask/a.jpg", "Masks/a-masklabel.png", "a (mask).png", "a-matte.webp",
    "a_seg.png", "a_segmentation.PNG",
]  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_as_many_tools_call_them_are_masks_and_never_images(
    tmp_path: Path, name: str
) -> None:
    save_gray_square(tmp_path / "a.png")
    mask = save_gray_square(tmp_path / name, 20)
    assert names(tmp_path) == ["a.png"]
    assert [
        r.mask_path for r in scan_folder(tmp_path, captions="one", caption="x", masks="file")
    ] == [mask]
    left = dataset.find_unused_files(
        tmp_path, scan_folder(tmp_path, captions="one", caption="x", masks="none")
    )
    assert [(paths, "masks that are not asked for" in why) for why, paths in left.items()] == [
        ([mask], True)
    ]
    assert (
        dataset.find_unused_files(
            tmp_path, scan_folder(tmp_path, captions="one", caption="x", masks="file")
        )
        == {}
    )


@pytest.mark.parametrize(
    "name",
    [
        "venetian_mask.png",
        "a person with a mask.jpg",
        "mask.png",
        "mask_of_wood.png",
        "masks/other.png",
    ],
)
def test_an_image_whose_name_speaks_of_a_mask_stays_an_image(tmp_path: Path, name: str) -> None:
    save_gray_square(tmp_path / "a.png")
    save_gray_square(tmp_path / name)
    own = "/" not in name
    assert names(tmp_path) == sorted(["a.png", name] if own else ["a.png"])
    assert own or list(dataset.find_unused_files(tmp_path, scan_folder(tmp_path, caption="x"))) == [
        "sub-folders"
    ]


def test_cloneofsimos_source_and_mask_belong_together_and_the_nearest_mask_wins(
    tmp_path: Path,
) -> None:
    for i in (0, 1, 10):
        save_gray_square(tmp_path / f"{i}.src.jpg", i)
        save_gray_square(tmp_path / f"{i}.mask.png", i)
    spare = save_gray_square(tmp_path / "masks" / "1.src.png")
    records = scan_folder(tmp_path, caption="x", masks="file")
    assert [r.mask_path.name for r in records if r.mask_path] == [
        "0.mask.png",
        "1.mask.png",
        "10.mask.png",
    ]
    assert dataset.find_unused_files(tmp_path, records) == {"second masks of an image": [spare]}
    save_gray_square(tmp_path / "5-masklabel.png")
    with pytest.raises(UserError, match=r"5-masklabel\.png belongs to no image"):
        scan_folder(tmp_path, caption="x", masks="file")
    assert len(names(tmp_path)) == 3


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "name, content",
    [
        ("IMG_1.caption", "a red TOK"), ("IMG_1.TXT", "a red TOK\r\n"),
        ("IMG_1.Caption", "\ufeffa red TOK"), ("IMG_1.png.txt", "a red TOK"),
        ("IMG_1.json", '{"caption": "a red TOK"}'), ("IMG_1.json",
        '{"prompt": ["a red TOK"], "width": 3}'), ("IMG_1.JSON", '"a red TOK"'),
        ("IMG_1.json", "a red TOK"),
    ],
)  # fmt: skip
def test_files_beside_an_image_are_its_captions(tmp_path: Path, name: str, content: str) -> None:
    save_gray_square(tmp_path / "IMG_1.png")
    (tmp_path / name).write_text(content, encoding="utf-8")
    [record] = scan_folder(tmp_path)
    assert record.captions == ("a red TOK",) and record.source == tmp_path / name
    assert dataset.find_unused_files(tmp_path, [record]) == {}


def test_of_two_kinds_txt_comes_first_and_the_other_is_named(tmp_path: Path) -> None:
    for stem in "ab":
        save_gray_square(tmp_path / f"{stem}.png", ord(stem) - 97)
        (tmp_path / f"{stem}.caption").write_text("from caption")
    (tmp_path / "a.txt").write_text("from txt")
    records = scan_folder(tmp_path)
    assert [r.captions for r in records] == [("from txt",), ("from caption",)]
    assert dataset.find_unused_files(tmp_path, records) == {
        "texts of images that have another caption": [tmp_path / "a.caption"]
    }
    with pytest.raises(UserError, match=r"1 of 2 images lack a \.txt"):
        scan_folder(tmp_path, captions="txt")


def test_json_that_is_no_caption_is_left_out_and_broken_json_refused(tmp_path: Path) -> None:
    save_gray_square(tmp_path / "a red TOK.png")
    for content in ('{"title": "IMG"}', '{"prompt": {"3": {}}}', "[]", ""):
        (tmp_path / "a red TOK.json").write_text(content)
        assert scan_folder(tmp_path)[0].captions == ("a red TOK",)
    (tmp_path / "a red TOK.json").write_text('{"text": "a')
    with pytest.raises(UserError, match="is not JSON"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "IMG_4711.png",
        "PXL_20240501_123456789.png",
        "photo (3).png",
        "d41d8cd98f00b204e9800998ecf8427e.png",
    ],
)
def test_names_that_nobody_wrote_are_captions_only_when_asked_for(
    tmp_path: Path, name: str
) -> None:
    save_gray_square(tmp_path / name)
    save_gray_square(tmp_path / "a red TOK.png", 1)
    (tmp_path / "notes.txt").write_text("bought in May")
    with pytest.raises(
        UserError,
        match=r"1 of 2 images .* have no caption, first .*\(notes\.txt there belongs to no "
        r'image\); give --data\.caption "a photo of TOK", or write .*\.txt$',
    ):
        scan_folder(tmp_path)
    records = scan_folder(tmp_path, captions="filename")
    assert sorted(r.captions[0] for r in records) == sorted(
        ["a red TOK", name.removesuffix(".png")]
    )
    assert dataset.find_unused_files(tmp_path, records) == {
        "texts of no image": [tmp_path / "notes.txt"]
    }
    assert {r.captions for r in scan_folder(tmp_path, caption="a TOK")} == {("a TOK",)}


def test_empty_captions_fall_back_on_the_caption_that_is_given(tmp_path: Path) -> None:
    for i, text in enumerate(["a TOK", " \n", ""]):
        save_gray_square(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text(text)
    save_gray_square(tmp_path / "3.png", 3)
    with pytest.raises(UserError, match="3 of 4 images lack"):
        scan_folder(tmp_path)
    assert [r.captions[0] for r in scan_folder(tmp_path, caption="the TOK")] == [
        "a TOK",
        "the TOK",
        "the TOK",
        "the TOK",
    ]
    rows = [
        {"file_name": "0.png", "text": "row"},
        {"file_name": "1.png", "text": ""},
        {"file_name": "2.png", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text(
        "\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8"
    )
    with pytest.raises(UserError, match="line 2 has the text ''"):
        scan_folder(tmp_path)
    assert [r.captions[0] for r in scan_folder(tmp_path, caption="the TOK")] == [
        "row",
        "the TOK",
        "the TOK",
        "the TOK",
    ]
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "text": "row"}) for i in range(4))
    )
    with pytest.raises(
        UserError, match=r"has captions in metadata\.jsonl, so --data\.caption is not used"
    ):
        scan_folder(tmp_path, caption="the TOK")
    assert len(scan_folder(tmp_path, caption="the TOK", held_out=True)) == 4


# ---------------------------------------------------------------- folders


def test_kohyas_folders_are_read_with_their_repeats_and_names(tmp_path: Path) -> None:
    """As generate_dreambooth_subsets_config_by_subdirs: N repeats, the rest of the name where an
    image has no caption file.
    """
    root = save_kohya_folders(tmp_path / "img")
    save_gray_square(root / "reg" / "1_dog" / "x.png")
    save_gray_square(root / "2024_summer" / "y.png")
    save_gray_square(root / "0_off" / "z.png")
    save_gray_square(root / "20240501_party" / "w.png")
    records = scan_folder(root)
    found = [(r.path.parent.name, r.captions[0]) for r in records]
    assert (
        found
        == [("10_ohwx dog", "ohwx dog"), ("10_ohwx dog", "ohwx dog on grass")] * 10
        + [("3_TOK", "TOK")] * 3
    )
    assert (
        scan_folder(root, repeats=2) == records * 2 and len(scan_folder(root, held_out=True)) == 3
    )
    assert dataset.find_unused_files(root, records) == {
        "sub-folders": [root / "0_off", root / "20240501_party", root / "2024_summer", root / "reg"]
    }
    assert {r.captions for r in scan_folder(root, captions="one", caption="a TOK")} == {("a TOK",)}
    assert [r.captions[0] for r in scan_folder(root, caption="a TOK", held_out=True)] == [
        "a TOK",
        "ohwx dog on grass",
        "a TOK",
    ]
    save_gray_square(root / "own.png")
    assert names(root) == ["own.png"]


def test_class_images_in_kohyas_folders_are_counted_and_added_to_the_first(tmp_path: Path) -> None:
    root = save_kohya_folders(tmp_path / "reg")
    assert folder_for_new_images(root) == (root / "10_ohwx dog", 3)
    assert (
        len(scan_folder(root, captions="one", caption="a dog", masks="none", is_prior=True)) == 23
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert folder_for_new_images(empty) == (empty, 0)
    save_gray_square(empty / "a" / "b.png")
    with pytest.raises(UserError, match=r"1 below .*give the folder .*a itself"):
        folder_for_new_images(empty)


def test_class_images_are_neither_a_file_nor_among_the_training_images(tmp_path: Path) -> None:
    image = save_gray_square(tmp_path / "photos" / "a.png")
    for given, sentence in (
        (image, "is a file"),
        (tmp_path / "photos" / ".." / "photos", "folder of the training images"),
    ):
        with pytest.raises(UserError, match=sentence):
            class_images.check_class_folder(str(given), str(tmp_path / "photos"))
    for given in ("", str(tmp_path / "new")):
        class_images.check_class_folder(given, str(tmp_path / "photos"))


def test_a_train_folder_is_read_and_other_sub_folders_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_gray_square(tmp_path / split / "0.png", len(split))
        (tmp_path / split / "metadata.jsonl").write_text(
            json.dumps({"file_name": "0.png", "text": split})
        )
    records = scan_folder(tmp_path)
    assert [r.captions for r in records] == [("train",)] and dataset.find_unused_files(
        tmp_path, records
    ) == {"sub-folders": [tmp_path / "test"]}
    (tmp_path / "metadata.csv").write_text(
        "\ufefffile_name,text\ntrain/0.png,beside\n", encoding="utf-8"
    )
    records = scan_folder(tmp_path)
    assert [(r.path, r.captions) for r in records] == [(tmp_path / "train" / "0.png", ("beside",))]
    assert dataset.find_unused_files(tmp_path, records) == {"sub-folders": [tmp_path / "test"]}


def test_a_folder_without_images_says_what_it_has_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "pillow_heif", None)
    save_gray_square(tmp_path / "deep" / "er" / "0.png")
    with pytest.raises(
        UserError,
        match=r"no images in .* itself, but 1 below .*deep; give the folder .*deep/er itself",
    ):
        scan_folder(tmp_path)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(
        UserError,
        match=r"no images in .* can be read; 1 file left out, first IMG_1.HEIC: HEIC needs",
    ):
        scan_folder(tmp_path / "phone")
    save_kohya_folders(tmp_path / "project" / "img")
    with pytest.raises(UserError, match=r"give the folder .*project/img itself"):
        scan_folder(tmp_path / "project")


def test_nothing_but_what_systems_leave_is_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "pillow_heif", None)
    save_gray_square(tmp_path / "a.png")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    save_gray_square(tmp_path / ".ipynb_checkpoints" / "a.png")
    assert dataset.find_unused_files(tmp_path, scan_folder(tmp_path, caption="x")) == {}
    for name in (
        "b.heic",
        "c.svg",
        "d.jxl",
        "a.npz",
        "a-condlabel.png",
        ".hidden.png",
        "metadata.csv",
    ):
        if name.endswith(".png"):
            save_gray_square(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b"file_name,text\na.png,t")
    (tmp_path / "e.png").symlink_to(tmp_path / "nowhere.png")
    found = dataset.find_unused_files(tmp_path, scan_folder(tmp_path, captions="one", caption="x"))
    assert found.pop("links to nothing") == [tmp_path / "e.png"]
    every = itertools.chain.from_iterable(found.values())
    assert sorted(path.name for path in every) == sorted(
        ["b.heic", "c.svg", "d.jxl", "a.npz", "a-condlabel.png", ".hidden.png", "metadata.csv"]
    )
    assert [p.name for p in next(paths for why, paths in found.items() if "HEIC" in why)] == [
        "b.heic"
    ]


# ---------------------------------------------------------------- Unicode


@pytest.mark.parametrize(
    "space", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
)
def test_only_newlines_separate_captions(tmp_path: Path, space: str) -> None:
    save_gray_square(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(f"a{space}TOK\rthe TOK\r\n\nmy{space}TOK".encode())
    assert scan_folder(tmp_path)[0].captions == (f"a{space}TOK", "the TOK", f"my{space}TOK")


@pytest.mark.parametrize("disk, table", [(NFC, NFD), (NFD, NFC)])
def test_normal_forms_of_unicode_are_one_name(tmp_path: Path, disk: str, table: str) -> None:
    save_gray_square(tmp_path / f"{disk}.png")
    save_gray_square(tmp_path / f"{table}.mask.png", 3)
    (tmp_path / f"{table}.txt").write_text(f"un {NFD}", encoding="utf-8")
    [record] = scan_folder(tmp_path)
    assert record.captions == (f"un {NFC}",) and record.mask_path == tmp_path / f"{table}.mask.png"
    save_gray_square(tmp_path / disk / f"{disk}.png", 1)
    rows = [{"file_name": name, "text": NFD} for name in (f"{table}.png", f"{table}/{table}.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [r.captions for r in scan_folder(tmp_path)] == [(NFC,)] * 2


def test_names_that_are_no_utf8_are_no_captions_and_can_be_printed(tmp_path: Path) -> None:
    save_gray_square(tmp_path / "b.png")
    os.rename(tmp_path / "b.png", os.fsencode(tmp_path) + b"/caf\xe9 TOK.png")
    for how in ({}, {"captions": "filename"}):
        with pytest.raises(
            UserError, match=r"caf\\xe9 TOK\.png has bytes that are not UTF-8 .*rename"
        ):
            scan_folder(tmp_path, **how)  # type: ignore[arg-type]
    [record] = scan_folder(tmp_path, caption="a TOK")
    assert record.captions == ("a TOK",)
    (tmp_path / "k").mkdir()
    os.mkdir(os.fsencode(tmp_path / "k") + b"/5_caf\xe9")
    save_gray_square(Path(os.fsdecode(os.fsencode(tmp_path / "k") + b"/5_caf\xe9")) / "a.png")
    with pytest.raises(UserError, match=r"5_caf\\xe9 has bytes"):
        scan_folder(tmp_path / "k")


def test_other_encodings_are_named(tmp_path: Path) -> None:
    save_gray_square(tmp_path / "a.png")
    for content, match in (
        ("a TOK".encode("utf-16"), "not UTF-8 text but UTF-16"),
        (b"caf\xe9", "not UTF-8 text .*byte 3"),
    ):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match=match):
            scan_folder(tmp_path)


def test_what_is_no_folder_and_what_is_no_text_is_named(tmp_path: Path) -> None:
    image = save_gray_square(tmp_path / "IMG_0001.png")
    with pytest.raises(UserError, match="is a file, not a folder"):
        scan_folder(image)
    (tmp_path / "meta_lat.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=r"first IMG_0001.png \(meta_lat.json there belongs to no image\); give --data",
    ):
        scan_folder(tmp_path)
    (tmp_path / "IMG_0001.txt").write_bytes(b"a photo\0 of")
    with pytest.raises(UserError, match="zero byte at byte 7"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("IMG_1.json", '{"tags": "a, b"}', r"IMG_1.json has no text, caption, prompt"),
        ("IMG_1.json", "[" * 100_000, "JSON in too many brackets"),
        ("IMG_1.json", '{"text": "\\udc00"}', "half a character"),
        ("metadata.parquet", "PAR1", "metadata.parquet there belongs to no image"),
        ("Metadata.JSONL", "{}", "Metadata.JSONL there belongs to no image"),
    ],
)
def test_texts_that_are_no_captions_are_named_where_captions_are_missing(
    tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    save_gray_square(tmp_path / "IMG_1.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        scan_folder(tmp_path)


def test_a_text_beside_an_image_without_a_caption_is_named(tmp_path: Path) -> None:
    for stem in ("IMG_1", "IMG_2"):
        save_gray_square(tmp_path / f"{stem}.png")
    (tmp_path / "IMG_1.json").write_text('{"text": null, "caption": "of a TOK"}')
    (tmp_path / "IMG_2.json").write_text('{"tags": "x"}')
    with pytest.raises(
        UserError, match=r"1 of 2 images lack .*IMG_2\.png, next to which is IMG_2\.json; add it"
    ):
        scan_folder(tmp_path)
    assert [r.captions for r in scan_folder(tmp_path, caption="a TOK")] == [
        ("of a TOK",),
        ("a TOK",),
    ]


def test_masks_without_images_are_named(tmp_path: Path) -> None:
    for name in ("a.mask.png", "b-masklabel.png"):
        save_gray_square(tmp_path / name)
    with pytest.raises(UserError, match=r"but 2 masks, first a\.mask\.png"):
        scan_folder(tmp_path)


def test_masks_by_index_belong_to_the_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    """lora_pti --use_face_segmentation_condition; a set with a gap belongs to no image."""
    for number, name in enumerate(("kiriko b.png", "kiriko a.jpg")):
        save_gray_square(tmp_path / name)
        save_gray_square(tmp_path / f"{number}.mask.png")
    records = scan_folder(tmp_path, caption="x", masks="file")
    found = {r.path.name: r.mask_path.name for r in records if r.mask_path}
    assert found == {"kiriko a.jpg": "0.mask.png", "kiriko b.png": "1.mask.png"}
    (tmp_path / "1.mask.png").rename(tmp_path / "2.mask.png")
    with pytest.raises(UserError, match=r"\.mask\.png"):
        scan_folder(tmp_path, caption="x", masks="file")
