"""streams: a run on shards is the run on the folder that they would be extracted or exported to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from lora_core.config import Config
from lora_core.data import hub
from lora_core.data.captions import CaptionMode
from lora_core.data.dataset import ImageDataset, ImageSettings, iterate_batches, scan_folder
from lora_core.data.image_checks import ImageChecks
from lora_core.data.records import Record
from lora_core.data.shards.streams import StreamOptions, find_shards, scan_stream
from lora_core.errors import UserError
from lora_core.toml import read_toml
from tests.conftest import learned, merged, rows, same
from tests.image_examples import WILD, save_gray_square, save_image
from tests.shard_examples import (
    encoded,
    table,
    write_folder,
    write_image_folder,
    write_parquet,
    write_shards,
    write_tar,
)

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        hub, "cached_assets_path", lambda *names: tmp_path.joinpath("assets", *names)
    )


def stream(name: Path | str, checks: ImageChecks | None = None, **options) -> list[Record]:
    return scan_stream(str(name), StreamOptions(**options), checks or ImageChecks())


def contents(records: list[Record]) -> list[tuple]:
    return [(r.key, r.captions, r.size, r.use_alpha) for r in records]


# ---------------------------------------------------------------- the same order as a folder


def batches(records: list[Record], settings: ImageSettings, batch: int, **how: Any) -> list[tuple]:
    found = iterate_batches(
        ImageDataset(records, settings, seed=3), batch=batch, seed=3, **{"stop": 8, **how}
    )
    return [(b.pixels, b.captions, b.keys, b.visits) for b in found]


def equal(a: list[tuple], b: list[tuple]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and x[1:] == y[1:] for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("settings", [WILD, replace(WILD, buckets=True, bucket_step=4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_batches_of_tar_shards_are_those_of_the_extracted_folder(
    tmp_path: Path, settings: ImageSettings, batch: int
) -> None:
    """At any batch size, number of threads, number of shards and resume point."""
    folder = scan_folder(write_folder(tmp_path / "folder"), captions="txt")
    whole = batches(folder, settings, batch)
    for shards in (1, 2, 5):
        name = write_shards(tmp_path / str(shards), shards=shards)
        records = stream(f"{name}/{{000..00{shards - 1}}}.tar")
        assert contents(records) == contents(folder)
        assert equal(batches(records, settings, batch), whole)
        assert equal(batches(records, settings, batch, workers=3), whole)
        assert equal(batches(records, settings, batch, start=5), whole[5:])
    if batch == 3:  # of two processes, the second one's images
        share = slice(1, None, 2)
        other = batches(folder, settings, batch, share=share)
        assert equal(batches(records, settings, batch, share=share), other)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "one file", "images"])
def test_rows_of_tables_are_those_of_the_export(tmp_path: Path, kind: str) -> None:
    """Of an Arrow folder, which `load_dataset` does not take, that of the same table's parquet."""
    name = exportable = tmp_path / "data"
    if kind == "images":
        write_image_folder(name)
    elif kind == "parquet":
        write_parquet(name)
    else:
        exportable = write_parquet(tmp_path / "parquet")
        table().save_to_disk(str(name))
    streamed = str(next(name.glob("*.arrow"))) if kind == "one file" else str(name)
    records = stream(streamed)
    exported = scan_folder(hub.export_dataset(str(exportable), tmp_path / "out"))
    assert contents(records) == contents(exported) and len(records) > 5
    assert equal(batches(records, WILD, 3), batches(exported, WILD, 3))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_curve_of_a_run_is_that_of_the_folder(
    config: Config, quick: None, tmp_path: Path, kind: str
) -> None:
    """To the bit, with validation; of tar shards with buckets, class images and other validation
    images as well.
    """
    data = {"images": "", "streaming": True, "crop": "random", "flip": True}
    if kind == "tar":
        write_shards(tmp_path / "shards")
        folder = {**data, "streaming": False, "images": str(write_folder(tmp_path / "folder"))}
        data["dataset"] = str(tmp_path / "shards")
        others = {"images": config.data.images}
        config = merged(config, {"prior": {"prompt": "a cat", "count": 1, **others}})
        config = merged(config, {"validation": others})
        for options in (data, folder):
            options |= {"buckets": True, "bucket_step": 4}
    else:
        data["dataset"] = str(write_parquet(tmp_path / "tables"))
        folder = {**data, "streaming": False}
    one = train.train(merged(config, {"data": folder}))
    other = merged(config, {"data": data, "save_every": 1, "out": config.out + "2"})
    two = train.train(other)
    for name in ("metrics", "val"):
        assert [{**row, "seconds": 0} for row in losses(one, name)] == losses(two, name)
    assert same(learned(one), learned(two))
    assert read_toml(two / "config.toml").data.streaming


