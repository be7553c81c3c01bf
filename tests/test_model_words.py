"""The placeholder words of a model folder: written, joined with earlier ones, read back."""

import json
from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.formats.model_words import WORDS_FILE, model_placeholders, write_model_words
from lora_core.placeholders import Placeholder

TOK = Placeholder("TOK", ("<s0>", "<s1>"))
LAYERED = Placeholder("<cat>", ("<n0>", "<n1>", "<n2>", "<n3>"), layers=2)


def test_words_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    assert model_placeholders(tmp_path) == ()
    write_model_words(tmp_path, ())
    assert not (tmp_path / WORDS_FILE).exists()
    write_model_words(tmp_path, [TOK])
    write_model_words(tmp_path, [LAYERED])
    assert model_placeholders(tmp_path) == (TOK, LAYERED)
    assert model_placeholders("a/hub-id") == ()


@pytest.mark.parametrize(
    "content",
    [
        {"placeholders": ["TOK"]},
        {"placeholders": {"TOK": "<s0>"}},
        {"placeholders": {"TOK": [1]}},
        {"placeholders": {"TOK": ["<s0>"]}, "placeholder_layers": {"TOK": 3}},
        {"placeholders": {"TOK": ["<s0>"]}, "placeholder_layers": 3},
    ],
)
def test_another_content_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / WORDS_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="placeholder"):
        model_placeholders(tmp_path)
