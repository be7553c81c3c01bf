"""summary: the lines before a training, from records alone."""

import io
import os
import sys
from pathlib import Path

import pytest

from lora_core.data import dataset
from lora_core.data.dataset import ImageDataset, ImageSettings, scan_folder
from lora_core.placeholders import make_placeholders
from lora_core.text import print_escaped
from tests.image_examples import save_gray_square, save_kohya_folders
from training.run_summary import RunLength, describe_run


def told(
    folder: Path,
    *,
    words: tuple[str, ...] = (),
    prior: ImageDataset | None = None,
    length: RunLength | None = None,
    **how: object,
) -> list[str]:
    records = scan_folder(folder, **how)  # type: ignore[arg-type]
    made = ImageDataset(records, ImageSettings(8))
    text = describe_run(
        made,
        prior,
        make_placeholders(words) if words else (),
        length or RunLength(10, 2, 3),
        dataset.find_unused_files(folder, records),
    )
    text.encode()  # can be printed
    return text.splitlines()


def test_everything_that_was_read_is_said_with_numbers(tmp_path: Path) -> None:
    for i in range(4):
        save_gray_square(tmp_path / f"{i}.png", i)
    save_gray_square(tmp_path / "2.mask.png")
    for i, text in enumerate(["a TOK", "", "the TOK\nmy TOK"]):
        (tmp_path / f"{i}.txt").write_text(text)
    for name in "abcde":
        (tmp_path / f"{name}.svg").write_bytes(b"x")
    prior = ImageDataset(
        scan_folder(
            save_gray_square(tmp_path / "class" / "c.png").parent,
            captions="one",
            caption="a dog",
            is_prior=True,
        ),
        ImageSettings(8),
    )
    lines = told(tmp_path, words=("TOK",), prior=prior, masks="auto", caption="photo of TOK")
    assert lines == [
        f"images: 4 in {tmp_path}, 8 x 8 pixels",
        "captions: 2 from .txt files, 2 from --data.caption, where an image has no text of its own",
        "  as trained: 'a <s0><s1>' (0.png)",
        "masks: 1 of 4 images have one",
        f"class images: 1 in {tmp_path / 'class'}, 'a dog'",
        "tokens: TOK is <s0><s1>",
        "training: 10 steps of 6 images (2 x 3), 15 epochs of 4",
        "left out, images in formats that are not read (save them as JPEG or PNG): "
        "a.svg, b.svg, c.svg and 2 more",
        "left out, sub-folders: class/ (1 image)",
        "left out, empty texts: 1.txt",
    ]


def test_repeats_of_folders_and_names_that_are_no_utf8_are_said(tmp_path: Path) -> None:
    root = save_kohya_folders(tmp_path / "img")
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    save_gray_square(Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")) / "0.png")
    lines = told(root)
    assert (
        lines[0]
        == f"images: 3 in {root}, 23 with repeats (10_ohwx dog x 10, 3_TOK x 3), 8 x 8 pixels"
    )
    assert lines[1] == "captions: 2 from the folder's name, 1 from .caption files"
    assert lines[-1] == "left out, sub-folders: caf\\xe9/ (1 image)"
    assert lines[-2] == "training: 10 steps of 6 images (2 x 3), 2.61 epochs of 23"


def test_it_is_printed_whatever_the_terminal_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (
        ("ascii", "caf\\xe9 \\u732b \\xe9"),
        ("cp1252", "café \\u732b \\xe9"),
        ("utf-8", "café 猫 \\xe9"),
    ):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        print_escaped("café 猫 \udce9")
        stdout.flush()
        written = stdout.buffer.getvalue()  # type: ignore[attr-defined]
        assert written.decode(encoding) == shown + "\n"


def test_an_epoch_of_buckets_is_all_of_their_batches(tmp_path: Path) -> None:
    for i in range(3):
        save_gray_square(tmp_path / f"{i}.png", i)
    records = scan_folder(tmp_path, caption="x")
    folder = ImageDataset(records, ImageSettings(64, buckets=True))
    assert "20 steps of 2 images, 10 epochs of 3" in describe_run(
        folder, None, (), RunLength(20, 2, 1), {}
    )


def test_images_that_a_table_leaves_out_are_counted_in_their_folder(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        save_gray_square(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "in/a.png", "text": "x"}')
    assert told(tmp_path)[-1] == f"left out, sub-folders: {tmp_path / 'in'}/ (2 images)"
