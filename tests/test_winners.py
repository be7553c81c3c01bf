"""The table of winners: what a measurement replaces, damaged files, and what made each row."""

from __future__ import annotations

import json

import pytest

from lora_core.kernels import OPS, choice, winners
from tests.conftest import measured_rows


def test_stored_rows_replace_those_of_their_class_and_keep_the_others(winners_file):
    choice.store_winners(
        winners_file,
        "cpu",
        measured_rows(("a", "float32", "x", "fused"), ("a", "float32", "y", "fused")),
    )
    choice.store_winners(winners_file, "cpu", measured_rows(("a", "float32", "x", "reference")))
    choice.store_winners(winners_file, "A GPU", measured_rows(("a", "float32", "x", "triton")))
    tables = winners.read_winners(winners_file)
    assert tables["cpu"].rows == {("a", "float32"): {"x": "reference", "y": "fused"}}
    assert tables["A GPU"].rows == {("a", "float32"): {"x": "triton"}}
    assert json.loads(winners_file.read_text())["devices"]["cpu"]["command"] == "a test"


def table_of(cpu: dict) -> str:
    return json.dumps({"format": winners.FORMAT, "devices": {"cpu": cpu}})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "another", "devices": {}}',
        table_of({"rows": [{"op": "a"}]}),
        table_of(measured_rows(("a", "float32", "*", "quickest"))),
    ],
)
def test_a_damaged_or_foreign_cache_is_ignored_in_one_sentence_and_never_written_over(
    winners_file, content
):
    winners_file.parent.mkdir()
    winners_file.write_text(content)
    with pytest.warns(UserWarning, match="winners.json") as said:
        choice.reload_winners()
    assert len(said) == 1 and "delete it" in str(said[0].message)
    op = OPS["lora_linear"]
    assert choice.choose_winner("lora_linear", op, op.example()) in winners.BACKENDS
    with pytest.raises(ValueError, match=r"winners.json"):
        choice.store_winners(winners_file, "cpu", measured_rows())
    assert winners_file.read_text() == content


def test_the_committed_table_says_what_made_it():
    devices = json.loads(winners.COMMITTED.read_text())["devices"]
    for device, table in devices.items():
        assert table["rows"], device
        assert "estimated" in table or all(table[key] for key in ("command", "date", "machine")), (
            device
        )
    assert {row["op"] for row in devices["cpu"]["rows"]} <= set(OPS)
