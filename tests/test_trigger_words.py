"""Trigger words: what a prompt needs for a LoRA to act, in the words of the tools that draw it."""

from pathlib import Path

import pytest

from lora_core.config import Config
from lora_core.data.records import Record
from lora_core.placeholders import Placeholder
from tests.test_configs import put
from training.headers.trigger_words import caption_in_tools, find_trigger, usage_hint

TOK = Placeholder("TOK", ("<s0>", "<s1>"))
CAT = Placeholder("<cat>", ("<c0>",))
LAYERED = Placeholder("TOK", ("<s0>", "<s1>"), layers=2)


def records(*captions: str) -> list[Record]:
    return [
        Record(Path(f"{i}.png"), (text,), None, False, str(i), (8, 8))
        for i, text in enumerate(captions)
    ]


@pytest.mark.parametrize(
    "captions, words, expected",
    [
        (("a photo of TOK", "TOK in a box"), (TOK,), "demo_emb"),
        (("TOK with <cat>",), (TOK, CAT), "demo_emb"),
        (("a photo of TOK",), (LAYERED,), "TOK"),  # of which A1111 reads no file
        (("a photo of TOK", "TOK in a box"), (), "TOK"),  # plain text here
        (("a photo of sks dog",) * 3, (), "a photo of sks dog"),
        (("sks, sitting", "sks, red", "sks"), (), "sks"),
        (("a dog in a box", "a dog on grass"), (), ""),
        (("sks, sitting", "red, sks"), (), ""),
        (("a" * 300,) * 2, (), ""),
    ],
)
def test_the_trigger_is_what_a_prompt_needs(
    captions: tuple[str, ...], words: tuple[Placeholder, ...], expected: str
) -> None:
    own = records(*captions)
    assert find_trigger(Config(), own, words, "demo").words == expected
    config = put(Config(), {"files.trigger": "zib"})
    assert find_trigger(config, own, words, "demo") == ("zib", False)


def test_words_from_captions_are_known_as_such() -> None:
    assert find_trigger(Config(), records("anna", "anna"), (), "demo").is_caption
    assert find_trigger(Config(), records("anna, red", "anna, blue"), (), "demo").is_caption
    assert not find_trigger(Config(), records("TOK anna"), (), "demo").is_caption


def test_the_hint_names_the_file_and_both_spellings() -> None:
    hint = usage_hint((TOK,), "demo-000300")
    assert "TOK of the captions is demo-000300_emb in prompts of A1111" in hint
    assert "embedding:demo-000300_emb in ComfyUI" in hint
    assert "with demo-000300_emb.safetensors among the embeddings" in hint
    assert "lora_core draws" in usage_hint((LAYERED,), "demo") and not usage_hint((), "demo")


def test_captions_are_written_as_a1111_is_prompted() -> None:
    assert caption_in_tools("a TOK and <cat>", (TOK, CAT), "demo") == "a demo_emb and demo_emb"
    assert caption_in_tools("a TOK", (LAYERED,), "demo") == "a TOK"
    assert caption_in_tools("a TOKEN", (TOK,), "demo") == "a TOKEN"
