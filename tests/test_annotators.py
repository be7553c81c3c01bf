"""The words of --data.prepare name the models that write captions and masks."""

import pytest

from lora_core.errors import UserError
from training.inputs.annotators import WEIGHTS, Annotator, parse_annotators


def test_words_name_a_kind_its_weights_and_what_to_look_for() -> None:
    found = parse_annotators(["clipseg@a/b:a red hat: old", "florence"])
    assert found.captions == Annotator("florence", WEIGHTS["florence"])
    assert found.masks == Annotator("clipseg", "a/b", "a red hat: old")
    assert parse_annotators(["face@models/owl"]) == (None, Annotator("face", "models/owl"))


def test_without_words_it_is_what_lora_ppim_does() -> None:
    found = parse_annotators([])
    assert found.captions == Annotator("blip", "Salesforce/blip-image-captioning-large")
    assert found.masks == Annotator("clipseg", "CIDAS/clipseg-rd64-refined", "")


@pytest.mark.parametrize("word", ["", "sam", "blip@", "blip:a", "clipseg:", "face:a", "Blip"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="expected blip or florence for captions"):
        parse_annotators([word])
