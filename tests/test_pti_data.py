"""Images, captions and tokens of lora_pti's command line."""

from pathlib import Path

import pytest

from lora_core.config import Config
from lora_core.data.captions import TEMPLATES
from training.translation.lora_pti import translate_lora_pti
from training.translation.pti_data import ENCODER


def config_of(folder: Path, *words: str) -> Config:
    return translate_lora_pti([str(folder), "model", "out", *words]).config


@pytest.mark.parametrize(
    "template, mode, count", [("object", "object", 27), ("style", "style", 19), ("null", "one", 1)]
)
def test_templates_have_their_sentences_with_all_tokens(
    photos: Path, template: str, mode: str, count: int
) -> None:
    config = config_of(photos, f"--use_template={template}", "--placeholder_tokens=<a>|<b>")
    assert (config.data.captions, config.data.caption) == (mode, "<a><b>")
    assert len(TEMPLATES.get(mode, ("{}",))) == count
    assert config.tokens.encoders == (ENCODER,) and config.tokens.vectors == 2


def test_the_word_of_the_captions_is_dummy_where_they_have_it(photos: Path, tmp_path: Path) -> None:
    """lora_pti replaces DUMMY by the tokens; captions may also have the tokens themselves."""
    named = tmp_path / "named"
    named.mkdir()
    (named / "a DUMMY in a garden.png").write_bytes((photos / "0.png").read_bytes())
    assert config_of(named, "--placeholder_tokens=<a>").tokens.words == ("DUMMY",)
    assert config_of(photos, "--placeholder_tokens=<a>").tokens.words == ("<a>",)
    words = ("--placeholder_tokens=<a>|<b>", "--placeholder_token_at_data=<krk>|<a><b>")
    assert config_of(photos, *words).tokens.words == ("<krk>",)
    assert config_of(photos, *words, "--use_template=style").tokens.words == ("<a><b>",)


def test_initializers_are_joined_for_the_vectors_of_one_word(photos: Path) -> None:
    words = ("--placeholder_tokens=<a>|<b>", "--initializer_tokens=<rand-0.5>|woman")
    assert config_of(photos, *words).tokens.init == ("<rand-0.5>+woman",)
    random = config_of(photos, "--placeholder_tokens=<a>|<b>").tokens.init
    assert random == ("<rand-0.017>+<rand-0.017>",)


def test_latents_are_cached_unless_holes_are_drawn(photos: Path) -> None:
    assert config_of(photos).data.variants == 1
    assert config_of(photos, "--cached_latents=False").data.variants == 0
    assert config_of(photos, "--train_inpainting").data.variants == 0
