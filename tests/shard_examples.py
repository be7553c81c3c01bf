"""Shards of a few small images for tests: tar files, parquet, Arrow, and the folder of the same."""

import io
import json
import tarfile
from pathlib import Path

from tests.image_examples import noise_image


def encoded(seed: int, kind: str = "PNG", side: int = 12) -> bytes:
    content = io.BytesIO()
    noise_image(side + 2 * (seed % 3), side, seed).save(content, kind)
    return content.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def image_members(numbers: range) -> dict[str, bytes]:
    """PNG files with a caption each, as text and, for odd numbers, in two lines."""
    members: dict[str, bytes] = {}
    for i in numbers:
        members[f"{i:04d}.png"] = encoded(i)
        more = f"\na second text {i}" if i % 2 else ""
        members[f"{i:04d}.txt"] = f" a photo of TOK {i} {more}".encode()
    return members


def write_shards(folder: Path, count: int = 10, shards: int = 2) -> Path:
    size = count // shards
    for k in range(shards):
        write_tar(folder / f"{k:03d}.tar", image_members(range(k * size, (k + 1) * size)))
    return folder


def write_folder(folder: Path, count: int = 10) -> Path:
    """The folder that extracting `write_shards` gives."""
    folder.mkdir(parents=True)
    for name, content in image_members(range(count)).items():
        (folder / name).write_bytes(content)
    return folder


def table(count: int = 10):
    """A dataset of encoded images with a text each, as the hub has them."""
    import datasets

    datasets.disable_progress_bars()
    columns = {
        "image": [
            {"bytes": encoded(i, "JPEG" if i % 2 else "PNG"), "path": None} for i in range(count)
        ],
        "text": [f"a photo of TOK {i}" for i in range(count)],
    }
    features = {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_parquet(folder: Path, count: int = 10, group: int = 3) -> Path:
    """Two parquet files whose groups of rows are small."""
    folder.mkdir(parents=True)
    whole = table(count)
    for k, rows in enumerate((range(count // 2), range(count // 2, count))):
        file = folder / f"train-{k:05d}-of-00002.parquet"
        whole.select(rows).to_parquet(str(file), batch_size=group)
    return folder


def write_image_folder(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encoded(i))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a photo of TOK {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder
