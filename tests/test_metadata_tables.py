"""metadata_tables: rows of JSON and CSV tables, and rows whose image is not there.

tests/test_captions.py has the errors of bad tables.
"""

import json
from pathlib import Path

import pytest

from lora_core.data.metadata_tables import read_image_table, read_metadata
from lora_core.errors import UserError


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_without_their_image_are_collected_where_that_is_asked_for(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "a.png").touch()
    rows = [("a.png", "one"), ("gone.png", "two"), ("a.png", "three"), ("a.txt", "four")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    if kind == "csv":
        lines = ["file_name,text", *(",".join(row) for row in rows)]
    table = tmp_path / f"metadata.{kind}"
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"names gone.png, which is not an image"):
        read_metadata(table)
    missing: dict[Path, str] = {}
    assert read_metadata(table, missing=missing) == {tmp_path / "a.png": ("one", "three")}
    assert [path.name for path in missing] == ["gone.png", "a.txt"]
    assert all("names it" in reason for reason in missing.values())
    both = read_image_table(table, ("file_name", "file_name"), missing={})
    assert list(both) == [(tmp_path / "a.png",) * 2]
