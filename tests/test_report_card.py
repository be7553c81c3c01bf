"""Sections of a model card: the code of a card that a run writes, and what is left out."""

import re

from lora_core.runs.card import ModelCard, write_card
from lora_core.runs.report_card import Block, Words, card_sections, describe_files
from models import read_layout
from tests.test_card import leave


def test_the_code_of_a_card_is_shown_as_it_is(model, tmp_path) -> None:
    run = leave(tmp_path / "my run", read_layout(str(model)), rows={"clip_l": 16})
    card = ModelCard(str(model), "StableDiffusionPipeline", {"text_encoder": "clip_l"},
                     words={"TOK": ("<s0>", "<s1>")}, prompts=("a `TOK` | b",),
                     training={"steps": 10})  # fmt: skip
    text = write_card(card, run).read_text()
    sections = {section.title: section.blocks for section in card_sections(text)}
    assert list(sections) == ["Trigger words", "Files", "diffusers", "A1111", "ComfyUI"]
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert [b.code for b in sections["diffusers"] if b.kind == "code"] == [code]
    rows = [block.cells for block in sections["Trigger words"] if block.kind == "row"]
    assert rows[1] == ((Words("TOK", True),), (Words("<s0><s1>", True),))
    names = [block.cells[0][0].text for block in sections["Files"]]
    assert names[0].startswith("pytorch_lora_weights.safetensors: LoRA")


def test_files_are_described(model, tmp_path) -> None:
    run = leave(tmp_path / "mine", read_layout(str(model)))
    text = write_card(ModelCard(str(model), "StableDiffusionPipeline"), run).read_text()
    found = describe_files(text)
    assert found["pytorch_lora_weights.safetensors"] == (
        Words("LoRA under diffusers' names", False),
    )
    assert describe_files("## Files\n\n- x\n- `y`: z\n") == {}


def test_lines_are_items_rows_and_paragraphs() -> None:
    table = "|a|b|\n|---|---|\n|`m \\| n`|k|\n"
    card = f"# a\n\nhead\n\n## b\n\n- [x](y): `` p`q `` z\n\n*text* `c`\n\n{table}"
    (section,) = card_sections(f"{card}\n## Training\n\nno\n\n## empty\n")
    assert section.title == "b"
    assert section.blocks == (
        Block("item", cells=((Words("x: ", False), Words("p`q", True), Words(" z", False)),)),
        Block("text", cells=((Words("text ", False), Words("c", True)),)),
        Block("row", cells=((Words("a", False),), (Words("b", False),))),
        Block("row", cells=((Words("m | n", True),), (Words("k", False),))),
    )


def test_unclosed_code_and_no_card() -> None:
    (section,) = card_sections("## a\n```python\nx = 1\n")
    assert section.blocks == (Block("code", "x = 1\n"),)
    assert card_sections("") == card_sections("---\ntags: x\n---\n") == []
