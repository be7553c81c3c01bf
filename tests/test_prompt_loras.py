"""<lora:NAME:0.7> in the prompts of infer.py draws what --lora draws; prompts without a word."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import infer
from lora_core import formats
from lora_core.formats import embeddings
from models import load_family
from tests.tiny_pipeline import random_state, save_sd_pipeline


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, the LoRA files a, b and dir/c, and the run folder dog with learned tokens."""
    folder = tmp_path_factory.mktemp("tags")
    pipe = save_sd_pipeline(folder / "model")
    layout = load_family(str(folder / "model")).layout
    (folder / "dir").mkdir()
    for seed, name in enumerate(("a.safetensors", "b 2.safetensors", "dir/c.safetensors")):
        state = random_state(pipe, seed=seed)
        formats.save(state, folder / name, format="kohya", layout=layout)
    unet_only = replace(state, components={"unet": state.components["unet"]})
    formats.save(unet_only, folder / "unet.safetensors", format="kohya", layout=layout)
    state.tokens = {"clip_l": torch.ones(1, 16)}
    state.token_names = ("<s0>",)
    state.metadata = embeddings.placeholder_header({"TOK": ("<s0>",)})
    (folder / "dog").mkdir()
    formats.save_run(state, folder / "dog", layout=layout)
    return folder


@pytest.fixture
def inside(stock: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(stock)
    return stock


def draw(*words: str, status: int = 0, out: str = "x.png") -> bytes:
    given = ["--model", "model", "--steps", "2", "--overwrite", "--out", out, *words]
    assert infer.main(given) == status
    return Image.open(out).tobytes() if status == 0 and Path(out).exists() else b""


@pytest.mark.parametrize(
    ("prompt", "loras"),
    [
        ("a cat <lora:a:0.7>", ["a.safetensors:0.7"]),
        ("<lora:a>a cat", ["a.safetensors"]),
        ("a cat<lora:b 2:-0.5><lora:dir/c:0.4>", ["b 2.safetensors:-0.5", "dir/c.safetensors:0.4"]),
        ("a cat <lora:a:0.2:0.9>", ["a.safetensors:unet=0.9,text=0.2"]),
        ("a cat <lora:a.safetensors:te=0.2:unet=1>", ["a.safetensors:text=0.2"]),
        ("a cat <lora:unet:unet=0.4>", ["unet.safetensors:unet=0.4"]),
        ("a cat <lyco:dog:0.3>", ["dog:0.3"]),
    ],
)
def test_a_tag_draws_what_the_flag_draws(inside: Path, prompt: str, loras: list[str]) -> None:
    flags = list(itertools.chain.from_iterable(("--lora", lora) for lora in loras))
    by_flags = draw("--prompt", "a cat", *flags)
    assert draw("--prompt", prompt, out="tag.png") == by_flags != draw("--prompt", "a cat")
    assert infer.main(["--from", "tag.png", "--out", "again.png", "--overwrite"]) == 0
    assert Image.open("again.png").tobytes() == by_flags


def test_tags_join_those_of_the_flag(inside: Path) -> None:
    both = draw("--prompt", "a", "--lora", "a.safetensors:0.3", "--lora", "dir/c.safetensors:0.6")
    assert draw("--prompt", "a<lora:dir/c:0.6>", "--lora", "a.safetensors:0.3") == both
    grid = ["--grid", "lora1.strength=0:1:1"]
    flags = ["--lora", "a.safetensors:0.3", "--lora", "dir/c.safetensors"]
    assert draw("--prompt", "a<lora:dir/c>", *flags[:2], *grid) == draw(
        "--prompt", "a", *flags, *grid
    )


def test_each_line_of_a_file_has_its_own_tags(inside: Path) -> None:
    lines = ["a <lora:a:0.7>", "b", "b <lora:dir/c:0.5>", "c <lora:a:0.2> <lora:dir/c>"]
    Path("prompts.txt").write_text("\n".join(lines))
    draw("--prompts", "prompts.txt", "--count", "2", "--batch", "3", out="many.png")
    for number, line in enumerate(lines):
        for i in range(2):
            alone = draw("--prompt", line, "--seed", str(i), out="one.png")
            many = Image.open(f"many_{2 * number + i:03d}.png").tobytes()
            assert max(abs(x - y) for x, y in zip(many, alone, strict=True)) <= 1, line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "a <lora:nowhere:1>"], "<lora:nowhere> names no file"),
        (["--prompt", "a <lora:a:1> <lora:./a:0.5>"], "named twice"),
        (["--prompt", "a <lora:a:1>", "--lora", "a.safetensors"], "named twice"),
        (["--prompt", "a <lora:a:1:lbw=OUTD>"], "merge.py mix"),
        (["--prompt", "a <lora:a:x>"], "strength 'x'"),
        (["--prompt", "a", "--negative", "<lora:a:1>"], "--negative has a <lora"),
        (["--prompt", "a <lora:unet:0.5:0.7>"], "would have no effect"),
    ],
)
def test_wrong_tags_are_one_sentence(
    inside: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(*words, status=2)
    said = capsys.readouterr().err.strip()
    assert sentence in said and "\n" not in said


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a cat"], "the prompt 'a cat' has none of the learned words: TOK"),
        (["TOKs"], "the prompt 'TOKs' has none"),
        (["a TOK", "a cat", "a dog"], "2 of 3 prompts, first 'a cat', have none"),
        (["a TOK"], ""),
        (["a <s0> b"], ""),
    ],
)
def test_prompts_without_a_learned_word_are_said(
    inside: Path, prompts: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("words.txt").write_text("\n".join(prompts))
    draw("--prompts", "words.txt", "--lora", "dog", out="words.png")
    error = capsys.readouterr().err
    assert said in error if said else "learned words" not in error


def test_a_word_in_a_region_or_the_negative_prompt_is_enough(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "a cat", "--lora", "dog", "--guidance", "2"]
    side = load_family("model").resolution
    draw(*asked, "--region", f"0,0,{side},{side}: a TOK", out="region.png")
    draw(*asked, "--negative", "TOK", out="negative.png")
    assert "learned words" not in capsys.readouterr().err


def test_a_lora_without_tokens_expects_no_word(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw("--prompt", "a cat", "--lora", "a.safetensors")
    assert "learned words" not in capsys.readouterr().err
