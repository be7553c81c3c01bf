"""table_shards: the places of images in parquet and Arrow files hold what datasets reads."""

from pathlib import Path

import pytest

from lora_core.data.shards.stored_files import StoredFile
from lora_core.data.shards.table_shards import list_table_rows, table_columns
from lora_core.errors import UserError
from tests.shard_examples import table, write_parquet

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")


def expected(count: int) -> list[tuple[bytes, str]]:
    return [(row["image"]["bytes"], row["text"]) for row in table(count)]


@pytest.mark.parametrize("group", [1, 3, 100])
def test_rows_of_parquet_are_those_of_datasets(tmp_path: Path, group: int) -> None:
    files = sorted(write_parquet(tmp_path / "t", count=11, group=group).glob("*.parquet"))
    assert table_columns(files[0]) == ["image", "text"]
    rows = list(list_table_rows(files, "image", "text"))
    assert [(row.image.read_bytes(), row.texts) for row in rows if row.image] == expected(11)
    assert [row.image.path.name for row in rows if row.image][-1] == "000010"


@pytest.mark.parametrize("sliced", [False, True])
def test_images_of_an_arrow_file_are_pieces_of_it(tmp_path: Path, sliced: bool) -> None:
    """Of `save_to_disk`, whose batches may begin within a larger array."""
    own = table(11).select(range(4, 11)) if sliced else table(11)
    own.save_to_disk(str(tmp_path / "t"), num_shards=2)
    files = sorted((tmp_path / "t").glob("*.arrow"))
    assert table_columns(files[0]) == ["image", "text"]
    rows = list(list_table_rows(files, "image", "text"))
    wanted = expected(11)[4 if sliced else 0 :]
    assert [(row.image.read_bytes(), row.texts) for row in rows if row.image] == wanted
    assert all(isinstance(row.image, StoredFile) for row in rows)


def test_without_a_caption_column_none_is_read(tmp_path: Path) -> None:
    (file, _) = sorted(write_parquet(tmp_path / "t").glob("*.parquet"))
    assert [row.texts for row in list_table_rows([file], "image", "")] == [None] * 5


def test_tables_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    import pyarrow

    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"x" * 100)
        with pytest.raises(UserError, match=rf"cannot read the shard .*{name} "):
            table_columns(tmp_path / name)
        with pytest.raises(UserError, match=rf"cannot read the shard .*{name} "):
            list(list_table_rows([tmp_path / name], "image", ""))
    columns = pyarrow.table({"image": [b"abc" * 1000], "text": ["x"]})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_file(str(tmp_path / "z.arrow"), columns.schema, options=options) as file:
        file.write_table(columns)
    with pytest.raises(UserError, match=r"z.arrow is compressed, so that no image can be read"):
        list(list_table_rows([tmp_path / "z.arrow"], "image", "text"))
