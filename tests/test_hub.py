"""hub: a dataset becomes a folder once, whole or not at all, and its files keep their bytes.
Offline: every dataset here is a local folder.
"""

import io
import json
import random
import sys

import pytest
import torch
from PIL import Image

from lora_core.data import hub
from lora_core.data.dataset import ImageDataset, ImageSettings, scan_folder
from lora_core.data.hub import export_dataset
from lora_core.errors import UserError

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        hub, "cached_assets_path", lambda *names: tmp_path.joinpath("assets", *names)
    )
    datasets.disable_progress_bars()


def noise(width, height, seed):
    return Image.frombytes(
        "RGB", (width, height), random.Random(seed).randbytes(3 * width * height)
    )


def encoded(image, kind, **settings):
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


@pytest.fixture
def photos(tmp_path):
    """An ImageFolder of a JPEG that lies on its side, a PNG and a BMP, with their texts."""
    folder = tmp_path / "photos"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a.jpg": encoded(noise(16, 8, 0), "JPEG", exif=turned),
        "b.png": encoded(noise(9, 9, 1), "PNG"),
        "c.bmp": encoded(noise(8, 8, 2), "BMP"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows = [
        {"file_name": name, "text": f"a photo of {name[0]}", "tags": f"tag {name[0]}"}
        for name in files
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parquet(folder, **columns):
    """A dataset of one parquet file that holds encoded images, as most of the hub's do."""
    folder.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    return str(folder)


def test_an_image_folder_keeps_its_bytes_and_reads_as_itself(photos, tmp_path):
    out = export_dataset(str(photos), tmp_path / "out")
    files = sorted(p.name for p in out.iterdir())
    assert files == ["000000.jpg", "000001.png", "000002.bmp", "dataset.json", "metadata.jsonl"]
    before, after = scan_folder(photos), scan_folder(out)
    assert [(r.key, r.captions, r.size) for r in after] == [
        (r.key, r.captions, r.size) for r in before
    ] and after[0].size == (16, 8)
    settings = ImageSettings(8, crop="random", flip=True)
    for i in range(3):
        assert torch.equal(
            ImageDataset(before, settings).example(i, 2).pixels,
            ImageDataset(after, settings).example(i, 2).pixels,
        )


def test_parquet_with_encoded_images_other_formats_and_lists_of_captions(tmp_path):
    images = [noise(8, 12, 3), noise(10, 8, 4)]
    cells = [
        {"bytes": encoded(images[0], "WEBP", lossless=True), "path": None},
        {"bytes": encoded(images[1], "TIFF"), "path": None},
    ]
    texts = [["one", "zwei\u2028drei"], ["two"]]
    name = parquet(tmp_path / "data", picture=cells, words=texts, count=[1, 2])
    out = export_dataset(name, tmp_path / "out", image_column="picture", caption_column="words")
    assert (out / "000000.webp").read_bytes() == cells[0]["bytes"]
    assert (
        Image.open(out / "000001.png").tobytes() == images[1].tobytes()
    )  # TIFF is not read by scan, so written as PNG
    assert [r.captions for r in scan_folder(out)] == [tuple(t) for t in texts]


def test_the_first_usual_column_one_caption_for_all_or_a_named_one(photos, tmp_path):
    assert [r.captions for r in scan_folder(export_dataset(str(photos), tmp_path / "1"))] == [
        (f"a photo of {c}",) for c in "abc"
    ]
    named = export_dataset(str(photos), tmp_path / "2", caption_column="tags")
    assert [r.captions for r in scan_folder(named)] == [(f"tag {c}",) for c in "abc"]
    one = export_dataset(str(photos), tmp_path / "3", caption="a TOK")
    assert not (one / "metadata.jsonl").exists() and {
        r.captions for r in scan_folder(one, caption="a TOK")
    } == {("a TOK",)}


def test_empty_captions_of_a_column_fall_back_on_the_caption_that_is_given(tmp_path, capsys):
    """As in train_dreambooth_lora_sdxl.py, where --instance_prompt stands for empty rows of
    --caption_column.
    """
    good = {"bytes": encoded(noise(8, 8, 0), "PNG"), "path": None}
    name = parquet(tmp_path / "data", image=[good] * 4, text=["one", "", None, " "])
    out = export_dataset(name, tmp_path / "out", caption="a TOK", caption_column="text")
    assert [r.captions[0] for r in scan_folder(out, caption="a TOK")] == [
        "one",
        "a TOK",
        "a TOK",
        "a TOK",
    ]
    assert "is not read" not in capsys.readouterr().out
    export_dataset(name, tmp_path / "one", caption="a TOK")
    assert (
        "the column 'text' of" in (said := capsys.readouterr().out)
        and "--data.caption-column text reads it" in said
    )
    with pytest.raises(
        UserError,
        match=r"row 1 of the dataset has '' in 'text', .*in addition to --data.caption-column text",
    ):
        export_dataset(name, tmp_path / "none")
    lists = parquet(tmp_path / "lists", image=[good] * 2, text=[["a", "b"], ["c", ""]])
    with pytest.raises(UserError, match=r"row 1 of the dataset has \['c', ''\]"):
        export_dataset(lists, tmp_path / "none")


def test_a_second_call_does_nothing_until_the_dataset_changes(photos, capsys):
    out = export_dataset(str(photos))
    assert "3 images of" in capsys.readouterr().out and out.parent.name == "photos"
    times = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert (
        export_dataset(str(photos)) == out
        and {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
        and capsys.readouterr().out == ""
    )
    assert export_dataset(str(photos), caption="a TOK") != out  # other settings, another folder
    (photos / "c.bmp").unlink()
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "x"}\n{"file_name": "b.png", "text": "y"}\n'
    )
    assert export_dataset(str(photos)) == out and [r.captions for r in scan_folder(out)] == [
        ("x",),
        ("y",),
    ]
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []


def test_a_broken_row_leaves_nothing_behind(tmp_path):
    good = {"bytes": encoded(noise(8, 8, 0), "PNG"), "path": None}
    for i, (cell, text, match) in enumerate([
        ({"bytes": good["bytes"][:30], "path": None}, "a",
        "row 1 of the dataset has no readable image in 'image'"),
        (None, "a", "row 1 of the dataset has no readable image in 'image' \\(it is empty\\)"),
        ({"bytes": b"<html>", "path": None}, "a", "no image format that is known"),
        (good, "  ", "row 1 of the dataset has '  ' in 'text'"),
        (good, None, "row 1 of the dataset has None in 'text'"),
    ]):  # fmt: skip
        name = parquet(tmp_path / f"data{i}", image=[good, cell], text=["a", text])
        with pytest.raises(UserError, match=match):
            export_dataset(name, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_folder_of_something_else_is_refused_and_an_empty_one_taken(photos, tmp_path):
    with pytest.raises(UserError, match="something else than an exported dataset"):
        export_dataset(str(photos), photos)
    (tmp_path / "out").mkdir()
    export_dataset(str(photos), tmp_path / "out")
    with pytest.raises(
        UserError, match=r"another export \(caption_column 'text'; wanted caption_column 'tags'\)"
    ):
        export_dataset(str(photos), tmp_path / "out", caption_column="tags")


def test_what_is_missing_is_said_in_one_sentence(photos, tmp_path, monkeypatch):
    out, name = tmp_path / "out", str(photos)
    with pytest.raises(
        UserError, match="cannot load split 'train' of the dataset nobody/nothing: "
    ):
        export_dataset("nobody/nothing", out)
    with pytest.raises(
        UserError, match=r"cannot load split 'test' of the dataset .*; check its name"
    ):
        export_dataset(name, out, split="test")
    with pytest.raises(
        UserError, match="no image column 'photo'; its columns are image, text, tags"
    ):
        export_dataset(name, out, image_column="photo")
    with pytest.raises(
        UserError, match="no caption column 'label'; its columns are image, text, tags"
    ):
        export_dataset(name, out, caption_column="label")
    with pytest.raises(UserError, match=r"holds no images|no readable image in 'tags'"):
        export_dataset(name, out, image_column="tags")
    bare = parquet(
        tmp_path / "bare",
        image=[{"bytes": encoded(noise(8, 8, 0), "PNG"), "path": None}],
        label=[3],
    )
    with pytest.raises(
        UserError, match="none of text, caption, prompt; name the caption column with --data"
    ):
        export_dataset(bare, out)
    with pytest.raises(
        UserError, match="row 0 of the dataset has 3 in 'label', expected a caption"
    ):
        export_dataset(bare, out, caption_column="label")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets"):
        export_dataset(name, out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["{outside}/private.png", "private.png", "../outside/private.png"])
def test_a_row_names_no_file_of_this_computer(tmp_path, monkeypatch, name):
    (tmp_path / "outside").mkdir()
    monkeypatch.chdir(tmp_path / "outside")
    noise(8, 8, 0).save("private.png")
    cell = {"bytes": None, "path": name.format(outside=tmp_path / "outside")}
    data = parquet(tmp_path / "data", image=[cell], text=["a face"])
    with pytest.raises(UserError, match="which is no file of the dataset"):
        export_dataset(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
