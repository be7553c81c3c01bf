"""The grammar of python-fire: the values are what fire 0.7 gave for the same words."""

from typing import Any

import pytest

from lora_core.errors import UserError
from lora_core.flags.fire_words import REQUIRED, parse_fire_words

DEFAULTS: dict[str, Any] = {
    "folder": REQUIRED,
    "model": REQUIRED,
    "out": "o",
    "train_text_encoder": True,
    "steps": 1000,
    "lr": 1e-4,
    "use_template": None,
    "clip": True,
    "rank": 4,
}
CASES = [  # words after "D M" -> what they set
    ("", {}),
    ("--train-text-encoder", {"train_text_encoder": True}),
    ("O", {"out": "O"}),
    ("--notrain_text_encoder", {"train_text_encoder": False}),
    ("--lr 1e-3 --clip False", {"lr": 1e-3, "clip": False}),
    ("--clip --rank=1", {"clip": True, "rank": 1}),
    ("--use_template=style --steps -1", {"use_template": "style", "steps": -1}),
    ("-l=3", {"lr": 3.0}),
    ("-r 2", {"rank": 2}),
    ("--use_template", {"use_template": True}),
    ("--use_template=None", {"use_template": None}),
    ("--noclip --lr=.5", {"clip": False, "lr": 0.5}),
    ("--use_template=[a,b]", {"use_template": ["a", "b"]}),
    ("--out=12", {"out": "12"}),  # a text, where fire gives the number
]


@pytest.mark.parametrize("words, expected", CASES)
def test_words_mean_what_fire_makes_of_them(words: str, expected: dict[str, Any]) -> None:
    given = parse_fire_words(["D", "M", *words.split()], DEFAULTS, "command")
    assert given == {"folder": "D", "model": "M"} | expected


def test_words_without_a_flag_fill_what_no_flag_sets() -> None:
    given = parse_fire_words(["--model=M", "D", "O", "False"], DEFAULTS, "command")
    assert given == {"folder": "D", "model": "M", "out": "O", "train_text_encoder": False}


@pytest.mark.parametrize(
    "words, said",
    [
        (["D"], "needs --model"),
        (["D", "M", "--clip", "O"], "--clip of command is 'O', expected True or False"),
        (["D", "M", "--rank=1.5"], "--rank of command is '1.5', expected a whole number"),
        (["D", "M", "--lr=fast"], "--lr of command is 'fast', expected a number"),
        (["D", "M", "--step=1"], "no flag --step; the nearest is --steps"),
        (["D", "M", "--learning_rate=1"], "no flag --learning_rate; see command --help"),
    ],
)
def test_other_words_are_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_fire_words(words, DEFAULTS, "command")


def test_a_word_too_many_is_an_error() -> None:
    with pytest.raises(UserError, match="command has no place for 'c'; leave it out"):
        parse_fire_words(["a", "b", "c"], {"folder": REQUIRED, "model": REQUIRED}, "command")
