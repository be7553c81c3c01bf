"""JSON objects and lines that others wrote: the fields, or one sentence."""

import json

import pytest

from lora_core.errors import UserError
from lora_core.json_files import INTEGER, NUMBER, TEXT, parse_object, read_object, read_rows
from lora_core.text import DEEPEST_JSON, LONGEST_NAME, nearest_names, shorten_value
from tests.refusals import sentence

FIELDS = {"step": INTEGER, "loss": NUMBER, "key": TEXT}
ROW = {"step": 3, "loss": 0.5, "key": "a", "more": [1]}


def test_what_json_writes_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [ROW, ROW | {"key": "\u2028 \x85"}, ROW | {"loss": 3}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert list(read_rows(path, "", FIELDS)) == rows
    path.write_text(json.dumps(ROW))
    assert read_object(path, "", FIELDS) == ROW


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 1.0}, "1.0 as step, expected an integer"),
        ({"step": True}, "True as step"),
        ({"step": 2**64}, "as step, expected an integer"),
        ({"loss": float("nan")}, "nan as loss, expected a number"),
        ({"loss": 1e200}, "1e+200 as loss"),
        ({"key": ["a"] * 1000}, "as key, expected a text"),
        ({"key": None}, "None as key"),
    ],
)
def test_a_field_of_another_type_is_named(change, said):
    text = json.dumps(ROW | change)
    found = sentence(parse_object, text, "line 7", "remove it", FIELDS)
    assert found.startswith("line 7 has") and said in found and found.endswith("remove it")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"step"', "9" * 5000, "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000]
)
def test_what_is_no_object_is_refused(text):
    assert sentence(parse_object, text, "it", "remove it").endswith("remove it")


def test_brackets_are_counted_not_their_number():
    wide = json.dumps({"a": [[]] * 10_000})
    assert len(parse_object(wide, "it", "")["a"]) == 10_000
    for depth, refused in ((DEEPEST_JSON - 1, False), (DEEPEST_JSON + 1, True)):
        text = '{"a":' + "[" * depth + "]" * depth + "}"
        if refused:
            assert "too many brackets" in sentence(parse_object, text, "it", "")
        else:
            parse_object(text, "it", "")


def test_a_value_is_quoted_in_a_line():
    nest: list = []
    for _ in range(200):
        nest = [nest, nest]
    assert len(shorten_value(nest)) <= 80
    assert shorten_value(10**10_000) == "a very long int"
    assert shorten_value("a\nb") == r"'a\nb'"
    assert len(str(UserError("x" * 10**6))) < 2_100


def test_nearest_names_of_long_names():
    assert nearest_names("step", ["steps", "seed"]) == ["steps"]
    assert nearest_names("lora", ["format", "base"]) == []
    long = "a" * 10**6
    assert nearest_names(long, [long + "b"]) == [long + "b"]
    assert nearest_names("b" * LONGEST_NAME, [long], cutoff=0.5) == []