def losses(run: Path, name: str) -> list[dict]:
    kept = ("step", "loss", "key", "t", "draw")
    return [{**{k: row[k] for k in kept if k in row}, "seconds": 0} for row in rows(run, name)]


def test_a_resumed_run_on_shards_is_the_uninterrupted_one(
    config: Config, quick: None, tmp_path: Path
) -> None:
    name = str(write_shards(tmp_path / "shards"))
    config = merged(config, {"data": {"images": "", "dataset": name, "streaming": True}})
    config = replace(config, save_every=1, stages=(replace(config.stages[0], steps=3),))
    whole = train.train(config)
    part = replace(config, out=config.out + "2", stages=(replace(config.stages[0], steps=1),))
    train.train(part)
    resumed = train.train(replace(part, stages=config.stages, resume=True))
    assert same(learned(whole), learned(resumed))


# ---------------------------------------------------------------- captions and masks


def test_captions_of_tar_shards(tmp_path: Path) -> None:
    members = {
        "a.jpg": encoded(0, "JPEG"), "a.json": b'{"caption": "from json"}', "a.cls": b"7",
        "sub/b.c.png": encoded(1), "sub/b.txt": "gr\u00fcn".encode(),
        "d.png": encoded(2), "d.txt": b" \n",
    }  # fmt: skip
    name = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"d.png of .* has no caption; give --data.caption"):
        stream(name)
    found = stream(name, caption="a TOK", caption_column="txt")
    assert [r.captions for r in found] == [("a TOK",), ("gr\u00fcn",), ("a TOK",)]
    assert [r.path.name for r in found] == ["a.jpg", "b.c.png", "d.png"]
    found = stream(name, caption="a TOK", caption_column="json")
    assert [r.captions[0] for r in found] == ["from json", "a TOK", "a TOK"]
    assert {r.captions for r in stream(name, caption="a TOK")} == {("a TOK",)}
    assert len(stream(name, captions="object", caption="TOK")[0].captions) == 27
    assert [r.path.name for r in stream(name, caption="x", image_column="jpg")] == ["a.jpg"]


def test_captions_that_have_no_use_or_cannot_be_read_are_refused(tmp_path: Path) -> None:
    name = write_shards(tmp_path / "shards")
    with pytest.raises(UserError, match="has no use, because every image"):
        stream(name, caption="a TOK", caption_column="txt")
    modes: tuple[CaptionMode, ...] = ("filename", "metadata")
    for mode in modes:
        with pytest.raises(UserError, match=f"--data.captions {mode} reads a folder of images"):
            stream(name, captions=mode)
    with pytest.raises(UserError, match="need the caption"):
        stream(name, captions="object")
    with pytest.raises(UserError, match=r"--data.caption-column txt has no effect with"):
        stream(name, captions="one", caption="x", caption_column="txt")


