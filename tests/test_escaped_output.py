"""What files of strangers hold reaches the terminal escaped, whatever command prints it."""

import io
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import infer
import train
from lora_core.errors import exit_status
from lora_core.escaped_output import EscapedStream, escape_controls
from lora_core.runs.image_recipe import CHUNK
from lora_core.runs.pictures import save_png
from tests.merge_commands import call

DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
EVIL = {
    "title": "\x1b]0;owned\x07",
    "erase": "\x1b[2J\x1b[1;1H",
    "one byte": "\x9b31m",
    "reversed": "\u202egpj.exe\u2066",
    "typed back": "\x05\x1b[6n\x90",
    "bell and back": "ok\x08\x08\x07\x7f",
}


def harmful(text: str) -> list[str]:
    """The characters that Unicode calls controls, or that change the order of others."""
    found = []
    for character in text:
        is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        if is_control or unicodedata.bidirectional(character) in DIRECTIONS:
            found.append(character)
    return found


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    both = capsys.readouterr()
    assert not harmful(both.out + both.err), both
    return both.out + both.err


@pytest.fixture(params=EVIL.values(), ids=list(EVIL))
def evil(request: pytest.FixtureRequest) -> str:
    return request.param


def test_headers_tokens_and_words(
    here: Path, evil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {f"W{evil}": [f"<s{evil}>"]}
    header = {
        "author": evil,
        evil: "x",
        "lora_core.token_names": json.dumps([f"<s{evil}>"]),
        "lora_core.placeholders": json.dumps(words),
        "lora_core.merge": json.dumps(
            {"command": evil, "options": {"sum": evil}, "inputs": {evil: evil}}
        ),
    }
    save_file(load_file("a.safetensors"), "evil.safetensors", header)
    call("info", "evil.safetensors", "--model", "base")
    assert escape_controls(evil) in printed(capsys)


def test_what_is_quoted_stays_in_its_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "x\nwritten: important.safetensors"
    header = {
        "author": forged,
        "lora_core.merge": json.dumps(
            {"command": forged, "options": {"sum": forged}, "inputs": {forged: forged}}
        ),
    }
    save_file(load_file("a.safetensors"), "evil.safetensors", header)
    call("info", "evil.safetensors", "--model", "base")
    call("redo", "evil.safetensors", status=2)
    save_png(Image.new("RGB", (8, 8)), here / "s.png", {CHUNK: json.dumps({"prompt": forged})})
    infer.main(["--from", str(here / "s.png")])
    both = capsys.readouterr()
    assert r"x\nwritten" in both.out and r"x\nwritten" in both.err
    assert not [line for line in both.out.splitlines() if line.startswith("written")]


def test_keys(here: Path, evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file("a.safetensors") | {f"unet.{evil}.to_q.lora_A.weight": torch.ones(2, 2)}
    save_file(tensors, "keys.safetensors")
    for words in (("info",), ("convert", "--to", "kohya", "k.safetensors")):
        path = ("keys.safetensors", *words[3:])
        call(words[0], *path, *words[1:3], "--model", "base", status=2)
        assert escape_controls(evil) in printed(capsys)
    call("info", "keys.safetensors", "--model", "base", "--allow-extra")
    assert escape_controls(evil) in printed(capsys)


def test_names_of_files(here: Path, evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{evil}.safetensors"
    save_file(load_file("a.safetensors"), name)
    call("convert", name, f"b{name}", "--to", "kohya", "--model", "base")
    assert escape_controls(f"b{name}") in printed(capsys)
    call("info", f"no{name}", status=2)
    printed(capsys)


def test_recipes_of_images(tmp_path: Path, evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("prompt", "model", "out"):
        recipe = {"prompt": "a", option: evil}
        save_png(Image.new("RGB", (8, 8)), tmp_path / "s.png", {CHUNK: json.dumps(recipe)})
        assert infer.main(["--from", str(tmp_path / "s.png")]) == 2
        assert escape_controls(evil) in printed(capsys)


def test_captions_and_names_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    evil = "".join(EVIL.values())
    Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / f"{evil}.png")
    (tmp_path / f"{evil}.txt").write_text(f"a photo {evil}")
    (tmp_path / f"{evil}.jxl").write_text("x")
    words = ["--model", str(model), "--data.images", str(tmp_path), "--out", str(tmp_path / "o")]
    quick = ["--stages.0.steps", "1", "--samples.steps", "1", "--samples.guidance", "1"]
    small = ["--data.resolution", "16", "--validation.every", "-1", "--device", "cpu"]
    assert train.main([*words, *quick, *small, "--adapter.rank", "2"]) == 0
    said = printed(capsys)
    assert "left out" in said and escape_controls(evil) in said


def test_logs_and_lines_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        handler = logging.StreamHandler()
        logger = logging.getLogger("test_escaped_output")
        logger.addHandler(handler)
        logger.warning("a log with %s", EVIL["title"])
        logger.removeHandler(handler)
        sys.stdout.writelines([f"a line with {EVIL['reversed']}\n"])

    assert exit_status(run) == 0
    both = capsys.readouterr()
    assert not harmful(both.out + both.err)
    assert r"\x1b" in both.err and r"\u202e" in both.out


def test_progress_bars_are_drawn_as_they_are() -> None:
    drawn = []
    for escaped in (False, True):
        stream = io.StringIO()
        file = EscapedStream(stream) if escaped else stream
        bar = {"file": file, "mininterval": 0, "bar_format": "{desc} {n_fmt}/{total_fmt}"}
        for _ in tqdm(range(2), desc="outer", **bar):
            for _ in tqdm(range(2), desc="inner", position=1, **bar):
                pass
        drawn.append(stream.getvalue())
    assert drawn[0] == drawn[1] and "\x1b[A" in drawn[0] and "\r" in drawn[0]


def test_streams_are_restored_and_write_what_they_can_encode() -> None:
    before = sys.stdout, sys.stderr
    assert exit_status(lambda: print("\N{SNOWMAN}")) == 0
    assert before == (sys.stdout, sys.stderr)
    raw = io.BytesIO()
    latin = io.TextIOWrapper(raw, encoding="latin-1", write_through=True)
    print("caf\xe9 \N{SNOWMAN} \udce9 \ud83d\tx", file=EscapedStream(latin))
    assert raw.getvalue() == b"caf\xe9 \\u2603 \\xe9 \\ud83d\tx\n"
