"""LoRA tags in prompts, held to A1111's rules for their arguments."""

import pytest

from lora_core.errors import UserError
from lora_core.prompt_tags import LoraTag, find_tagged_file, parse_lora_tag, parse_lora_tags

OUTD = "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0"


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<lora:a>", LoraTag("a")),
        ("<lora:a:0.7>", LoraTag("a", 0.7, 0.7)),
        ("<lyco:a:-.25>", LoraTag("a", -0.25, -0.25)),
        ("<lora:a:0.5:0.7>", LoraTag("a", 0.7, 0.5)),
        ("<lora:a:te=0.5:unet=0.7>", LoraTag("a", 0.7, 0.5)),
        ("<lora:a:te=0.5>", LoraTag("a", 0.5, 0.5)),
        ("<lora:a:unet=0.7>", LoraTag("a", 0.7, 1.0)),
        ("<lora:a:0.3:unet=0.7>", LoraTag("a", 0.7, 0.3)),
        ("<lora:a:0.3:0.7:te=2>", LoraTag("a", 0.7, 2.0)),
        ("<lora:a:0.7:lbw=OUTD>", LoraTag("a", 0.7, 0.7, "OUTD")),
        ("<lora:a:lbw=OUTD:te=0.5>", LoraTag("a", 0.5, 0.5, "OUTD")),
        ("<lora:a:1:1:w=MIDD>", LoraTag("a", 1.0, 1.0, "MIDD")),
        (f"<lora:a:0.7:{OUTD}>", LoraTag("a", 0.7, 0.7, OUTD)),
        (f"<lora:a:1:0.5:lbw={OUTD}>", LoraTag("a", 0.5, 1.0, OUTD)),
        ('<lora:"my lora-v1.2":0.7>', LoraTag("my lora-v1.2", 0.7, 0.7)),
        ("<lora:styles/a_v2.safetensors: 1 >", LoraTag("styles/a_v2.safetensors")),
    ],
)
def test_arguments_mean_what_they_mean_in_a1111(text, tag):
    assert parse_lora_tag(text) == tag


@pytest.mark.parametrize(
    ("text", "rest", "tags"),
    [
        ("a cat", "a cat", []),
        ("a cat <lora:a:0.7>, sharp", "a cat , sharp", [LoraTag("a", 0.7, 0.7)]),
        (
            "<lora:a:0.7><lora:b> a photo of <s0><s1>",
            " a photo of <s0><s1>",
            [LoraTag("a", 0.7, 0.7), LoraTag("b")],
        ),
        ("<lora:> <LORA:a:1> <hypernet:h:1> <lora:a", None, []),
    ],
)
def test_tags_leave_the_rest_of_a_prompt_as_it_is(text, rest, tags):
    assert parse_lora_tags(text) == (text if rest is None else rest, tags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<lora:a:strong>", "'strong', expected a number"),
        ("<lora:a:nan>", "'nan', expected a number"),
        ("<lora:a:te=>", "'', expected a number"),
        ("<lora:a:1:1:4>", "'4', which means nothing"),
        ("<lora:a:1:dyn=4>", "'dyn=4', which means nothing"),
        ("<lora:a:0.5@0.2-1.0>", "only --lora takes; write --lora PATH:0.5@0.2-1.0"),
        ("<lora:a:1:stop=10>", "'stop=10', which means nothing"),
        ("<lora:a:1:OUTD:lbw=MIDD>", "several block weights, MIDD and OUTD"),
        ("<lora: :1>", "names no LoRA"),
    ],
)
def test_a_tag_that_cannot_be_followed_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_lora_tags(f"a cat {text}")


def test_a_name_finds_a_file_with_or_without_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "run", "sub"):
        (tmp_path / folder).mkdir()
    for name in ("a.safetensors", "a.pt", "v1.5.ckpt", "sub/b.safetensors"):
        (tmp_path / name).touch()
    assert find_tagged_file("a") == "a.safetensors"
    assert find_tagged_file("a.pt") == "a.pt"
    assert find_tagged_file("v1.5") == "v1.5.ckpt"
    assert find_tagged_file("sub/b") == "sub/b.safetensors"
    assert find_tagged_file(str(tmp_path / "sub/b")) == str(tmp_path / "sub/b.safetensors")
    assert find_tagged_file("run") == "run"
    assert find_tagged_file("b", "sub") == "sub/b.safetensors"
    with pytest.raises(UserError, match=r"neither c nor c\.safetensors"):
        find_tagged_file("c")
