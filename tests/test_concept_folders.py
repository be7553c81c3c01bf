"""Mix-of-Show's layout of training data: folders and lists of concepts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_core.data.records import find_unused_files, scan_folder
from lora_core.errors import UserError


def concept(folder: Path, count: int = 2, *, captions: int = 2, masks: int = 2) -> Path:
    """count images, named 01, 02 ..., with as many captions and masks."""
    for name in ("image", "caption", "mask"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        shade = 10 * i + len(folder.name)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / "image" / f"{i:02d}.jpg")
        if i < captions:
            (folder / "caption" / f"{i:02d}.txt").write_text(f"a photo of {folder.name} {i}\n")
        if i < masks:
            mask = Image.new("L", (8, 8))
            mask.paste(255, (0, 0, 4, 8))
            mask.save(folder / "mask" / f"{i:02d}.png")
    return folder


def rows(folder: Path, **options) -> list[tuple[str, str, str]]:
    found = []
    for record in scan_folder(folder, **options):
        mask = "" if record.mask_path is None else str(record.mask_path.relative_to(folder))
        found.append((str(record.path.relative_to(folder)), record.captions[0], mask))
    return found


def test_a_concept_is_image_caption_and_mask(tmp_path: Path) -> None:
    folder = concept(tmp_path / "dog")
    (folder / "caption" / "99.txt").write_text("of no image")
    assert rows(folder, masks="file") == [
        ("image/00.jpg", "a photo of dog 0", "mask/00.png"),
        ("image/01.jpg", "a photo of dog 1", "mask/01.png"),
    ]
    unused = find_unused_files(folder, scan_folder(folder, masks="file"))
    assert [path.name for path in unused["texts of no image"]] == ["99.txt"]


def test_several_concepts_lie_in_one_folder(tmp_path: Path) -> None:
    concept(tmp_path / "dog"), concept(tmp_path / "cat", masks=1)
    found = rows(tmp_path, masks="auto")
    assert [(name, mask) for name, _, mask in found] == [
        ("cat/image/00.jpg", "cat/mask/00.png"),
        ("cat/image/01.jpg", ""),
        ("dog/image/00.jpg", "dog/mask/00.png"),
        ("dog/image/01.jpg", "dog/mask/01.png"),
    ]


def write_list(file: Path, *concepts: dict) -> Path:
    file.write_text(json.dumps(list(concepts)))
    return file


def test_a_list_of_concepts_names_folders_and_a_caption(tmp_path: Path) -> None:
    """hermione.json of Mix-of-Show; its folders lie next to the file."""
    concept(tmp_path / "data" / "dog", captions=1)
    concept(tmp_path / "cat")
    file = write_list(
        tmp_path / "two.json",
        {
            "instance_prompt": "a photo of TOK",
            "instance_data_dir": "data/dog/image",
            "caption_dir": "data/dog/caption",
            "mask_dir": "data/dog/mask",
        },
        {"instance_prompt": "a CAT", "instance_data_dir": "cat/image"},
    )
    captions = [record.captions[0] for record in scan_folder(file)]
    assert captions == ["a photo of dog 0", "a photo of TOK", "a CAT", "a CAT"]
    masks = [record.mask_path for record in scan_folder(file, masks="auto")]
    assert [mask and mask.name for mask in masks] == ["00.png", "01.png", None, None]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", r"is \{\}; expected a list of concepts"),
        ("[1]", "concept 1 of .* is 1, expected an object with instance_data_dir"),
        (
            '[{"instance_data_dir": "nowhere"}]',
            "instance_data_dir of .*'nowhere', which is no fold",
        ),
        ('[{"instance_data_dir": "dog/caption"}]', "has no images that can be read"),
        ('[{"instance_data_dir": "dog/image", "mask_dir": 3}]', "mask_dir of .* is 3, which is no"),
        (
            '[{"instance_data_dir": "dog/image", "instance_promt": "TOK"}]',
            "concept 1 of .* has 'instance_promt', which means nothing here; the nearest is "
            "instance_prompt of",
        ),
        ("[", "two.json"),
    ],
)
def test_wrong_lists_are_one_sentence(tmp_path: Path, content: str, said: str) -> None:
    concept(tmp_path / "dog")
    (tmp_path / "two.json").write_text(content)
    with pytest.raises(UserError, match=said):
        scan_folder(tmp_path / "two.json")


def test_masks_of_no_image_and_other_files_are_refused(tmp_path: Path) -> None:
    folder = concept(tmp_path / "dog")
    Image.new("L", (8, 8)).save(folder / "mask" / "07.png")
    with pytest.raises(UserError, match=r"07\.png belongs to no image"):
        scan_folder(folder, masks="auto")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(UserError, match="is a file, not a folder"):
        scan_folder(tmp_path / "x.txt")