def test_masks_are_members_and_alpha_channels(tmp_path: Path) -> None:
    save_gray_square(tmp_path / "mask.png")
    save_image(Image.new("RGB", (8, 8), "red"), tmp_path / "image.png")
    members = {
        "a.png": (tmp_path / "image.png").read_bytes(),
        "a.mask.png": (tmp_path / "mask.png").read_bytes(),
        "b.png": encoded(1),
    }
    name = write_tar(tmp_path / "a.tar", members)
    whole = write_tar(tmp_path / "b.tar", dict(list(members.items())[:2]))
    (tmp_path / "folder").mkdir()
    for member, content in list(members.items())[:2]:
        (tmp_path / "folder" / member).write_bytes(content)
    one = {"captions": "one", "caption": "TOK"}
    assert [r.has_mask for r in stream(name, masks="auto", **one)] == [True, False]
    assert [r.has_mask for r in stream(name, **one)] == [False, False]
    with pytest.raises(UserError, match=r"b.png has no mask; add NAME.mask.png to the shard"):
        stream(name, masks="file", **one)
    ours = stream(whole, masks="file", **one)
    folder = scan_folder(tmp_path / "folder", masks="file", captions="one", caption="TOK")
    assert contents(ours) == contents(folder)
    mask = ImageDataset(ours, ImageSettings(8)).example(0, 0).mask
    assert torch.equal(mask, ImageDataset(folder, ImageSettings(8)).example(0, 0).mask)
    with pytest.raises(UserError, match=r"--data.masks file looks for NAME.mask.png"):
        stream(write_parquet(tmp_path / "tables"), masks="file")


# ---------------------------------------------------------------- refusals


def test_what_is_no_dataset_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no user/name; of a dataset of the hub, download"):
        find_shards("user/name", "train")
    with pytest.raises(UserError, match=r"there is no .*002.tar"):
        find_shards(f"{write_shards(tmp_path / 'a')}/{{000..002}}.tar", "train")
    with pytest.raises(UserError, match=r"there is no file .*\*.tar"):
        find_shards(str(tmp_path / "*.tar"), "train")
    with pytest.raises(UserError, match=r"--data.split test has no effect on"):
        find_shards(str(tmp_path / "a"), "test")
    with pytest.raises(UserError, match="cannot find split 'test' of the dataset"):
        find_shards(str(write_parquet(tmp_path / "tables")), "test")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"reads files that are all .tar, .parquet or .arrow"):
        find_shards(str(tmp_path / "a.txt"), "train")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"is a dataset of .csv; --data.streaming reads"):
        find_shards(str(tmp_path / "csv"), "train")
    photos = write_image_folder(tmp_path / "photos")
    with pytest.raises(UserError, match="no image column 'photo'"):
        stream(photos, image_column="photo")
    (photos / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(UserError, match=r"cannot read the image .*gone.png"):
        stream(photos)
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", ')
    with pytest.raises(UserError, match=r"cannot read the dataset .*photos .*--data.images"):
        stream(photos)
    write_tar(tmp_path / "empty.tar", {"a.txt": b"x"})
    with pytest.raises(UserError, match="no images in"):
        stream(tmp_path / "empty.tar")


def test_rows_without_an_image_or_a_caption_are_named_or_left_out(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    )
    cells = [{"bytes": encoded(0), "path": None}, None, {"bytes": b"<html>", "path": None}]
    own = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]}, features=features)
    (tmp_path / "t").mkdir()
    own.to_parquet(str(tmp_path / "t" / "train.parquet"))
    own.save_to_disk(str(tmp_path / "arrow"))
    for name in (tmp_path / "t", tmp_path / "arrow"):
        with pytest.raises(UserError, match="row 1 of the dataset has no image in 'image'"):
            stream(name)
        checks = ImageChecks(skips=True)
        assert [r.captions for r in stream(name, checks)] == [("a",)]
        assert list(checks.left_out.values()) == [
            "row 1 of the dataset has no image in 'image'; remove it",
            "no image format that is known",
        ]
    with pytest.raises(UserError, match="no image column 'photo'; its columns are image, text"):
        stream(tmp_path / "t", image_column="photo")
    with pytest.raises(UserError, match="holds string and no encoded images"):
        stream(tmp_path / "t", image_column="text", caption_column="text")


def test_options_that_cannot_be_with_shards_are_refused(config: Config, tmp_path: Path) -> None:
    name = str(write_shards(tmp_path / "shards"))
    for data, sentence in (
        ({"streaming": True}, "--data.streaming has no effect without --data.dataset"),
        ({"images": "", "dataset": name, "streaming": True, "masks": "clipseg:x"}, "clipseg:x"),
        ({"images": "", "dataset": name, "streaming": True, "pairs": "x"}, "--data.pairs x pairs"),
    ):
        with pytest.raises(UserError, match=sentence):
            train.train(merged(config, {"data": data}))
    assert not Path(config.out).exists()
