"""stored_files: a piece of a larger file is read by its place, and a missing one is named."""

from pathlib import Path

import pytest

from lora_core.data.images import read_image
from lora_core.data.shards.stored_files import StoredCell, StoredFile, path_of
from lora_core.errors import UserError
from lora_core.text import read_lines
from tests.shard_examples import encoded, write_parquet


def test_a_piece_of_a_file_is_read_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(b"abc one\ntwo def")
    piece = StoredFile(tmp_path / "whole" / "a.txt", tmp_path / "whole", 4, 7)
    assert piece.read_bytes() == piece.open("rb").read() == b"one\ntwo"
    assert read_lines(piece) == ["one", "two"] and piece.suffix == ".txt"
    assert str(piece) == str(path_of(piece)) and path_of(tmp_path) == tmp_path


def test_a_larger_file_that_is_gone_or_cut_is_named(tmp_path: Path) -> None:
    content = encoded(0)
    (tmp_path / "whole").write_bytes(content)
    piece = StoredFile(tmp_path / "whole" / "a.png", tmp_path / "whole", 0, len(content))
    assert read_image(piece).original_size == (12, 12)
    (tmp_path / "whole").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"cannot read the image .*a.png .*ends at byte"):
        read_image(piece)
    (tmp_path / "whole").unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*a.png .*No such file"):
        read_image(piece)


def test_a_cell_is_read_from_its_group_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    file = sorted(write_parquet(tmp_path / "t", count=10, group=2).glob("*.parquet"))[1]
    cell = StoredCell(tmp_path / "000008", file, "image", 1, 1)
    assert cell.read_bytes() == encoded(8)
    assert cell.suffix == "" and str(cell) == str(tmp_path / "000008")
    file.unlink()
    with pytest.raises(UserError, match="No such file"):
        read_image(cell)
