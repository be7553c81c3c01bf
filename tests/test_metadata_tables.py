"""metadata_tables: rows of JSON and CSV tables, and rows whose image is not there.

tests/test_captions.py has the errors of bad tables.
"""

import json
from pathlib import Path

import pytest

from lora_core.data.dataset import find_unused_files, scan_folder
from lora_core.data.metadata_tables import read_image_table, read_metadata
from lora_core.errors import UserError
from tests.image_examples import save_gray_square


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


def test_a_line_of_caption_txt_is_that_of_the_image_with_its_number(tmp_path: Path) -> None:
    """As lora_ppim writes it; in the order of names image 10 would have line 2."""
    for number in range(11):
        save_gray_square(tmp_path / f"{number}.src.jpg", number)
        save_gray_square(tmp_path / f"{number}.mask.png", number)
    table = tmp_path / "caption.txt"
    table.write_text("".join(f"the text {number}\n" for number in range(11)))
    records = scan_folder(tmp_path, masks="file")
    found = {record.path.name: record.captions for record in records}
    assert found == {f"{number}.src.jpg": (f"the text {number}",) for number in range(11)}
    assert not find_unused_files(tmp_path, records)
    table.write_text("the text 0\n\n")
    with pytest.raises(UserError, match=r"no text in its line 2, the caption of 1\.src\.jpg"):
        scan_folder(tmp_path)
    (tmp_path / "other.jpg").write_bytes((tmp_path / "0.src.jpg").read_bytes())
    assert {r.captions for r in scan_folder(tmp_path, caption="x")} == {("x",)}  # not such a folder
